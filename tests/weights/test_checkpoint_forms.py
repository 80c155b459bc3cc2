"""Checkpoints of any training: an average of any name, plain data beside the weights, formats told by content."""

from __future__ import annotations

import argparse
import datetime
import pickle
import random
import re
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import EXACT
from safetensors.torch import save_file
from test_checkpoint import assert_loads, ours, paf_as_ours, paf_wrn, saved
from torch.optim.swa_utils import AveragedModel

from timm_paf.weights.checkpoint import load_checkpoint, read_checkpoint
from timm_paf.weights.checkpoint_files import read_file


@pytest.mark.parametrize('entries', [
    'params params_ema', 'net net_ema', 'model_state_dict ema_model_state_dict', 'state_dict swa_state_dict',
    'model averaged_model', 'model modelEMA', 'net avg_net', 'network polyak', 'state_dict params.swa', 'a a_avg',
    'model ema.module', 'model ema.shadow', 'checkpoint.model checkpoint.model_ema', 'unaveraged_params params'])
def test_an_average_of_any_name_goes_before_the_last_weights(tmp_path: Path, entries: str) -> None:
    content: dict[str, Any] = {'epoch': 3, 'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}, 'param_groups': []}}
    for seed, entry in enumerate(entries.split()):
        inside = content
        for part in entry.split('.')[:-1]:
            inside = inside.setdefault(part, {})
        inside[entry.rpartition('.')[2]] = paf_wrn(seed).state_dict()
    average = entries.split()[1]
    assert_loads(saved(tmp_path / 'a.pt', content), paf_wrn(1), f'({average}, an average of the weights)')
    assert read_checkpoint(tmp_path / 'a.pt', ours()).averaged


def test_an_average_is_told_by_its_form_too(tmp_path: Path) -> None:
    last, mean = paf_wrn(0).state_dict(), paf_as_ours(1)
    assert_loads(saved(tmp_path / 'a.pt', {'model': last, 'tracked': {'decay': 0.9, 'module': mean.state_dict()}}),
                 mean, '(tracked.module, an average')
    average = AveragedModel(mean)
    average.update_parameters(mean)
    assert_loads(saved(tmp_path / 'a.pt', {'model': last, 'best': average.state_dict()}), mean, '(best, an average')
    # without one the last weights are what is meant
    for nothing in (None, {}, 0.999, {'decay': 0.9}, {'loss': torch.ones(1)}):
        assert_loads(saved(tmp_path / 'a.pt', {'model': last, 'ema': nothing}), paf_wrn(0), '(model)')
    for nameless in ({'decay': 0.9, 'shadow_params': [torch.ones(3)] * 2}, [torch.ones(3)] * 2):
        with pytest.raises(ValueError, match=r'^[^\n]*has an average of the weights under ema[^\n]*without their'):
            read_checkpoint(saved(tmp_path / 'a.pt', {'model': last, 'ema': nameless}), ours())
    two = {'model': last, 'ema': last, 'swa': mean.state_dict()}
    with pytest.raises(ValueError, match=r'^[^\n]*has different weights under ema, swa; expected one of them'):
        read_checkpoint(saved(tmp_path / 'a.pt', two), ours())
    assert_loads(saved(tmp_path / 'a.pt', {**two, 'swa': last}), paf_wrn(0), '(ema, an average')


@pytest.mark.parametrize('entry', ['params', 'net_state_dict', 'model_state', 'my_network', 'student.weights'])
def test_weights_under_any_one_name(tmp_path: Path, entry: str) -> None:
    content: dict[str, Any] = {'epoch': 1, 'losses': {'train': torch.ones(1)}}
    outer, _, inner = entry.rpartition('.')
    content[outer or inner] = {inner: paf_wrn().state_dict()} if outer else paf_wrn().state_dict()
    assert_loads(saved(tmp_path / 'a.pt', content), paf_wrn(), f'({entry})')
    content['other'] = paf_wrn(1).state_dict()
    if entry not in ('params', 'net_state_dict', 'model_state'):
        with pytest.raises(ValueError, match=rf'has different weights under {entry}, other; expected one of them'):
            read_checkpoint(saved(tmp_path / 'a.pt', content), ours())


@pytest.mark.parametrize('prefix', ['_model.', 'classifier.backbone.', 'a.0.b.', 'encoder_', 'module.student.'])
def test_one_prefix_before_every_key(tmp_path: Path, prefix: str) -> None:
    content = {prefix + key: value for key, value in paf_wrn().state_dict().items()}
    assert_loads(saved(tmp_path / 'a.pt', content), paf_wrn(), f'without the prefix {prefix}')
    content['fc.bias'] = content.pop(f'{prefix}fc.bias')
    with pytest.raises(ValueError, match=rf'^[^\n]*missing [^\n]*unexpected {prefix}[^\n]*$'):  # what the file has
        read_checkpoint(saved(tmp_path / 'a.pt', content), ours())
    second = {f'stages.1.{key}': value for key, value in paf_wrn().state_dict().items()}
    with pytest.raises(ValueError, match=r'is the second in a Sequential'):
        read_checkpoint(saved(tmp_path / 'a.pt', second), ours())


def test_counters(tmp_path: Path) -> None:
    """Batches that nobody counted are zero, as torch has it; what thop counted is no weight."""
    state = paf_wrn().state_dict()
    without = {key: value for key, value in state.items() if 'num_batches' not in key}
    path = saved(tmp_path / 'a.pt', {**without, 'total_ops': torch.zeros(1), 'conv1.total_params': torch.zeros(1)})
    assert_loads(path, paf_wrn(), 'num_batches_tracked of 7 norms, missing, set to 0', '2 counters of thop left out')
    found = read_checkpoint(path, ours()).state_dict['bn1.num_batches_tracked']
    assert (found.item(), found.dtype, found.shape) == (0, torch.long, ())
    with pytest.raises(ValueError, match=r'unexpected total_ops'):
        read_checkpoint(saved(path, {**state, 'total_ops': torch.zeros(3)}), ours())
    del without['bn1.running_mean']
    with pytest.raises(ValueError, match=r'missing bn1\.running_mean; missing bn1\.num_batches_tracked'):
        read_checkpoint(saved(path, without), ours())


def test_plain_data_beside_the_weights(tmp_path: Path) -> None:
    """None of it is built: a file that runs no code loads, whatever a training has written down."""
    state, log = paf_wrn().state_dict(), defaultdict(list, {'loss': [np.float32(1)]})
    beside = {
        'scalars': [np.float64(0.5), np.int64(3), np.bool_(True), np.str_('a')], 'types': [np.dtype('f4'), np.float32],
        'array': np.arange(3.0), 'strided': np.ones((4, 4))[::2].T, 'objects': np.array([1, 'a', None], dtype=object),
        'record': np.zeros(2, [('a', 'i4'), ('b', 'f8')]), 'random': np.random.get_state(),
        'states': [np.random.RandomState(0), np.random.default_rng(0)], 'log': log, 'recent': deque([1.0], maxlen=3),
        'args': argparse.Namespace(out=Path('x'), lr=0.1, more=argparse.Namespace(seeds=(1, 2))), 'sets': {1, 2},
        'space': SimpleNamespace(a=1), 'when': datetime.datetime(2026, 1, 1), 'took': datetime.timedelta(1),
        'ordered': OrderedDict(a=Counter('ab')), 'python': random.getstate(), 'torch': torch.get_rng_state(),
        'size': torch.Size([1]), 'device': torch.device('cpu'), 'kind': torch.float16, 'complex': 1j, 'bytes': b'ab'}
    for name, value in beside.items():
        for legacy in (False, True):
            path = tmp_path / 'a.pt'
            torch.save({'state_dict': state, name: value}, path, _use_new_zipfile_serialization=not legacy)
            assert torch.equal(load_checkpoint(ours(), path).state_dict['fc.weight'], state['fc.weight']), name
    assert_loads(saved(tmp_path / 'a.pt', {'state_dict': state, **beside}), paf_wrn())
    core = b'numpy.core' if b'numpy._core' in (whole := pickle.dumps(np.float64(1), 2)) else b'numpy._core'
    assert re.search(rb'numpy\._?core\.multiarray\nscalar', re.sub(rb'numpy\._?core', core, whole))
    for other in ('numpy.core', 'numpy._core'):  # numpy 2 writes another name than numpy 1
        text = re.sub(rb'numpy\._?core', other.encode(), pickle.dumps({'a': np.float64(1)}, 2))
        torch.save({'a': 1}, path)
        with zipfile.ZipFile(path, 'w') as archive:
            for part, body in (('data.pkl', text), ('byteorder', b'little'), ('version', b'3\n')):
                archive.writestr(f'a/{part}', body)
        assert read_file(path).keys() == {'a'}


@pytest.mark.parametrize('name', ['a.pt', 'a.bin', 'a.safetensors', 'a', 'a.pth.tar', 'a.ckpt', 'a.npz'])
def test_the_format_is_told_by_the_content(tmp_path: Path, name: str) -> None:
    state, path = paf_wrn().state_dict(), tmp_path / name
    for legacy in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        assert_loads(path, paf_wrn())
    save_file(ours().state_dict(), path)
    assert read_file(path).keys() == ours().state_dict().keys()
    pointers = {
        'is a pointer of Git LFS ': 'version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n',
        'is a pointer of git-annex ': '/annex/objects/SHA256E-s123--abc.pt\n'}
    for said, text in pointers.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=rf'^[^\n]*{said}[^\n]*; run git [^\n]*$'):
            read_file(path)
    path.unlink()
    path.symlink_to('.git/annex/objects/ab/cd/SHA256E-s123--abc/SHA256E-s123--abc')
    with pytest.raises(ValueError, match=r'is a link of git-annex whose file is not here; run git annex get'):
        read_file(path)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 1e300])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    """Also those that become so: the network has another type than the file."""
    state = {key: v.double() if v.is_floating_point() else v for key, v in paf_as_ours(0).state_dict().items()}
    for key in ('fc.weight', 'bn1.running_var', 'act.alpha'):
        wrong = {**state, key: state[key].clone()}
        wrong[key].view(-1)[0] = value
        model = ours()
        with pytest.raises(ValueError, match=rf'^[^\n]*{key} has 1 values that are not finite; expected finite[^\n]*$'):
            load_checkpoint(model, saved(tmp_path / 'a.pt', wrong))
        torch.testing.assert_close(model.state_dict(), ours().state_dict(), **EXACT)


@pytest.mark.parametrize(('change', 'said'), [
    (lambda v: v.to_sparse(), 'is a sparse tensor'), (lambda v: v.to('meta'), 'is a meta tensor'),
    (lambda v: v.to(torch.complex64), 'is a complex tensor'), (lambda v: v.to(torch.int8), r'is torch\.int8 and not'),
    (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), 'is a quantised tensor')])
def test_weights_that_are_no_array_of_real_numbers(tmp_path: Path, change: Any, said: str) -> None:
    state = paf_as_ours(0).state_dict()
    path = saved(tmp_path / 'a.pt', {**state, 'fc.weight': change(state['fc.weight'])})
    with pytest.raises(ValueError, match=rf'^[^\n]*fc\.weight {said}[^\n]*$'):
        read_checkpoint(path, ours())
