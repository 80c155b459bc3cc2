"""Image sets and batches: real files, exact random access, and every bad file named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_paf.data import Batches, ImageSet, derive_seed, load_dataset, to_float


def image_set(n: int = 50, size: int = 8, pad: int = 2, flip: bool = True) -> ImageSet:
    images = torch.randint(256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet('made', images, torch.arange(n) % 10, 10, pad=pad, flip=flip)


def _crop(padded: torch.Tensor, dy: int, dx: int, flip: bool) -> torch.Tensor:
    part = padded[:, dy:dy + 8, dx:dx + 8]
    return part.flip(-1) if flip else part


def test_digits_are_the_real_ones() -> None:
    train, test = load_dataset('digits', None, True), load_dataset('digits', None, False)
    assert (len(train), len(test)) == (1438, 359)
    assert train.images.shape[1:] == (32, 32, 3)
    from sklearn.datasets import load_digits
    digits = load_digits()
    assert torch.equal(test.labels, torch.from_numpy(digits.target[4::5]).long())
    # enlarging keeps the mean brightness of every image to a grey level or two
    small = torch.from_numpy(digits.images[4::5]).mean((1, 2)) / 16 * 255
    assert (test.images.double().mean((1, 2, 3)) - small).abs().max() < 4
    assert train.sha256() != test.sha256()
    assert train.sha256() == load_dataset('digits', None, True).sha256()


def test_cifar10_is_torchvision_s(cifar10_root: Path) -> None:
    from torchvision.datasets import CIFAR10
    ours, theirs = load_dataset('cifar10', cifar10_root, False), CIFAR10(str(cifar10_root), train=False)
    assert len(ours) == 10000
    assert np.array_equal(ours.images.numpy(), theirs.data)
    assert ours.labels.tolist() == theirs.targets
    from torchvision.transforms.functional import to_tensor
    assert torch.equal(to_float(ours.images[:3])[2], to_tensor(theirs[2][0]))
    assert len(load_dataset('cifar10', cifar10_root, True)) == 50000


def test_bad_files_are_named(cifar10_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='expected one of cifar10, cifar100, digits'):
        load_dataset('cifar11', tmp_path, True)
    with pytest.raises(ValueError, match='--data-dir DIR with cifar-10-batches-py'):
        load_dataset('cifar10', None, True)
    with pytest.raises(FileNotFoundError, match=r'data_batch_1 is missing; .*download=True'):
        load_dataset('cifar10', tmp_path, True)
    folder = tmp_path / 'cifar-10-batches-py'
    shutil.copytree(cifar10_root / 'cifar-10-batches-py', folder)
    (folder / 'test_batch').write_bytes((folder / 'test_batch').read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'test_batch is corrupt: MD5 [0-9a-f]{32}, expected 40351d58'):
        load_dataset('cifar10', tmp_path, False)


def test_image_set_checks_its_tensors() -> None:
    images, labels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 9])
    ImageSet('made', images, labels, 10)
    with pytest.raises(ValueError, match=r'labels span \[0, 9\]; expected \[0, 8\]'):
        ImageSet('made', images, labels, 9)
    with pytest.raises(ValueError, match='labels span'):
        ImageSet('made', images, labels - 1, 10)
    with pytest.raises(ValueError, match='expected uint8'):
        ImageSet('made', images.float(), labels, 10)
    with pytest.raises(ValueError, match='3 labels for 4 images'):
        ImageSet('made', images, labels[:3], 10)


def test_an_epoch_holds_every_image_once() -> None:
    data = ImageSet('made', torch.arange(48, dtype=torch.uint8).view(48, 1, 1, 1).expand(48, 4, 4, 3).contiguous(),
                    torch.arange(48) % 10, 10, pad=0, flip=False)
    batches = Batches(data, 12, seed=3, device='cpu')
    assert batches.steps_per_epoch == 4
    orders = []
    for epoch in range(2):
        seen = [(batches[step][0][:, 0, 0, 0] * 255).round().int() for step in range(4 * epoch, 4 * epoch + 4)]
        orders.append(torch.cat(seen).tolist())
        assert sorted(orders[-1]) == list(range(48))
    assert orders[0] != orders[1]


def test_batches_are_random_access_and_repeatable() -> None:
    one, two = (Batches(image_set(), 10, seed=1, device='cpu') for _ in range(2))
    forward = [one[step] for step in range(12)]
    for step in (11, 3, 7, 0):
        assert all(torch.equal(a, b) for a, b in zip(forward[step], two[step]))
    other = Batches(image_set(), 10, seed=2, device='cpu')
    assert not torch.equal(other[0][0], forward[0][0])


@pytest.mark.parametrize('world', [2, 5])
def test_processes_share_the_same_global_batch(world: int) -> None:
    whole = Batches(image_set(), 10, seed=1, device='cpu')
    parts = [Batches(image_set(), 10, seed=1, device='cpu', rank=rank, world=world) for rank in range(world)]
    for step in (0, 4, 6):
        images, labels = zip(*(part[step] for part in parts))
        assert torch.equal(torch.cat(images), whole[step][0])
        assert torch.equal(torch.cat(labels), whole[step][1])


def test_augmentation_is_a_padded_crop_and_a_flip() -> None:
    """Every augmented image equals one of the (2 pad + 1)^2 crops of the padded image or of its mirror."""
    data = image_set(n=20, pad=2)
    x, y = Batches(data, 20, seed=5, device='cpu')[0]
    padded = torch.nn.functional.pad(to_float(data.images), (2, 2, 2, 2))
    kinds = set()
    for image, label in zip(x, y):
        matches = [(flip, dy, dx) for index in (data.labels == label).nonzero() for flip in (False, True)
                   for dy in range(5) for dx in range(5)
                   if torch.equal(image, _crop(padded[index.item()], dy, dx, flip))]
        assert matches
        kinds.add(matches[0])
    assert len({flip for flip, _, _ in kinds}) == 2
    assert len({dy for _, dy, _ in kinds}) > 2


def test_batches_refuse_impossible_sizes() -> None:
    with pytest.raises(ValueError, match='positive multiple of the 3 processes'):
        Batches(image_set(), 10, 0, 'cpu', rank=0, world=3)
    with pytest.raises(ValueError, match='made has 50 training images'):
        Batches(image_set(), 51, 0, 'cpu')


def test_seeds_do_not_collide() -> None:
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert derive_seed(1, 2) == derive_seed(1, 2)
    assert all(0 <= seed < 2**63 for seed in seeds)
