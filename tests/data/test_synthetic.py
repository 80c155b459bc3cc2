"""Synthetic images: formats against numpy itself, every bad file named, an order without duplicates, little memory."""

from __future__ import annotations

import collections
import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_paf.data.synthetic import Permutation, SyntheticSet, open_synthetic

SHAPE = (4, 5, 3)


def made(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8), rng.integers(0, 10, n)


def opened(path: object, **kwargs: object) -> SyntheticSet:
    return open_synthetic(path, SHAPE, 10, log=lambda text: None, **kwargs)


def assert_holds(synthetic: SyntheticSet, images: np.ndarray, labels: np.ndarray) -> None:
    """In any order, with repetitions, from any part."""
    assert len(synthetic) == len(images)
    indices = np.random.default_rng(1).integers(0, len(images), 3 * len(images))
    for chosen in (indices, torch.from_numpy(indices), np.arange(len(images)), indices[:0]):
        x, y = synthetic[chosen]
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(x.numpy(), images[np.asarray(chosen)])
        assert np.array_equal(y.numpy(), labels[np.asarray(chosen)])


@pytest.mark.parametrize(('image', 'label'), [('image', 'label'), ('X', 'Y')])
@pytest.mark.parametrize('dtype', ['u1', '<i8', '>i4'])
def test_an_npz_is_read_in_place(tmp_path: Path, image: str, label: str, dtype: str) -> None:
    images, labels = made()
    np.savez(tmp_path / 'a.npz', **{label: labels.astype(dtype), 'other': np.zeros(3), image: images})
    before = sorted(tmp_path.iterdir())
    assert_holds(opened(tmp_path / 'a.npz'), images, labels)
    assert sorted(tmp_path.iterdir()) == before


def test_a_member_is_found_behind_a_longer_local_header(tmp_path: Path) -> None:
    """numpy streams a member, so that its local header has a zip64 field that the directory of the archive lacks."""
    images, labels = made()
    np.savez(tmp_path / 'a.npz', image=images, label=labels)
    with zipfile.ZipFile(tmp_path / 'a.npz') as archive:
        members = {info.filename: info for info in archive.infolist()}
        local = (tmp_path / 'a.npz').read_bytes()[members['image.npy'].header_offset:][:30]
        assert struct.unpack('<HH', local[26:])[1] != len(members['image.npy'].extra)
    with zipfile.ZipFile(tmp_path / 'b.npz', 'w') as archive:  # and one without any such field
        for name, array in (('image', images), ('label', labels)):
            np.save(tmp_path / 'c.npy', array)
            archive.write(tmp_path / 'c.npy', f'{name}.npy')
    assert_holds(opened(tmp_path / 'b.npz'), images, labels)


def test_a_compressed_npz_is_unpacked_once(tmp_path: Path) -> None:
    images, labels = made()
    path, said = tmp_path / 'edm.npz', []
    np.savez_compressed(path, image=images, label=labels)
    for _ in range(2):
        assert_holds(open_synthetic(path, SHAPE, 10, log=said.append), images, labels)
    assert len(said) == 1
    assert re.fullmatch(rf'unpacks {path} to {path}\.unpacked, 0\.00 GB, once', said[0])
    assert np.array_equal(np.load(tmp_path / 'edm.npz.unpacked' / 'images.npy'), images)
    assert_holds(opened(path, cache=tmp_path / 'new' / 'cache'), images, labels)
    assert (tmp_path / 'new' / 'cache' / 'edm.npz.unpacked' / 'labels.npy').is_file()
    np.savez_compressed(path, image=images[:20], label=labels[:20])
    with pytest.raises(ValueError, match=r'unpacked was made from another edm\.npz; delete that directory'):
        opened(path)


def test_parts_are_one_set_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    images, labels = made(60)
    for part, chosen in enumerate(np.array_split(np.arange(60), [5, 7, 20, 21, 22, 30, 31, 33, 40, 41])):
        np.savez(tmp_path / f'cifar5m_part{part}.npz', X=images[chosen], Y=labels[chosen])
    assert_holds(opened(tmp_path), images, labels)
    two = [tmp_path / 'cifar5m_part10.npz', str(tmp_path / 'cifar5m_part0.npz')]
    assert_holds(opened(two), np.concatenate([images[41:], images[:5]]), np.concatenate([labels[41:], labels[:5]]))


def test_npy_pairs(tmp_path: Path) -> None:
    images, labels = made()
    for images_name, labels_name in (('images', 'labels'), ('edm_images_1m', 'edm_labels_1m')):
        np.save(tmp_path / f'{images_name}.npy', images)
        np.save(tmp_path / f'{labels_name}.npy', labels.astype(np.int16))
        assert_holds(opened(tmp_path / f'{images_name}.npy'), images, labels)
    assert_holds(opened(tmp_path), images, labels)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('order', ['C', 'F'])
def test_a_pickle_is_converted_once(tmp_path: Path, protocol: int, order: str) -> None:
    images, labels = made()
    content = {'data': np.asarray(images, order=order), 'extrapolated_targets': labels.astype('>i4'), 'model': 'wrn',
               'epochs': [1, 2.5, None], 'flags': labels > 3}
    path = tmp_path / 'ti_500K_pseudo_labeled.pickle'
    path.write_bytes(pickle.dumps(content, protocol))
    assert_holds(opened(path), images, labels)
    path_of_list = tmp_path / 'list.pickle'
    path_of_list.write_bytes(pickle.dumps({'data': images, 'extrapolated_targets': labels.tolist()}, protocol))
    assert_holds(opened(path_of_list), images, labels)
    made_at = (tmp_path / f'{path.name}.unpacked' / 'images.npy').stat().st_mtime_ns
    assert_holds(opened(path), images, labels)
    assert (tmp_path / f'{path.name}.unpacked' / 'images.npy').stat().st_mtime_ns == made_at


def test_a_pickle_of_python_2_and_numpy_1(tmp_path: Path) -> None:
    """Opcode by opcode, as numpy 1.14 under Python 2.7 wrote it: text for bytes, and numpy.core."""
    images, labels = made(2)

    def text(value: bytes) -> bytes:
        return b'T' + struct.pack('<i', len(value)) + value

    def array(values: np.ndarray, code: bytes, endian: bytes, shape: bytes) -> bytes:
        return (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85' + text(b'b') + b'\x87R'
                + b'(K\x01' + shape + b'cnumpy\ndtype\n' + text(code) + b'K\x00K\x01\x87R'
                + b'(K\x03' + text(endian) + b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
                + b'I00\n' + text(values.tobytes()) + b'tb')

    raw = (b'\x80\x02}(' + text(b'data') + array(images, b'u1', b'|', b'(K\x02K\x04K\x05K\x03t')
           + text(b'extrapolated_targets') + array(labels.astype('<i8'), b'i8', b'<', b'K\x02\x85') + b'u.')
    assert np.array_equal(pickle.loads(raw, encoding='latin1')['data'], images)
    (tmp_path / 'old.pickle').write_bytes(raw)
    assert_holds(opened(tmp_path / 'old.pickle'), images, labels)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f'touch {self.mark}',)


@pytest.mark.parametrize('place', ['extra', 'data', 'array'])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    images, labels = made()
    evil, mark = Evil(tmp_path / 'mark'), tmp_path / 'mark'
    content = {'data': images, 'extrapolated_targets': labels}
    content[place] = np.array([evil], object) if place == 'array' else evil
    (tmp_path / 'a.pickle').write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"asks for posix\.system, which is code and was not run|array of type 'O8'"):
        opened(tmp_path / 'a.pickle')
    assert not mark.exists()
    assert [path.name for path in tmp_path.iterdir()] == ['a.pickle']
    pickle.loads((tmp_path / 'a.pickle').read_bytes())
    assert mark.exists()  # so the file would have


@pytest.mark.parametrize(('value', 'words'), [
    (collections.OrderedDict(data=1), r'asks for collections\.OrderedDict'),
    ([1, 2], r'holds a list; expected data and extrapolated_targets'),
    ({'data': 1, 'labels': 2}, r'holds data, labels; expected data and extrapolated_targets'),
    ({'data': 'text', 'extrapolated_targets': [1]}, r'data is a str; expected an array of integers'),
    ({'data': np.zeros((1, *SHAPE)), 'extrapolated_targets': [1]}, r"an array of type 'f8'"),
    ({'data': np.zeros((1, *SHAPE), np.uint8), 'extrapolated_targets': [1, 2]}, r'int64 \(2,\); expected integers'),
    ({'data': np.zeros((1, *SHAPE), np.uint8), 'extrapolated_targets': [10]}, r'labels span \[10, 10\]; expected'),
    ({'data': np.zeros((1, 3, 4, 5), np.uint8), 'extrapolated_targets': [1]}, r'expected uint8 \(n, 4, 5, 3\)'),
    (torch.zeros(2), r'asks for torch\._utils\._rebuild_tensor_v2'),
])
def test_other_pickles_are_named(tmp_path: Path, value: object, words: str) -> None:
    (tmp_path / 'a.pickle').write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=words) as info:
        opened(tmp_path / 'a.pickle')
    assert '\n' not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ['a.pickle']


def test_every_cut_of_a_pickle_is_named(tmp_path: Path) -> None:
    images, labels = made(1)
    whole = pickle.dumps({'data': images, 'extrapolated_targets': labels})
    for length in range(6, len(whole)):
        (tmp_path / 'a.pickle').write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r'a\.pickle: .*expected a pickled dict'):
            opened(tmp_path / 'a.pickle')


@pytest.mark.parametrize(('arrays', 'words'), [
    ({'images': 0, 'label': 0}, 'holds images, label; expected image and label, X and Y, images and labels, or arr_0'),
    ({'image': np.zeros((2, *SHAPE), np.float32), 'label': [1, 2]}, r'image is float32 \(2, 4, 5, 3\); expected uint8'),
    ({'image': np.zeros((2, 3, 4, 5), np.uint8), 'label': [1, 2]}, r'uint8 \(2, 3, 4, 5\); expected uint8 \(n, 4'),
    ({'image': np.zeros((0, *SHAPE), np.uint8), 'label': np.zeros(0, int)}, r'uint8 \(0, 4, 5, 3\); expected'),
    ({'image': np.zeros((2, *SHAPE), np.uint8, order='F'), 'label': [1, 2]}, 'image is in Fortran order'),
    ({'image': np.zeros((2, *SHAPE), np.uint8), 'label': [1.0, 2.0]}, r'label is float64 \(2,\); expected integers'),
    ({'image': np.zeros((2, *SHAPE), np.uint8), 'label': [[1, 2]]}, r'label is int64 \(1, 2\); expected integers'),
    ({'image': np.zeros((2, *SHAPE), np.uint8), 'label': [1, 2, 3]}, 'label: 3 labels for 2 images'),
    ({'image': np.zeros((2, *SHAPE), np.uint8), 'label': [1, -1]}, r'label: labels span \[-1, 1\]; expected \[0, 9\]'),
    ({'image': np.zeros((2, *SHAPE), np.uint8), 'label': [257, 1]}, r'label: labels span \[1, 257\]; expected \[0, 9'),
    ({'image': np.zeros((2, *SHAPE), np.uint8), 'label': np.array([object()] * 2)}, r'label is object \(2,\); exp'),
])
@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_wrong_arrays_are_named(tmp_path: Path, arrays: dict[str, object], words: str, save: object) -> None:
    save(tmp_path / 'a.npz', **arrays)
    with pytest.raises(ValueError, match=words) as info:
        opened(tmp_path / 'a.npz')
    assert '\n' not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ['a.npz']


def test_every_label_is_checked(tmp_path: Path) -> None:
    """The wrong one is in the last of several blocks."""
    labels = np.zeros((1 << 20) + 7, np.uint8)
    labels[-1] = 10
    np.save(tmp_path / 'images.npy', np.zeros((len(labels), 1, 1, 1), np.uint8))
    np.save(tmp_path / 'labels.npy', labels)
    with pytest.raises(ValueError, match=r'labels\.npy: labels span \[0, 10\]; expected \[0, 9\]'):
        open_synthetic(tmp_path, (1, 1, 1), 10)
    assert open_synthetic(tmp_path, (1, 1, 1), 11)[np.array([0, len(labels) - 1])][1].tolist() == [0, 10]


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    images, labels = made()
    with pytest.raises(FileNotFoundError, match=r'a\.npz is missing; expected synthetic data'):
        opened(tmp_path / 'a.npz')
    with pytest.raises(FileNotFoundError, match=r'has no \.npz'):
        opened(tmp_path)
    with pytest.raises(ValueError, match='at least one'):
        opened([])
    (tmp_path / 'a.txt').write_text('hello world')
    with pytest.raises(ValueError, match=r"a\.txt begins with b'hello '; expected an npz, an npy or a pickle"):
        opened(tmp_path / 'a.txt')
    np.save(tmp_path / 'images.npy', images)
    with pytest.raises(FileNotFoundError, match=r'images\.npy has no labels'):
        opened(tmp_path)
    np.save(tmp_path / 'labels.npy', labels)
    whole = (tmp_path / 'images.npy').read_bytes()
    (tmp_path / 'images.npy').write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r'images\.npy has 2,527 bytes; expected 2,528 for 40 images'):
        opened(tmp_path)
    (tmp_path / 'images.npy').write_bytes(whole[:60])
    with pytest.raises(ValueError, match=r'images\.npy is no \.npy array'):
        opened(tmp_path)
    (tmp_path / 'images.npy').write_bytes(whole)
    (tmp_path / 'labels.npy').write_bytes((tmp_path / 'labels.npy').read_bytes()[:-9])
    with pytest.raises(ValueError, match=r'labels\.npy ends within label 38 of 40'):
        opened(tmp_path)
    synthetic = open_synthetic(_npz(tmp_path / 'b.npz', np.savez), SHAPE, 10)
    with pytest.raises(IndexError, match=r'span \[0, 40\]; b\.npz has 40'):
        synthetic[np.array([0, 40])]
    with pytest.raises(IndexError, match='span'):
        synthetic[np.array([-1, 2])]
    os.truncate(tmp_path / 'b.npz', 500)
    with pytest.raises(OSError, match=r'b\.npz ends within image 39; it was cut short since'):
        synthetic[np.array([39])]
    with pytest.raises(ValueError, match=r'b\.npz is damaged \(File is not a zip file\)'):
        opened(tmp_path / 'b.npz')


def _npz(path: Path, save: object) -> Path:
    save(path, **dict(zip(('image', 'label'), made())))
    return path


def test_a_damaged_compressed_npz_leaves_nothing_behind(tmp_path: Path) -> None:
    path = _npz(tmp_path / 'a.npz', np.savez_compressed)
    raw = bytearray(path.read_bytes())
    raw[1000:1010] = bytes(10)  # within the images
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r'a\.npz is damaged \(.*\); fetch it again'):
        opened(path)
    assert [path.name for path in tmp_path.iterdir()] == ['a.npz']


def test_no_space_is_one_line_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _npz(tmp_path / 'a.npz', np.savez_compressed)
    usage = collections.namedtuple('usage', 'free')
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda where: usage(100))
        with pytest.raises(OSError, match=r'a\.npz needs 0\.00 GB unpacked, .* has 0\.00 GB free; make room, or name'):
            opened(path)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(shutil, 'copyfileobj', full)
    with pytest.raises(OSError, match=r'unpacked could not be written: No space left on device; make room') as info:
        opened(path)
    assert '\n' not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ['a.npz']


def test_what_a_killed_process_left_goes_away(tmp_path: Path) -> None:
    path = _npz(tmp_path / 'a.npz', np.savez_compressed)
    (tmp_path / '.a.npz.unpacked.x1.part').mkdir()
    opened(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.npz', 'a.npz.unpacked']


UNPACK = """
import multiprocessing, sys
from timm_paf.data.synthetic import open_synthetic

def unpack(_):
    said = []
    open_synthetic(sys.argv[1], (4, 5, 3), 10, log=said.append)
    return len(said)

with multiprocessing.get_context('fork').Pool(4) as pool:
    print(sum(pool.map(unpack, range(8), chunksize=1)))
"""


def test_of_several_processes_one_unpacks(tmp_path: Path) -> None:
    path = _npz(tmp_path / 'a.npz', np.savez_compressed)
    # They fork from a process of their own: a fork of this one could inherit a lock that a thread holds.
    done = subprocess.run(
        [sys.executable, '-c', UNPACK, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == '1\n'


def test_without_locks_the_first_to_finish_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _npz(tmp_path / 'a.npz', np.savez_compressed)
    copy = shutil.copyfileobj

    def no_locks(*args: object) -> None:
        raise OSError(errno.EBADF, 'no locks')

    def another_is_faster(*args: object) -> None:
        monkeypatch.setattr(shutil, 'copyfileobj', copy)
        assert_holds(opened(path), *made())
        copy(*args)

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    monkeypatch.setattr(shutil, 'copyfileobj', another_is_faster)
    assert_holds(opened(path), *made())
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.npz', 'a.npz.unpacked']


def test_the_record_tells_sets_apart(tmp_path: Path) -> None:
    images, labels = made()
    np.savez(tmp_path / 'a.npz', image=images, label=labels)
    first = opened(tmp_path / 'a.npz').record()
    assert json.loads(json.dumps(first)) == first
    assert (first['n'], first['files']) == (40, ['a.npz'])
    assert opened(tmp_path / 'a.npz').record() == first
    images[39, 3, 4, 2] += 1
    np.savez(tmp_path / 'a.npz', image=images, label=labels)
    assert opened(tmp_path / 'a.npz').record() != first


@settings(max_examples=150)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2 ** 63))
def test_a_permutation_has_no_duplicates(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, seed)(np.arange(n))), np.arange(n))


@pytest.mark.parametrize('n', [2 ** 20 - 1, 2 ** 20, 2 ** 20 + 1, 6_000_000])
def test_a_large_permutation_has_no_duplicates(n: int) -> None:
    seen = np.zeros(n, bool)
    for start in range(0, n, 1 << 20):
        values = Permutation(n, 7)(np.arange(start, min(start + (1 << 20), n)))
        assert values.min() >= 0
        assert values.max() < n
        seen[values] = True
    assert seen.all()


def test_a_permutation_is_random() -> None:
    """Every value as often at every position; neighbours and passes unrelated."""
    n, draws = 7, 7000
    table = np.zeros((n, n))
    for seed in range(draws):
        table[np.arange(n), Permutation(n, seed)(np.arange(n))] += 1
    chi2 = ((table - draws / n) ** 2 / (draws / n)).sum()
    assert chi2 < 36 + 5 * np.sqrt(2 * 36)  # (n - 1)^2 degrees of freedom
    n = 50_000_000
    one, two = (Permutation(n, 3, number)(np.arange(100_000)) for number in range(2))
    for a, b in ((one[1:], one[:-1]), (one, two), (one, np.arange(100_000))):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(100_000)
    assert abs(np.histogram(one, 100, (0, n))[0] - 1000).max() < 5 * np.sqrt(1000)


def test_the_order_is_one_pass_after_another(tmp_path: Path) -> None:
    synthetic = opened(_npz(tmp_path / 'a.npz', np.savez))
    order = synthetic.order(np.arange(120), seed=5)
    passes = order.reshape(3, 40)
    assert all(sorted(one) == list(range(40)) for one in passes.tolist())
    assert len({tuple(one) for one in passes.tolist()}) == 3
    for start in (0, 17, 33, 79):  # any part of it alone, also across two passes
        assert np.array_equal(synthetic.order(np.arange(start, start + 30), seed=5), order[start:start + 30])
    assert not np.array_equal(synthetic.order(np.arange(120), seed=6), order)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_six_million_images_take_little_memory(tmp_path: Path) -> None:
    """18.4 GB in an npz: 4,000 batches of 256 synthetic and 256 real images, in a process of its own."""
    need, free = 20e9, shutil.disk_usage(tmp_path).free
    if free < need:
        pytest.skip(f'{tmp_path} has {free / 1e9:.0f} GB free; expected {need / 1e9:.0f}')
    count, path = 6_000_000, tmp_path / 'ddpm.npz'
    try:
        with zipfile.ZipFile(path, 'w') as archive:
            with archive.open('image.npy', 'w', force_zip64=True) as out:
                header = {'descr': '|u1', 'fortran_order': False, 'shape': (count, 32, 32, 3)}
                np.lib.format.write_array_header_1_0(out, header)
                for start in range(0, count, 50_000):
                    out.write(_pattern(np.arange(start, start + 50_000)).tobytes())
            with archive.open('label.npy', 'w') as out:
                np.lib.format.write_array(out, np.arange(count) % 10)
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', str(Path(__file__)), str(path)], cwd=ROOT,
            capture_output=True, text=True, check=False, env={**os.environ, 'PYTHONPATH': os.getcwd()})
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        growth = float(re.search(r'grew by ([0-9.]+) GB', done.stdout)[1])
        assert growth < 3
    finally:
        path.unlink(missing_ok=True)


def _pattern(indices: np.ndarray) -> np.ndarray:
    """An image that tells its index: (n, 32, 32, 3) whose every six bytes are a multiple of it."""
    index = (indices[:, None].astype(np.uint64) * np.uint64(2654435761)).astype('<u8').view(np.uint8)[:, :6]
    return np.tile(index, (1, 512)).reshape(-1, 32, 32, 3)


def _read_many(path: Path) -> None:
    """Print how fast batches are made, and by how much the peak of this process' memory grew meanwhile."""
    import time

    from timm_paf.data import Batches, ImageSet

    torch.set_num_threads(1)
    data = ImageSet('real', torch.zeros(50_000, 32, 32, 3, dtype=torch.uint8), torch.zeros(50_000).long(), 10)

    def rate(batches: Batches, steps: int, first: int = 0) -> float:
        started = time.perf_counter()
        for step in range(first, first + steps):
            batches[step]
        return steps * 512 / (time.perf_counter() - started)

    def peak() -> float:
        # getrusage's begins with that of the process that started this one
        return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024

    rate(Batches(data, 512, 0, 'cpu'), 20)
    before = peak()
    started = time.perf_counter()
    synthetic = open_synthetic(path, (32, 32, 3), 10)
    opening = time.perf_counter() - started
    batches = Batches(data, 512, 0, 'cpu', synthetic=synthetic)
    with open(path, 'rb') as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # nothing of it is in memory yet
    cold = rate(batches, 1000)
    cached = rate(Batches(data, 512, 0, 'cpu', synthetic=synthetic), 1000)
    rate(batches, 2000, 1000)
    growth = peak() - before
    plain = rate(Batches(data, 512, 0, 'cpu'), 1000)
    indices = np.random.default_rng(0).integers(0, len(synthetic), 3000)
    images, labels = synthetic[indices]
    assert np.array_equal(images.numpy(), _pattern(indices))
    assert np.array_equal(labels.numpy(), indices % 10)
    print(f'{len(synthetic):,} images opened in {opening:.2f} s; batches of 256 + 256: {cold:,.0f} images/s from the '
          f'disk, {cached:,.0f} from the cache; 512 real ones: {plain:,.0f}; the peak grew by {growth / 1e9:.3f} GB')


if __name__ == '__main__':
    _read_many(Path(sys.argv[1]))
