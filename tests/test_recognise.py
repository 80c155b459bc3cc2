"""Activations and gates of unknown classes, recognised by what they do: torchvision's and users' networks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from networks import EXACT, images
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from timm_paf import convert_activations, create_paf
from timm_paf.activations import PAF, ChannelPAF
from timm_paf.sharing import SharedActivation

SIZE = {'input_size': (3, 32, 32)}


def module(forward: Callable[..., Tensor], name: str = 'Mine', /, **parts: nn.Module | nn.Parameter) -> nn.Module:
    """An object of a new class of a user's."""
    found = type(name, (nn.Module,), {'forward': forward})()
    for key, part in parts.items():
        setattr(found, key, part)
    return found


class Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * F.softplus(x).tanh()


@torch.jit.script
def scripted(x):
    return x * torch.sigmoid(x)


OWN = {
    'a formula': ('silu', lambda: module(lambda self, x: x * torch.sigmoid(x))),
    'a function': ('relu', lambda: module(lambda self, x: F.relu(x))),
    'in place': ('relu', lambda: module(lambda self, x: x.clamp_(min=0))),
    'of torch script': ('silu', lambda: module(lambda self, x: scripted(x))),
    'of autograd': ('mish', lambda: module(lambda self, x: Mish.apply(x))),
    'with a slope': ('leaky_relu', lambda: module(lambda self, x: torch.where(x > 0, x, 0.2 * x))),
    'with a parameter': ('silu', lambda: module(
        lambda self, x: x * torch.sigmoid(self.beta * x), beta=nn.Parameter(torch.ones(())))),
    'with a sigmoid': ('silu', lambda: module(lambda self, x: x * self.gate(x), gate=nn.Sigmoid())),
    'with a hard sigmoid': ('hard_swish', lambda: module(lambda self, x: x * self.sigmoid(x), sigmoid=module(
        lambda self, x: self.relu(x + 3) / 6, relu=nn.ReLU6()))),
    'of a known class': ('gelu', lambda: type('MyGELU', (nn.GELU,), {})('tanh')),
}


def network(act: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), act(), nn.Linear(6, 4)).eval()


@pytest.mark.parametrize('kind', OWN)
def test_a_users_activation_is_replaced_as_what_it_computes(kind: str) -> None:
    act, create = OWN[kind]
    model, x, random = network(create), images(), torch.random.get_rng_state()
    theirs = {'relu': nn.ReLU(), 'silu': nn.SiLU(), 'mish': nn.Mish(), 'leaky_relu': nn.LeakyReLU(0.2),
              'hard_swish': nn.Hardswish(), 'gelu': nn.GELU('tanh')}
    expected = network(lambda: theirs[act])(x)
    torch.testing.assert_close(model(x), expected)  # so it does compute that
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        done = convert_activations(copy.deepcopy(model), 'psilu', 'channel', **SIZE)
    assert done.replaced == {'2': act, '5': act, '9': act}
    assert (done.left, done.unknown, done.out_of_reach, done.pafs) == ({}, {}, {}, 3)
    twin = copy.deepcopy(model)
    assert len(convert_activations(twin, 'pssilu', replace=act, **SIZE).replaced) == 3
    other = network(lambda: SharedActivation(create_paf('pssilu')))
    torch.testing.assert_close(twin(x), other(x), **EXACT)
    assert torch.equal(torch.random.get_rng_state(), random)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match=r'replace has Yours; expected some of relu, .*, or classes of Sequential'):
        convert_activations(model, 'pssilu', replace='Yours', **SIZE)
    if kind != 'of a known class':
        assert set(convert_activations(model, 'pssilu', replace='Mine', **SIZE).replaced.values()) == {'Mine'}


UNKNOWN = {
    'a snake': lambda: module(lambda self, x: x + torch.sin(x) ** 2),
    'a value per channel': lambda: module(
        lambda self, x: x.clamp(min=0) - self.slope.view(-1, *[1] * (x.ndim - 2)) * (-x).clamp(min=0).square(),
        slope=nn.Parameter(torch.ones(8))),
    'rounding': lambda: module(lambda self, x: torch.round(x * 16) / 16 + 0.5 * torch.sign(x)),
    'more than the activation in it': lambda: module(lambda self, x: 1.7 * self.act(x) + x / 9, act=nn.ReLU()),
}


@pytest.mark.parametrize('kind', UNKNOWN)
def test_another_nonlinear_function_stays_and_is_reported(kind: str) -> None:
    act = UNKNOWN[kind]()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
    with pytest.warns(UserWarning, match=r'0 left; 1 of unknown classes, which replace can name: 1 \(Mine\)$'):
        done = convert_activations(model, 'psilu', **SIZE)
    assert (done.replaced, done.unknown) == ({'3': 'relu'}, {'1': 'Mine'})
    assert model[1] is act
    assert not any(isinstance(part, PAF) for part in act.modules())
    done = convert_activations(model, 'psilu', replace=('Mine', 'psilu'), **SIZE)
    assert done.replaced == {'1': 'Mine', '3': 'psilu'}
    alone = nn.Sequential(nn.Conv2d(3, 8, 3), act)
    with pytest.raises(ValueError, match=r'no activation module to replace: 1 are left \(Mine\), 0 are function calls'):
        convert_activations(alone, 'psilu', **SIZE)


OTHERS = {
    'linear': lambda: module(lambda self, x: 3 * x + 1),
    'softmax': lambda: module(lambda self, x: torch.softmax(x, 1)),
    'normalised': lambda: module(lambda self, x: ((x - x.mean()) / x.std()).clamp(min=0)),
    'dropout': lambda: module(lambda self, x: F.dropout(x, 0.5, self.training)),
    'noise': lambda: module(lambda self, x: (x + torch.randn_like(x)).sigmoid() * x),
    'a pooling': lambda: nn.MaxPool2d(3, 1, 1),
    'a batch norm': lambda: type('Norm', (nn.BatchNorm2d,), {})(8),
    'another shape': lambda: module(lambda self, x: x[:, :4] * x[:, 4:].sigmoid()),
    'a sigmoid': lambda: module(lambda self, x: torch.sigmoid(x)),
    'a hard sigmoid': lambda: module(lambda self, x: F.relu6(x + 3) / 6),
    'only these values': lambda: module(lambda self, x: x.sin() if x.abs().max() < 8 else 1 / 0),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_what_is_no_activation_is_not_counted(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), OTHERS[kind](), nn.Conv2d(4 if kind == 'another shape' else 8, 8, 3),
                          nn.ReLU())
    done = convert_activations(model, 'psilu', **SIZE)
    assert (done.replaced, done.unknown, done.out_of_reach) == ({'3': 'relu'}, {}, {})
    assert done.left == ({'1 (Mine: relu6)': 'function call in a gate'} if kind == 'a hard sigmoid' else {})


def test_a_sigmoid_is_replaced_if_it_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh())
    with pytest.raises(ValueError, match='no activation module to replace: 0 are left'):
        convert_activations(model, 'psilu', **SIZE)
    assert convert_activations(model, 'psilu', replace='Tanh', **SIZE).replaced == {'1': 'Tanh', '3': 'Tanh'}


# ---- gates


@pytest.mark.parametrize('size', [32, 64])  # at 32 the last features are of 1 x 1, as what is pooled
@pytest.mark.parametrize('name', ['mobilenet_v3_small', 'efficientnet_b0', 'regnet_y_400mf'])
def test_gates_of_torchvision_stay_unless_asked_for(name: str, size: int) -> None:
    model = torchvision.models.get_model(name)
    gates = {f'{path}.activation' for path, part in model.named_modules() if isinstance(part, SqueezeExcitation)}
    acts = {path for path, part in model.named_modules() if isinstance(part, nn.ReLU | nn.SiLU | nn.Hardswish)}
    assert gates < acts
    done = convert_activations(model, 'pssilu', input_size=(3, size, size))
    assert done.left.keys() == gates
    assert set(done.left.values()) == {'silu in a gate' if name == 'efficientnet_b0' else 'relu in a gate'}
    assert done.replaced.keys() == acts - gates
    assert (done.unknown, done.out_of_reach) == ({}, {})
    done = convert_activations(model, 'psilu', gates=True, input_size=(3, size, size))
    assert done.replaced.keys() == acts


@pytest.mark.parametrize('name', ['seresnet50', 'mobilenetv3_small_100', 'efficientnet_b0', 'regnety_002', 'skresnet18',
                                  'ghostnet_100', 'tresnet_m', 'nf_regnet_b0'])
def test_gates_are_found_without_their_names(name: str) -> None:
    """Those that the table of timm's classes knows, once their classes have other names."""
    model = timm.create_model(name)
    left = convert_activations(copy.deepcopy(model), 'pssilu', **SIZE).left
    assert left
    for part in list(model.modules()):
        if 'SE' in type(part).__name__ or type(part).__name__ in ('SqueezeExcite', 'SelectiveKernelAttn'):
            part.__class__ = type('Renamed', (type(part),), {})
    assert convert_activations(model, 'pssilu', **SIZE).left == left


def squeeze(self: nn.Module, x: Tensor) -> Tensor:
    return x * self.two(self.act(self.one(x.mean((2, 3), keepdim=True)))).sigmoid()


def test_gates_of_a_user() -> None:
    def gate(act: nn.Module) -> nn.Module:
        return module(squeeze, one=nn.Conv2d(8, 4, 1), act=act, two=nn.Conv2d(4, 8, 1))

    shared = nn.ReLU()
    calls = module(lambda self, x: x.mul(
        F.hardsigmoid(self.two(F.relu(self.one(F.adaptive_avg_pool2d(x, 1).flatten(1)))))[..., None, None]),
        one=nn.Linear(8, 4), two=nn.Linear(4, 8))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), gate(nn.ReLU()), gate(OWN['a formula'][1]()), gate(UNKNOWN['a snake']()), calls,
        nn.Conv2d(8, 8, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Mish(),
        nn.Linear(8, 2)).eval()
    done = convert_activations(copy.deepcopy(model), 'pssilu', 'layer', **SIZE)
    assert done.replaced == {'1': 'relu', '7': 'silu', '11': 'mish'}  # the head is pooled, but it is no gate
    assert done.left == {'2.act': 'relu in a gate', '3.act': 'silu in a gate', '4.act': 'Mine in a gate',
                         '5 (Mine: relu)': 'function call in a gate'}
    assert (done.unknown, done.out_of_reach) == ({}, {})
    model[1] = model[2].act = shared
    done = convert_activations(copy.deepcopy(model), 'pssilu', 'layer', **SIZE)
    assert {done.left['1'], done.left['2.act']} == {'relu in a gate and outside of one'}
    done = convert_activations(model, 'pssilu', 'layer', gates=True, replace=('relu', 'silu'), **SIZE)
    assert list(done.replaced) == ['1', '2.act', '3.act', '7']


def test_a_gate_of_each_pixel_is_no_squeeze() -> None:
    """Nothing is pooled in a gated linear unit: its activation acts on features. A sigmoid's parts are a sigmoid's."""
    hard = OWN['with a hard sigmoid'][1]().sigmoid
    model = nn.Sequential(nn.Conv2d(3, 8, 3), module(
        lambda self, x: self.one(x) * self.act(self.two(x)) * self.gate(x),
        one=nn.Conv2d(8, 8, 1), two=nn.Conv2d(8, 8, 1), act=nn.GELU(), gate=hard))
    done = convert_activations(model, 'pssilu', **SIZE)
    assert done.replaced == {'1.act': 'gelu'}
    assert done.left == {'1.gate.relu': 'relu6 in a gate'}


def test_a_plain_network_of_a_user() -> None:
    """Replaced, kept and counted, and the values per channel have the channels' number."""
    model = module(
        lambda self, x: self.head(self.pool(F.elu(self.act(self.conv(x)))).flatten(1)), 'Net', conv=nn.Conv2d(3, 5, 3),
        act=OWN['with a hard sigmoid'][1](), pool=nn.AdaptiveAvgPool2d(2), head=nn.Linear(20, 2))
    with pytest.warns(UserWarning, match=r'1 out of reach, being function calls: the model itself \(Net: elu\)'):
        done = convert_activations(model, 'pssilu', 'channel', **SIZE)
    assert done.replaced == {'act': 'hard_swish'}
    assert isinstance(model.act.act, ChannelPAF)
    assert model.act.act.alpha.shape == (5,)


def test_calls_are_counted_and_those_of_pafs_are_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.paf = nn.Conv2d(3, 4, 1), nn.ReLU(), create_paf('prelu_plus')

        def forward(self, x: Tensor) -> Tensor:
            x = self.paf(self.act(self.conv(x)))  # PReLU+ calls relu
            return nn.functional.silu(torch.relu(x)).relu_() * torch.sigmoid(x)

    with pytest.warns(UserWarning, match='3 out of reach'):
        done = convert_activations(Net(), 'prelu_plus', **SIZE)
    assert done.replaced == {'act': 'relu', 'paf': 'prelu_plus'}
    assert done.out_of_reach == {f'the model itself (Net: {name})': 1 for name in ('relu', 'silu', 'relu_')}


class Excited(nn.Module):
    """Squeeze-and-excite whose product is written in another way."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product
        self.stem, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.reduce, self.gate_act, self.expand = nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.product(x, self.expand(self.gate_act(self.reduce(x.mean((2, 3))))).sigmoid()).mean((2, 3))


@pytest.mark.parametrize('product', [
    lambda x, gate: x * gate[:, :, None, None], lambda x, gate: torch.einsum('bchw,bc->bchw', x, gate),
    lambda x, gate: torch.addcmul(torch.zeros_like(x), x, gate[:, :, None, None])])
def test_a_gate_may_multiply_in_any_way(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Excited(product)
    found = convert_activations(model, 'pssilu', input_size=(3, 16, 16))
    assert isinstance(model.gate_act, nn.ReLU)
    assert not isinstance(model.act, nn.ReLU)
    assert str(found).startswith('1 activations replaced by 1 pssilu, 1 left')
