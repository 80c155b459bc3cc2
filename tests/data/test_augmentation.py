"""Augmentation of large images: what timm's transforms make with the same random state, in any thread or process."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from timm.data import Mixup, auto_augment, create_transform, random_erasing
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

import train_robust
from timm_paf.data import (
    Augmentation,
    Batches,
    ImageSet,
    IndexedBatches,
    derive_seed,
    load_dataset,
    mixup,
    open_folder,
    open_synthetic,
    to_float,
    training_batch,
)
from timm_paf.training.config import check, parse

SIZE = 32
PIXELS = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
    (SIZE, SIZE)))
POLICIES = (None, 'rand-m9-mstd0.5-inc1', 'rand-m5-n3-p0.7', 'original', 'v0', '3a', 'augmix-m5-w2-d2')


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for name in ('cat', 'dog'):
        (root / 'train' / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / 'train' / name / f'{i}.png')
    return root


def of_timm(aa: str | None, jitter: float | None, reprob: float, seed: int,
            monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What timm makes of PIXELS, erased after it was normalised, in [0, 1] again."""
    with monkeypatch.context() as patch:
        for module in (auto_augment, random_erasing):
            patch.setattr(module, 'random', random)
        patch.setattr(auto_augment, 'np', np)
        _, change, last = create_transform(SIZE, is_training=True, auto_augment=aa, color_jitter=jitter,
                                           interpolation='bicubic', re_prob=reprob, separate=True)
        random.seed(seed)
        np.random.seed(seed % 2 ** 32)
        torch.manual_seed(seed)
        made = last(change(Image.fromarray(PIXELS)))
    mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return np.asarray((made * std + mean).permute(1, 2, 0))


@pytest.mark.parametrize('aa', POLICIES)
@pytest.mark.parametrize(('jitter', 'reprob'), [(None, 0.0), (0.4, 0.6)])
def test_an_image_is_what_timm_makes_of_it(
        aa: str | None, jitter: float | None, reprob: float, monkeypatch: pytest.MonkeyPatch) -> None:
    augment, changed = Augmentation(SIZE, aa, jitter or 0.0, reprob), 0
    for seed in [*range(20), 2 ** 62 + 5]:
        found = augment(PIXELS, seed)
        assert (found.shape, found.dtype) == (PIXELS.shape, np.uint8)
        np.testing.assert_allclose(found / 255, of_timm(aa, jitter, reprob, seed, monkeypatch), atol=0.51 / 255)
        changed += not np.array_equal(found, PIXELS)
    assert changed >= (10 if aa or jitter else 0)


def test_cifar10_is_torchvision_s_autoaugment() -> None:
    augment, theirs = Augmentation(SIZE, 'cifar10'), transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    before, changed = torch.get_rng_state(), 0
    for seed in range(300):
        found = augment(PIXELS, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = np.asarray(theirs(Image.fromarray(PIXELS)))
        assert np.array_equal(found, expected)
        changed += not np.array_equal(found, PIXELS)
    assert changed > 200
    assert torch.equal(torch.get_rng_state(), before)


def idbh_by_definition(pixels: np.ndarray, erase: float) -> tuple[np.ndarray, str]:
    """IDBH of CIFAR-10 on torch's global generator, and the name of the change of colour or shape (arXiv 2301.09879,
    in the order of draws of the authors' code): flip, CropShift of 0 to 10 pixels, one change of eight, erasing."""
    def integer(end: int) -> int:
        return int(torch.randint(end, (1,)))

    image = np.asarray(transforms.RandomHorizontalFlip()(Image.fromarray(pixels)))
    height, width = image.shape[:2]
    lost = integer(11)
    lost_x = integer(lost + 1)
    lost_y = lost - lost_x
    from_x, from_y = integer(lost_x + 1), integer(lost_y + 1)
    window_x, window_y = integer(lost_x + 1), integer(lost_y + 1)
    bordered = np.zeros((height + lost_y, width + lost_x, 3), np.uint8)
    bordered[lost_y:height, lost_x:width] = image[from_y:from_y + height - lost_y, from_x:from_x + width - lost_x]
    shifted = Image.fromarray(bordered[window_y:window_y + height, window_x:window_x + width])

    name = ('Color', 'Brightness', 'Contrast', 'Sharpness', 'autocontrast', 'equalize', 'shear', 'rotate')[
        int(torch.rand(1) * 8)]
    if name in ('autocontrast', 'equalize'):
        made = getattr(ImageOps, name)(shifted)
    elif name == 'rotate':
        angle = 1 + integer(10)
        made = shifted.rotate(-angle if integer(2) else angle, Image.Resampling.NEAREST)
    elif name == 'shear':
        slope = 0.05 + 0.1 * torch.rand(1).item()
        slope = np.tan(-slope if integer(2) else slope)
        # Pillow takes the map from the result to the source, about the centre of the image.
        matrix = (1, slope, -slope * height / 2, 0, 1, 0) if integer(2) else (1, 0, 0, slope, 1, -slope * width / 2)
        made = shifted.transform(shifted.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    else:
        low = 0.1 if name in ('Color', 'Sharpness') else 0.5
        made = getattr(ImageEnhance, name)(shifted).enhance((torch.rand(1) * (1.9 - low) + low).item())
    erased = transforms.RandomErasing(p=erase)(transforms.functional.pil_to_tensor(made))
    return erased.permute(1, 2, 0).numpy(), name


@pytest.mark.parametrize(('aa', 'erase'), [('idbh-weak', 0.5), ('idbh-strong', 1.0)])
def test_idbh_is_what_its_definition_says(aa: str, erase: float) -> None:
    augment, black = Augmentation(SIZE, aa), 0
    assert augment.crops
    counts: dict[str, int] = {}
    for seed in range(1200):
        found = augment(PIXELS, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected, name = idbh_by_definition(PIXELS, erase)
        assert np.array_equal(found, expected), name
        counts[name] = counts.get(name, 0) + 1
        black += (found == 0).all()
    assert len(counts) == 8
    assert all(abs(count - 150) < 60 for count in counts.values())  # five standard deviations
    assert not black


def test_threads_disturb_neither_each_other_nor_anybody_s_generators() -> None:
    augment = Augmentation(SIZE, 'rand-m9-mstd0.5-inc1', 0.4, 0.5)
    alone = [augment(PIXELS, seed) for seed in range(200)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        assert all(map(np.array_equal, alone, pool.map(lambda seed: augment(PIXELS, seed), range(200))))
    assert (random.getstate(), str(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])

    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            random.random()
            np.random.rand()
            torch.rand(1)

    other = threading.Thread(target=draw)
    other.start()
    try:
        assert all(np.array_equal(image, augment(PIXELS, seed)) for seed, image in enumerate(alone))
    finally:
        stop.set()
        other.join()


def test_the_highest_level_leaves_no_bit() -> None:
    """At level 10 timm's Posterize keeps no bit; newer Pillow raises for that."""
    augment = Augmentation(SIZE, 'rand-m10-n1-p1.0-inc1')
    made = [augment(PIXELS, seed) for seed in range(100)]
    assert any(not image.any() for image in made)


def test_timm_s_own_transforms_still_draw_from_the_modules() -> None:
    Augmentation(SIZE, 'rand-m9')
    made = create_transform(SIZE, is_training=True, auto_augment='rand-m9-mstd0.5', re_prob=0.5)
    drawn = []
    for seed in (0, 0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        drawn.append(made(Image.fromarray(PIXELS)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_batches_do_not_depend_on_threads_processes_or_steps(root: Path) -> None:
    def batches(rank: int = 0, world: int = 1, workers: int = 1) -> IndexedBatches:
        augmentation = Augmentation(16, 'rand-m9-mstd0.5-inc1', 0.3, 0.5)
        return IndexedBatches(open_folder(root, True), 8, 1, 'cpu', rank, world, 16, augmentation, workers)
    one = batches()
    whole = [training_batch(one, step, 1, mixup_alpha=0.8, alpha=1.0) for step in range(6)]
    assert not torch.equal(whole[0][0], one[0][0])
    parts = [batches(rank, 4, 3) for rank in range(4)]
    for step in (5, 2, 3, 0):
        images, labels = zip(*(
            training_batch(part, step, 1, rank, mixup_alpha=0.8, alpha=1.0) for rank, part in enumerate(parts)))
        assert torch.equal(torch.cat(images), whole[step][0])
        assert torch.equal(torch.cat(labels), whole[step][1])
    plain = IndexedBatches(open_folder(root, True), 8, 1, 'cpu', size=16)
    assert torch.equal(plain[0][1], one[0][1])
    assert not torch.equal(plain[0][0], one[0][0])


SMALL = load_dataset('digits')


def test_in_memory_the_policy_comes_after_crop_and_flip() -> None:
    """The images are those of the plain batches, each changed by the seed of its epoch and index alone."""
    data = ImageSet('made', SMALL.images[:40], torch.arange(40), 40)  # a label tells the image
    for aa, pad_mode in (('cifar10', 'zeros'), ('rand-m9-mstd0.5-inc1', 'reflect')):
        augment = Augmentation(32, aa, 0.3, 0.5)
        plain = Batches(data, 16, 7, 'cpu', pad_mode=pad_mode)
        changed = Batches(data, 16, 7, 'cpu', pad_mode=pad_mode, augmentation=augment)
        for step in (0, 1, 2, 5, 3):
            (x, y), (found, labels) = plain[step], changed[step]
            assert torch.equal(labels, y)
            assert (found.dtype, found.shape) == (x.dtype, x.shape)
            assert found.is_contiguous(memory_format=torch.channels_last) == x.is_contiguous(
                memory_format=torch.channels_last)
            for image, result, index in zip(x, found, y.tolist()):
                pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
                expected = augment(pixels, derive_seed(7, 8, step // 2, index))
                assert torch.equal(result, to_float(torch.from_numpy(expected.copy())[None])[0])


def test_a_policy_with_its_own_crop_gets_images_as_they_are(tmp_path: Path) -> None:
    data = ImageSet('made', SMALL.images[:40], torch.arange(40), 40)
    np.savez(tmp_path / 'made.npz', image=SMALL.images[40:60].numpy(), label=np.arange(20))
    made = open_synthetic(tmp_path / 'made.npz', (32, 32, 3), 40)
    augment = Augmentation(32, 'idbh-strong')
    for also in (True, False):
        batches = Batches(data, 16, 7, 'cpu', synthetic=made, augmentation=augment, synthetic_augment=also)
        results = set()
        for step in range(10):
            x, y = batches[step]
            for image, index in zip(x[:8], y[:8].tolist()):
                expected = augment(data.images[index].numpy(), derive_seed(7, 8, step // 5, index))
                assert torch.equal(image, to_float(torch.from_numpy(expected.copy())[None])[0])
            for image, index in zip(x[8:], y[8:].tolist()):
                same = torch.equal(image, to_float(SMALL.images[40 + index][None])[0])
                assert same == (not also)
                results.add(image.numpy().tobytes())
        assert len(results) == (80 if also else 20)  # an image comes again as another one


@pytest.mark.parametrize('aa', ['idbh-strong', 'cifar10', 'augmix-m5-w2-d2'])
def test_batches_in_memory_do_not_depend_on_threads_processes_or_steps(tmp_path: Path, aa: str) -> None:
    np.savez(tmp_path / 'made.npz', image=SMALL.images[40:60].numpy(), label=np.arange(20) % 10)
    made = open_synthetic(tmp_path / 'made.npz', (32, 32, 3), 10)

    def batches(rank: int = 0, world: int = 1, workers: int = 1) -> Batches:
        return Batches(SMALL.take(torch.arange(44)), 16, 1, 'cpu', rank, world, made, drop_last=False,
                       augmentation=Augmentation(32, aa, reprob=0.2), workers=workers)
    one = batches()
    whole = [one[step] for step in range(13)]
    assert (one.steps_per_epoch, one.last_size) == (6, 4 + 8)
    parts = [batches(rank, 4, 3) for rank in range(4)]
    for step in (12, 5, 6, 7, 3, 3):  # the last of an epoch has one real image in each process
        shares = [part[step] for part in parts]
        real = 1 if step % 6 == 5 else 2
        for kind in (slice(real), slice(real, None)):
            begin, size = (0, 4 * real) if kind.start is None else (4 * real, 8)
            for index in range(2):
                assert torch.equal(torch.cat([share[index][kind] for share in shares]),
                                   whole[step][index][begin:begin + size])


def test_a_failed_augmentation_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(SMALL, 16, 1, 'cpu', augmentation=Augmentation(32, 'cifar10'))
    batches[0]

    def broken(*args: object) -> None:
        raise OSError('no memory')

    monkeypatch.setattr(Augmentation, '__call__', broken)
    with pytest.raises(OSError, match='no memory'):
        [batches[step] for step in (1, 2)]


def test_the_last_smaller_batch_of_a_folder_is_kept(root: Path) -> None:
    def batches(rank: int = 0, world: int = 1) -> IndexedBatches:
        return IndexedBatches(open_folder(root, True), 6, 1, 'cpu', rank, world, 16, workers=2, drop_last=False)
    one, parts = batches(), [batches(rank, 2) for rank in range(2)]
    assert (one.steps_per_epoch, one.last_size) == (3, 4)
    images = set()
    for step in range(3):
        x, y = one[step]
        assert len(x) == (4 if step == 2 else 6)
        for index, whole in enumerate((x, y)):
            assert torch.equal(torch.cat([part[step][index] for part in parts]), whole)
        images |= {image.numpy().tobytes() for image in x}
    assert len(images) == 16
    with pytest.raises(ValueError, match='the last batch of an epoch has 4 of 16 images and there are 3 processes'):
        batches(0, 3)


@pytest.mark.parametrize('cutmix_alpha', [0.0, 1.0])
def test_mixup_is_timm_s_of_neighbours(cutmix_alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 3, 0])
    before, kinds = str(np.random.get_state()), set()
    for seed in range(40):
        images, labels = mixup(x, y, 5, 0.8, cutmix_alpha, seed)
        order = [0, 2, 4, 5, 3, 1]
        with torch.random.fork_rng():
            state = np.random.get_state()
            np.random.seed(seed)
            expected = Mixup(0.8, cutmix_alpha, label_smoothing=0.0, num_classes=5)(x[order], y[order])
            np.random.set_state(state)
        assert torch.equal(images[order], expected[0].clamp(0, 1))
        assert torch.equal(labels[order], expected[1])
        # in closed form: one share for all, and the neighbour's image
        share = labels[0, 0].item()
        torch.testing.assert_close(labels, share * torch.eye(5)[y] + (1 - share) * torch.eye(5)[y[[1, 0, 3, 2, 5, 4]]])
        blended = torch.allclose(images, share * x + (1 - share) * x[[1, 0, 3, 2, 5, 4]], atol=1e-6)
        assert blended or ((images == x) | (images == x[[1, 0, 3, 2, 5, 4]])).all()
        kinds.add(blended)
    assert kinds == ({True, False} if cutmix_alpha else {True})
    assert str(np.random.get_state()) == before
    assert x.min() >= 0
    with pytest.raises(ValueError, match='a process has 5; expected an even number'):
        mixup(x[:5], y[:5], 5, 0.8, 0.0, 0)


def test_mixup_of_images_in_memory() -> None:
    data = load_dataset('digits')
    whole = training_batch(Batches(data, 16, 0, 'cpu'), 3, 0, mixup_alpha=0.2)
    halves = [training_batch(Batches(data, 16, 0, 'cpu', rank, 2), 3, 0, rank, mixup_alpha=0.2) for rank in range(2)]
    for got, expected in zip(map(torch.cat, zip(*halves)), whole):
        assert torch.equal(got, expected)
    assert whole[1].shape == (16, 10)


@pytest.mark.parametrize(('args', 'message'), [
    (('--dataset', 'folder', '--data-dir', 'x', '--aa', 'best'),
     r"--aa best is none of timm's policies \(.*best.*\); expected one such as rand-m9"),
    (('--dataset', 'folder', '--data-dir', 'x', '--aa', 'rand-q9'), "--aa rand-q9 is none of timm's policies"),
    (('--aa', 'idbh'), "--aa idbh is none of timm's policies .* original or v0, or cifar10, idbh-weak, idbh-strong"),
    (('--dataset', 'folder', '--data-dir', 'x', '--aa', 'idbh-weak'),
     '--aa idbh-weak does not work with --dataset folder: .* small images; expected cifar10, cifar100, digits with it'),
    (('--dataset', 'folder', '--data-dir', 'x', '--pad-mode', 'reflect'),
     '--pad-mode reflect does not work with --dataset folder: its crops are not padded; expected cifar10'),
    (('--aa', 'idbh-strong', '--pad-mode', 'reflect'), '--pad-mode reflect does not work with --aa idbh-strong, which'),
    (('--pad-mode', 'edge'), "unknown --pad-mode 'edge'; expected one of zeros, reflect"),
    (('--reprob', '1.2'), '--reprob is 1.2; expected from 0 to below 1'),
    (('--mixup', '-1'), '--mixup is -1.0; expected at least 0')])
def test_wrong_options_are_one_line(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        check(parse(['--output', 'x', *args]))
    assert '\n' not in str(info.value)


def test_an_odd_batch_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='--mixup pairs the images of a batch and a process has 5; expected a --batch'):
        train_robust.run(parse(['--output', str(tmp_path / 'run'), '--dataset', 'digits', '--batch-size', '5',
                                '--mixup', '1', '--model', 'wrn10_1_pssilu']))
    assert not (tmp_path / 'run').exists()
