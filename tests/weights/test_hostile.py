"""Files of strangers: nothing in them runs, and what is wrong with them is said in one line."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT

from timm_paf.weights import load_bundle, load_checkpoint
from timm_paf.weights import sources as weight_sources
from timm_paf.weights.bundle_files import write_checksums
from timm_paf.weights.checkpoint_files import read_file

NET, IN_NET = 'wrn10_1_pssilu', 'resnet18_in_relu'
SMALL_IN = {'channels': (8, 8, 8, 8)}
EMBEDDED = ROOT / 'hub' / 'models' / 'wrn10_1_pssilu'


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / 'ran'
    yield path
    assert not path.exists(), 'code of a file ran'


class Call:
    """A pickle of it calls a function with arguments when it is read."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class State:
    """A pickle of it gives a second value to what a call returned."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


def payloads(marker: Path) -> dict[str, Any]:
    touch = f'open({str(marker)!r}, "w").close()'
    weights = timm.create_model(NET).state_dict()
    return {
        'system': Call(os.system, f'touch {marker}'),
        'eval': {'state_dict': weights, 'best': Call(eval, touch)},
        'exec in a Namespace': {'state_dict': weights, 'args': State(
            argparse.Namespace, (), {'a': Call(exec, touch)})},
        'nested': {'state_dict': {**weights, 'x': Call(getattr, Call(__import__, 'os'), 'system')}},
        'call of what a call returned': Call(map, Call(getattr, Call(__import__, 'os'), 'mkdir'), [str(marker)]),
        'a factory': {'state_dict': weights, 'log': State(collections.defaultdict, (Call(eval, 'dict'),))},
    }


def zipped(content: Any, path: Path, protocol: int) -> None:
    torch.save(content, path, pickle_protocol=protocol)


def legacy(content: Any, path: Path, protocol: int) -> None:
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def raw(content: Any, path: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps(content, protocol))


def tarred(content: Any, path: Path, protocol: int) -> None:
    inner = path.with_name('inner')
    legacy(content, inner, protocol)
    with tarfile.open(path, 'w') as archive:
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):  # the names of torch's first format
            archive.add(inner, name)


def overlay(name: str, **fields: Any) -> Callable[[Path], Any]:
    def load(path: Path) -> Any:
        found = {key: str(value).format(path=path) for key, value in fields.items()}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=found,
                                 **(SMALL_IN if name == IN_NET else {}))
    return load


def of_bundle(path: Path) -> Any:
    bundle = path.parent / 'bundle'
    shutil.copytree(EMBEDDED, bundle, dirs_exist_ok=True)
    shutil.copy(path, bundle / 'model.safetensors')
    write_checksums(bundle)
    return load_bundle(bundle)


PATHS: dict[str, Callable[[Path], Any]] = {
    'load_checkpoint': lambda path: load_checkpoint(timm.create_model(NET), path),
    'file': overlay(NET, file='{path}'),
    'file of ImageNet': overlay(IN_NET, file='{path}'),
    'source': overlay(NET, file='{path}', source='file'),
    'source of ImageNet': overlay(IN_NET, file='{path}', source='file'),
    'hub': overlay(NET, hf_hub_id='org/model', hf_hub_filename='{path}'),
    'hub of ImageNet': overlay(IN_NET, hf_hub_id='org/model', hf_hub_filename='{path}', source='hf-hub'),
    'custom': overlay(NET, hf_hub_id='org/model', hf_hub_filename='{path}', custom_load='hf'),
    'url': overlay(NET, url='file://{path}'),
    'url of ImageNet': overlay(IN_NET, url='file://{path}'),
    'checkpoint_path': lambda path: timm.create_model(NET, checkpoint_path=str(path)),
    'checkpoint_path of ImageNet': lambda path: timm.create_model(IN_NET, checkpoint_path=str(path), **SMALL_IN),
    'bundle': of_bundle,
}


def assert_refused(load: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(ValueError, match=r'^[^\n\r]+$') as caught:
        load(path)
    assert len(str(caught.value)) < 1200
    return str(caught.value)


@pytest.mark.parametrize('write', [zipped, legacy, raw, tarred], ids=lambda write: write.__name__)
@pytest.mark.parametrize('where', PATHS)
def test_a_pickle_runs_nowhere(
        where: str, write: Callable[[Any, Path, int], None], marker: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sources, 'hf_hub_download', lambda repo, name, **kwargs: name)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    some = where != 'load_checkpoint'
    for protocol in (2, 4) if some else range(6):
        for name, content in payloads(marker).items():
            path = tmp_path / f'{protocol} {name}.pt'.replace(' ', '-')
            write(content, path, protocol)
            said = assert_refused(PATHS[where], path)
            if where == 'load_checkpoint':
                assert ('needs code to be read (' if write is not tarred else 'is a tar archive of sys_info') in said
                assert_refused(PATHS[where], path.rename(path.with_suffix('.safetensors')))


def test_the_names_in_a_message_are_those_of_the_pickle(marker: Path, tmp_path: Path) -> None:
    trusted = 'torch.load(PATH, weights_only=False)'
    model = timm.create_model(NET)
    weights = model.state_dict()
    for content, said in (
            (Call(eval, '1'), r'\(\w+\.eval\): it holds a whole pickled object'),
            (model, rf'holds a whole pickled object.* torch\.save\({trusted}\.state_dict\(\), NEW\)'),
            ({'model': model, 'epoch': 3}, rf"beside the weights.* torch\.save\({trusted}\['model'\]\.state_dict\(\)"),
            ({'best': Call(eval, '1'), 'model': weights}, rf"beside the weights.* \({trusted}\['model'\], NEW\)")):
        for write in (zipped, legacy):
            for protocol in (2, 4, 5):
                write(content, tmp_path / 'a.pt', protocol)
                with pytest.raises(ValueError, match=said.replace('(PATH, weights_only=False)', r'\(PATH, [^)]*\)')
                                   .replace(r' \(torch', r'\(torch')):
                    read_file(tmp_path / 'a.pt')
    zipped(weights, tmp_path / 'a.pt', 4)
    with pytest.raises(ValueError, match=r'is written in protocol 4 of pickle; expected protocol 2'):
        read_file(tmp_path / 'a.pt')


def test_objects_of_numpy_are_not_built(tmp_path: Path) -> None:
    """An array of a forged type would be memory read as pointers, which numpy does not check."""
    np = pytest.importorskip('numpy')
    forged = State(np.dtype, ('V8', False, True), (3, '|', None, ('a',), {'a': (np.dtype('O'), 0)}, 8, 1, 0))
    array = State(np.ndarray, ((1,), forged, b'12345678'))
    weights = timm.create_model(NET).state_dict()
    zipped({'state_dict': weights, 'history': array, 'more': np.ones(3), 'best': np.float32(1)}, tmp_path / 'a.pt', 2)
    before = set(torch.serialization.get_safe_globals())
    content = read_file(tmp_path / 'a.pt')
    assert {type(content[key]).__name__ for key in ('history', 'more', 'best')} == {'_Record'}
    assert torch.equal(content['state_dict']['fc.weight'], weights['fc.weight'])
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize('protocol', range(6))
def test_the_pickles_do_run_where_nobody_stops_them(protocol: int, tmp_path: Path) -> None:
    live = []
    for name, content in payloads(tmp_path / 'live').items():
        (tmp_path / 'live').unlink(missing_ok=True)
        raw(content, tmp_path / 'a', protocol)
        pickle.loads((tmp_path / 'a').read_bytes())
        if (tmp_path / 'live').exists():
            live.append(name)
    assert live == ['system', 'eval', 'exec in a Namespace']  # the others only lead there


# ---- sizes


def claim(path: Path, entries: int) -> Path:
    """A file of torch.save whose tensor claims so many entries that all lie on one number."""
    torch.save({'fc.weight': torch.ones(1).expand(entries)}, path)
    return path


def test_what_a_file_claims_is_not_believed(tmp_path: Path) -> None:
    net = timm.create_model(NET)
    path = claim(tmp_path / 'a.pt', 10**12)
    for load in (PATHS['load_checkpoint'], PATHS['file'], PATHS['checkpoint_path']):
        with pytest.raises(ValueError, match=r'^[^\n]*fc\.weight claims 1,000,000,000,000 entries in a file [^\n]*$'):
            load(path)
    header = json.dumps({'fc.weight': {'dtype': 'F32', 'shape': [10**6, 10**6], 'data_offsets': [0, 4 * 10**12]}})
    path.write_bytes(len(header).to_bytes(8, 'little') + header.encode() + bytes(4))
    with pytest.raises(ValueError, match=r'^[^\n]*is cut off or no safetensors file[^\n]*$'):
        load_checkpoint(net, path)
    for content in (bytes(8) + b'{', b'\xff' * 4 + bytes(4) + b'{}', b'{' * 100):
        path.write_bytes(content)
        assert_refused(PATHS['load_checkpoint'], path)
    legacy({'a': torch.ones(4)}, path, 2)
    body = path.read_bytes()
    numbers = body.replace(b'K\x04Nt', b'\x8a\x06' + (10**12).to_bytes(6, 'little') + b'Nt')
    assert numbers != body
    path.write_bytes(numbers)
    assert_refused(PATHS['load_checkpoint'], path)
    path.write_bytes(b'\x80\x02c__builtin__\nbytearray\n\x8a\x06' + (10**14).to_bytes(6, 'little') + b'\x85R.')
    assert_refused(PATHS['load_checkpoint'], path)
    path.write_bytes(b'\x80\x02' + b'](' * 1 + b'(' * 100_000)
    assert_refused(PATHS['load_checkpoint'], path)


def test_archives_that_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    path = tmp_path / 'a.pt'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(50_000_000))
    with pytest.raises(ValueError, match=r'^[^\n]* and claims 50,000,000 unpacked; expected a file of torch\.save'):
        read_file(path)
    torch.save({'a': torch.ones(3)}, path)
    whole = path.read_bytes()
    end = whole.rindex(b'PK\x05\x06')
    for at, value in ((8, b'\xff\xfe'), (10, b'\xff\xfe'), (12, b'\xff\xff\xff\xfe'), (16, b'\xff\xff\xff\xfe')):
        path.write_bytes(whole[:end + at] + value + whole[end + at + len(value):])
        try:
            assert torch.equal(read_file(path)['a'], torch.ones(3))
        except ValueError as error:
            assert '\n' not in str(error)  # noqa: PT017
    entry = whole.rindex(b'PK\x01\x02')
    path.write_bytes(whole[:entry + 24] + b'\xff\xff\xff\x7f' + whole[entry + 28:])  # its size unpacked
    assert_refused(read_file, path)


def test_archives_of_files_are_named(tmp_path: Path) -> None:
    path, inner = tmp_path / 'a.pt', tmp_path / 'model.pt'
    torch.save({'a': torch.ones(3)}, inner)
    for mode in ('w', 'w:gz', 'w:bz2', 'w:xz'):
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            archive.add(inner, 'model.pt')
        with pytest.raises(ValueError, match=r'^[^\n]*is a tar archive of model\.pt; [^\n]*unpack it \(tar -xf\)'):
            read_file(path)
    import gzip

    path.write_bytes(gzip.compress(inner.read_bytes()))
    with pytest.raises(ValueError, match=r'is packed with gzip; expected a checkpoint: unpack it$'):
        read_file(path)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.write(inner, 'model.pt')
    with pytest.raises(ValueError, match=r'^[^\n]*a zip archive of model\.pt\)[^\n]*unpack it'):
        read_file(path)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(path))
    with pytest.raises(ValueError, match=r'is a program of TorchScript; expected weights'):
        read_file(path)
