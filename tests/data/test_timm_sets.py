"""Data sets of timm that are reached by index: the images, labels and classes are timm's, whatever reads them."""

from __future__ import annotations

import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset

from timm_paf.data import IndexedBatches, IndexedImages, open_images

RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with 8 training and 3 validation images each, as directories, tar files and torchvision's MNIST."""
    root = tmp_path_factory.mktemp('sets') / 'pets'
    for split, count in (('train', 8), ('val', 3)):
        for label, name in enumerate(('cat2', 'cat10', 'dog')):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = RNG.integers(10, 60, 2)
                image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
                (image.convert('L') if i == 2 else image).save(
                    root / split / name / f'{label}_{i}.{"png" if i % 2 else "JPEG"}')
        (root / 'tars').mkdir(exist_ok=True)
        with tarfile.open(root / 'tars' / f'{split}.tar', 'w') as file:
            file.add(root / split, arcname='pets')
    write_mnist(root, RNG.integers(0, 10, 30))
    return root


def write_mnist(root: Path, labels: np.ndarray) -> None:
    raw = root / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for split in ('train', 't10k'):
        images = RNG.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        (raw / f'{split}-images-idx3-ubyte').write_bytes(struct.pack('>4i', 2051, *images.shape) + images.tobytes())
        (raw / f'{split}-labels-idx1-ubyte').write_bytes(
            struct.pack('>2i', 2049, len(labels)) + labels.astype(np.uint8).tobytes())


SETS = [  # the name here, the directory below root, and what timm is asked for
    ('torch/image_folder', '', 'torch/image_folder', ('', '')),
    ('torch/mnist', '', 'torch/mnist', ('', '')),
    ('folder', 'tars', '', ('train.tar', 'val.tar')),
    ('hfds', '', 'hfds', ('', ''))]


@pytest.fixture(params=SETS, ids=lambda case: case[0])
def case(root: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
         tmp_path: Path) -> tuple[dict[bool, IndexedImages], dict[bool, object]]:
    """Both splits as they are opened here, and by timm."""
    name, below, of_timm, files = request.param
    place: Path | None = root / below
    if name == 'hfds':
        pytest.importorskip('datasets')
        monkeypatch.setenv('HF_HOME', str(tmp_path))
        for split in ('train', 'val'):
            shutil.copytree(root / split, tmp_path / 'pets' / split)
        monkeypatch.chdir(tmp_path)
        name, of_timm, place = 'hfds/pets', 'hfds/pets', tmp_path / 'cache'
    ours = {train: open_images(name, place, train) for train in (True, False)}
    theirs = {train: create_dataset(of_timm, str(place / file), split=split) for train, file, split in zip(
        (True, False), files, ('train', 'validation'))}
    return ours, theirs


def test_images_labels_and_classes_are_those_of_timm(
        case: tuple[dict[bool, IndexedImages], dict[bool, object]]) -> None:
    for train, data in case[0].items():
        theirs = case[1][train]
        assert len(data) == len(theirs) > 8
        assert sorted(data.classes) == (['cat10', 'cat2', 'dog'] if data.num_classes == 3 else sorted(theirs.classes))
        for index in range(len(data)):
            image, label = theirs[index]
            assert np.array_equal(np.asarray(data.read(index)), np.asarray(image.convert('RGB')))
            assert data.labels[index] == int(label)


def test_batches_do_not_depend_on_threads_processes_or_steps(
        case: tuple[dict[bool, IndexedImages], dict[bool, object]]) -> None:
    data = case[0][True]
    one = IndexedBatches(data, 8, 1, 'cpu', size=16, workers=1)
    whole = [one[step] for step in range(7)]
    many = IndexedBatches(data, 8, 1, 'cpu', size=16, workers=8)
    parts = [IndexedBatches(data, 8, 1, 'cpu', rank, 2, size=16) for rank in range(2)]
    for step in (6, 2, 3, 0):
        for got in (many[step], tuple(map(torch.cat, zip(*(part[step] for part in parts))))):
            assert torch.equal(got[0], whole[step][0])
            assert torch.equal(got[1], whole[step][1])


def test_the_digest_is_of_labels_and_images(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / 'train', tmp_path / 'train')
    def digest() -> dict[str, str]:
        return open_images('torch/image_folder', tmp_path, True).digest()
    before = digest()
    assert before == open_images('torch/image_folder', root, True).digest()
    assert before.keys() == {'sha256_of_sample'}
    (tmp_path / 'train' / 'dog' / '2_5.png').rename(tmp_path / 'train' / 'cat2' / '2_5.png')
    moved = digest()
    (tmp_path / 'train' / 'cat2' / '2_5.png').write_bytes((root / 'train' / 'dog' / '2_3.png').read_bytes())
    assert len({str(found) for found in (before, moved, digest())}) == 3
    data = open_images('torch/image_folder', root, True)
    assert data.without(['3', '4']).digest() != before
    assert data.without([]).digest() == before


def test_16_bits_and_damaged_files(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / 'train', tmp_path / 'train')
    deep = np.full((12, 12), 65535, np.uint16)
    deep[0] = 32768
    Image.fromarray(deep).save(tmp_path / 'train' / 'cat2' / '0_0.JPEG', 'png')
    (tmp_path / 'train' / 'cat2' / '0_1.png').write_bytes(b'no image')
    data = open_images('torch/image_folder', tmp_path, True)
    index = data.labels.tolist().index(data.classes.index('cat2'))
    assert np.unique(np.asarray(data.read(index))).tolist() == [128, 255]
    with pytest.raises(ValueError, match=rf'1 of 24 images.*image {index + 1} of torch/image_folder \(Pillow knows no'):
        data.check(print)
    with pytest.raises(ValueError, match=f'image {index + 1} of torch/image_folder is no readable image'):
        data.centre(index + 1, 16)
    assert data.check(print, skip=True) == [str(index + 1)]
    with tarfile.open(tmp_path / 'train.tar', 'w') as file:
        file.add(tmp_path / 'train', arcname='pets')
    shutil.rmtree(tmp_path / 'train')
    with pytest.raises(ValueError, match=r"1 of 24 images can't be read: image \d+ of folder \(Pillow"):
        open_images('folder', tmp_path, True).check(print)  # timm's data set gives the next image


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ('code of a stranger',)


def test_no_pickle_beside_a_large_tar_is_read(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(root / 'tars' / 'train.tar', tmp_path)
    with open(tmp_path / 'train.tar', 'r+b') as file:
        file.truncate(11 * 1024 ** 3)  # from 10 GB on timm keeps a pickle; this file takes no room
    (tmp_path / '_train_tarinfos.pickle').write_bytes(pickle.dumps(Payload()))
    assert len(open_images('folder', tmp_path, True)) == 24
    assert 'stranger' not in capsys.readouterr().out


@pytest.mark.parametrize(('name', 'message'), [
    ('tfds/cifar10', 'tfds/cifar10 is read in its order alone, and a step that is resumed needs its images by index; '
                     'expected imagenet, folder, torch/NAME, hfds/NAME'),
    ('mnist', "unknown data set 'mnist'; expected one of cifar10, .*, folder, torch/NAME"),
    ('torch/', 'unknown data set'),
    ('wds/imagenet', 'read in its order alone'), ('hfids/a/b', 'read in its order alone'),
    ('torch/nothing', r"torch/nothing can't be opened in .*: Unknown torchvision dataset nothing; expected"),
    ('torch/cifar10', r"torch/cifar10 can't be opened in .*: Dataset not found or corrupted"),
    ('torch/image_folder', 'has no directory train; expected one'), ('folder', 'has no train; expected'),
    ('hfds//data/pets', 'names a place of this machine')])
def test_what_can_t_be_opened_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as info:
        open_images(name, tmp_path, True)
    assert '\n' not in str(info.value)


def test_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, np.array([0, 3, 12]))
    with pytest.raises(ValueError, match=r'labels span \[0, 12\] with 10 classes; expected'):
        open_images('torch/mnist', tmp_path, True)
    with pytest.raises(FileNotFoundError, match='torch/mnist needs a directory; expected --data-dir DIR'):
        open_images('torch/mnist', None, True)


def test_a_file_that_ends_early_is_named_and_faults_of_the_machine_are_not_the_image_s(
        root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(root / 'tars' / 'train.tar', tmp_path)
    data = open_images('folder', tmp_path, True)
    with open(tmp_path / 'train.tar', 'r+b') as file:
        file.truncate(2000)
    with pytest.raises(ValueError, match=r"\d+ of 24 images can't be read: image \d+ of folder \(") as info:
        data.check(print)
    assert '\n' not in str(info.value)
    pictures = open_images('torch/image_folder', root, True)

    def fails(self: Path) -> bytes:
        raise OSError(24, 'Too many open files')
    monkeypatch.setattr(Path, 'read_bytes', fails)
    with pytest.raises(OSError, match='Too many open files'):
        pictures.check(print)
