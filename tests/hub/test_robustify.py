"""From clean weights to a bundle in one command, of its steps and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, Program
from networks import EXACT, images, in_hub_cache, randomise
from PIL import Image

from hub import robustify
from hub.sources import load_run
from timm_paf.activations import PAF
from timm_paf.weights import load_bundle

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:timm.*')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of four images each, to train on and to be attacked."""
    for index in range(16):
        path = tmp_path / 'images' / ('train', 'val')[index % 2] / f'class{index // 2 % 2}' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 56), (15 * index, 90, 255 - 15 * index)).save(path)
    return tmp_path / 'images'


def test_a_folder_of_images_and_a_network_of_timm(folder: Path, tmp_path: Path, program: Program) -> None:
    torch.manual_seed(0)
    in_hub_cache(tmp_path / 'hub', 'timm/resnet10t.c3_in1k', randomise(timm.create_model('resnet10t')))
    env = {'HF_HUB_CACHE': str(tmp_path / 'hub'), 'HF_HUB_OFFLINE': '1'}
    args = ['-m', 'timm_paf', 'robustify', 'resnet10t', '--data-dir', folder, '--minutes', '1', '--images', '4',
            '--attacks', 'clean,pgd-2', '--output', tmp_path / 'out', '--', '--image-size', '64', '--batch-size', '4',
            '--epochs', '2', '--no-compile']
    done = program(*args, env=env)
    assert done.returncode == 0, done.stderr
    for text in ('timm-paf train --config robustify --model resnet10t --init pretrained --act pssilu --dataset folder',
                 'starts from weights of resnet10t.c3_in1k', 'new head fc', '11 activations replaced by 1 pssilu',
                 'timm-paf evaluate', 'timm-paf bundle', '\nresnet10t from resnet10t.c3_in1k, Linf eps 4/255, 4 test'):
        assert text in done.stdout, text
    run = json.loads((tmp_path / 'out' / 'run' / 'run.json').read_text())
    assert run['steps'] == 4  # two epochs are less than a minute
    x = images(size=(64, 64))
    model = load_bundle(tmp_path / 'out' / 'bundle')
    torch.testing.assert_close(model(x), load_run(tmp_path / 'out' / 'run')(x), **EXACT)
    assert any(isinstance(module, PAF) for module in model.modules())
    again = program(*args, env=env)
    assert again.returncode == 0, again.stderr
    assert 'is complete' in again.stdout
    other = tmp_path / 'other'
    for number, value, output, words in (  # found before it trains
            (7, '2', tmp_path / 'out', 'was begun with --minutes 1.0, now 2.0'),
            (7, '0', other, '--minutes is 0; expected more than 0'), (11, 'pdg-50', other, "unknown attack 'pdg-50'"),
            (11, 'pgd-2@8', other, 'pgd-2@8: eps is 8; expected')):
        wrong = [*map(str, args[3:])]
        wrong[number - 3], wrong[10] = value, str(output)
        with pytest.raises(SystemExit, match=f'^hub.robustify: .*{words}') as error:
            robustify.main(wrong)
        assert '\n' not in str(error.value)
        assert not (other / 'run').exists()


@pytest.mark.slow
def test_a_network_of_ours_goes_on_after_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, '-m', 'timm_paf', 'robustify', 'wrn10_1_pssilu', '--init', 'wrn10_1_relu', '--dataset',
               'digits', '--data-dir', str(tmp_path), '--minutes', '10', '--images', '4', '--attacks', 'clean',
               '--output', str(tmp_path / 'out'), '--', '--batch-size', '16', '--epochs', '2', '--swa', '2', '--ema',
               '0', '--no-compile', '--checkpoint-steps', '2', '--val', '16', '--patience', '3']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list((tmp_path / 'out' / 'run' / 'checkpoints').glob('step-*')):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'resumes from' in done.stdout
    assert '--act null' in done.stdout
    trial, run = (json.loads((tmp_path / 'out' / name / 'run.json').read_text()) for name in ('trial', 'run'))
    assert (trial['recipe']['val'], run['recipe']['val']) == (0, 16)  # the trial is of steps alone
    assert (run['status'], run['recipe']['act'], run['recipe']['init']['source']) == (
        'complete', None, 'wrn10_1_relu.timm_paf_cifar10_linf')
    assert load_bundle(tmp_path / 'out' / 'bundle').act.alpha.item() != 100
