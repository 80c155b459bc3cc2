"""Any timm model with a PAF: what is replaced, shared, kept together and reported."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT
from networks import EXACT, images, paf_keys, pafs, randomise, small
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from timm_paf import convert_activations, kernels, list_pafs, paf_parameters
from timm_paf.activation_sites import functional_activations
from timm_paf.activations import PAF, create_paf
from timm_paf.convert import SHARES, create_converted
from timm_paf.sharing import SharedActivation

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:timm.*')
SIZE = {'input_size': (3, 32, 32)}


def converted(share: str = 'network', name: str = 'resnet10t', act: str = 'pssilu', **kwargs) -> nn.Module:
    """A small model of timm, with PAF values of which no two are equal."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    convert_activations(model, act, share, **{**SIZE, **kwargs})
    for index, value in enumerate(paf_parameters(model).values()):
        nn.init.uniform_(value, 0.1 + 0.01 * index, 0.1 + 0.01 * (index + 1))
    return model


def count(model: nn.Module, cls: type) -> int:
    return sum(isinstance(module, cls) for module in model.modules())


@pytest.mark.parametrize('name', [
    'resnet10t', 'efficientnet_b0', 'seresnet50', 'regnety_002', 'densenet121', 'repvgg_a0'])
def test_an_activation_that_replaces_itself_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), images(size=(64, 64))
    expected = model(x)
    act = 'silu' if name == 'efficientnet_b0' else 'relu'
    done = convert_activations(model, act, replace=act, gates=True, **SIZE)
    assert count(model, nn.SiLU if act == 'silu' else nn.ReLU) == 1
    assert count(model, SharedActivation) == len(done.replaced) > 10
    assert not done.left
    assert not done.out_of_reach
    torch.testing.assert_close(model(x), expected, **EXACT)


def test_the_shared_paf_acts_at_every_place() -> None:
    """Against timm's own way to another activation, which works in ResNets."""
    torch.manual_seed(0)
    reference = timm.create_model('resnet10t', act_layer=lambda inplace=False: create_paf('psilu', alpha=0.7))
    randomise(reference)
    model = timm.create_model('resnet10t')
    done = convert_activations(model, 'psilu', alpha=0.7)
    assert set(done.replaced.values()) == {'relu'}
    weights = {k: v for k, v in reference.state_dict().items() if not k.endswith('.alpha')}
    model.load_state_dict({**weights, 'conv1.2.act.alpha': torch.tensor([0.7])})
    torch.testing.assert_close(model.eval()(images()), reference.eval()(images()), **EXACT)


@pytest.mark.parametrize(('share', 'number', 'size'), [
    ('network', 1, 2), ('stage', 5, 10), ('layer', 11, 22),
    ('channel', 11, 2 * (24 + 32 + 64 + 2 * (64 + 128 + 256 + 512)))])
def test_values_of_each_share(share: str, number: int, size: int) -> None:
    model = converted(share)
    assert count(model, PAF) == number
    assert sum(p.numel() for p in paf_parameters(model).values()) == size
    assert len(paf_keys(model.state_dict())) == 2 * number
    assert len(pafs(model)) == 11


def test_stages_are_those_of_timm() -> None:
    model = converted('stage')
    groups: dict[PAF, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SharedActivation):
            groups.setdefault(module.act, set()).add(name.split('.')[0])
    assert list(groups.values()) == [{'conv1', 'act1'}, {'layer1'}, {'layer2'}, {'layer3'}, {'layer4'}]


@pytest.mark.parametrize('share', SHARES)
def test_values_stay_shared(share: str, tmp_path: Path) -> None:
    """Through files, copies, averages, devices and dtypes: each value once, and the same logits."""
    model, x = converted(share), images()
    expected, number = model(x), count(model, PAF)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    loaded = timm.create_model('resnet10t', num_classes=5).eval()
    convert_activations(loaded, 'pssilu', share, **SIZE)
    loaded.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    meta = copy.deepcopy(model).to('meta').to_empty(device='cpu')
    meta.load_state_dict(model.state_dict())
    for other in (loaded, copy.deepcopy(model), meta, ModelEmaV3(model).module, copy.deepcopy(model).double().float()):
        assert count(other, PAF) == number
        assert other.state_dict().keys() == model.state_dict().keys()
        torch.testing.assert_close(other.eval()(x), expected, **EXACT)
    half = copy.deepcopy(model).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_average_counts_a_shared_value_once() -> None:
    model = converted()
    average = ModelEmaV3(model, decay=0.9)
    before = {k: v.clone() for k, v in paf_parameters(model).items()}
    with torch.no_grad():
        for value in paf_parameters(model).values():
            value.add_(1)
    average.update(model)
    for key, value in paf_parameters(average.module).items():
        torch.testing.assert_close(value, before[key] + 0.1)


DDP = '''
import os, sys, timm, torch
import torch.distributed as dist
from timm_paf import convert_activations, paf_parameters
from timm_paf.activations import PAF
dist.init_process_group('gloo')
found = []
for share in ('network', 'channel'):
    torch.manual_seed(0)
    model = timm.create_model('resnet10t', num_classes=5).eval()
    convert_activations(model, 'pssilu', share, input_size=(3, 32, 32))
    x = torch.rand(4, 3, 32, 32)
    if dist.get_rank() == 0:
        alone = torch.autograd.grad(model(x).square().sum() / 4, list(paf_parameters(model).values()))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    part = x[2 * dist.get_rank():][:2]
    (wrapped(part).square().sum() / 2).backward()
    torch.optim.SGD(model.parameters(), 1e-4).step()
    pafs = {m for m in model.modules() if isinstance(m, PAF)}
    state = torch.cat([v.flatten() for v in paf_parameters(model).values()]).detach()
    both = [torch.empty_like(state) for _ in range(2)]
    dist.all_gather(both, state)
    assert torch.equal(*both)
    assert len(pafs) == (1 if share == 'network' else 11)
    assert sum(k.endswith('.alpha') for k in model.state_dict()) == len(pafs)
    if dist.get_rank() == 0:
        for p, expected in zip(paf_parameters(model).values(), alone):
            torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-4)
dist.barrier()
sys.stdout.flush()
os._exit(0)  # as train_robust.py does
'''


def test_ddp_keeps_what_is_shared(tmp_path: Path) -> None:
    script = tmp_path / 'ddp.py'
    script.write_text(DDP)
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         script],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_gates_stay_unless_asked_for() -> None:
    torch.manual_seed(0)
    model = timm.create_model('seresnet50')
    done = convert_activations(model, 'psilu', **SIZE)
    assert len(done.replaced) == 49
    assert done.left == {
        f'layer{i}.{j}.se.act': 'relu in a gate' for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)}
    assert 'out of reach' not in str(done)
    assert len(convert_activations(model, 'pelu', replace='relu', gates=True, **SIZE).replaced) == 16


def test_split_attention_has_a_feature_activation_and_a_gate() -> None:
    done = convert_activations(timm.create_model('resnest14d'), 'psilu', **SIZE)
    assert all(place.endswith('.conv2.act1') for place in done.left)
    assert sum(place.endswith('.conv2.act0') for place in done.replaced) == len(done.left) == 4


def test_only_what_is_named_is_replaced() -> None:
    model = timm.create_model('levit_128s')
    before = count(model, nn.Hardswish)
    with pytest.raises(ValueError, match=r"no activation module to replace: \d+ are left \(hard_swish\)"):
        convert_activations(model, 'psilu', replace=('relu', 'gelu'))
    assert count(model, nn.Hardswish) == before > 0
    assert len(convert_activations(model, 'psilu', replace=('hard_swish',)).replaced) == before


@pytest.mark.parametrize(('name', 'where'), [
    ('mobilevitv2_050', 'LinearSelfAttention: relu'),
    ('resnetv2_50d_evos', 'EvoNorm2dS0: norm and activation in one'),
    ('resnetv2_50d_frn', 'FilterResponseNormTlu2d: norm and activation in one')])
def test_function_calls_are_named(name: str, where: str) -> None:
    model = timm.create_model(name)
    found = functional_activations(model, (3, 64, 64))
    assert found
    assert all(where in place for place in found)
    if where.startswith('LinearSelf'):
        with pytest.warns(UserWarning, match='9 out of reach, being function calls') as caught:
            done = convert_activations(model, 'pssilu', input_size=(3, 64, 64))
        assert sum(where in str(warning.message) for warning in caught) == 1
        assert len(done.out_of_reach) == 9
        assert found == done.out_of_reach
        assert all(where in place and n == 1 for place, n in done.out_of_reach.items())
    else:
        with pytest.raises(ValueError, match=f'{where}.*; expected another model'):
            convert_activations(model, 'pssilu', input_size=(3, 64, 64))


def test_function_calls_inside_of_modules_are_named() -> None:
    model = timm.create_model('dm_nfnet_f0')
    with pytest.raises(ValueError, match=r'\(GammaAct: gelu\)'):
        convert_activations(model, 'pssilu', **SIZE)
    found = functional_activations(model.to('meta'))
    assert found
    assert all('(GammaAct: gelu)' in place for place in found)


def test_a_network_made_for_other_images_is_converted_with_them() -> None:
    """timm leaves its size of the images in the cfg where the arguments say another one."""
    model = create_converted('vit_tiny_patch16_224', 'psilu', num_classes=10, img_size=[32, 48], in_chans=1)
    assert model(torch.rand(1, 1, 32, 48)).shape == (1, 10)


def test_hooks_of_an_activation_stay_and_can_be_removed() -> None:
    model = timm.create_model('resnet10t', features_only=True, feature_cls='hook').eval()
    seen: list[Tensor] = []
    site = next(module for name, module in model.named_modules() if name.endswith('act2'))
    handle = site.register_forward_hook(lambda module, args, out: seen.append(out))
    expected = [each.shape for each in model(images())]
    convert_activations(model, 'psilu', input_size=(3, 32, 32))
    seen.clear()
    assert [each.shape for each in model(images())] == expected
    assert len(seen) == 1
    handle.remove()
    model(images())
    assert len(seen) == 1


def test_the_probe_leaves_no_trace() -> None:
    model = timm.create_model('resnet10t').train()
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.random.get_rng_state()
    convert_activations(model, 'relu')  # has no values
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.layer2[0].bn1.training
    assert not model.layer1[0].bn1.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], **EXACT)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('act', list_pafs())
def test_values_per_channel(act: str) -> None:
    """A channel at a time, with the kernel for one value."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 7), nn.GELU())
    convert_activations(model, act, 'channel', input_size=(3, 4, 4))
    first, last = model[1].act, model[4].act
    for module, shape, dim in ((first, (2, 5, 4, 4), 1), (last, (2, 7), 1), (last, (2, 3, 7), 2)):
        values = [getattr(module, name) for name in module.init]
        x = torch.randn(shape, requires_grad=True)
        with torch.no_grad():
            for value in values:
                value.uniform_(0.2, 0.9)
        parts = [kernels.run(act, x.select(dim, i), *[v[i:i + 1] for v in values]) for i in range(shape[dim])]
        expected, found = torch.stack(parts, dim), module(x)
        torch.testing.assert_close(found, expected)
        wanted = [x, *(v for v in values if v.requires_grad)]
        for got, right in zip(torch.autograd.grad(found.sin().sum(), wanted),
                              torch.autograd.grad(expected.sin().sum(), wanted), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('name', 'axis'), [
    ('resnet10t', 1), ('vit_tiny_patch16_224', -1), ('convnext_atto', 1), ('resmlp_12_224', -1),
    ('efficientnet_lite0', 1)])
def test_the_channel_axis_is_found(name: str, axis: int) -> None:
    model = timm.create_model(name)
    convert_activations(model, 'psilu', 'channel')
    assert {module.axis for module in model.modules() if isinstance(module, PAF)} == {axis}


@pytest.mark.parametrize(('layer', 'axis'), [(nn.Linear(5, 5), -1), (nn.Conv1d(5, 5, 1), 1), (nn.LayerNorm(5), -1)])
def test_of_two_axes_of_one_size_the_layer_before_knows(layer: nn.Module, axis: int) -> None:
    model = nn.Sequential(nn.Flatten(2), layer, nn.GELU())
    convert_activations(model, 'psilu', 'channel', input_size=(5, 5, 1))
    assert model[2].act.axis == axis


def test_a_channel_axis_that_is_not_clear_is_an_error() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x).flatten(1))

    model = Net()
    with pytest.raises(ValueError, match=r"act: its inputs \(1, 4096\) have no one channel axis; expected"):
        convert_activations(model, 'psilu', 'channel', **SIZE)
    assert isinstance(model.act, nn.ReLU)


def test_our_own_networks_convert() -> None:
    expected, model = small('wrn10_1', 'pssilu'), small('wrn10_1', 'relu')
    assert len(convert_activations(model, 'pssilu').replaced) == 7
    assert model.state_dict().keys() == expected.state_dict().keys()
    model.load_state_dict(expected.state_dict())
    torch.testing.assert_close(model(images()), expected(images()), **EXACT)
    done = convert_activations(model, 'psilu', 'layer')
    assert set(done.replaced.values()) == {'pssilu'}
    assert count(model, PAF) == 7
    assert 'act.alpha' not in model.state_dict()
    copy.deepcopy(model).load_state_dict(model.state_dict())
    assert convert_activations(model, 'pssilu', 'stage').pafs == 4


@pytest.mark.parametrize(('args', 'message'), [
    (('nope',), 'unknown activation'),
    (('psilu', 'block'), "unknown share 'block'; expected one of network, stage, layer, channel"),
    (('psilu', 'network', ('relu', 'tanh')), 'replace has tanh; expected some of relu'),
    (('relu', 'channel'), 'relu has no values to keep per channel'),
    (('psilu', 'stage'), 'Sequential has no group_matcher')])
def test_errors_leave_the_model_as_it_was(args: tuple[object, ...], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(ValueError, match=message):
        convert_activations(model, *args, **SIZE)  # type: ignore[arg-type]
    assert isinstance(model[1], nn.ReLU)
    assert not model._state_dict_hooks


def test_a_child_of_the_name_that_says_the_activation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act_layer, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.act_layer(self.conv(x)).mean((2, 3)))

    model = Net()
    done = convert_activations(model, 'pssilu', input_size=(3, 32, 32))
    assert done.replaced == {'act_layer': 'relu'}
    assert model(images()).shape == (2, 2)


def test_a_start_of_a_network_of_features() -> None:
    model = timm.create_model('resnet18', features_only=True)
    done = convert_activations(model, 'prelu', start='same')
    assert (done.logits_change, done.replaced != {}) == (0, True)


def test_a_model_that_does_not_run_says_so() -> None:
    with pytest.raises(ValueError, match=r'Sequential has no pretrained_cfg; expected input_size=\(3, H, W\)'):
        convert_activations(nn.Sequential(nn.ReLU()), 'psilu')
    with pytest.raises(ValueError, match=r'Sequential does not run on \(3, 4, 4\)'):
        convert_activations(nn.Sequential(nn.Linear(5, 5), nn.ReLU()), 'psilu', input_size=(3, 4, 4))
    with pytest.raises(TypeError, match='PSiLU has no parameter beta'):
        convert_activations(nn.Sequential(nn.ReLU()), 'psilu', beta=1.0)


def test_frozen_values_and_initial_ones() -> None:
    for share in SHARES:
        model = timm.create_model('resnet10t')
        convert_activations(model, 'pssilu', share, alpha=2.5, frozen='alpha', **SIZE)
        assert all(key.endswith('.beta') for key in paf_parameters(model))
        alphas = [value for key, value in model.state_dict().items() if key.endswith('.alpha')]
        assert alphas
        assert all(bool((value == 2.5).all()) for value in alphas)


@pytest.mark.parametrize('share', ['network', 'channel'])
def test_torch_export_takes_a_converted_model(share: str) -> None:
    model, x = converted(share), images()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_survey_found_no_family_that_breaks() -> None:
    found = json.loads((ROOT / 'tests' / 'benchmarks' / 'results' / 'families.json').read_text())
    assert len(found['families']) == 98
    for family, row in found['families'].items():
        assert 'error' not in row, family
        assert row['activations'] == row['replaced'] + sum(row['left'].values()) + len(row['out_of_reach']), family
        assert row['forward'], family
        assert row.get('same_logits_with_itself') is not False, family
        assert row.get('backward') is not False, family
