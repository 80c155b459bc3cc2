"""Files of CIFAR-10-C and CIFAR-100-C: RobustBench loads the same images, and faults are told."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import timm_paf  # noqa: F401  makes `import autoattack` work, which RobustBench needs
from timm_paf.data import to_float
from timm_paf.data.corrupted import CORRUPTIONS, SEVERITIES, open_cifar_c

KEPT = 12


def write_cifar_c(folder: Path) -> Path:
    """Writes files of the true size with content for the first images of each severity alone, so hardly on the disk."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in CORRUPTIONS:
        images = np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', np.uint8, (50_000, 32, 32, 3))
        for severity in SEVERITIES:
            first = (severity - 1) * 10_000
            images[first:first + KEPT] = rng.integers(0, 256, (KEPT, 32, 32, 3), np.uint8)
    np.save(folder / 'labels.npy', np.tile(rng.integers(0, 10, 10_000), 5).astype(np.uint8))
    return folder


@pytest.fixture(scope='module', params=['CIFAR-10-C', 'CIFAR-100-C'])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar_c(tmp_path_factory.mktemp('data') / request.param)


@pytest.mark.skipif(importlib.util.find_spec('robustbench') is None, reason="needs pip install 'timm-paf[robustbench]'")
def test_images_and_labels_are_those_of_robustbench(folder: Path) -> None:
    from robustbench import data

    assert {*CORRUPTIONS} == {*data.CORRUPTIONS}
    load = data.load_cifar10c if folder.name == 'CIFAR-10-C' else data.load_cifar100c
    found = open_cifar_c(folder, KEPT - 2)
    for severity, corruption in enumerate(CORRUPTIONS[::3], 1):
        x, y = load(KEPT - 2, severity, str(folder.parent), False, [corruption])
        assert torch.equal(to_float(found.read(corruption, severity, 0, KEPT - 2)), x)
        assert torch.equal(found.labels, y.long())


def test_a_few_are_read_at_a_time(folder: Path) -> None:
    found = open_cifar_c(folder, KEPT)
    whole = found.read('fog', 5, 0, KEPT)
    assert whole.dtype == torch.uint8
    assert torch.equal(found.read('fog', 5, 3, 7), whole[3:7])
    assert not torch.equal(whole, found.read('fog', 4, 0, KEPT))
    assert (len(found), found.name, found.about['generated']) == (KEPT, folder.name, False)


def test_the_sha256_is_of_the_images_that_are_used(folder: Path) -> None:
    found = open_cifar_c(folder, 2)
    content = found.labels.numpy().tobytes() + b''.join(
        found.read(name, severity, 0, 2).numpy().tobytes() for name in CORRUPTIONS for severity in SEVERITIES)
    assert found.about['data_sha256'] == hashlib.sha256(content).hexdigest()
    assert open_cifar_c(folder, 3).about != found.about


@pytest.mark.parametrize(('file', 'content', 'message'), [
    ('snow.npy', None, 'lacks snow.npy; expected'), ('labels.npy', None, 'lacks labels.npy; expected'),
    ('fog.npy', b'no array', 'fog.npy is no .npy array'), ('frost.npy', b'', 'is no .npy array'),
    ('fog.npy', np.zeros((5, 32, 32, 3), np.uint8), 'expected uint8'), ('fog.npy', np.array([{}]), 'is no .npy array'),
    ('labels.npy', np.zeros(50_000), 'expected uint8'), ('labels.npy', np.arange(50_000), 'labels for each severity')])
def test_faults_are_told(folder: Path, tmp_path: Path, file: str, content: bytes | np.ndarray | None,
                         message: str) -> None:
    for path in folder.iterdir():
        if path.name != file:
            (tmp_path / path.name).symlink_to(path)
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / file, content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_cifar_c(tmp_path, 2)
    assert '\n' not in str(error.value)
