"""Checkpoints of other code: each layout is made by the code that makes it, or by modules built as that code does."""

from __future__ import annotations

import argparse
import copy
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks import EXACT, images, randomise
from safetensors.torch import save_file
from test_model_weights import reference
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from timm_paf.weights.checkpoint import load_checkpoint, read_checkpoint
from timm_paf.weights.checkpoint_files import check_file, read_file


def paf_wrn(seed: int = 0) -> nn.Module:
    """RobustBench's and robust_paf's network."""
    torch.manual_seed(seed)
    file = reference('paf_wide_resnet')
    return randomise(file.PAF_WideResNet(file.PSSiLU(), depth=10, widen_factor=1)).eval()


def relu_resnet(seed: int = 0) -> nn.Module:
    """RobustBench's ResNet-18 (DM-Improves-AT's too, MadryLab's up to its stem), thin."""
    torch.manual_seed(seed)
    file = reference('resnet')
    model = file.ResNet(file.BasicBlock, [2, 2, 2, 2])
    return randomise(model).eval()


def ours(name: str = 'wrn10_1_pssilu') -> nn.Module:
    torch.manual_seed(9)
    return timm.create_model(name).eval()


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_loads(path: Path, other: nn.Module, *said: str, name: str = 'wrn10_1_pssilu') -> None:
    model = ours(name)
    checkpoint = load_checkpoint(model, path)
    assert checkpoint.state_dict.keys() == model.state_dict().keys()
    for words in said:
        assert words in str(checkpoint)
    assert '\n' not in str(checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), other(images()), rtol=1e-5, atol=1e-5)


class Normalizer(nn.Module):
    """As MadryLab's, whose statistics are in the state dict."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.register_buffer('new_mean', torch.full((3, 1, 1), mean))
        self.register_buffer('new_std', torch.full((3, 1, 1), std))


def madry(model: nn.Module, mean: float = 0.0, std: float = 1.0) -> nn.Module:
    normalizer = Normalizer(mean, std)
    attacker = nn.ModuleDict({'normalize': normalizer, 'model': model})
    return nn.DataParallel(nn.ModuleDict({'normalizer': normalizer, 'model': model, 'attacker': attacker}))


# ---- layouts


def test_robustbench(tmp_path: Path) -> None:
    state = paf_wrn().state_dict()
    assert sum('activation.' in key for key in state) == 8
    for content in (state, {'state_dict': state}, {'state_dict': {f'module.{k}': v for k, v in state.items()}},
                    {f'module.model.{k}': v for k, v in state.items()}):
        assert_loads(saved(tmp_path / 'a.pt', content), paf_wrn(), "RobustBench's PAF network",
                     "6 copies of the activation's values, equal, merged")
    assert_loads(saved(tmp_path / 'a.pt', relu_resnet().state_dict()), relu_resnet(), 'names of another ResNet',
                 name='resnet18_relu')


@pytest.mark.parametrize('parallel', [False, True])
def test_robust_paf(tmp_path: Path, parallel: bool) -> None:
    last, average = (nn.DataParallel(paf_wrn(seed)) if parallel else paf_wrn(seed) for seed in (0, 1))
    content = {'epoch': 3, 'arch': 'wrn_28_10', 'state_dict': last.state_dict(), 'best_prec1': torch.tensor(50.0),
               'optimizer': torch.optim.SGD(last.parameters(), lr=0.1).state_dict()}
    assert_loads(saved(tmp_path / 'a.pth.tar', {**content, 'swadict': {}}), paf_wrn(0), 'robust_paf (state_dict)')
    # its average is one over keys, whole numbers too
    swadict = {k: 0.5 * v + 0.5 * v for k, v in average.state_dict().items()}
    checkpoint = saved(tmp_path / 'a.pth.tar', {**content, 'swadict': swadict})
    assert_loads(checkpoint, paf_wrn(1), 'robust_paf (swadict, an average of the weights)')
    assert read_checkpoint(checkpoint, ours()).averaged


def test_robust_pafs_resnet(tmp_path: Path) -> None:
    source = randomise(timm.create_model('resnet18_pssilu')).eval()
    state = {k: v for k, v in source.state_dict().items() if not k.startswith('act.')}
    sites = ['', *(f'layer{i}.{j}.' for i in range(1, 5) for j in range(2))]  # one attribute `activation` per block
    for value in ('alpha', 'beta'):
        state |= {f'{site}activation.{value}': getattr(source.act, value).detach().clone() for site in sites}
    path = saved(tmp_path / 'a.pt', {'state_dict': state, 'swadict': {}})
    assert_loads(path, source, 'robust_paf', name='resnet18_pssilu')
    state['layer3.1.activation.beta'] += 1
    with pytest.raises(ValueError, match=r'^[^\n]*one activation is shared by [^\n]* \(1 of 9 differ\)'):
        read_checkpoint(saved(tmp_path / 'a.pt', {'state_dict': state, 'swadict': {}}), ours('resnet18_pssilu'))


def test_dm_improves_at(tmp_path: Path) -> None:
    models = [nn.DataParallel(nn.Sequential(paf_wrn(seed))).state_dict() for seed in (0, 1)]
    content = {'model_state_dict': models[1], 'unaveraged_model_state_dict': models[0], 'epoch': 3}
    assert_loads(saved(tmp_path / 'a.pt', content), paf_wrn(1),
                 'DM-Improves-AT (model_state_dict, an average of the weights)', 'without the prefix module.0.')
    assert_loads(saved(tmp_path / 'a.pt', {'model_state_dict': models[0]}), paf_wrn(0), 'network (model_state_dict)')
    # with --normalize the network is second, and the mean is nowhere in the file
    hidden = nn.DataParallel(nn.Sequential(nn.Identity(), paf_wrn())).state_dict()
    with pytest.raises(ValueError, match=r'^[^\n]*is the second in a Sequential; [^\n]*normalisation[^\n]*$'):
        read_checkpoint(saved(tmp_path / 'a.pt', {'model_state_dict': hidden}), ours())
    swish = reference('dm_wide_resnet').DMWideResNet(depth=10, width=1, activation_fn=nn.SiLU)
    content = {'model_state_dict': nn.DataParallel(nn.Sequential(swish)).state_dict()}
    with pytest.raises(ValueError, match=r"^[^\n]*DeepMind's WideResNet[^\n]*pad_type='same' and normalize=[^\n]*$"):
        read_checkpoint(saved(tmp_path / 'a.pt', content), ours())


def test_madrylabs_robustness(tmp_path: Path) -> None:
    for entry in ('model', 'state_dict'):
        content = {entry: madry(relu_resnet()).state_dict(), 'epoch': 3, 'amp': 'N/A', 'schedule': None}
        assert_loads(saved(tmp_path / 'a.pt', content), relu_resnet(), f"MadryLab's robustness ({entry})",
                     "the attacker's copy, equal, left out", 'a normalisation by mean 0 and std 1 left out',
                     name='resnet18_relu')
    for mean, std, said in ((0.5, 1.0, r'new_mean is \[0\.5, 0\.5, 0\.5\], expected 0'),
                            (0.0, 0.25, r'new_std is \[0\.25, 0\.25, 0\.25\], expected 1')):
        content = {'model': madry(paf_wrn(), mean, std).state_dict()}
        with pytest.raises(ValueError, match=rf'^[^\n]*normalises its input \(module\.\w+\.(normalize\.)?{said}\)'
                           .replace(r'\w+\.(normalize\.)?', r'normalizer\.') + r'[^\n]*normalize=\(mean, std\)$'):
            read_checkpoint(saved(tmp_path / 'a.pt', content), ours())
    state = madry(paf_wrn()).state_dict()
    state['module.attacker.model.fc.bias'] = state['module.attacker.model.fc.bias'] + 1
    with pytest.raises(ValueError, match=r'module\.attacker\.model\.fc\.bias is no copy of module\.model\.fc\.bias'):
        read_checkpoint(saved(tmp_path / 'a.pt', {'model': state}), ours())


def test_a_normalisation_that_does_nothing(tmp_path: Path) -> None:
    state = paf_wrn().state_dict()
    for names in (('mean', 'std'), ('mu', 'sigma'), ('0.mean', '0.std')):
        prefix = '1.' if '.' in names[0] else ''
        content = {f'{prefix}{k}': v for k, v in state.items()}
        content |= {names[0]: torch.zeros(3, 1, 1), names[1]: torch.ones(3, 1, 1)}
        assert_loads(saved(tmp_path / 'a.pt', content), paf_wrn(), 'a normalisation by mean 0 and std 1 left out')
        content[names[1]] = torch.tensor([1.0, 1.0, 0.9])
        with pytest.raises(ValueError, match=rf'normalises its input \({names[1]} is '):
            read_checkpoint(saved(tmp_path / 'a.pt', content), ours())


def test_timms_training(tmp_path: Path) -> None:
    model, average = randomise(ours()), ModelEmaV3(paf_as_ours(1))
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), lr=0.1), argparse.Namespace(model='wrn10_1_pssilu', lr=0.1), average,
        checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=0.5)
    assert_loads(tmp_path / 'last.pth.tar', paf_wrn(1), "timm's train.py (state_dict_ema, an average of the weights)")


def paf_as_ours(seed: int) -> nn.Module:
    model = ours()
    model.load_state_dict(paf_wrn(seed).state_dict())
    return model


@pytest.mark.parametrize('entry', ['model_ema', 'ema_state_dict', 'ema', 'ema_model'])
def test_an_average_in_a_dict(tmp_path: Path, entry: str) -> None:
    content = {'model': paf_wrn(0).state_dict(), entry: paf_wrn(1).state_dict(), 'step': 5}
    path = saved(tmp_path / 'a.pt', content)
    assert_loads(path, paf_wrn(1), f"RobustBench's PAF network ({entry}, an average of the weights)")
    assert read_checkpoint(path, ours()).averaged


def test_torchs_wrappers(tmp_path: Path) -> None:
    model = paf_as_ours(0)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert_loads(saved(tmp_path / 'a.pt', average.state_dict()), model, 'an AveragedModel', 'prefix module.')
    assert read_checkpoint(tmp_path / 'a.pt', ours()).averaged
    assert_loads(saved(tmp_path / 'a.pt', torch.compile(model).state_dict()), model, 'prefix _orig_mod.')
    wrapped = {f'module._orig_mod.{k}': v for k, v in model.state_dict().items()}
    save_file(wrapped, tmp_path / 'a.safetensors')
    assert_loads(tmp_path / 'a.safetensors', model, 'a state dict', 'prefix module._orig_mod.')
    assert_loads(saved(tmp_path / 'a.pt', model.half().state_dict()), model.float())
    model = nn.Sequential(OrderedDict(net=paf_as_ours(0)))
    assert_loads(saved(tmp_path / 'a.pt', model.state_dict()), model, 'prefix net.')


def test_any_model_of_timm(tmp_path: Path) -> None:
    source = timm.create_model('resnet18', num_classes=5).eval()
    path = saved(tmp_path / 'a.pt', {'state_dict': {f'module.{k}': v for k, v in source.state_dict().items()}})
    model = timm.create_model('resnet18', num_classes=5).eval()
    assert 'prefix module.' in str(load_checkpoint(model, path))
    torch.testing.assert_close(model(images()), source(images()), **EXACT)


# ---- refused


def test_a_model_is_changed_by_all_of_a_file_or_not_at_all(tmp_path: Path) -> None:
    state = paf_wrn().state_dict()
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in state.items() if k != 'fc.bias'}, r'missing fc\.bias; expected its keys'),
        ({**state, 'more': torch.ones(1)}, r'unexpected more; expected its keys'),
        ({k: v for k, v in state.items() if not k.endswith('beta')}, r'missing act\.beta;'),
        ({**state, 'fc.bias': torch.ones(5)}, r'fc\.bias is \(5,\) and not \(10,\)'),
        ({**state, 'activation.alpha': torch.ones(1)}, r'one activation is shared by the network, but '),
        ({k: v for k, v in state.items() if 'block1' not in k}, r'missing block1[^\n]* and \d+ more; expected')]
    for content, said in wrong:
        model = ours()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=rf'^[^\n]*{said}[^\n]*$'):
            load_checkpoint(model, saved(tmp_path / 'a.pt', content))
        torch.testing.assert_close(model.state_dict(), before, **EXACT)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / 'a.pt'
    for content, said in (
            (b'', 'is empty'), (b'\n <!DOCTYPE HTML><title>A\n page</title>', r'is a web page \(A page\)'),
            (b'<html></html>', r'is a web page \(without a title\)'), (b'some text', 'is cut off or no checkpoint')):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf'^{path} {said}[^\n]*$'):
            read_checkpoint(path, ours())
    with pytest.raises(FileNotFoundError, match=r'^[^\n]*no/such is no file; expected a checkpoint$'):
        read_checkpoint(tmp_path / 'no/such', ours())
    shadows = {'model': ours().state_dict(), 'ema': {'decay': 0.9, 'shadow_params': list(ours().parameters())}}
    for whole, said in (([1], 'holds a list; expected a state dict'), ({'a': 1, 'b': 2}, 'is a dict of a, b; expect'),
                        (shadows, 'has an average of the weights under ema.shadow_params, without their names')):
        with pytest.raises(ValueError, match=rf'^[^\n]*{said}[^\n]*$'):
            read_checkpoint(saved(path, whole), ours())
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.txt', 'text')
    with pytest.raises(ValueError, match=r'^[^\n]*is cut off or no checkpoint[^\n]*$'):
        read_checkpoint(path, ours())
    save_file(ours().state_dict(), tmp_path / 'a.safetensors')
    (tmp_path / 'a.safetensors').write_bytes((tmp_path / 'a.safetensors').read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'^[^\n]*is cut off or no safetensors file[^\n]*$'):
        read_checkpoint(tmp_path / 'a.safetensors', ours())


@pytest.mark.parametrize('legacy', [False, True])
def test_damage(tmp_path: Path, legacy: bool) -> None:
    """Every cut and every flipped bit of a tensor is found; the old format has no check sums, there only cuts are."""
    state = {'weight': torch.arange(5000.0), 'bias': torch.ones(3)}
    path = tmp_path / 'a.pt'
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    whole, rng = path.read_bytes(), random.Random(0)
    for cut in (1, 10, 300, *(rng.randrange(2, len(whole)) for _ in range(30))):
        path.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r'^[^\n]*(cut off|damaged|is empty)[^\n]*$'):
            read_file(path)
    start = whole.index(torch.arange(5000.0).numpy().tobytes()[:64])
    for turn in range(60):
        at = rng.randrange(len(whole)) if turn % 2 else rng.randrange(start, start + 20000)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1:])
        try:
            found = read_file(path)
        except ValueError as error:
            assert '\n' not in str(error)  # noqa: PT017
        else:
            assert legacy or all(torch.equal(found[key], state[key]) for key in state)
    path.write_bytes(whole[:9000] + whole)  # a download that began again in the middle
    if legacy:  # whose storages stand in the order of their addresses: the longer one may swallow the second beginning
        with pytest.raises(ValueError, match='cut off or no checkpoint'):
            read_file(path)
        path.write_bytes(whole + whole[:1])
        with pytest.raises(ValueError, match='more bytes than one checkpoint'):
            read_file(path)
    else:
        with pytest.raises(ValueError, match='9,000 other bytes come before the archive'):
            check_file(path)
