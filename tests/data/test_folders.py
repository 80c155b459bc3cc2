"""Image folders: found as timm finds them, decoded as Pillow does, the same batches whatever makes them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from timm_paf.data import ImageSet, to_float
from timm_paf.data.folders import ImageFolder, open_folder
from timm_paf.data.indexed import IndexedBatches, random_box


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes with 8 training and 3 validation images each, of many sizes, modes and formats."""
    root, rng = tmp_path_factory.mktemp('folders') / 'pets', np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 3)):
        for label, name in enumerate(('cat2', 'cat10', 'dog')):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(10, 60, 2)
                smooth = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height))
                smooth = smooth.convert('L') if i == 3 else smooth.convert('RGBA') if i == 4 else smooth
                smooth.save(root / split / name / f'{label}_{i}.{"png" if i in (3, 4) else "JPEG"}')
    (root / 'train' / 'notes.txt').write_text('no image')
    return root


@pytest.fixture
def data(root: Path) -> ImageFolder:
    return open_folder(root, train=True)


def test_folders_are_those_of_timm(root: Path) -> None:
    from timm.data import ImageDataset
    for train, split in ((True, 'train'), (False, 'val')):
        ours, theirs = open_folder(root, train), ImageDataset(str(root / split))
        found = zip(map(str, ours.files), ours.labels.tolist())
        assert set(found) == set(theirs.reader.samples)
        assert ours.classes == ('cat2', 'cat10', 'dog')
        assert len(ours) == len(theirs) == (24 if train else 9)
        assert ours.labels.tolist() == sorted(ours.labels.tolist())


def test_validation_may_be_written_out(root: Path, tmp_path: Path) -> None:
    (tmp_path / 'validation').symlink_to(root / 'val')
    assert len(open_folder(tmp_path, train=False)) == 9
    with pytest.raises(FileNotFoundError, match=r'has no train; expected .*/train and .*/val, each with a directory'):
        open_folder(tmp_path, train=True)


def test_a_box_is_cut_out_as_pillow_and_torchvision_do(data: ImageFolder) -> None:
    from torchvision.transforms.functional import InterpolationMode, resized_crop
    for index in range(0, 24, 3):
        with Image.open(data.files[index]) as image:
            rgb = image.convert('RGB')
        rng = np.random.default_rng(index)
        left, top, right, bottom = random_box(*rgb.size, rng)
        theirs = resized_crop(rgb, top, left, bottom - top, right - left, [16, 16], InterpolationMode.BICUBIC)
        theirs = np.asarray(theirs)[:, ::-1] if rng.random() < 0.5 else np.asarray(theirs)
        assert np.array_equal(data.training_crop(index, 16, np.random.default_rng(index)), theirs)


@pytest.mark.parametrize('size', [16, 24, 37])
def test_the_centre_is_that_of_torchvision_s_transforms(data: ImageFolder, size: int) -> None:
    """What published ImageNet numbers are measured with: the shorter side to size / 0.875, then the central square."""
    field = transforms.Compose([
        transforms.Resize(math.floor(size / 0.875), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size)])
    for index, file in enumerate(data.files[:6]):
        with Image.open(file) as image:
            expected = np.asarray(field(image.convert('RGB')))
        assert np.array_equal(data.centre(index, size), expected)


def test_all_centres(data: ImageFolder) -> None:
    centres = data.centres(24)
    assert (centres.shape, centres.dtype) == ((24, 24, 24, 3), torch.uint8)
    assert all(np.array_equal(image.numpy(), data.centre(index, 24)) for index, image in enumerate(centres))
    images = ImageSet(data.name, centres, data.labels, data.num_classes)
    assert to_float(images.images).shape == (24, 3, 24, 24)


@pytest.mark.parametrize(('width', 'height'), [(300, 200), (17, 40), (1, 1), (500, 3), (2, 900)])
def test_random_boxes_lie_inside_and_are_of_the_published_sizes(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(width, height, rng) for _ in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert w.min() >= 1
    assert h.min() >= 1
    assert boxes[:, 2].max() <= width
    assert boxes[:, 3].max() <= height
    if (width, height) == (300, 200):
        assert 0.075 < (w * h / 60_000).min() < 0.1
        assert 0.74 < (w / h).min() < (w / h).max() < 1.35
        assert boxes[:, 0].min() == 0
        assert boxes[:, 2].max() == 300


def test_an_epoch_holds_every_image_once(tmp_path: Path) -> None:
    for i in range(12):
        folder = tmp_path / 'train' / f'c{i % 2}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (9, 7), (20 * i, 0, 0)).save(folder / f'{i}.png')
    batches = IndexedBatches(open_folder(tmp_path, True), 4, 0, 'cpu', size=8)
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            x, y = batches[step]
            assert (x.shape, x.dtype, y.dtype) == ((4, 3, 8, 8), torch.float32, torch.int64)
            numbers = (x[:, 0, 4, 4] * 255 / 20).round().int()
            assert y.tolist() == (numbers % 2).tolist()
            seen += numbers.tolist()
        assert sorted(seen) == list(range(12))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_batches_do_not_depend_on_threads_nor_on_the_steps_before(data: ImageFolder) -> None:
    def batches(seed: int = 1, workers: int = 2) -> IndexedBatches:
        return IndexedBatches(data, 8, seed, 'cpu', size=16, workers=workers)
    one = batches()
    forward = [one[step] for step in range(7)]
    assert all(x.min() >= 0 and x.max() <= 1 for x, _ in forward)
    for step in (6, 2, 2, 3, 0):
        for again in (batches(workers=1)[step], batches(workers=5)[step], one[step]):
            assert all(torch.equal(a, b) for a, b in zip(forward[step], again))
    assert not torch.equal(batches(2)[0][0], forward[0][0])


@pytest.mark.parametrize('world', [2, 4])
def test_processes_share_the_same_global_batch(data: ImageFolder, world: int) -> None:
    whole = IndexedBatches(data, 8, 1, 'cpu', size=16)
    parts = [IndexedBatches(data, 8, 1, 'cpu', rank, world, size=16) for rank in range(world)]
    for step in (0, 2, 3):
        images, labels = zip(*(part[step] for part in parts))
        assert torch.equal(torch.cat(images), whole[step][0])
        assert torch.equal(torch.cat(labels), whole[step][1])


def test_an_image_changes_from_epoch_to_epoch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ('a', 'b'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / 'train' / name / '0.png')
    batches = IndexedBatches(open_folder(tmp_path, True), 2, 0, 'cpu', size=16)
    views = [x[y.argsort()] for x, y in (batches[step] for step in range(5))]
    assert all(not torch.equal(views[i], views[j]) for i in range(5) for j in range(i))


@pytest.mark.parametrize('content', [b'', b'\xff\xd8\xff\xe0 no jpeg', None])
def test_a_corrupt_image_is_named(root: Path, tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / 'train').mkdir()
    for name in ('cat2', 'dog'):
        (tmp_path / 'train' / name).mkdir()
        whole = (root / 'train' / 'cat2' / '0_0.JPEG').read_bytes()
        (tmp_path / 'train' / name / 'x.jpg').write_bytes(whole)
    (tmp_path / 'train' / 'dog' / 'x.jpg').write_bytes(whole[:len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r'train/dog/x\.jpg is no readable image: .*; put back the file') as info:
        IndexedBatches(open_folder(tmp_path, True), 2, 0, 'cpu', size=16)[0]
    assert '\n' not in str(info.value)


def test_wrong_folders_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='has no train; expected'):
        open_folder(tmp_path, True)
    (tmp_path / 'train' / 'dog').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='train has no images; expected a directory of them for each class'):
        open_folder(tmp_path, True)
    image = root / 'train' / 'cat2' / '0_0.JPEG'
    (tmp_path / 'train' / 'dog' / '1.jpg').symlink_to(image)
    with pytest.raises(ValueError, match=r'has images of one class, dog; expected .*/train/dog/1\.jpg'):
        open_folder(tmp_path, True)
    (tmp_path / 'train' / 'cat').mkdir()
    (tmp_path / 'train' / 'cat' / '1.jpg').symlink_to(image)
    assert len(open_folder(tmp_path, True)) == 2
    for name in ('cat', 'bird'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        (tmp_path / 'val' / name / '1.jpg').symlink_to(image)
    for train in (True, False):
        with pytest.raises(ValueError, match=r'have different classes, such as bird; expected the same ones'):
            open_folder(tmp_path, train)
    (tmp_path / 'train' / '1.jpg').symlink_to(image)
    with pytest.raises(ValueError, match='has images of no class; expected'):
        open_folder(tmp_path, True)


def test_folder_batches_refuse_impossible_sizes(data: ImageFolder) -> None:
    with pytest.raises(ValueError, match='positive multiple of the 3 processes'):
        IndexedBatches(data, 8, 0, 'cpu', rank=0, world=3)
    with pytest.raises(ValueError, match='pets has 24 training images'):
        IndexedBatches(data, 25, 0, 'cpu')
