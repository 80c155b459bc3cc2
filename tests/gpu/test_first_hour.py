"""The program of the first hour, rehearsed on a CPU: a training that its time limit stops goes on, then is attacked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Program


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_its_limit_stopped_goes_on_and_is_attacked_at_its_end(
        tmp_path: Path, cifar10_root: Path) -> None:
    output = tmp_path / 'hour'
    # Without the part of the tests: it would only find that there is no GPU.
    command = [sys.executable, '-W', 'ignore', 'tests/gpu/first_hour.py', '--tiny', '--data-dir', cifar10_root,
               '--output', output, '--parts', 'bench,train,evaluate', '--bench', 'convolution']

    def start(*options: str) -> tuple[int, str, list[tuple[str, int, bool]]]:
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
        done = subprocess.run([*command, *options], cwd=ROOT, env=env, capture_output=True, text=True)
        starts = json.loads((output / 'first_hour.json').read_text())['starts']
        return done.returncode, done.stderr, [(each['part'], each['exit'], each['passed']) for each in starts]

    stopped = [('bench', 0, True), ('train', 0, False)]
    assert start('--train-minutes', '0.001') == (
        1, 'not done: train, evaluate; the same command goes on\n', stopped)
    assert 'stopped by --max-minutes' in (output / 'train.log').read_text()
    assert not (output / 'evaluate.log').exists()
    ended = [*stopped, ('train', 0, True), ('evaluate', 0, True)]
    assert start() == (0, '', ended)
    assert 'resumes from' in (output / 'train.log').read_text()
    assert json.loads((output / 'run' / 'run.json').read_text())['recipe']['mixed_precision'] == 'bf16'
    assert json.loads((output / 'run' / 'evaluation.json').read_text())['complete']
    assert start() == (0, '', ended)
    status, error, starts = start('--config', 'hub/recipes/fastat_nfgsm.yaml')
    assert (status, error.count('\n'), starts) == (1, 1, ended)
    assert 'has the part train by other arguments (python train_robust.py --config hub/recipes/fastat_ema.yaml' in error


def test_a_part_that_is_not_there_is_one_line(tmp_path: Path, program: Program) -> None:
    output = tmp_path / 'hour'
    done = program('tests/gpu/first_hour.py', '--data-dir', 'data', '--output', output, '--parts', 'tests,trian')
    assert done.returncode == 1
    assert done.stderr == "--parts has no 'trian'; expected some of tests,bench,train,evaluate\n"
    assert not list(tmp_path.iterdir())
