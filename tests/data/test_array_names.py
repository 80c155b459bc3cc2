"""Names and shapes that people save generated images under, and headers that claim more than a file has."""

from __future__ import annotations

import itertools
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from timm_paf.data import SyntheticSet, open_synthetic

SHAPE, HUGE = (4, 5, 3), 10 ** 12
IMAGES = np.random.default_rng(0).integers(0, 256, (20, *SHAPE), dtype=np.uint8)
LABELS = np.arange(20) % 10


def opened(path: object) -> SyntheticSet:
    return open_synthetic(path, SHAPE, 10, log=lambda text: None)


def refused(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as info:
        opened(path)
    assert '\n' not in str(info.value)
    assert len(str(info.value)) < 500


def assert_holds_all(synthetic: SyntheticSet) -> None:
    x, y = synthetic[np.arange(20)]
    assert np.array_equal(x.numpy(), IMAGES)
    assert np.array_equal(y.numpy(), LABELS)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('names', [
    ('image', 'label'), ('images', 'labels'), ('arr_0', 'arr_1'), ('X', 'Y'), ('x', 'y'), ('Images', 'LABELS')])
def test_pairs_of_names_in_any_case(tmp_path: Path, names: tuple[str, str], save: object) -> None:
    save(tmp_path / 'a.npz', **dict(zip(names, (IMAGES, LABELS))), other=np.zeros(3))
    assert_holds_all(opened(tmp_path / 'a.npz'))


def test_names_written_as_they_are_come_first(tmp_path: Path) -> None:
    np.savez(tmp_path / 'a.npz', **{'x': IMAGES[:2], 'y': LABELS[:2], 'X': IMAGES, 'Y': LABELS})
    assert_holds_all(opened(tmp_path / 'a.npz'))
    np.savez(tmp_path / 'b.npz', **{'Image': IMAGES, 'IMAGE': IMAGES, 'label': LABELS})
    refused(tmp_path / 'b.npz', 'holds Image, IMAGE, label; expected image and label, X and Y, images and labels, or')
    with zipfile.ZipFile(tmp_path / 'c.npz', 'w') as archive:
        archive.writestr('image', b'')
        archive.writestr('label', b'')
    refused(tmp_path / 'c.npz', 'holds nothing; expected image and label')


def test_labels_in_a_column(tmp_path: Path) -> None:
    column = LABELS[:, None]
    np.savez(tmp_path / 'a.npz', image=IMAGES, label=column)
    np.savez_compressed(tmp_path / 'b.npz', image=IMAGES, label=column)
    np.savez(tmp_path / 'd.npz', image=IMAGES, label=np.asfortranarray(np.stack([LABELS] * 2, 1))[:, :1])
    (tmp_path / 'c.pickle').write_bytes(pickle.dumps({'data': IMAGES, 'extrapolated_targets': column}))
    for name in ('a.npz', 'b.npz', 'c.pickle', 'd.npz'):
        assert_holds_all(opened(tmp_path / name))
    np.savez(tmp_path / 'e.npz', image=IMAGES, label=np.stack([LABELS] * 2, 1))
    refused(tmp_path / 'e.npz', r'label is int64 \(20, 2\); expected integers')


def header(shape: object, dtype: str = '|u1') -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode() + b'\n'
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text


CLAIMS = [(count, kind, lie) for count in (HUGE, 2 ** 63, 10 ** 400, -5) for kind in (
    zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA) for lie in (False, True)]


@pytest.mark.parametrize(('count', 'kind', 'lie'), CLAIMS, ids=range(len(CLAIMS)))
def test_claims_in_an_npz_take_no_memory(tmp_path: Path, count: int, kind: int, lie: bool) -> None:
    """The archive's directory may tell the same lie as the header of the array."""
    path, images = tmp_path / 'a.npz', header((count, *SHAPE))
    with zipfile.ZipFile(path, 'w', kind) as archive:
        archive.writestr('image.npy', images + bytes(100))
        archive.writestr('label.npy', header((count,)) + bytes(100))
    if lie and 0 < count * 60 < 2 ** 63:
        with zipfile.ZipFile(path, 'a', kind) as archive:
            archive.getinfo('image.npy').file_size = len(images) + count * 60
            archive._didModify = True
    refused(path, r'image (has|claims|is)|is damaged')
    assert [each.name for each in tmp_path.iterdir()] == ['a.npz']


@pytest.mark.parametrize('count', [HUGE, 2 ** 63, 10 ** 400, -5, 0, True], ids=range(6))
def test_claims_in_an_npy_take_no_memory(tmp_path: Path, count: int) -> None:
    (tmp_path / 'images.npy').write_bytes(header((count, *SHAPE)) + bytes(10))
    (tmp_path / 'labels.npy').write_bytes(header((count,)) + bytes(10))
    refused(tmp_path, r'images\.npy (has|is|claims)')
    np.save(tmp_path / 'images.npy', IMAGES)
    refused(tmp_path, r'labels\.npy(: .* labels for 20 images| is| claims)')


@pytest.mark.parametrize('text', [
    '(' * 5000, '[' * 200 + ']' * 200, '{[]: 1}', "{1: 2, 'a': 3}", '"""', '\x00', '\\', '1' * 9000, '-' * 8000 + '1'])
def test_headers_of_any_text_are_named(tmp_path: Path, text: str) -> None:
    for version, size in ((1, '<H'), (2, '<I'), (3, '<I'), (9, '<I')):
        raw = text.encode() + b'\n'
        (tmp_path / 'images.npy').write_bytes(b'\x93NUMPY' + bytes([version, 0]) + struct.pack(size, len(raw)) + raw)
        np.save(tmp_path / 'labels.npy', LABELS)
        refused(tmp_path, r'images\.npy is no \.npy array: ')


PIECES = st.one_of(st.binary(max_size=9), st.sampled_from([
    b'\x8e' + struct.pack('<Q', HUGE), b'\x8d' + struct.pack('<Q', HUGE), b'\x96' + struct.pack('<Q', HUGE),
    b'B' + struct.pack('<I', 2 ** 31 - 1), b'\x95' + struct.pack('<Q', HUGE), b'\x8b' + struct.pack('<I', 2 ** 31 - 1),
    b'K\x01r' + struct.pack('<I', 2 ** 28), b'}', b']', b'(', b'u', b'e', b'.', b'0', b'2', b'h\x00',
    b'c__builtin__\neval\n']))


@settings(max_examples=60)
@given(st.lists(PIECES, max_size=8))
@example([b'\x8e' + struct.pack('<Q', HUGE)])
@example([b'\x8e' + struct.pack('<Q', 2 ** 63)])
@example([b'P'])
@example([b'K\x01r' + struct.pack('<I', 2 ** 32 - 1)])
@example([b'K\x01p99999999999\n'])
@example([b'}', b'Va\\u000ab\n', b'K\x01', b's', b'.'])
@example([b'\x8b' + struct.pack('<i', -1)])
def test_pickles_of_any_bytes_are_named(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    path = tmp_path_factory.mktemp('pickle') / 'a.pickle'
    path.write_bytes(b'\x80\x04' + b''.join(pieces))
    refused(path, r'a\.pickle[: ]')


def test_a_pickled_label_beyond_64_bits_is_named(tmp_path: Path) -> None:
    (tmp_path / 'a.pickle').write_bytes(pickle.dumps({'data': IMAGES, 'extrapolated_targets': [2 ** 70] * 20}))
    refused(tmp_path / 'a.pickle', 'extrapolated_targets has a number beyond 64 bits; expected labels from 0')


@pytest.mark.parametrize(('method', 'step'), itertools.product(
    (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA), range(4)))
def test_damage_in_a_packed_member_is_named(tmp_path: Path, method: int, step: int) -> None:
    path = tmp_path / 'a.npz'
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, array in (('image', IMAGES), ('label', LABELS)):
            np.save(tmp_path / 'x.npy', array)
            archive.write(tmp_path / 'x.npy', f'{name}.npy')
    raw = bytearray(path.read_bytes())
    start = 200 + 200 * step
    raw[start:start + 20] = bytes(20)
    path.write_bytes(raw)
    refused(path, r'a\.npz is damaged|a\.npz: (image|label)')
    assert {each.name for each in tmp_path.iterdir()} == {'a.npz', 'x.npy'}


def test_the_home_directory_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    np.savez_compressed(tmp_path / 'a.npz', image=IMAGES, label=LABELS)
    for path in ('~/a.npz', ['~/a.npz'], Path('~/a.npz')):
        assert_holds_all(opened(path))
    assert_holds_all(open_synthetic('~/a.npz', SHAPE, 10, cache='~/cache', log=lambda text: None))
    assert (tmp_path / 'cache').is_dir()


PAIRS = b')' + b'2\x86' * 20  # a pair of pairs, 2^20 of them; a hash of 2^60 has no end
GIVEN = {
    'a hash of a million pairs': (b'}' + PAIRS + b'K\x01s.', 'a tuple as a key'),
    'the same by other opcodes': (b'}(' + PAIRS + b'K\x01u.', 'a tuple as a key'),
    'in a dict of protocol 0': (b'(' + PAIRS + b'K\x01d.', 'a tuple as a key'),
    'in a set': (b'\x8f(' + PAIRS + b'\x90.', 'a tuple as a key'),
    'in a frozen set': (b'(' + PAIRS + b'\x91.', 'a tuple as a key'),
    'a text of a million pairs': (b'c_codecs\nencode\nX\0\0\0\0' + PAIRS + b'\x86R.', 'bytes in another encoding'),
    'a state for a function': (b'c_codecs\nencode\n})\x86b.', 'a function as an array'),
    'a number as a name': (b'}\x8b' + struct.pack('<i', 5000) + b'\x7f' * 5000 + b'K\x01s.', 'holds no names'),
    'a long name': (b'}X' + struct.pack('<I', 10 ** 6) + b'a' * 10 ** 6 + b'K\x01s.', r'holds a{200}\.\.\.;'),
    'a long line': (b'c' + b'a' * 10 ** 6, r'asks for a{191}\.\.\.;')}


@pytest.mark.parametrize('case', GIVEN)
def test_what_a_pickle_gives_costs_no_more_than_its_length(tmp_path: Path, case: str) -> None:
    content, words = GIVEN[case]
    (tmp_path / 'a.pickle').write_bytes(b'\x80\x04' + content)
    refused(tmp_path / 'a.pickle', words)


def test_a_pickled_bytearray_takes_no_memory_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / 'a.pickle').write_bytes(b'\x80\x05\x96' + struct.pack('<Q', 4 << 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / 'a.pickle', 'cut short')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
