"""A data set of timm as a run has it: held-out images, an exact resume, its evaluation and the names in the bundle."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import train_robust
from hub import bundle, evaluate
from timm_paf import load_bundle
from timm_paf.data import DATASETS, open_images, split_validation

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The program handles signals, which are put back, and takes an accelerator that no other test has made."""
    AcceleratorState._reset_state(reset_partial_state=True)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('images')
    for split, count in (('train', 8), ('val', 3)):
        for name in ('cat', 'dog'):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
                    root / split / name / f'{i}.png')
    return root


def train(root: Path, output: Path, *more: object, dataset: str = 'torch/image_folder') -> int:
    return train_robust.run(train_robust.parse([str(arg) for arg in (
        '--model', 'wrn10_1_pssilu', '--dataset', dataset, '--data-dir', root, '--image-size', 24, '--epochs', 2,
        '--batch-size', 4, '--attack-steps', 1, '--val', 4, '--output', output, *more)]))


@pytest.mark.parametrize(('dataset', 'more'), [
    ('torch/image_folder', ()),
    ('folder', ('--aa', 'rand-m9-mstd0.5-inc1', '--reprob', '0.5', '--color-jitter', '0.4', '--mixup', '0.8'))])
def test_a_run_resumes_exactly_and_its_bundle_names_the_classes(
        root: Path, tmp_path: Path, dataset: str, more: tuple[str, ...]) -> None:
    assert train(root, tmp_path / 'whole', *more, dataset=dataset) == 0
    assert train(root, tmp_path / 'parts', *more, '--max-minutes', '0.00001', dataset=dataset) == 0
    assert not (tmp_path / 'parts' / 'model.safetensors').exists()
    assert train(root, tmp_path / 'parts', *more, dataset=dataset) == 0
    for name in ('model.safetensors', 'metrics.jsonl'):
        assert (tmp_path / 'whole' / name).read_bytes() == (tmp_path / 'parts' / name).read_bytes()
    run = json.loads((tmp_path / 'whole' / 'run.json').read_text())
    assert (run['data']['name'], run['data']['n'], run['data']['label_names']) == (dataset, 12, ['cat', 'dog'])
    assert run['weights']['chosen_by'] == '4 held-out images'

    evaluate.main([str(arg) for arg in (
        tmp_path / 'whole', '--data-dir', root, '--attacks', 'clean,pgd-2', '--n', 4, '--device', 'cpu')])
    found = json.loads((tmp_path / 'whole' / 'evaluation.json').read_text())
    assert (found['dataset'], found['images']) == (dataset, '4 evenly spaced')
    bundle.main([str(tmp_path / 'whole'), '--out', str(tmp_path / 'packed')])
    model = load_bundle(tmp_path / 'packed')
    assert tuple(model.pretrained_cfg['label_names']) == ('cat', 'dog')
    images = open_images(dataset, root, False).spread(4)
    with torch.no_grad():
        right = model(images.centres(24).permute(0, 3, 1, 2).float() / 255).argmax(1) == images.labels
    assert found['attacks']['clean']['verdicts'] == ''.join(str(int(each)) for each in right)

    (root / 'val' / 'dog').rename(root / 'val' / 'wolf')
    (root / 'train' / 'dog').rename(root / 'train' / 'wolf')
    try:
        with pytest.raises(SystemExit, match=r'trained on 2 classes and .* has 2, such as wolf in place of dog'):
            evaluate.main([str(arg) for arg in (tmp_path / 'packed', '--data-dir', root, '--output', tmp_path / 'other',
                                                '--device', 'cpu')])
    finally:
        (root / 'val' / 'wolf').rename(root / 'val' / 'dog')
        (root / 'train' / 'wolf').rename(root / 'train' / 'dog')


def test_held_out_images_are_of_all_classes_and_not_trained_on(root: Path) -> None:
    for name in ('folder', 'torch/image_folder'):
        data = open_images(name, root, True)
        rest, held_out = split_validation(data, 5, seed=3)
        assert (len(rest), len(held_out), held_out.name) == (11, 5, f'{data.name}-val')
        assert sorted(held_out.labels.tolist()) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
        assert sorted(rest.names() + held_out.names()) == sorted(data.names())
        names = [each.names() for each in (rest, held_out, *split_validation(data, 5, seed=3))]
        assert names[:2] == names[2:]
        assert split_validation(data, 5, seed=4)[1].names() != names[1]


@pytest.mark.parametrize(('args', 'message'), [
    (('--dataset', 'tfds/x'), 'tfds/x is read in its order alone'),
    (('--dataset', 'torch/'), "unknown --dataset 'torch/'; expected one of cifar10, .*, imagenet, folder, torch"),
    (('--dataset', 'torch/cifar10'), '--dataset torch/cifar10 needs a directory; expected --data-dir DIR'),
    (('--dataset', 'folder', '--data-dir', 'x', '--synthetic', 'y'),
     f'--synthetic y does not work with --dataset folder: generated images need .*; expected {", ".join(DATASETS)}')])
def test_what_does_not_go_together_is_one_line(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_robust.check(train_robust.parse(['--output', 'x', *args]))
