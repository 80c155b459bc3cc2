"""Images in memory as a run augments them: with its last batch, generated images and all, resumed exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

import train_robust
from hub.training_summary import training_summary

SHORT = ('--model', 'wrn10_1_relu', '--dataset', 'digits', '--batch-size', '400', '--eps', '0', '--no-compile')


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *more: object, stop: bool = False) -> dict[str, object]:
    """What run.json has after a run to the end, or of one step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    reason = '--max-minutes' if stop else None
    monkeypatch.setattr(train_robust, 'Interruption', lambda minutes: SimpleNamespace(reason=lambda *_: reason))
    assert train_robust.run(train_robust.parse([str(arg) for arg in (*SHORT, '--output', output, *more)])) == 0
    found: dict[str, object] = json.loads((output / 'run.json').read_text())
    return found


def in_parts(monkeypatch: pytest.MonkeyPatch, output: Path, steps: int, *more: object) -> dict[str, object]:
    """The record of a run that stops after every step; one that stops in an epoch's end resumes before it."""
    count, record = 0, dict[str, object]()
    while record.get('status') != 'complete':
        record, count = run(monkeypatch, output, *more, stop=True), count + 1
        assert count <= 2 * steps
    assert count >= steps
    return record


@pytest.mark.parametrize('more', [
    ('--aa', 'idbh-strong', '--no-synthetic-augment'),
    pytest.param(('--aa', 'cifar10', '--reprob', '0.5', '--color-jitter', '0.4', '--pad-mode', 'reflect', '--mixup',
                  '0.8'), marks=pytest.mark.slow)])
def test_a_run_that_stops_after_every_step_ends_alike(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: tuple[str, ...], capfd: pytest.CaptureFixture[str],
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (90, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / 'made.npz', image=images, label=np.arange(90) % 10)
    more = (*more, '--synthetic', f'{tmp_path}/made.npz:0.1', '--no-drop-last', '--max-steps', '5')
    whole = run(monkeypatch, tmp_path / 'whole', *more)
    shown = capfd.readouterr().err
    assert re.search(r'epoch 1 loss \d\.\d{3} clean \d', shown), shown
    assert ' adv ' not in shown  # there is no attack
    parts = in_parts(monkeypatch, tmp_path / 'parts', 5, *more)
    assert whole['status'] == parts['status'] == 'complete'
    for name in ('model.safetensors', 'metrics.jsonl'):
        assert (tmp_path / 'whole' / name).read_bytes() == (tmp_path / 'parts' / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == [4, 5]  # 1,438 real images: 360, 360, 360, 358
    done = training_summary(whole)
    assert (done.per_epoch, done.images, done.generated) == (4, 1438, 90)
    assert training_summary({**whole, 'steps': 4}).images == 1438
    recipe = whole['recipe']
    assert isinstance(recipe, dict)
    dropped = training_summary({**whole, 'steps': 3, 'recipe': {**recipe, 'drop_last': None}})
    assert (dropped.per_epoch, dropped.images) == (3, 1080)


def test_an_augmentation_reaches_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [run(monkeypatch, tmp_path / str(index), '--max-steps', '2', '--batch-size', '40', *more) and (
        tmp_path / str(index) / 'model.safetensors').read_bytes() for index, more in enumerate((
            (), ('--aa', 'idbh-weak'), ('--aa', 'idbh-strong'), ('--reprob', '0.5'), ('--pad-mode', 'reflect')))]
    assert len(set(found)) == 5


def test_a_folder_keeps_its_last_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index in range(14):
        path = tmp_path / 'images' / 'train' / f'class{index % 2}' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 36), (9 * index, 50, 90)).save(path)
    args = ('--dataset', 'folder', '--data-dir', tmp_path / 'images', '--image-size', 16, '--batch-size', 6,
            '--epochs', 2, '--no-drop-last', '--aa', 'cifar10')
    whole = run(monkeypatch, tmp_path / 'whole', *args)
    assert whole['steps'] == 6
    in_parts(monkeypatch, tmp_path / 'parts', 6, *args)
    for name in ('model.safetensors', 'metrics.jsonl'):
        assert (tmp_path / 'whole' / name).read_bytes() == (tmp_path / 'parts' / name).read_bytes()
