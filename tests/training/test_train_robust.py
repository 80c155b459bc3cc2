"""The training program as a user runs it: real processes, signals, kills, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, Program, assert_one_line
from PIL import Image
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

import train_robust
from hub.sources import read_run
from hub.training_summary import hardware_of
from hub.wording import escape_markdown
from timm_paf.files import write_record
from timm_paf.speed import emulates_bfloat16, has_bfloat16_units
from timm_paf.training.config import Config
from timm_paf.training.option import flag_of, options_of

SMALL = ['--model', 'wrn10_1_pssilu', '--dataset', 'digits', '--epochs', '1', '--batch-size', '32',
         '--attack-steps', '1', '--max-steps', '6']


def fails(capfd: pytest.CaptureFixture[str], *args: object) -> str:
    """The last line that the program prints to stderr or exits with; it must not succeed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', ['train_robust.py', *map(str, args)])
            with pytest.raises(SystemExit) as exit_info:
                train_robust.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert exit_info.value.code not in (0, None)
    if isinstance(exit_info.value.code, str):
        assert '\n' not in exit_info.value.code
        return exit_info.value.code
    return capfd.readouterr().err.strip()


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp('runs') / 'whole'
    done = program('train_robust.py', *SMALL, '--output', output, '--trackers', '[tensorboard]')
    assert done.returncode == 0, done.stderr
    return output


def test_a_run_leaves_what_it_promises(finished: Path, program: Program) -> None:
    run = json.loads((finished / 'run.json').read_text())
    assert run['status'] == 'complete'
    assert run['recipe']['threat'] == {
        'norm': 'Linf', 'eps': '8/255', 'step': '2/255', 'steps': 1, 'random_start': True}
    assert run['recipe']['seed'] == 0
    assert run['steps'] == 6
    assert run['data']['n'] == 1438
    assert {'torch', 'timm', 'timm-paf', 'python'} <= run['versions'].keys()
    assert run['hardware']['cpu']
    row, = metrics(finished)
    assert row['step'] == 6
    weights = load_file(finished / 'model.safetensors')
    assert row['act.alpha'] == weights['act.alpha'].item() != 1
    assert (finished / 'checkpoints' / 'step-00000006' / 'state.pt').is_file()
    assert list(finished.rglob('events.out.tfevents*'))
    again = program('train_robust.py', *SMALL, '--output', finished, '--trackers', '[tensorboard]')
    assert again.returncode == 0
    assert 'is complete' in again.stdout


def test_a_run_says_what_each_of_its_parts_was_done_with(tmp_path: Path, program: Program) -> None:
    args = ['train_robust.py', *SMALL, '--no-compile', '--output', tmp_path / 'run']
    for threads, more in ((1, ('--max-minutes', '0.0001')), (2, ('--max-minutes', '0.0001')), (2, ())):
        done = program(*args, *more, env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
        assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / 'run')
    first, = run['earlier']
    assert (first['last_step'], first['hardware']['threads'], run['hardware']['threads']) == (1, 1, 2)
    assert 0 < first['seconds'] < run['seconds']
    cpu = escape_markdown(run['hardware']['cpu'])
    assert hardware_of(run) == f'{cpu}, 2 threads (to step 1 on {cpu}, 1 thread, torch {run["versions"]["torch"]})'
    one, two = ({**run, 'last_step': step, 'git_commit': str(step)} for step in (2, 3))
    assert hardware_of({**run, 'earlier': [first, {**first, 'last_step': 2}, two]}) == (
        f'{cpu}, 2 threads (to step 2 on {cpu}, 1 thread, torch {run["versions"]["torch"]})')
    assert hardware_of({**run, 'earlier': [one, two]}) == f'{cpu}, 2 threads'
    first['hardware']['cpu'] = 'two\nlines'
    write_record(tmp_path / 'run' / 'run.json', run)
    with pytest.raises(ValueError, match=r'run.json: earlier 0: hardware.cpu is .*; expected a text of one line$'):
        read_run(tmp_path / 'run')


@pytest.mark.slow
def test_compiling_is_chosen_by_the_work_and_kept(finished: Path, tmp_path: Path, program: Program) -> None:
    assert json.loads((finished / 'run.json').read_text())['recipe']['compile'] is False  # six steps
    args = [*SMALL, '--output', tmp_path / 'run', '--max-minutes', '0.001']
    first = program('train_robust.py', *args, '--compile', 'true')
    assert first.returncode == 0, first.stderr
    assert ' compiled (--no-compile' in first.stdout
    again = program('train_robust.py', *args)
    assert ' compiled (--no-compile' in again.stdout, again.stderr
    assert 'resumes from' in again.stdout
    other = program('train_robust.py', *args, '--compile', 'false')
    assert_one_line(other, 'holds another run: compile True, now False')


@pytest.mark.slow
def test_a_compiled_run_that_was_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    long = ('--compile', 'true', '--max-steps', '30')
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    process = start(whole, *long)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert 'paid back after' in out or 'not faster' in out
    process = start(killed, *long)
    wait_for_step(process, killed, 9)
    process.kill()
    process.communicate()
    assert start(killed, *long).wait(timeout=300) == 0
    assert (whole / 'model.safetensors').read_bytes() == (killed / 'model.safetensors').read_bytes()


def start(output: Path, *extra: str) -> subprocess.Popen[str]:
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    return subprocess.Popen(
        [sys.executable, 'train_robust.py', *SMALL, '--output', str(output), '--checkpoint-steps', '1', *extra],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not any(int(path.name[5:]) >= step for path in (output / 'checkpoints').glob('step-*')):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize('number', [signal.SIGTERM, *(
    pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGKILL))])
def test_an_interrupted_run_ends_with_the_same_weights(finished: Path, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / 'run'
    process = start(output)
    wait_for_step(process, output, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=200)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    elif process.returncode != 0:  # 0: it was done before the signal came
        assert process.returncode == train_robust.EXIT_CONTINUE, err
        assert f'stopped by {number.name}' in out
        assert 'resumes from there' in out
    process = start(output, '--resume', 'auto')
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert (output / 'model.safetensors').read_bytes() == (finished / 'model.safetensors').read_bytes()
    assert metrics(output) == metrics(finished)


VALIDATED = ('--epochs', '2', '--max-steps', '14', '--val', '1200', '--val-attack', 'ce-1', '--checkpoint-steps', '0')
"""Seven steps an epoch, and 38 batches of held-out images."""


@pytest.fixture(scope='module')
def validated(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Path:
    """A run that nothing interrupted, with a validation that takes longer than an epoch's steps."""
    output = tmp_path_factory.mktemp('runs') / 'validated'
    done = program('train_robust.py', *SMALL, *VALIDATED, '--output', output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_run_that_ends_in_a_validation_resumes_before_it(
        validated: Path, tmp_path: Path, program: Program, number: signal.Signals) -> None:
    output = tmp_path / 'run'
    process = start(output, *VALIDATED)
    wait_for_step(process, output, 7)
    process.send_signal(number)
    out, err = process.communicate(timeout=200)
    assert not (output / 'metrics.jsonl').exists()  # it was in the first validation
    if number == signal.SIGTERM:
        assert process.returncode == train_robust.EXIT_CONTINUE, err
        assert err.count('SIGTERM: stops with a checkpoint after the step') == 1
        assert 'stopped by SIGTERM' in out
        assert 'step 7 of 14, the same command resumes from there, first with the end of its epoch' in out
    # with less time than a validation takes it goes on all the same
    command = ('train_robust.py', *SMALL, '--output', output, *VALIDATED)
    done = program(*command, '--max-minutes', '0.0001')
    assert done.returncode == 0, done.stderr
    assert 'step 8 of 14, the same command resumes from there\n' in done.stdout
    assert metrics(output) == metrics(validated)[:1]
    done = program(*command)
    assert done.returncode == 0, done.stderr
    for name in ('model.safetensors', 'metrics.jsonl'):
        assert (output / name).read_bytes() == (validated / name).read_bytes(), name
    runs = [json.loads((run / 'run.json').read_text()) for run in (output, validated)]
    assert runs[0]['weights'] == runs[1]['weights']


@pytest.mark.slow
def test_two_processes_stop_in_a_validation_of_unlike_batches(tmp_path: Path) -> None:
    """One of both gets the signal, and has 37 batches where the other has 38."""
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'

    def launch(output: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', 'train_robust.py', *SMALL,
             *VALIDATED, '--val', '1185', '--output', str(output)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'ACCELERATE_USE_CPU': 'true'})

    process = launch(whole)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    process = launch(stopped)
    wait_for_step(process, stopped, 7)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    second, = (int(pid) for pid in children if b'\0RANK=1\0' in Path(f'/proc/{pid}/environ').read_bytes())
    os.kill(second, signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert 'stopped by a signal' in out, err
    assert 'first with the end of its epoch' in out
    assert not (stopped / 'metrics.jsonl').exists()
    process = launch(stopped)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for name in ('model.safetensors', 'metrics.jsonl'):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_alike(tmp_path: Path, program: Program, kills: int) -> None:
    """Weights, optimizer and metrics to the byte; killed at random moments, also in a checkpoint's writing."""
    long = ('--max-steps', str(10 + 4 * kills), '--epochs', '20', '--ema', '0.9', '--val', '64', '--keep', '3')
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    done = program('train_robust.py', *SMALL, '--output', whole, '--checkpoint-steps', '1', *long)
    assert done.returncode == 0, done.stderr
    random.seed(kills)
    survived, writing = 0, 0
    while survived < kills:
        process = start(killed, *long)
        newest = max((path.name for path in (killed / 'checkpoints').glob('step-*')), default='')
        while process.poll() is None and max(
                (path.name for path in (killed / 'checkpoints').glob('step-*')), default='') <= newest:
            time.sleep(0.002)
        time.sleep(random.random() * 0.2)
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        survived += 1
        writing += any((killed / 'checkpoints').glob('.step-*.part'))
    assert survived == kills
    assert start(killed, *long).wait(timeout=300) == 0
    for name in ('model.safetensors', 'metrics.jsonl'):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    names = [[path.name for path in sorted((run / 'checkpoints').iterdir())] for run in (whole, killed)]
    assert names[0] == names[1]
    assert len(names[0]) == 3
    last = Path('checkpoints', names[0][-1], 'state.pt')
    states = [torch.load(run / last, weights_only=True) for run in (whole, killed)]
    for state in states:
        del state['seconds']
    leaves = [tree_leaves(state) for state in states]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*leaves, strict=True))


def test_everything_at_once_resumes_exactly(tmp_path: Path, program: Program) -> None:
    """TRADES with AWP in L2, mixed and generated images, an average, parts, warm-ups, held-out images."""
    generator = np.random.default_rng(0)
    np.savez(tmp_path / 'generated.npz', image=generator.integers(256, size=(50, 32, 32, 3), dtype=np.uint8),
             label=generator.integers(10, size=50))
    args = ('--objective', 'trades', '--awp', '0.005', '--norm', 'L2', '--eps', '0.5', '--cutmix', '1', '--synthetic',
            f'{tmp_path}/generated.npz:0.25', '--ema', '0.9', '--accumulate', '2', '--warmup-epochs', '0.1', '--val',
            '32', '--eps-warmup-epochs', '0.1', '--clean-ratio', '0.25', '--label-smoothing', '0.1', '--optimizer',
            'adamw', '--lr', '0.001', '--paf-weight-decay', '0', '--clip-grad', '1')
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    for output, more in ((whole, ()), *[(parts, ('--max-minutes', '0.0001'))] * 3, (parts, ())):
        done = program('train_robust.py', *SMALL, '--output', output, *args, *more)
        assert done.returncode == 0, done.stderr
    assert 'resumes from' in done.stdout
    for name in ('model.safetensors', 'metrics.jsonl'):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    run = json.loads((whole / 'run.json').read_text())
    assert run['recipe']['synthetic']['n'] == 50
    assert run['recipe']['synthetic']['fraction'] == 0.25
    assert str(tmp_path) not in json.dumps(run['recipe'])
    assert run['weights'] == {'of': 'ema', 'epoch': 0, 'chosen_by': '32 held-out images'}


@pytest.mark.slow
def test_patience_ends_a_run_also_after_a_resume(tmp_path: Path) -> None:
    """With a learning rate of next to nothing no epoch is better than the first."""
    args = ('--val', '20', '--patience', '2', '--epochs', '9', '--max-steps', '400', '--lr', '1e-12', '--min-lr', '0',
            '--attack-steps', '1', '--batch-size', '256')
    process = start(tmp_path / 'run', *args)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    rows = metrics(tmp_path / 'run')
    assert len(rows) < 9
    assert rows[-1]['epoch'] - rows[-1]['best_epoch'] == 2
    run = tmp_path / 'run' / 'run.json'
    weights = (tmp_path / 'run' / 'model.safetensors').read_bytes()
    # killed before it wrote the result
    (tmp_path / 'run' / 'model.safetensors').unlink()
    run.write_text(json.dumps({**json.loads(run.read_text()), 'status': 'running'}))
    process = start(tmp_path / 'run', *args)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert 'resumes from' in out
    assert metrics(tmp_path / 'run') == rows
    assert (tmp_path / 'run' / 'model.safetensors').read_bytes() == weights


@pytest.mark.slow
def test_an_image_folder_trains_and_is_evaluated(tmp_path: Path, program: Program) -> None:
    generator = np.random.default_rng(0)
    for split, count in (('train', 6), ('val', 3)):
        for label in ('cat', 'dog'):
            (tmp_path / 'images' / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(256, size=(40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / 'images' / split / label / f'{number}.png')
    args = ['--model', 'wrn10_1_pssilu', '--dataset', 'folder', '--data-dir', tmp_path / 'images', '--image-size', '24',
            '--epochs', '2', '--batch-size', '4', '--attack-steps', '1', '--output', tmp_path / 'run']
    done = program('train_robust.py', *args)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / 'run' / 'run.json').read_text())
    assert (run['num_classes'], run['data']['n'], run['steps']) == (2, 12, 6)
    done = program('-m', 'hub.evaluate', tmp_path / 'run', '--data-dir', tmp_path / 'images', '--n', '4', '--attacks',
                   'clean,pgd-2')
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
    assert (found['n'], found['images']) == (4, '4 evenly spaced')
    done = program('train_robust.py', *args[:-1], tmp_path / 'stopped', '--max-minutes', '0.0001')
    assert done.returncode == 0, done.stderr
    shutil.copy(tmp_path / 'images' / 'train' / 'cat' / '0.png', tmp_path / 'images' / 'train' / 'cat' / 'new.png')
    refused = program('train_robust.py', *args[:-1], tmp_path / 'stopped')
    assert_one_line(refused, 'trained on other images', 'n 12, now 13')

    (tmp_path / 'images' / 'train' / 'cat' / 'new.png').write_bytes(b'no image')
    assert_one_line(program('train_robust.py', *args[:-1], tmp_path / 'skipped'), '1 of 13 images', '--skip-unreadable')
    skipping = ['train_robust.py', *args[:-1], tmp_path / 'skipped', '--skip-unreadable', '--max-minutes', '0.0001']
    done = program(*skipping)
    assert 'they are left out' in done.stdout, done.stderr
    (tmp_path / 'images' / 'train' / 'cat' / 'new.png').unlink()  # it was left out, so it may go
    done = program(*skipping[:-2])
    assert 'resumes from' in done.stdout, done.stderr
    assert (tmp_path / 'skipped' / 'model.safetensors').read_bytes() == (
        tmp_path / 'run' / 'model.safetensors').read_bytes()
    data = json.loads((tmp_path / 'skipped' / 'run.json').read_text())['data']
    assert (data['n'], data['left_out']) == (12, ['cat/new.png'])


def test_a_run_in_bfloat16_is_told_of_missing_units_and_of_no_idle_ones(tmp_path: Path, program: Program) -> None:
    done = program('train_robust.py', *SMALL, '--output', tmp_path, '--max-steps', 1, '--mixed-precision', 'bf16')
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'run.json').read_text())['recipe']['mixed_precision'] == 'bf16'
    assert done.stdout.count('--mixed-precision no is faster') == emulates_bfloat16(torch.device('cpu'))
    assert '--mixed-precision bf16' not in done.stdout


def test_max_minutes_stops_cleanly_and_goes_on(finished: Path, tmp_path: Path, program: Program) -> None:
    output = tmp_path / 'run'
    done = program('train_robust.py', *SMALL, '--output', output, '--max-minutes', '0.0001')
    assert done.returncode == 0, done.stderr
    assert 'stopped by --max-minutes' in done.stdout
    assert [path.name for path in (output / 'checkpoints').iterdir()] == ['step-00000001']
    assert not (output / 'model.safetensors').exists()
    checkpoint = output / 'checkpoints' / 'step-00000001'
    done = program('train_robust.py', *SMALL, '--output', output, '--resume', checkpoint)
    assert done.returncode == 0, done.stderr
    assert f'resumes from {checkpoint}' in done.stdout
    assert (output / 'model.safetensors').read_bytes() == (finished / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('options', [(), pytest.param(('--fsdp', 'true'), marks=pytest.mark.slow)])
def test_two_processes_train_one_network(tmp_path: Path, program: Program, options: tuple[str, ...]) -> None:
    launch = ['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '29631', 'train_robust.py']
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    told = []
    for output, extra in ((stopped, ['--max-minutes', '0.0001']), (stopped, []), (whole, [])):
        done = program(*launch, *SMALL, *options, '--output', output, *extra, env={'ACCELERATE_USE_CPU': 'true'})
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
        if extra:
            shutil.copytree(stopped, tmp_path / 'alone')
    assert told[0].count('--mixed-precision bf16 is faster') == has_bfloat16_units(torch.device('cpu'))
    assert '--mixed-precision no' not in told[0]
    assert 'resumes from' in told[1]
    assert (stopped / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()
    assert metrics(stopped) == metrics(whole)
    assert json.loads((whole / 'run.json').read_text())['processes'] == 2
    row, = metrics(whole)
    assert row['adv_accuracy'] * 6 * 32 == pytest.approx(round(row['adv_accuracy'] * 6 * 32))  # each image once
    alone = ['train_robust.py', *SMALL, *options, '--output', tmp_path / 'alone']
    assert_one_line(program(*alone), *(['there is one'] if options else ['processes 2, now 1', '--resume-anyway']))
    if not options:
        anyway = program(*alone, '--resume-anyway', 'true')
        assert anyway.returncode == 0, anyway.stderr
        assert 'resumes from another run: processes 2, now 1' in anyway.stdout
        assert '--mixed-precision bf16 is faster' not in anyway.stdout
        assert metrics(tmp_path / 'alone')[-1]['step'] == 6


def test_a_finished_run_is_never_trained_again(finished: Path, tmp_path: Path, program: Program) -> None:
    """Nor when its checkpoints are gone; one that was cut off while it wrote its weights is completed."""
    output = tmp_path / 'run'
    shutil.copytree(finished, output)
    weights = (output / 'model.safetensors').read_bytes()
    record = json.loads((output / 'run.json').read_text())
    (output / 'run.json').write_text(json.dumps({**record, 'status': 'running'}))
    (output / 'model.safetensors').write_bytes(weights[:100])
    done = program('train_robust.py', *SMALL, '--output', output)
    assert done.returncode == 0, done.stderr
    assert (output / 'model.safetensors').read_bytes() == weights
    assert json.loads((output / 'run.json').read_text())['status'] == 'complete'
    shutil.rmtree(output / 'checkpoints')
    before = (output / 'run.json').stat().st_mtime_ns
    assert 'is complete' in program('train_robust.py', *SMALL, '--output', output).stdout
    assert_one_line(program('train_robust.py', *SMALL, '--output', output, '--lr', '0.5', '--resume-anyway', 'true'),
                    'is complete and of another recipe')
    assert (output / 'run.json').stat().st_mtime_ns == before


@pytest.mark.parametrize(('args', 'words'), [
    (['--model', 'wrn28_10_psilu2'], ['unknown model', 'wrn28_10_psilu']),
    (['--model', 'wrn28_10_swish'], ['unknown model']),
    (['--dataset', 'cifar11'], ['unknown --dataset', 'cifar10, cifar100, digits']),
    (['--eps', '8'], ['eps is 8', 'write 8/255']),
    (['--eps', 'eight'], ['not a number', '8/255']),
    (['--eps=-1/255'], ['eps is -1/255']),
    (['--norm', 'l_inf'], ['unknown --norm', 'Linf, L2']),
    (['--schedule', 'cosin'], ['unknown --schedule', 'cosine']),
    (['--epochs', '0'], ['--epochs is 0']),
    (['--batch-size', '5000'], ['batch size is 5000', '1438']),
    (['--max-minutes', '0'], ['--max-minutes is 0']),
    (['--dataset', 'cifar10', '--data-dir', 'nowhere'], ['--data-dir is nowhere', '--download']),
    (['--act-kwargs', '{gamma: 1}'], ['gamma', 'alpha, beta']),
    (['--resume', 'nowhere'], ['--resume nowhere', 'auto, never']),
    (['--epochs', 'ten'], ['epochs', 'ten']),
    (['--epoch-count', '3'], ['epoch-count']),
    (['--attack-steps', '0'], ['--attack-steps is 0', '--eps 0']),
    (['--model', 'wrn10_1_pssilu.bogus'], ['wrn10_1_pssilu.bogus']),
    (['--model', 'vit_tiny_patch16_224'], ['does not take images of digits']),
    (['--seed', '-1'], ['--seed is -1']),
    (['--trackers', '[wandbb]'], ['wandbb', 'not installed']),
    (['--objective', 'trade'], ["unknown --objective 'trade'", 'pgd-at, trades, mart, ikl, fgsm-rs, n-fgsm']),
    (['--objective', 'n-fgsm', '--norm', 'L2'], ['--norm L2 does not work with --objective n-fgsm']),
    (['--no-decay', 'bn,head'], ["unknown --no-decay 'head'", 'some of bn, bias, paf']),
    (['--milestones', '3'], ['--milestones 3 with --schedule cosine', 'expected piecewise']),
    (['--milestones', '0', '--schedule', 'piecewise'], ['--milestones 0; expected epochs above 0']),
    (['--milestones', '[3, 5]', '--schedule', 'piecewise'], ['--milestones [3, 5]', 'with commas']),
    (['--milestones', '3,99', '--schedule', 'piecewise'], ['--milestones 3,99 is past the end', 'such as 0.5,0.75']),
    (['--config', 'ikl2023', '--epochs', '1'],
     ['--eps-warmup-epochs is 200', 'at most --epochs 1: give --eps-warmup-epochs too']),
    (['--config', 'wu2020_trades_awp', '--epochs', '20'], ['--milestones 99,149 is past', 'too, such as 10,15']),
    (['--config', 'wong2020_fast', '--model', 'wrn10_1_pssilu', '--val', '0'],
     ['--model-kwargs has shortcut, which wrn10_1_pssilu does not take', '{"normalize": [[']),
    (['--ema-bn', 'copy'], ['--ema-bn copy has no effect without --ema or --swa']),
    (['--ema-warmup', 'none', '--swa', '1'], ['--ema-warmup none has no effect without --ema;']),
    (['--config', 'fastat_ema', '--ema', '0', '--ema-warmup', 'ratio'], ['--ema-warmup ratio has no effect']),
    (['--awp-warmup-epochs', '1'], ['--awp-warmup-epochs 1.0 has no effect without --awp']),
    (['--ikl-mse', '3', '--objective', 'trades'], ['--ikl-mse 3.0 has no effect with --objective trades', 'of ikl']),
    (['--separate-forwards'], ['--separate-forwards has no effect with --objective pgd-at']),
    (['--no-nesterov', '--optimizer', 'adamw'], ['--no-nesterov has no effect with --optimizer adamw']),
    (['--no-synthetic-augment'], ['--no-synthetic-augment has no effect without --synthetic']),
    (['--image-size', '64'], ['--image-size 64 has no effect with --dataset digits']),
    (['--skip-unreadable'], ['--skip-unreadable has no effect with --dataset digits']),
    (['--momentum-cycle', '0.8,0.9'], ['--momentum-cycle 0.8,0.9 with --schedule cosine', 'one-cycle or triangular']),
    (['--momentum-cycle', '0.9,0.8', '--schedule', 'triangular'], ['--momentum-cycle 0.9,0.8', 'the smaller first']),
    (['--eps-warmup-epochs', '200'], ['--eps-warmup-epochs is 200', 'past the end']),
    (['--awp-warmup-epochs', '200'], ['--awp-warmup-epochs is 200', 'past the end']),
    (['--bn-momentum', '5'], ['--bn-momentum is 5', 'above 0 and below 1']),
    (['--pct-start', '0.2'], ['--pct-start 0.2 with --schedule cosine', 'one-cycle or triangular']),
    (['--pct-start', '1', '--schedule', 'triangular'], ['--pct-start is 1']),
    (['--swa', '1', '--ema', '0.9'], ['--swa 1 with --ema 0.9', 'one average']),
    (['--swa', '300'], ['--swa is 300, past the end']),
    (['--val-attack', 'ce-many'], ['--val-attack ce-many has no number of steps', 'ce-10']),
    (['--val-attack', 'ce-10'], ['--val-attack ce-10 has no effect without --val; give both or neither']),
    (['--val-attack', 'pgd-10'], ["unknown --val-attack 'pgd-10'"]),
    (['--freeze-bn', '--clean-pass', 'before'], ['--clean-pass before does not work with --freeze-bn']),
    (['--attack-bn', 'frozen'], ["unknown --attack-bn 'frozen'", 'eval, train-frozen, train']),
    (['--optimizer', 'adamv'], ["unknown optimizer 'adamv'", 'sgd, adamw']),
    (['--ema', '1'], ['--ema is 1', 'below 1']),
    (['--awp', '-1'], ['--awp is -1']),
    (['--patience', '3'], ['--patience 3 has no effect without --val; give both or neither']),
    (['--val', '1400'], ['1400 held-out images', 'expected fewer']),
    (['--synthetic', 'nowhere.npz'], ['nowhere.npz is missing', 'expected synthetic data']),
    (['--synthetic', 'nowhere.npz:half'], ["'half' is no share", 'PATH:FRACTION']),
    (['--keep', '0'], ['--keep is 0']),
    (['--fsdp', 'true'], ['several processes and there is one', 'torchrun']),
    (['--fsdp', 'true', '--awp', '0.01'], ['--awp 0.01 does not work with --fsdp']),
    (['--sync-bn', 'true'], ['several processes and there is one']),
    (['--cuda-graphs', 'true'], ['needs a GPU and the device is cpu']),
    (['--cuda-graphs', 'true', '--compile', 'false'], ['--no-compile does not work with --cuda-graphs']),
    (['--min-lr=-1', '--paf-lr=-1', '--paf-clip=-1'],
     ['--min-lr is -1', '--paf-lr is -1', '--paf-clip is -1']),
    (['--optimizer', 'adahessian'], ['adahessian needs second derivatives']),
    (['--accumulate', '5'], ['accumulate is 5', 'a divisor of the 32 images']),
])
def test_bad_input_is_named(
        tmp_path: Path, capfd: pytest.CaptureFixture[str], args: list[str], words: list[str]) -> None:
    line = fails(capfd, *SMALL, '--output', tmp_path / 'run', *args)
    for word in words:
        assert word in line
    assert not (tmp_path / 'run').exists()


def test_all_mistakes_are_reported_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = ['--model', 'nope', '--dataset', 'nope', '--eps', '9', '--lr', '-1']
    line = fails(capfd, '--output', tmp_path / 'run', *bad)
    for word in ('unknown model', 'unknown --dataset', 'eps is 9', '--lr is -1'):
        assert word in line


def test_recipe_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('model: wrn10_1_pelu\nepochs: 3\neps: 0.031\nattack_step: 2/255\n')
    config = train_robust.parse(['--config', str(recipe), '--epochs', '4', '--output', 'x'])
    assert (config.model, config.epochs, str(train_robust.check(config).threat.eps)) == ('wrn10_1_pelu', 4, '31/1000')
    for text, word in (('epoch: 3\n', 'epoch'), ('epochs: many\n', 'many'), ('{', 'is no YAML')):
        recipe.write_text(text)
        assert word in fails(capfd, '--config', recipe, '--output', tmp_path / 'run')
    assert 'nowhere.yaml' in fails(capfd, '--config', tmp_path / 'nowhere.yaml', '--output', tmp_path / 'run')


@pytest.mark.parametrize('recipe', sorted((ROOT / 'hub' / 'recipes').glob('*.yaml')), ids=lambda path: path.stem)
def test_shipped_recipes_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each: with its own activation in a tiny network, on digits and generated images; those for ImageNet
    with their own network, on a tiny folder."""
    config = train_robust.parse(['--config', str(recipe), '--output', str(tmp_path / 'run'), '--data-dir',
                                 str(tmp_path / 'images')])
    train_robust.check(config)
    assert re.search(r'^# .*(https://|hub/results)', recipe.read_text(), re.MULTILINE)
    assert re.search(r'^# Published\b', recipe.read_text(), re.MULTILINE)
    act = 'relu' if config.act else config.model.rpartition('_')[2]
    small = {'model': f'wrn10_1_{act}', 'init': config.init and 'wrn10_1_relu', 'dataset': 'digits', 'batch_size': 20,
             'data_dir': None, 'max_steps': 2, 'val': min(config.val, 20), 'compile': False, 'model_kwargs': {},
             'mixed_precision': 'no'}  # many a CPU emulates bfloat16, for minutes
    if config.dataset == 'imagenet':
        for index in range(16):
            path = tmp_path / 'images' / ('train', 'val')[index % 2] / f'class{index // 2 % 2}' / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (64, 56), (4 * index, 9, 90)).save(path)
        small |= {'model': config.model, 'model_kwargs': config.model_kwargs, 'dataset': 'folder',
                  'data_dir': config.data_dir, 'image_size': 32, 'batch_size': 4}
    if config.synthetic:
        np.savez(tmp_path / 'made.npz', image=np.zeros((30, 32, 32, 3), np.uint8), label=np.arange(30) % 10)
        small['synthetic'] = f'{tmp_path}/made.npz:{config.synthetic.rpartition(":")[2]}'
    AcceleratorState._reset_state()
    monkeypatch.setattr(train_robust, 'Interruption', lambda minutes: SimpleNamespace(reason=lambda *_: None))
    assert train_robust.run(dataclasses.replace(config, **small)) == 0
    assert metrics(tmp_path / 'run')[-1]['step'] == 2


def test_headers_of_recipes_name_options_that_there_are() -> None:
    named = {path.stem: {word for line in path.read_text().splitlines() if line.startswith('#')
                         for word in re.findall(r'--[a-z][a-z-]*', line)}
             for path in (ROOT / 'hub' / 'recipes').glob('*.yaml')}
    assert '--ikl-mse' in named['ikl2023']
    options = {flag_of(name) for name in options_of(Config)}
    options |= {f'--no-{option[2:]}' for option in options}
    assert {name: words - options for name, words in named.items() if words - options} == {}


def test_another_run_in_the_directory_is_kept(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob('*') if path.is_file()}
    assert 'seed 0, now 1' in fails(capfd, *SMALL, '--output', finished, '--seed', '1')
    assert '--resume never' in fails(capfd, *SMALL, '--output', finished, '--resume', 'never')
    assert before == {path: path.read_bytes() for path in finished.rglob('*') if path.is_file()}


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = fails(capfd, *SMALL, '--output', tmp_path / 'run', '--lr', '1e18', '--checkpoint-steps', '1')
    assert 'is not finite; stopped before the optimizer step' in line
    step = int(line.split('step ')[1].split(' ')[0])
    assert (f'step-{step:08d}' if step else 'not there yet') in line  # where the step started from
    assert not (tmp_path / 'run' / 'model.safetensors').exists()


def test_no_space_leaves_the_last_good_checkpoint(tmp_path: Path, program: Program) -> None:
    output = tmp_path / 'run'
    assert program('train_robust.py', *SMALL, '--output', output, '--max-minutes', '0.0001').returncode == 0
    kept = {path: path.read_bytes() for path in (output / 'checkpoints').rglob('*') if path.is_file()}
    limit = 100_000  # bytes in a file: less than a checkpoint
    done = program('train_robust.py', *SMALL, '--output', output,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_one_line(done, 'could not be written, is there space left?')
    assert kept == {path: path.read_bytes() for path in (output / 'checkpoints').rglob('*') if path.is_file()}


def test_real_images(cifar10_root: Path, tmp_path: Path, program: Program) -> None:
    args = ['train_robust.py', '--model', 'wrn10_1_pssilu', '--data-dir', cifar10_root, '--batch-size', '16',
            '--attack-steps', '2', '--max-steps', '2', '--output', tmp_path / 'run']
    done = program(*args)
    assert done.returncode == 0, done.stderr
    assert 'cifar10: 50,000 images' in done.stdout
    assert json.loads((tmp_path / 'run' / 'run.json').read_text())['data']['n'] == 50000
