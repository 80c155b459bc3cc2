"""The listing of an image folder: what is an image, a class and a split, whatever else lies there."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from timm_paf.data import open_folder
from timm_paf.data.folder_files import EXTENSIONS, natural_order

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path, 'png' if path.suffix in ('', '.txt', '.heic') else None)


def images(root: Path, *paths: str) -> Path:
    """A root in which both splits have these images."""
    for split in ('train', 'val'):
        for path in paths:
            save(root / split / path)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return images(tmp_path / 'pets', *(f'{name}/{i}.jpg' for name in ('cat', 'dog', 'frog') for i in range(2)))


def names(root: Path, train: bool = True) -> list[str]:
    data = open_folder(root, train)
    split = next(path for path in data.files[0].parents if path.parent == root)
    return [file.relative_to(split).as_posix() for file in data.files]


USUAL = [f'{name}/{i}.jpg' for name in ('cat', 'dog', 'frog') for i in range(2)]


def test_the_extensions_are_those_of_pillow_timm_and_torchvision() -> None:
    from timm.data.readers.img_extensions import get_img_extensions
    from torchvision.datasets.folder import IMG_EXTENSIONS
    assert {*get_img_extensions(), *IMG_EXTENSIONS, '.webp', '.gif'} <= EXTENSIONS
    assert Image.registered_extensions().keys() >= EXTENSIONS


@pytest.mark.parametrize('extension', sorted(EXTENSIONS | {'.JPG', '.WebP'}))
def test_every_format_counts_and_is_decoded(root: Path, extension: str) -> None:
    if Image.registered_extensions()[extension.lower()] not in Image.SAVE:
        pytest.skip(f'this Pillow does not write {extension}')
    images(root, f'bird/a{extension}')
    data = open_folder(root, train=True)
    assert data.classes == ('bird', 'cat', 'dog', 'frog')
    assert data.files[0].name == f'a{extension}'
    assert data.centre(0, 16).shape == (16, 16, 3)


def test_the_first_frame_of_several_is_taken(root: Path) -> None:
    frames = [Image.new('RGB', (16, 16), colour) for colour in ('red', 'blue')]
    for extension in ('gif', 'tif', 'webp'):
        options = {'lossless': True} if extension == 'webp' else {}
        frames[0].save(root / 'train' / 'cat' / f'0.{extension}', save_all=True, append_images=frames[1:], **options)
        data = open_folder(root, train=True)
        index = next(i for i, file in enumerate(data.files) if file.name == f'0.{extension}')
        assert (data.centre(index, 16) == (255, 0, 0)).all()


@pytest.mark.parametrize('stray', [
    '.ipynb_checkpoints/0.jpg', 'cat/.ipynb_checkpoints/0.jpg', 'cat/._0.jpg', '._cat/0.jpg', 'cat/.DS_Store',
    '__MACOSX/cat/0.jpg', '@eaDir/0.jpg', '.0.jpg', 'Thumbs.db', 'labels.txt', 'cat/boxes.txt', 'notes/a.txt',
    'cat/jpg', 'cat/.jpg'])
def test_what_is_hidden_or_no_image_does_not_count(root: Path, stray: str) -> None:
    for split in ('train', 'val'):
        (root / split / stray).parent.mkdir(parents=True, exist_ok=True)
        (root / split / stray).write_bytes(b'\x00\x05\x16\x07')
    assert names(root) == USUAL
    assert open_folder(root, True).classes == ('cat', 'dog', 'frog')


def test_images_that_pillow_does_not_open_are_refused_by_name(root: Path) -> None:
    images(root, 'toad/a.heic')
    with pytest.raises(ValueError, match=r"train has 1 images that Pillow doesn't open, such as toad/a\.heic"):
        open_folder(root, True)


def test_a_class_is_the_first_directory(tmp_path: Path) -> None:
    images(tmp_path, 'n01/images/0.jpg', 'n01/images/1.jpg', 'n02/images/0.jpg', 'n02/1.jpg', 'n03/a/b/c/0.jpg')
    data = open_folder(tmp_path, True)
    assert (data.classes, data.labels.tolist()) == (('n01', 'n02', 'n03'), [0, 0, 1, 1, 2])


def test_links_to_directories_are_walked_once(root: Path, tmp_path: Path) -> None:
    train = root / 'train'
    for link, target in (
            (train / 'cat' / 'up', train), (train / 'cat' / 'self', train / 'cat'), (train / 'all', train),
            (train / 'above', tmp_path), (train / 'cat' / 'other', train / 'frog'),
            (train / 'dog' / 'dog', train / 'cat')):
        link.symlink_to(target)
    (train / 'cat' / 'ring').symlink_to(train / 'cat' / 'ring')
    assert names(root) == USUAL
    save(tmp_path / 'elsewhere' / '7.jpg')
    for link in (train / 'bird', root / 'val' / 'bird'):
        link.symlink_to(tmp_path / 'elsewhere')
    assert names(root) == ['bird/7.jpg', *USUAL]
    (train / 'eagle').symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(ValueError, match=r'train/eagle and .*train/bird are the same directory; expected one for each'):
        open_folder(root, True)


def test_a_split_that_is_a_link_is_walked(root: Path, tmp_path: Path) -> None:
    (tmp_path / 'linked').mkdir()
    for split in ('train', 'val'):
        (tmp_path / 'linked' / split).symlink_to(root / split)
    assert names(tmp_path / 'linked') == USUAL


def test_the_evaluation_split_has_four_names(root: Path) -> None:
    (root / 'val').rename(root / 'test')
    for number, name in enumerate(('test', 'valid', 'validation', 'val')):
        for label in ('cat', 'dog', 'frog'):
            save(root / name / label / f'{number}.jpg')
        assert {file.parts[-3] for file in open_folder(root, False).files} == {name}
        assert names(root) == USUAL


@pytest.mark.parametrize('stray', ['1.jpg', 'unknown/1.jpg', None])
def test_training_takes_no_notice_of_a_test_without_classes(root: Path, stray: str | None) -> None:
    for path in (root / 'val').rglob('*.jpg'):
        path.unlink()
    (root / 'val').rename(root / 'test')
    if stray:
        save(root / 'test' / stray)
    assert names(root) == USUAL
    with pytest.raises((ValueError, FileNotFoundError), match=r'test has (images of (no|one) class|no images)'):
        open_folder(root, False)
    for name in ('cat', 'bird'):
        save(root / 'test' / name / '1.jpg')
    if stray != '1.jpg':
        with pytest.raises(ValueError, match='have different classes, such as bird'):
            open_folder(root, True)


def test_a_class_without_images_in_one_split_is_named(root: Path) -> None:
    for path in (root / 'val' / 'frog').iterdir():
        path.rename(path.with_suffix('.txt'))
    for train in (True, False):
        with pytest.raises(ValueError, match='have different classes, such as frog'):
            open_folder(root, train)


def test_a_directory_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == 'dog':
            raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(ValueError, match=r"train/dog can't be read \(Permission denied\); expected a directory"):
        open_folder(root, True)


def test_the_home_directory_may_be_written_short(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(root.parent))
    assert len(open_folder('~/pets', True)) == 6
    with pytest.raises(FileNotFoundError, match=r'~nobody_here/pets has no train'):
        open_folder('~nobody_here/pets', True)


def test_classes_that_count_alike_have_one_order(tmp_path: Path) -> None:
    """timm sorts a set, so that the order of these would change from process to process."""
    images(tmp_path, *(f'{name}/0.jpg' for name in ('a', 'A', '01', '1', '10', '9', '²', 'b2', 'B10')))
    assert open_folder(tmp_path, True).classes == ('01', '1', '9', '10', 'A', 'a', 'b2', 'B10', '²')


def test_the_digest_of_a_listing_stays(root: Path) -> None:
    images(root, 'cat/10.jpg', 'cat/9.PNG')
    expected = hashlib.sha256()
    for label, name in enumerate(('cat', 'dog', 'frog')):
        for file in sorted((root / 'train' / name).iterdir()):
            expected.update(f'{name}/{file.name} {file.stat().st_size} {label}\n'.encode())
    assert open_folder(root, True).sha256() == expected.hexdigest()


def test_names_of_any_bytes_have_a_digest(tmp_path: Path) -> None:
    images(tmp_path, 'a/0.jpg', 'b/0.jpg')
    for split in (b'train', b'val'):
        os.rename(os.fsencode(tmp_path) + b'/' + split + b'/a', os.fsencode(tmp_path) + b'/' + split + b'/\xff')
    assert len(open_folder(tmp_path, True).sha256()) == 64


WORDS = st.sampled_from([
    'a', 'B', 'b', '1', '10', '9', '01', 'x 2', 'x10', 'ü', '²', '.hid', '._a', '__MACOSX', '@eaDir', 'c.jpg', 'c.JPG',
    'd.webp', '.e.png', 'f.txt', 'g', 'h.tar.gif', '..jpg', 'images', "it's", 'new\nline'])


@settings(max_examples=60)
@given(st.lists(st.lists(WORDS, min_size=1, max_size=4), max_size=12))
@example([['a', 'c.jpg'], ['b', 'images', 'd.webp'], ['.hid', 'c.jpg'], ['c.jpg', 'g', 'c.JPG'], ['1', 'f.txt']])
def test_any_tree_is_listed_as_by_an_independent_walk(paths: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        train, kept = Path(place) / 'train', set()
        train.mkdir()
        for parts in paths:
            file = train.joinpath(*parts)
            if file.exists() or any(parent.is_file() for parent in file.parents):
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            shown = not any(part.startswith('.') or part in ('__MACOSX', '@eaDir') for part in parts)
            if shown and re.search(r'\.(jpg|webp|gif)$', parts[-1], re.IGNORECASE):
                kept.add('/'.join(parts))
        classes = sorted({path.split('/')[0] for path in kept}, key=natural_order)
        if len(classes) < 2 or any('/' not in path for path in kept):
            with pytest.raises((ValueError, FileNotFoundError), match=r'has no images|has images of'):
                open_folder(place, True)
            return
        data = open_folder(place, True)
        assert data.classes == tuple(classes)
        expected = [(label, path) for label, name in enumerate(classes) for path in sorted(kept)
                    if path.split('/')[0] == name]
        assert list(zip(data.labels.tolist(), [str(file.relative_to(train)) for file in data.files])) == expected
