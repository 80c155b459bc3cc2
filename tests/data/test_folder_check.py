"""Images that can't be decoded are found before the first step, and those of more than 8 bits are scaled."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from timm_paf.data import ImageFolder, open_folder
from timm_paf.training.config import Config, check
from timm_paf.training.inputs import open_inputs, parse_synthetic

RNG = np.random.default_rng(0)
SMOOTH = Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with eight images each."""
    for name in ('cat', 'dog'):
        (tmp_path / 'pets' / 'train' / name).mkdir(parents=True)
        for i in range(8):
            SMOOTH.save(tmp_path / 'pets' / 'train' / name / f'{i}.{"png" if i % 2 else "jpg"}')
    return tmp_path / 'pets'


def check_all(data: ImageFolder) -> list[str]:
    said: list[str] = []
    data.check(said.append)
    return said


def test_good_images_pass(root: Path) -> None:
    assert check_all(open_folder(root, True)) == ['all 16 images of pets can be read']


def test_bad_images_are_named_up_to_five(root: Path) -> None:
    (root / 'train' / 'cat' / '0.jpg').write_bytes(b'')
    data, said = open_folder(root, True), []
    with pytest.raises(ValueError, match=r"^1 of 16 images can't be read: \S+/cat/0\.jpg \(Pillow knows no"):
        data.check(said.append)
    for file in data.files[:7]:
        file.write_bytes(file.read_bytes()[:200])
    data.files[7].unlink()
    data.files[7].symlink_to('nowhere')
    with pytest.raises(ValueError, match=r"^8 of 16 .*cat/4\.jpg \(.*\) and 3 more; replace or remove") as info:
        data.check(said.append)
    assert '\n' not in str(info.value)
    assert len(re.findall(r'cat/\d', str(info.value))) == 5
    assert said == []
    for file in data.files[:7]:
        file.unlink()
    with pytest.raises(ValueError, match=r'cat/7\.png \(No such file or directory\)'):
        open_folder(root, True).check(said.append)
    SMOOTH.save(root / 'train' / 'cat' / '8.png')
    data.files[7].unlink()
    assert check_all(open_folder(root, True)) == ['all 9 images of pets can be read']  # so the advice holds


@pytest.mark.parametrize('name', ['x.jpg', 'progressive.jpg', 'x.png', 'x.webp', 'x.bmp', 'x.gif', 'x.tif'])
def test_the_check_finds_what_training_would(root: Path, name: str) -> None:
    path = root / 'train' / 'cat' / name
    SMOOTH.save(path, **({'progressive': True} if name.startswith('p') else {}))
    whole, data = path.read_bytes(), ImageFolder('one', open_folder(root, True).labels[:1], ('cat',), (path,))
    found = set()
    for length in np.linspace(0, len(whole), 30).astype(int).tolist():
        path.write_bytes(whole[:length])
        errors = []
        for decode in (lambda: check_all(data), lambda: data.training_crop(0, 16, np.random.default_rng(0))):
            try:
                decode()
            except ValueError as error:
                errors.append(str(error))
        assert len(errors) in (0, 2), f'{length} of {len(whole)} bytes: {errors}'
        found.add(len(errors))
    assert found == {0, 2}


def test_processes_check_a_share_each_and_raise_the_same(root: Path) -> None:
    data = open_folder(root, True)
    for file in data.files[3:5]:
        file.write_bytes(b'')
    shares: list[list[str]] = []

    def keep(mine: list[str]) -> list[str]:
        shares.append(mine)
        return []
    for rank in range(3):
        data.check(lambda text: None, rank, 3, keep)
    assert [len(share) for share in shares] == [1, 1, 0]
    texts = set()
    for rank in range(3):
        with pytest.raises(ValueError, match='2 of 16 images') as info:
            data.check(lambda text: None, rank, 3, lambda mine: [text for share in shares for text in share])
        texts.add(str(info.value))
    assert len(texts) == 1


def test_a_new_run_checks_and_one_that_was_begun_does_not(root: Path, tmp_path: Path) -> None:
    config = Config(model='wrn10_1_pssilu', dataset='folder', data_dir=str(root), output=str(tmp_path / 'run'),
                    batch_size=4, image_size=16)
    (root / 'train' / 'dog' / '3.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r"1 of 16 images can't be read: .*dog/3\.png"):
        open_inputs(config, check(config), Accelerator(cpu=True))
    assert not (tmp_path / 'run').exists()
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'run.json').write_text('{"data": {}}')
    assert len(open_inputs(config, check(config), Accelerator(cpu=True)).batches.data) == 16


def test_a_bad_image_within_a_run_is_told_without_advice_to_remove_it_and_go_on(root: Path) -> None:
    data = open_folder(root, True)
    data.files[2].write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'cat/2\.jpg is no readable image: Pillow knows no such format; put back the '
                                         'file as it was, or replace or remove it and start a new run$'):
        data.centre(2, 16)


RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
EIGHT = (RAMP / 257).round().astype(np.uint8)


@pytest.mark.parametrize(('values', 'name'), [
    (RAMP.astype(np.uint16), 'z.png'), (RAMP.astype(np.uint16), 'z.tif'), (RAMP.astype('>u2'), 'z.tif'),
    (RAMP.astype(np.uint16), 'z.pgm'), ((RAMP / 65535).astype(np.float32), 'z.tif'), (EIGHT, 'z.png')])
def test_more_bits_are_scaled_to_eight(root: Path, values: np.ndarray, name: str) -> None:
    Image.fromarray(values).save(root / 'train' / 'cat' / name)
    data = open_folder(root, True)
    index = next(i for i, file in enumerate(data.files) if file.name == name)
    found = data.centre(index, 32, 1.0)
    assert np.abs(found.astype(int) - EIGHT[..., None]).max() <= 1
    assert (found[..., 0] == found[..., 2]).all()
    check_all(data)


@pytest.mark.parametrize('values', [
    RAMP.astype(np.int32), RAMP.astype(np.int32) - 9, RAMP.astype(np.float32), np.full((9, 9), np.nan, np.float32)])
def test_values_without_a_white_are_refused(root: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(root / 'train' / 'cat' / 'z.tif')
    with pytest.raises(ValueError, match=r'z\.tif \(it has values of 32 bits in \[.*\]; expected 8 or 16 bits'):
        check_all(open_folder(root, True))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGBA', 'CMYK', 'YCbCr'])
def test_other_modes_are_converted_as_pillow_does(root: Path, mode: str) -> None:
    made = SMOOTH.convert('L' if mode in ('LA', 'PA') else 'RGB').convert('P' if mode == 'PA' else mode).convert(mode)
    path = root / 'train' / 'cat' / 'a.tif'
    made.save(path)
    data = open_folder(root, True)
    index = data.files.index(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert('RGB').resize((40, 30), Image.Resampling.BICUBIC).crop((5, 0, 35, 30)))
    assert np.array_equal(data.centre(index, 30, 1.0), expected)


@pytest.mark.parametrize('n', [0, -1])
def test_no_images_are_no_choice(root: Path, n: int) -> None:
    with pytest.raises(ValueError, match=f'{n} images of pets are asked for; expected at least 1'):
        open_folder(root, True).spread(n)


def test_the_home_directory_in_a_synthetic_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a:0.5').touch()
    assert parse_synthetic('~/a.npz:0.7') == (f'{tmp_path}/a.npz', 0.7)
    assert parse_synthetic('~/a.npz') == (f'{tmp_path}/a.npz', 0.5)
    assert parse_synthetic('~/a:0.5') == (f'{tmp_path}/a:0.5', 0.5)


@pytest.mark.parametrize('error', [
    MemoryError(), OSError(24, 'Too many open files'), OSError(12, 'Cannot allocate'), OSError(5, 'Input/output error'),
    OSError(116, 'Stale file handle')])
def test_what_is_the_machine_s_fault_is_no_bad_image(
        root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error
    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(type(error)):
        open_folder(root, True).check(print, skip=True)
