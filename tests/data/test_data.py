"""Image sets and batches: real files, exact random access, and every bad file named."""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_paf.data import Batches, ImageSet, cutmix, derive_seed, find_root, load_dataset, split_validation, to_float
from timm_paf.data.synthetic import SyntheticSet, open_synthetic


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
    with pytest.raises(FileNotFoundError, match='which has no cifar-10-batches-py/test_batch'):
        load_dataset('cifar10', tmp_path, True)
    folder = tmp_path / 'cifar-10-batches-py'
    shutil.copytree(cifar10_root / 'cifar-10-batches-py', folder)
    (folder / 'test_batch').write_bytes((folder / 'test_batch').read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'test_batch is corrupt: MD5 [0-9a-f]{32}, expected 40351d58'):
        load_dataset('cifar10', tmp_path, False)
    (folder / 'data_batch_1').unlink()
    with pytest.raises(FileNotFoundError, match=r'data_batch_1 is missing; .*--download'):
        load_dataset('cifar10', tmp_path, True)


def test_image_set_checks_its_tensors() -> None:
    images, labels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1, 2, 9])
    ImageSet('made', images, labels, 10)
    with pytest.raises(ValueError, match=r'labels span \[0, 9\]; expected \[0, 8\]'):
        ImageSet('made', images, labels, 9)
    with pytest.raises(ValueError, match='labels span'):
        ImageSet('made', images, labels - 1, 10)
    with pytest.raises(ValueError, match='expected uint8'):
        ImageSet('made', images.float(), labels, 10)
    with pytest.raises(ValueError, match=r'^the name of an ImageSet is a Tensor; expected a text, before images$'):
        ImageSet(images, labels, 'made', 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'^made: images are of type ndarray; expected a tensor \(torch.from_numpy\)$'):
        ImageSet('made', images.numpy(), labels, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'\(\d+, 3, 8, 8\); expected uint8 \(n, height, width, channels\)$'):
        ImageSet('made', torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8), labels, 10)
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


def test_reflected_padding_is_numpy_s() -> None:
    """The same crops as with zeros, of images that NumPy padded."""
    made = image_set(n=20)
    data = ImageSet('made', made.images, torch.arange(20), 20, pad=3)  # a label tells the image
    black, mirrored = (Batches(data, 20, 5, 'cpu', pad_mode=mode) for mode in ('zeros', 'reflect'))
    around = {mode: to_float(torch.from_numpy(np.pad(data.images.numpy(), ((0, 0), (3, 3), (3, 3), (0, 0)), mode)))
              for mode in ('constant', 'reflect')}
    seen = set()
    for step in range(8):
        (x, y), (found, labels) = black[step], mirrored[step]
        assert torch.equal(labels, y)
        for image, reflected, label in zip(x, found, y.tolist()):
            crops = [(flip, dy, dx) for flip in (False, True) for dy in range(7) for dx in range(7)
                     if torch.equal(image, _crop(around['constant'][label], dy, dx, flip))]
            (flip, dy, dx), = crops
            assert torch.equal(reflected, _crop(around['reflect'][label], dy, dx, flip))
            seen.add((flip, dy, dx))
    assert len(seen) > 70
    with pytest.raises(ValueError, match="the pad mode is 'edge' with 3 pixels; expected one of zeros, reflect"):
        Batches(data, 20, 5, 'cpu', pad_mode='edge')
    with pytest.raises(ValueError, match=r"the pad mode is 'reflect' with 8 pixels; .* larger than what is reflected"):
        Batches(image_set(pad=8), 10, 5, 'cpu', pad_mode='reflect')


@pytest.mark.parametrize('world', [1, 2])
def test_the_last_smaller_batch_is_kept(world: int) -> None:
    """Every image comes once in an epoch; the batches before are those of an epoch without it."""
    data = ImageSet('made', torch.arange(44, dtype=torch.uint8).view(44, 1, 1, 1).expand(44, 4, 4, 3).contiguous(),
                    torch.arange(44) % 10, 10, pad=0, flip=False)
    parts = [Batches(data, 12, 3, 'cpu', rank, world, drop_last=False) for rank in range(world)]
    dropped = Batches(data, 12, 3, 'cpu')
    assert (parts[0].steps_per_epoch, parts[0].last_size, dropped.steps_per_epoch, dropped.last_size) == (4, 8, 3, 12)
    orders = []
    for epoch in range(2):
        epochs = [[part[step] for part in parts] for step in range(4 * epoch, 4 * epoch + 4)]
        assert [[len(y) for _, y in step] for step in epochs] == [[12 // world] * world] * 3 + [[8 // world] * world]
        orders.append(greys(torch.cat([x for step in epochs for x, _ in step])))
        assert sorted(orders[-1]) == list(range(44))
        assert orders[-1][:36] == greys(torch.cat([dropped[step][0] for step in range(3 * epoch, 3 * epoch + 3)]))
    assert orders[0] != orders[1]
    even = Batches(data, 22, 3, 'cpu', drop_last=False)
    assert (even.steps_per_epoch, even.last_size) == (2, 22)
    with pytest.raises(ValueError, match='the last batch of an epoch has 8 of 44 images and there are 3 processes'):
        Batches(data, 12, 3, 'cpu', 0, 3, drop_last=False)


def test_batches_refuse_impossible_sizes() -> None:
    with pytest.raises(ValueError, match='positive multiple of the 3 processes'):
        Batches(image_set(), 10, 0, 'cpu', rank=0, world=3)
    with pytest.raises(ValueError, match='made has 50 training images'):
        Batches(image_set(), 51, 0, 'cpu')


def test_batches_of_real_images_are_those_of_earlier_versions() -> None:
    """A run that began before there were synthetic images goes on exactly."""
    batches, digest = Batches(image_set(), 10, seed=1, device='cpu'), hashlib.sha256()
    for step in (0, 3, 4, 11):
        for part in batches[step]:
            digest.update(part.contiguous().numpy().tobytes())
    assert digest.hexdigest() == '1e930839c672b872b5329aa29abfb74fa93a4ad5eb954b002007b0455ca5e817'


N_REAL, N_MADE = 50, 28


@pytest.fixture
def synthetic(tmp_path: Path) -> SyntheticSet:
    """Image i is of the grey 100 + i all over; its label is i % 10."""
    images = np.broadcast_to(np.arange(100, 100 + N_MADE, dtype=np.uint8)[:, None, None, None], (N_MADE, 8, 8, 3))
    np.savez(tmp_path / 'made.npz', image=images, label=np.arange(N_MADE) % 10)
    return open_synthetic(tmp_path / 'made.npz', (8, 8, 3), 10)


def grey_set() -> ImageSet:
    """Image i is of the grey i all over."""
    images = torch.arange(N_REAL, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3).contiguous()
    return ImageSet('greys', images, torch.arange(N_REAL) % 10, 10, pad=0)


def greys(x: torch.Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize(('batch_size', 'fraction', 'real'), [(16, 0.5, 8), (20, 0.7, 6), (12, 0.25, 9), (60, 0.2, 48)])
def test_a_pass_over_each_kind_of_image(synthetic: SyntheticSet, batch_size: int, fraction: float, real: int) -> None:
    """An epoch is a pass over the real images; the synthetic ones go round on their own, across epochs."""
    batches = Batches(grey_set(), batch_size, 3, 'cpu', synthetic=synthetic, fraction=fraction)
    assert batches.steps_per_epoch == N_REAL // real
    orders, made = [], []
    for epoch in range(6):
        own: list[int] = []
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            x, y = batches[step]
            assert len(x) == len(y) == batch_size
            numbers = np.array(greys(x))
            assert (numbers[:real] < N_REAL).all()
            assert (numbers[real:] >= 100).all()
            assert np.array_equal(y.numpy(), np.where(numbers < 100, numbers, numbers - 100) % 10)
            own += numbers[:real].tolist()
            made += (numbers[real:] - 100).tolist()
        assert len(set(own)) == len(own) == batches.steps_per_epoch * real
        orders.append(own)
    assert orders[0] != orders[1]
    passes = [made[start:start + N_MADE] for start in range(0, len(made) - N_MADE + 1, N_MADE)]
    assert passes
    assert all(sorted(one) == list(range(N_MADE)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes)


def test_mixed_batches_are_random_access(synthetic: SyntheticSet) -> None:
    """A run that goes on at any step sees what it would have seen; as do steps asked for again or out of order."""
    def batches(seed: int = 1) -> Batches:
        return Batches(image_set(), 16, seed, 'cpu', synthetic=synthetic)
    one = batches()
    forward = [one[step] for step in range(13)]
    for step in (12, 5, 5, 6, 0):
        for again in (batches()[step], one[step]):
            assert all(torch.equal(a, b) for a, b in zip(forward[step], again))
    assert not torch.equal(batches(2)[0][0][8:], forward[0][0][8:])


@pytest.mark.parametrize('world', [2, 4])
def test_processes_share_the_same_mixed_batch(synthetic: SyntheticSet, world: int) -> None:
    whole = Batches(image_set(), 16, 1, 'cpu', synthetic=synthetic, fraction=0.25)
    parts = [Batches(image_set(), 16, 1, 'cpu', rank, world, synthetic, 0.25) for rank in range(world)]
    real, made = 12 // world, 4 // world
    for step in (0, 3, 4, 9, 20):
        x, y = whole[step]
        shares = [part[step] for part in parts]
        assert all(len(images) == len(labels) == real + made for images, labels in shares)
        for found, kind in ((x[:12], slice(real)), (x[12:], slice(real, None))):
            assert torch.equal(torch.cat([images[kind] for images, _ in shares]), found)
        for found, kind in ((y[:12], slice(real)), (y[12:], slice(real, None))):
            assert torch.equal(torch.cat([labels[kind] for _, labels in shares]), found)


def test_a_process_reads_its_share_alone_and_one_step_ahead(
        synthetic: SyntheticSet, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, list[int]]] = []
    read = SyntheticSet.__getitem__

    def remembered(self: SyntheticSet, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.01 * (len(reads) % 3))  # nothing may depend on how long it takes
        reads.append((threading.current_thread().name, indices.tolist()))
        return read(self, indices)

    def five_steps() -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = Batches(image_set(), 16, 1, 'cpu', 1, 4, synthetic)
        steps = [batches[step] for step in range(5)]
        assert batches._reader is not None
        batches._reader.shutdown()
        return steps

    plain = five_steps()
    monkeypatch.setattr(SyntheticSet, '__getitem__', remembered)
    for one, two in zip(five_steps(), plain):
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert [len(indices) for _, indices in reads] == [2] * 6
    assert [name.startswith('ahead') for name, _ in reads] == [False] + [True] * 5


def test_synthetic_images_are_augmented_alike(tmp_path: Path) -> None:
    """Real and synthetic images that are the same: every crop of each batch is one of that image or its mirror."""
    data = image_set(n=1)
    np.savez(tmp_path / 'a.npz', image=data.images.numpy(), label=data.labels.numpy())
    data = ImageSet('made', data.images.expand(20, -1, -1, -1), data.labels.expand(20), 10, pad=2)
    x, _ = Batches(data, 40, 5, 'cpu', synthetic=open_synthetic(tmp_path / 'a.npz', (8, 8, 3), 10))[0]
    padded = torch.nn.functional.pad(to_float(data.images[:1]), (2, 2, 2, 2))[0]
    crops = {(flip, dy, dx): _crop(padded, dy, dx, flip)
             for flip in (False, True) for dy in range(5) for dx in range(5)}
    kinds = [[kind for kind, crop in crops.items() if torch.equal(crop, image)] for image in x]
    assert all(len(kind) == 1 for kind in kinds)
    for half in (kinds[:20], kinds[20:]):
        assert {flip for (flip, _, _), in half} == {False, True}
        assert {dy for (_, dy, _), in half} == set(range(5))
        assert {dx for (_, _, dx), in half} == set(range(5))


@pytest.mark.parametrize('world', [1, 2])
def test_the_last_batch_has_all_of_its_synthetic_images(synthetic: SyntheticSet, world: int) -> None:
    """As the paper's: the real images that are left, and as many synthetic ones as ever, which go round on."""
    def batches(rank: int = 0, world: int = 1, drop_last: bool = False) -> Batches:
        data = ImageSet('made', grey_set().images, grey_set().labels, 10, pad=2)
        return Batches(data, 32, 3, 'cpu', rank, world, synthetic, 0.5, drop_last=drop_last)
    whole, dropped = batches(), batches(drop_last=True)
    assert (whole.steps_per_epoch, whole.last_size) == (4, 2 + 16)
    parts = [batches(rank, world) for rank in range(world)]
    for step in range(9):
        x, y = whole[step]
        real = 2 if step % 4 == 3 else 16
        assert len(x) == len(y) == real + 16
        if step < 3:
            assert all(map(torch.equal, (x, y), dropped[step]))
        for own, theirs in zip((x, y), dropped[step]):  # they do not depend on how many real ones there are
            assert torch.equal(own[real:], theirs[16:])
        shares = [part[step] for part in parts]
        for kind, own in ((slice(real), slice(real // world)), (slice(real, None), slice(real // world, None))):
            for index, of_whole in enumerate((x, y)):
                assert torch.equal(torch.cat([each[index][own] for each in shares]), of_whole[kind])


def test_synthetic_images_stay_as_they_are(tmp_path: Path) -> None:
    data = image_set(n=12)
    np.savez(tmp_path / 'a.npz', image=data.images.numpy(), label=data.labels.numpy())
    made = open_synthetic(tmp_path / 'a.npz', (8, 8, 3), 10)
    for mode in ('zeros', 'reflect'):
        plain, changed = (Batches(data, 12, 5, 'cpu', synthetic=made, pad_mode=mode, synthetic_augment=given)
                          for given in (False, True))
        for step in range(4):
            x, y = plain[step]
            assert torch.equal(x[:6], changed[step][0][:6])
            assert torch.equal(y, changed[step][1])
            assert all(any(torch.equal(image, own) for own in to_float(data.images)) for image in x[6:])
            assert not torch.equal(x[6:], changed[step][0][6:])


def test_a_failed_read_ahead_is_raised(synthetic: SyntheticSet, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(image_set(), 16, 1, 'cpu', synthetic=synthetic)
    batches[0][0].sum()
    assert batches._ahead is not None
    batches._ahead[1].result()

    def broken(*args: object) -> None:
        raise OSError('made.npz ends within image 3')

    monkeypatch.setattr(SyntheticSet, '__getitem__', broken)
    batches[1]  # had been read
    with pytest.raises(OSError, match='ends within image 3'):
        batches[2]


@pytest.mark.parametrize(('batch_size', 'fraction', 'world', 'words'), [
    (10, 0.5, 2, 'is 5 real and 5 synthetic images; expected positive multiples .* 2 processes, as with .* size 12'),
    (16, 0.1, 4, 'is 14 real and 2 synthetic images; .* as with batch size 36'),
    (1, 0.5, 1, 'is 1 real and 0 synthetic'),
    (16, 0.0, 1, 'fraction is 0.0; expected between 0 and 1'),
    (16, 1.0, 1, 'fraction is 1.0; expected between 0 and 1'),
    (120, 0.5, 1, 'batch size is 120 with 60 real images; made has 50 training images'),
    (9, 0.5, 2, 'positive multiple of the 2 processes'),
])
def test_mixed_batches_refuse_impossible_sizes(
        synthetic: SyntheticSet, batch_size: int, fraction: float, world: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Batches(image_set(), batch_size, 0, 'cpu', 0, world, synthetic, fraction)
    if 'as with' in words:
        near = int(words.split()[-1])
        Batches(image_set(), near, 0, 'cpu', 0, world, synthetic, fraction)


def test_batches_refuse_other_synthetic_images(tmp_path: Path) -> None:
    np.savez(tmp_path / 'a.npz', image=np.zeros((3, 8, 8, 3), np.uint8), label=np.zeros(3, int))
    other = open_synthetic(tmp_path / 'a.npz', (8, 8, 3), 100)
    with pytest.raises(ValueError, match=r'a\.npz has images \(8, 8, 3\) of 100 classes; expected .* of 10, like'):
        Batches(image_set(), 16, 0, 'cpu', synthetic=other)
    with pytest.raises(ValueError, match=r'expected \(9, 9, 3\) of 10, like made'):
        Batches(image_set(size=9), 16, 0, 'cpu', synthetic=other)


def tagged(n: int = 205, classes: int = 10) -> ImageSet:
    """Image i holds the number i."""
    images = torch.arange(n).view(-1, 1, 1, 1) // torch.tensor([1, 256]) % 256
    return ImageSet('tagged', images.to(torch.uint8).expand(n, 1, 1, 2), torch.arange(n) ** 2 % classes, classes)


@pytest.mark.parametrize(('n', 'classes'), [(50, 5), (23, 5), (3, 5), (7, 1)])
def test_held_out_images_are_balanced_and_apart(n: int, classes: int) -> None:
    data = ImageSet('made', tagged().images, torch.arange(205) * 7 % classes, classes)
    train, held_out = split_validation(data, n, seed=4)
    assert (len(held_out), len(train)) == (n, 205 - n)
    counts = held_out.labels.bincount(minlength=classes)
    assert counts.max() - counts.min() <= 1
    numbers = [(part.images[:, 0, 0].long() * torch.tensor([1, 256])).sum(1) for part in (train, held_out)]
    assert all(torch.equal(part, part.sort().values) for part in numbers)
    assert sorted(torch.cat(numbers).tolist()) == list(range(205))
    assert all(torch.equal(part.labels, data.labels[number]) for part, number in zip((train, held_out), numbers))
    assert split_validation(data, n, seed=4)[1].sha256() == held_out.sha256()
    assert split_validation(data, n, seed=5)[1].sha256() != held_out.sha256()
    assert (train.name, held_out.name, held_out.pad) == ('made', 'made-val', data.pad)


def test_impossible_held_out_sets_are_named() -> None:
    with pytest.raises(ValueError, match=r'50 held-out images are 5 of class \d, of which made has 5; expected fewer'):
        split_validation(image_set(), 50, 0)
    with pytest.raises(ValueError, match='0 images to hold out of made; expected at least 1'):
        split_validation(image_set(), 0, 0)
    assert len(split_validation(image_set(), 40, 0)[0]) == 10


@settings(max_examples=100)
@given(n=st.integers(1, 8), height=st.integers(1, 12), width=st.integers(1, 12),
       alpha=st.sampled_from([0.05, 0.3, 1.0, 10.0]), seed=st.integers(0, 2 ** 40))
def test_cutmix_pastes_one_box_and_mixes_by_its_area(n: int, height: int, width: int, alpha: float, seed: int) -> None:
    x = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 2, height, width)
    y = torch.arange(n) % 3
    mixed, labels = cutmix(x, y, 3, alpha, torch.Generator().manual_seed(seed))
    again = cutmix(x, y, 3, alpha, torch.Generator().manual_seed(seed))
    assert torch.equal(mixed, again[0])
    assert torch.equal(labels, again[1])
    assert torch.equal(x[:, 0, 0, 0], torch.arange(n).float())  # not changed
    for i in range(n):
        pasted = mixed[i, 0] != i
        assert torch.equal(mixed[i, 0], mixed[i, 1])
        partners = mixed[i, 0][pasted].unique().tolist()
        assert len(partners) <= 1
        if pasted.any():  # a whole rectangle
            rows, cols = pasted.any(1).nonzero(), pasted.any(0).nonzero()
            assert pasted[rows.min():rows.max() + 1, cols.min():cols.max() + 1].all()
        share = pasted.double().mean().item()
        expected = torch.zeros(3, dtype=torch.float64)
        expected[y[i]] += 1 - share
        expected[y[int(partners[0])] if partners else y[i]] += share
        # an image may be its own partner: then its label stays whole
        assert torch.allclose(labels[i].double(), expected, atol=1e-6)


@pytest.mark.parametrize('alpha', [0.2, 1.0, 5.0])
def test_cutmix_draws_its_box_as_published(alpha: float) -> None:
    """The mean area. A side s = sqrt(u) around a uniform centre keeps s - s^2 / 4 of itself on average, u is Beta."""
    def moment(k: float) -> float:
        return math.gamma(alpha + k) * math.gamma(2 * alpha) / math.gamma(2 * alpha + k) / math.gamma(alpha)

    x = torch.arange(8).float().view(8, 1, 1, 1).expand(8, 1, 100, 100)
    generator = torch.Generator().manual_seed(0)
    areas = [(cutmix(x, torch.arange(8), 8, alpha, generator)[0] != x).double().mean((1, 2, 3)).max().item()
             for _ in range(1500)]
    # 1% of a side is lost to whole pixels
    assert np.mean(areas) == pytest.approx(moment(1) - moment(1.5) / 2 + moment(2) / 16, abs=0.03)
    with pytest.raises(ValueError, match='alpha of CutMix is 0; expected above 0'):
        cutmix(x, torch.arange(8), 8, 0, generator)


def test_seeds_do_not_collide() -> None:
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert derive_seed(1, 2) == derive_seed(1, 2)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_cifar10_is_found_where_people_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable goes before the usual places, and what the user says before the variable."""
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('CIFAR10_ROOT', raising=False)
    monkeypatch.chdir(tmp_path)
    assert find_root('cifar10') is None
    for place in (Path('home/data'), Path('data'), Path('named'), Path('given')):
        (place / 'cifar-10-batches-py').mkdir(parents=True)
        (place / 'cifar-10-batches-py' / 'test_batch').touch()
        if place.name == 'named':
            monkeypatch.setenv('CIFAR10_ROOT', str(tmp_path / place))
        given = '~/../given' if place.name == 'given' else None
        assert find_root('cifar10', given).resolve() == tmp_path / place
    # the directory itself, and one level too high
    assert find_root('cifar10', 'given/cifar-10-batches-py') == Path('given')
    (tmp_path / 'above').mkdir()
    (tmp_path / 'given').rename(tmp_path / 'above' / 'given')
    assert find_root('cifar10', 'above') == Path('above/given')
    monkeypatch.setenv('CIFAR10_ROOT', str(tmp_path / 'nowhere'))
    for given, how in ((None, 'CIFAR10_ROOT'), ('nowhere', '--data-dir')):
        with pytest.raises(FileNotFoundError, match=f'{how} is .*nowhere, which has no cifar-10-batches-py/test_batch'):
            find_root('cifar10', given)
    assert find_root('cifar100') is None


def test_a_missing_data_set_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('CIFAR10_ROOT', raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'^no cifar10 found in [^\n]*--data-dir DIR[^\n]*--download'):
        load_dataset('cifar10')
