"""The networks' weights: state dict, files, copies, published layouts, and logits of independent implementations."""

from __future__ import annotations

import copy
import importlib.util
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from networks import EXACT, SMALL, images, paf_keys, pafs, randomise, small
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn

from timm_paf.activations import PSSiLU
from timm_paf.sharing import merge_aliases


def reference(name: str) -> ModuleType:
    """One architecture file of RobustBench; its package as a whole imports much that is not needed here."""
    package = importlib.util.find_spec('robustbench')
    if package is None:
        pytest.skip('needs robustbench: pip install robustbench')
    path = Path(package.submodule_search_locations[0]) / 'model_zoo' / 'architectures' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'reference_{name}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(seed: int = 0) -> nn.Module:
    """RobustBench's own network: one PSSiLU, whose values stand in the state dict once for every site."""
    torch.manual_seed(seed)
    file = reference('paf_wide_resnet')
    return randomise(file.PAF_WideResNet(file.PSSiLU(), depth=16, widen_factor=2)).eval()


def assert_same_logits(model: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    x = images(dtype=next(other.parameters()).dtype)
    with torch.no_grad():
        expected = other(x)
        assert expected.std() > 0.01
        torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


# ---- parity


@pytest.mark.parametrize(('depth', 'width'), [(16, 2), (28, 10)])
def test_wide_resnet_has_the_logits_of_robustbench(depth: int, width: int) -> None:
    torch.manual_seed(0)
    file = reference('paf_wide_resnet')
    theirs = file.pssilu_wrn_28_10() if depth == 28 else file.PAF_WideResNet(file.PSSiLU(), depth=16, widen_factor=2)
    state = randomise(theirs.eval()).state_dict()
    assert len(paf_keys(state)) == {16: 14, 28: 26}[depth]
    ours = timm.create_model(f'wrn{depth}_{width}_pssilu').eval()
    ours.load_state_dict(state, strict=True)
    assert (ours.act.alpha.item(), ours.act.beta.item()) == (pytest.approx(1.37), pytest.approx(-0.21))
    assert_same_logits(ours, theirs)


def test_relu_wide_resnet_has_the_logits_of_robustbench() -> None:
    torch.manual_seed(0)
    theirs = randomise(reference('wide_resnet').WideResNet(depth=16, widen_factor=2)).eval()
    ours = timm.create_model('wrn16_2_relu').eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize('act', ['relu', 'pssilu'])
@pytest.mark.parametrize('arch', ['resnet18', 'resnet50'])
def test_resnet_has_the_logits_of_torchvision(arch: str, act: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    if act == 'pssilu':
        shared = reference('paf_wide_resnet').PSSiLU()
        for module in theirs.modules():
            if hasattr(module, 'relu'):
                module.relu = shared
    state = randomise(theirs).eval().state_dict()
    ours = timm.create_model(f'{arch}_{act}').eval()
    plain = {k: v for k, v in state.items() if k not in paf_keys(state)}
    assert [k for k in ours.state_dict() if not k.startswith('act.')] == list(plain)
    values = {f'act.{k}': v for k, v in shared.state_dict().items()} if act == 'pssilu' else {}
    ours.load_state_dict({**plain, **values}, strict=True)
    # in float64, where 50 layers of rounding do not blur a difference
    assert_same_logits(ours.double(), theirs.double(), 1e-9)


# ---- state dict


@pytest.mark.parametrize('arch', SMALL)
def test_a_state_dict_holds_each_value_once(arch: str, tmp_path: Path) -> None:
    model, other = small(arch), small(arch, seed=1)
    state = model.state_dict()
    assert paf_keys(state) == ['act.alpha', 'act.beta']
    keys = list(state)
    other.load_state_dict(state, strict=True)
    assert list(state) == keys  # loading fills in aliases of its own copy
    assert_same_logits(other, model, 0)
    pointers = [value.data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)
    path = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(state, path)
    assert_same_logits(timm.create_model(f'{arch}_pssilu', checkpoint_path=str(path), **SMALL[arch]).eval(), model, 0)
    safetensors.torch.save_model(model, str(path))  # what the hub's mixins use
    other = small(arch, seed=2)
    assert safetensors.torch.load_model(other, path) == (set(), [])
    assert_same_logits(other, model, 0)
    torch.save({'state_dict': {f'module.{k}': v for k, v in state.items()}}, tmp_path / 'model.pth')
    other = timm.create_model(f'{arch}_pssilu', checkpoint_path=str(tmp_path / 'model.pth'), **SMALL[arch]).eval()
    assert_same_logits(other, model, 0)


def test_the_published_layout_loads_and_is_checked() -> None:
    theirs = published()
    state, ours = theirs.state_dict(), timm.create_model('wrn16_2_pssilu').eval()
    ours.load_state_dict(state, strict=True)
    assert paf_keys(ours.state_dict()) == ['act.alpha', 'act.beta']
    some = {k: v for k, v in state.items() if k not in paf_keys(state) or k.startswith('block2.layer.1.')}
    again = timm.create_model('wrn16_2_pssilu').eval()
    again.load_state_dict(some, strict=True)  # any one name will do
    assert_same_logits(again, theirs)
    wrong = 'block2.layer.1.activation.beta'
    state[wrong] = torch.tensor([0.125])
    with pytest.raises(RuntimeError, match=rf'activation\.beta is \[-0\.2\d*\] and {wrong} is \[0\.125\]'):
        ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match=wrong):
        ours.load_state_dict(state, strict=False)
    # the new layout beside an old one that disagrees with it
    with pytest.raises(RuntimeError, match=r'act\.alpha'):
        ours.load_state_dict({**theirs.state_dict(), 'act.alpha': torch.tensor([5.0])})


def test_aliases_are_merged_without_a_load() -> None:
    model = small('wrn10_1')
    state, before = model.state_dict(), copy.deepcopy(model.state_dict())
    sites = [f'block{stage}.layer.0.activation.{value}' for stage in (1, 2, 3) for value in ('alpha', 'beta')]
    aliased = {key: value for key, value in state.items() if key not in paf_keys(state)} | {
        key: state[f'act.{key.rpartition(".")[2]}'].clone() for key in sites}
    given = list(aliased)
    merged = merge_aliases(model, {**aliased, 'other': torch.ones(1)})
    assert merged.keys() == {*state, 'other'}
    for key, value in state.items():
        torch.testing.assert_close(merged[key], value, **EXACT)
        torch.testing.assert_close(before[key], value, **EXACT)
    aliased[sites[3]] = torch.tensor([0.125])
    with pytest.raises(ValueError, match=rf'is \[-0\.2\d*\] and {sites[3]} is \[0\.125\]'):
        merge_aliases(model, aliased)
    assert list(aliased) == given


def test_missing_and_unexpected_values_are_errors() -> None:
    model = small('wrn10_1')
    for key in ('act.alpha', 'act.beta'):
        state = {k: v for k, v in model.state_dict().items() if k != key}
        with pytest.raises(RuntimeError, match=rf'Missing key.*"{key}"'):
            small('wrn10_1').load_state_dict(state)
        assert key in small('wrn10_1').load_state_dict(state, strict=False).missing_keys
    for key in ('alpha', 'act.gamma', 'block1.layer.7.activation.alpha'):
        with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{key}"'):
            model.load_state_dict({**model.state_dict(), key: torch.ones(1)})
    with pytest.raises(RuntimeError, match=r'size mismatch for act\.alpha'):
        model.load_state_dict({**model.state_dict(), 'act.alpha': torch.ones(2)})


def test_nested_in_another_module() -> None:
    theirs = published()
    wrap = [nn.Sequential(OrderedDict(normalize=nn.Identity(), model=m))
            for m in (timm.create_model('wrn16_2_pssilu').eval(), theirs)]
    wrap[0].load_state_dict(wrap[1].state_dict(), strict=True)
    assert_same_logits(*wrap)
    state = wrap[0].state_dict()
    assert paf_keys(state) == ['model.act.alpha', 'model.act.beta']
    other = nn.Sequential(OrderedDict(normalize=nn.Identity(), model=timm.create_model('wrn16_2_pssilu').eval()))
    other.load_state_dict(state, strict=True)
    assert_same_logits(other, theirs)
    for key in ('model.alpha', 'alpha'):  # not a name of anything
        with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{key}"'):
            other.load_state_dict({**state, key: state['model.act.alpha']})
    wrong = 'model.activation.alpha'
    with pytest.raises(RuntimeError, match=wrong):
        other.load_state_dict({**wrap[1].state_dict(), wrong: torch.zeros(1)})


@pytest.mark.parametrize('frozen', [(), 'beta'])
@pytest.mark.parametrize('ema_type', [ModelEmaV2, ModelEmaV3])
def test_timm_averages_a_value_once(ema_type: type, frozen: tuple[str, ...] | str) -> None:
    model = small('wrn10_1', act_kwargs={'frozen': frozen})
    weight = model.fc.weight.detach().clone()
    alpha, beta = model.act.alpha.item(), model.act.beta.item()
    ema = ema_type(model, decay=0.75)
    with torch.no_grad():
        for step in range(1, 4):
            model.act.alpha.add_(1)
            model.fc.weight.add_(1)
            ema.update(model)
            # the average of start + 0, 1, ..., step; averaged once per name, alpha would lie nearer to the last
            gain = sum(0.25 * 0.75 ** (step - k) * k for k in range(1, step + 1))
            assert ema.module.act.alpha.item() == pytest.approx(alpha + gain, rel=1e-6)
            torch.testing.assert_close(ema.module.fc.weight, weight + gain)
    assert ema.module.act.beta.item() == pytest.approx(beta, rel=1e-6)
    assert {m.alpha.item() for m in pafs(ema.module)} == {ema.module.act.alpha.item()}


# ---- copies, dtypes, devices, programs


@pytest.mark.parametrize('arch', SMALL)
def test_one_activation_stays_one(arch: str) -> None:
    model, x = small(arch), images()
    expected, sites = model(x), len(pafs(model))
    assert sites > 4
    twin = copy.deepcopy(model)
    twin.act.alpha.data.fill_(3.0)
    torch.testing.assert_close(model(x), expected, **EXACT)
    meta = timm.create_model(f'{arch}_pssilu', device='meta', **SMALL[arch]).eval()
    assigned = copy.deepcopy(meta)
    assigned.load_state_dict(model.state_dict(), assign=True)
    empty = meta.to_empty(device='cpu')
    empty.load_state_dict(model.state_dict())
    wide = copy.deepcopy(model).to(torch.float64)
    for other in (twin, assigned, empty, wide, copy.deepcopy(model).half()):
        assert len(pafs(other)) == sites
        assert {id(p) for p in pafs(other)} == {id(other.act)}
        assert {name for name, _ in other.named_parameters()} == {name for name, _ in model.named_parameters()}
        assert paf_keys(other.state_dict()) == ['act.alpha', 'act.beta']
        assert isinstance(other.act, PSSiLU)
    torch.testing.assert_close(assigned(x), expected, **EXACT)
    torch.testing.assert_close(empty(x), expected, **EXACT)
    torch.testing.assert_close(wide(x.double()).float(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(twin(x), expected)
    for dtype in (torch.float16, torch.bfloat16):
        y = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        assert (y - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.filterwarnings('ignore:`torch.jit')
@pytest.mark.parametrize('arch', SMALL)
def test_torchscript_gives_the_same_logits(arch: str, tmp_path: Path) -> None:
    model, x = small(arch), images()
    expected = model(x)
    for scripted in (torch.jit.script(model), torch.jit.trace(model, x)):
        torch.testing.assert_close(scripted(x), expected, rtol=1e-5, atol=1e-5)
        torch.jit.save(scripted, str(tmp_path / 'model.pt'))
        torch.testing.assert_close(torch.jit.load(str(tmp_path / 'model.pt'))(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('arch', ['wrn10_1', 'resnet18'])
def test_export_gives_the_same_logits(arch: str) -> None:
    model, x = small(arch), images()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
