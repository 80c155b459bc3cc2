"""ResNets with the ImageNet stem, and timm's weights as their start; PAF names as ``act_layer`` of timm's models."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from networks import EXACT, images, paf_keys, pafs, randomise
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import timm_paf
from timm_paf import activations
from timm_paf.activations import PAF
from timm_paf.models.resnet_imagenet import weights_from_timm
from timm_paf.starts import STARTS
from timm_paf.weights import load_checkpoint, open_weights

ARCHS = ['resnet18_in', 'resnet34_in', 'resnet50_in', 'wide_resnet50_2_in']
SMALL = {'layers': (1, 1, 1, 1), 'channels': (8, 16, 24, 32), 'num_classes': 11}
ALL = timm_paf.list_pafs(plain=True)
IS_RELU = ['relu', 'prelu', 'prelu_plus', 'pelu', 'reblu']


def small(arch: str = 'resnet18_in', act: str = 'pssilu', seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(timm.create_model(f'{arch}_{act}', **{**SMALL, **kwargs})).eval()


def normalised(
        x: Tensor, mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN, std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
) -> Tensor:
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.fixture(scope='module')
def theirs() -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model('resnet18', zero_init_last=False, num_classes=1000)).eval()


@pytest.fixture(scope='module')
def timm_file(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('timm') / 'resnet18.safetensors'
    safetensors.torch.save_file(theirs.state_dict(), path)
    return str(path)


# ---- the networks


def test_every_arch_with_every_activation_is_registered() -> None:
    names = {f'{arch}_{act}' for arch in ARCHS for act in ALL}
    with_weights = {w.plain_name for w in timm_paf.list_weights('*_in_*') if w.model in names}
    assert set(timm.list_models(module='resnet_imagenet')) == names | with_weights
    assert 'resnet50_in_relu_imagenet_linf' in with_weights
    for name in names:
        cfg = timm.models.get_pretrained_cfg(name)
        assert (cfg.input_size, cfg.num_classes, cfg.mean, cfg.std) == ((3, 224, 224), 1000, (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize('arch', ARCHS)
def test_timms_architecture_with_one_activation(arch: str) -> None:
    theirs = timm.create_model(arch.removesuffix('_in'))
    for act, extra in {'relu': 0, 'ssilu': 0, 'psilu': 1, 'pssilu': 2}.items():
        model = timm.create_model(f'{arch}_{act}', device='meta', dtype=torch.float64)
        shapes = {k: v.shape for k, v in model.state_dict().items() if k != 'conv1.mean' and not k.startswith('act.')}
        assert list(shapes.items()) == [(k, v.shape) for k, v in theirs.state_dict().items()]
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters()) + extra
        assert all(t.is_meta and t.dtype == torch.float64 for t in [*model.parameters(), model.conv1.mean])
        assert len({id(p) for p in pafs(model)}) == int(act in timm_paf.list_pafs())
        # its own, under which it is saved, and timm's ReLUs
        assert len(pafs(model)) in (0, 1 + sum(isinstance(m, nn.ReLU) for m in theirs.modules()))


@pytest.mark.parametrize('arch', ['resnet18_in', 'resnet50_in'])
def test_one_activation_in_files_copies_averages_and_gradients(arch: str, tmp_path: Path) -> None:
    model, other, x = small(arch), small(arch, seed=1), images(size=(64, 64))
    state = model.state_dict()
    assert paf_keys(state) == ['act.alpha', 'act.beta'] == list(timm_paf.paf_parameters(model))
    safetensors.torch.save_file(state, tmp_path / 'model.safetensors')
    other.load_state_dict(safetensors.torch.load_file(tmp_path / 'model.safetensors'), strict=True)
    wrapped = small(arch, seed=2, features_only=True)
    wrapped.load_state_dict({f'model.{k}': v for k, v in state.items()}, strict=False)
    final, every = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), **EXACT)
    torch.testing.assert_close(wrapped(x), every, **EXACT)
    assert [64 // f.shape[-1] for f in every] == [2, 4, 8, 16, 32]
    for twin in (other, copy.deepcopy(model), ModelEmaV3(model).module, copy.deepcopy(model).double()):
        assert {id(p) for p in pafs(twin)} == {id(twin.act)}
        torch.testing.assert_close(twin(x.to(twin.fc.weight.dtype)).float(), model(x), rtol=1e-4, atol=1e-4)
    model.train()(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    ema = ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        model.act.alpha.add_(1)
        ema.update(model)
    assert ema.module.act.alpha.item() == pytest.approx(1.37 + 0.25)


def test_arguments() -> None:
    for wrong in ({'no_such': 1}, {'act_kwargs': {'gamma': 1.0}}):
        with pytest.raises(TypeError, match=r'no_such|gamma'):
            small(**wrong)
    with pytest.raises(ValueError, match=r"'mish'.*pssilu"):
        small(act_layer='mish')
    model = small(in_chans=1, drop_path_rate=0.1, output_stride=16)
    assert model.forward_features(images(chans=1, size=(64, 64))).shape == (2, 32, 4, 4)
    model.reset_classifier(0, '')
    assert model(images(chans=1, size=(64, 64))).shape == (2, 32, 4, 4)


def test_a_given_normalisation_is_in_the_network() -> None:
    mean, std = (0.9, 0.5, 0.1), (0.1, 0.2, 0.4)
    torch.manual_seed(0)
    given = small(normalize=(mean, std))
    torch.manual_seed(0)
    plain = small(normalize=((0.0,) * 3, (1.0,) * 3))
    x = images(size=(64, 64))
    z = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(given(x), plain(z))
    for wrong in ('image', 'foo', ((0.5,) * 3, (0.0,) * 3)):
        with pytest.raises(ValueError, match=r'^normalize is [^\n]*; expected None, [^\n]*\(mean, std\)[^\n]*$'):
            small(normalize=wrong)


# ---- timm's weights


def test_every_file_of_timm_is_taken_with_its_own_mean_and_std(theirs: nn.Module, timm_file: str) -> None:
    tags = [tag for arch in ('resnet18', 'resnet34', 'resnet50') for tag in timm.list_pretrained(f'{arch}.*')]
    assert len(tags) > 20
    others = {}
    for tag in tags:
        cfg = timm.models.get_pretrained_cfg(tag)
        if (cfg.mean, cfg.std) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
            others[tag] = (cfg.mean, cfg.std)
    x = images(size=(47, 66))
    for tag, (mean, std) in others.items():
        model = timm.create_model('resnet18_in_relu', pretrained=True, pretrained_cfg_overlay={
            'file': timm_file, 'hf_hub_id': f'timm/{tag}'}).eval()
        torch.testing.assert_close(model(x), theirs(normalised(x, mean, std)), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(no_such\) for resnet18'):
        timm.create_model('resnet18_in_relu', pretrained=True, pretrained_cfg_overlay={
            'file': timm_file, 'hf_hub_id': 'timm/resnet18.no_such'})
    half = (0.5, 0.5, 0.5)
    model = timm.create_model('resnet18_in_relu').eval()
    model.load_state_dict(weights_from_timm(theirs.state_dict(), model, mean=half, std=half))
    torch.testing.assert_close(model(x), theirs(2 * x - 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('act', ALL)
def test_a_start_from_timms_weights(act: str, theirs: nn.Module, timm_file: str) -> None:
    model = timm.create_model(
        f'resnet18_in_{act}', pretrained=True, pretrained_cfg_overlay={'file': timm_file}).eval()
    # an odd size, in which a border padded with another value would be much of the image
    x = images(size=(47, 66))
    with torch.no_grad():
        expected, found = theirs(normalised(x)), model(x)
    assert expected.std() > 0.1
    difference = (found - expected).abs().max() / expected.std()
    if act in IS_RELU:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    elif act in STARTS['relu']:
        assert difference < 0.2  # and less with more alpha, below
    else:  # the function of another activation
        assert difference > 0.5
    assert {k: v.item() for k, v in model.act.state_dict().items()} == pytest.approx(
        {'ssilu': {'beta': 0.3}, **STARTS['relu']}.get(act, {}))


def test_timms_file_is_a_checkpoint_too(theirs: nn.Module, timm_file: str) -> None:
    x = images(size=(47, 66))
    expected = theirs(normalised(x))
    by_path = timm.create_model('resnet18_in_relu', checkpoint_path=timm_file).eval()
    torch.testing.assert_close(by_path(x), expected, rtol=1e-5, atol=1e-5)
    model = timm.create_model('resnet18_in_prelu').eval()
    load_checkpoint(model, timm_file)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('share', ['network', 'layer', 'channel'])
def test_a_network_converted_before_its_weights_starts_as_relu(
        share: str, theirs: nn.Module, timm_file: str, tmp_path: Path) -> None:
    model = timm.create_model('resnet18_in_relu').eval()
    timm_paf.convert_activations(model, 'prelu', share=share, alpha=0.3)
    x = images(size=(47, 66))
    done = open_weights(timm_file).load(model, act_start='relu')
    assert (done.act, done.logits_change) == ('relu', pytest.approx(0, abs=1e-5))
    torch.testing.assert_close(model(x), theirs(normalised(x)), rtol=1e-5, atol=1e-5)
    if share != 'network':
        assert not any(key.startswith('act.') for key in weights_from_timm(theirs.state_dict(), model))


def test_alpha_decides_how_close_the_start_is(theirs: nn.Module, timm_file: str) -> None:
    x = images(size=(47, 66))
    for act in ('psilu', 'pssilu', 'psoftplus'):
        differences = []
        for alpha in (10.0, 100.0, 1000.0):
            model = timm.create_model(
                f'resnet18_in_{act}', act_kwargs={'alpha': alpha}, pretrained=True,
                pretrained_cfg_overlay={'file': timm_file}).eval()
            assert model.act.alpha.item() == alpha
            with torch.no_grad():
                differences.append((model(x) - theirs(normalised(x))).abs().max().item())
        assert all(b < 0.5 * a for a, b in itertools.pairwise(differences)), (act, differences)


def test_other_heads_and_channels_start_from_timms_weights_too(theirs: nn.Module, timm_file: str) -> None:
    cfg = {'pretrained': True, 'pretrained_cfg_overlay': {'file': timm_file}}
    x, theirs = images(size=(64, 64)).double(), copy.deepcopy(theirs).double()  # where no CPU's rounding shows
    model = timm.create_model('resnet18_in_relu', num_classes=7, **cfg).eval().double()
    assert model(x).shape == (2, 7)
    torch.testing.assert_close(
        model.forward_features(x), theirs.forward_features(normalised(x)), rtol=1e-5, atol=1e-6)
    grey = timm.create_model('resnet18_in_relu', in_chans=1, **cfg).eval().double()
    # exact for images whose channels are equal, when the three means are: so the mean of the means
    mean = (sum(IMAGENET_DEFAULT_MEAN) / 3,) * 3
    torch.testing.assert_close(
        grey(x[:, :1]), theirs(normalised(x[:, :1].expand(-1, 3, -1, -1), mean)), rtol=1e-5, atol=1e-6)


def test_our_own_file_comes_back_as_it_was(tmp_path: Path) -> None:
    model, x = small(), images(size=(64, 64))
    model.conv1.mean.fill_(0.25)  # a file's mean belongs to its weights
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'own.safetensors')
    again = timm.create_model('resnet18_in_pssilu', pretrained=True, **SMALL, pretrained_cfg_overlay={
        'file': str(tmp_path / 'own.safetensors'), 'num_classes': 11}).eval()
    torch.testing.assert_close(again(x), model(x), **EXACT)
    assert again.act.alpha.item() == pytest.approx(1.37)
    grey = timm.create_model('resnet18_in_pssilu', pretrained=True, in_chans=1, **SMALL, pretrained_cfg_overlay={
        'file': str(tmp_path / 'own.safetensors'), 'num_classes': 11}).eval()
    x = x[:, :1]
    torch.testing.assert_close(grey(x), model(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


# ---- act_layer='pssilu'


NAMED = {
    'resnet18': {'channels': (8, 8, 8, 8)}, 'mobilenetv3_small_050': {}, 'efficientnet_b0': {},
    'convnext_atto': {'depths': (1, 1, 1, 1), 'dims': (4, 8, 8, 8)}}


@pytest.mark.parametrize(('name', 'act'), [
    *(('resnet18', act) for act in timm_paf.list_pafs() if act != 'prelu'),
    *((name, 'pssilu') for name in NAMED if name != 'resnet18')])
def test_a_name_as_act_layer_of_timms_models(name: str, act: str) -> None:
    torch.manual_seed(0)
    kwargs = {'num_classes': 3, **NAMED[name]}
    model = timm.create_model(name, act_layer=act, **kwargs)
    cls = type(timm_paf.create_paf(act))
    sites = [m for m in model.modules() if isinstance(m, PAF)]
    assert len(sites) > 3
    assert {type(m) for m in sites} == {cls}
    assert len(timm_paf.paf_parameters(model)) == len(sites) * len(list(cls().parameters()))
    model(images(size=(64, 64))).square().sum().backward()
    grads = [p.grad for p in timm_paf.paf_parameters(model).values()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    if name == 'resnet18':  # the same network with timm's ReLUs replaced
        other = timm.create_model(name, **kwargs)
        for parent in list(other.modules()):
            for key, child in parent.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(parent, key, cls())
        other.load_state_dict(model.state_dict(), strict=True)
        x = images(size=(64, 64))
        torch.testing.assert_close(other.eval()(x), model.eval()(x), **EXACT)


def test_names_of_timm_and_unknown_ones_are_what_they_were() -> None:
    with pytest.raises(KeyError, match='no_such'):
        timm.create_model('resnet18', act_layer='no_such')
    model = timm.create_model('resnet18', act_layer='prelu')
    assert type(model.act1) is timm.layers.activations.PReLU
    assert type(timm.create_model('resnet18', act_layer='relu').act1) is nn.ReLU
    assert type(timm.layers.create_act_layer('PSSiLU', inplace=True)) is activations.PSSiLU
