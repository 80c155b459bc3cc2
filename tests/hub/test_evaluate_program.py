"""hub.evaluate as a user runs it: in processes that share the work, and that are killed."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Program

from hub import evaluate
from hub.masking import transfer_sources
from hub.record_check import check_evaluation
from hub.sources import load
from timm_paf.data import ImageSet
from timm_paf.files import write_record
from timm_paf.speed import emulates_bfloat16, has_bfloat16_units

ATTACKS = 'clean,pgd-1,pgd-4,pgd-3x4'
TORCHRUN = ['-m', 'torch.distributed.run', '--nproc_per_node', '2']
PROGRAM = ['-m', 'hub.evaluate']
CPU = {'ACCELERATE_USE_CPU': 'true'}


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Path:
    output = tmp_path_factory.mktemp('runs') / 'run'
    done = program('train_robust.py', '--dataset', 'digits', '--model', 'wrn10_1_pssilu', '--batch-size', 64, '--lr',
                   0.1, '--attack-steps', 1, '--attack-step', '8/255', '--max-steps', 40, '--output', output)
    assert done.returncode == 0, done.stderr
    return output


def command(run: Path, output: Path, *more: object) -> list[str]:
    return [str(arg) for arg in (run, '--images', 22, '--batch-size', 2, '--seed', 3, '--attacks',
                                 ATTACKS, '--eps', '32/255', '--output', output, *more)]


def verdicts(output: Path) -> dict[str, str]:
    found = json.loads((output / 'evaluation.json').read_text())
    assert found['complete']
    assert found['recheck']['different'] == 0
    assert found['recheck']['kept'] > 0
    return {name: result['verdicts'] for name, result in found['attacks'].items()} | {
        'worst case': found['worst_case']['verdicts']}


@pytest.fixture(scope='module')
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The verdicts of one process that nobody disturbed."""
    output = tmp_path_factory.mktemp('alone')
    evaluate.main(command(run, output))
    assert sorted(path.name for path in output.iterdir()) == ['evaluation.json', 'evidence.npz', 'evidence.png']
    found = verdicts(output)
    assert 2 < found['pgd-4'].count('1') < found['clean'].count('1') <= 22
    return found


def kill_and_go_on(
        run: Path, output: Path, chance: random.Random, kills: int, more: tuple[object, ...] = ()) -> list[str]:
    """Two processes, of which one or their launcher gets SIGKILL again and again; then one that ends by itself."""
    killed, before = [], {}
    while True:
        process = subprocess.Popen(
            [sys.executable, '-W', 'ignore', *TORCHRUN, *PROGRAM, *command(run, output, '--keep-state', *more)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1', **CPU})
        state = output / 'evaluation.state'
        target = len(before) + chance.randrange(1, 12)
        while len(killed) < kills and process.poll() is None and len(list(state.glob('*.safetensors'))) < target:
            time.sleep(0.005)
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
        workers = [int(pid) for pid in children.read_text().split()] if process.poll() is None else []
        workers = [pid for pid in workers if b'hub.evaluate' in Path(f'/proc/{pid}/cmdline').read_bytes()]
        if len(killed) < kills and process.poll() is None:
            time.sleep(0.1 * chance.random())
            victim = chance.choice(['launcher', 'first', 'second'])
            pid = process.pid if victim == 'launcher' else workers[victim == 'second']
            os.kill(pid, signal.SIGKILL)
            killed.append(victim)
        out, err = process.communicate(timeout=200)
        while any(Path(f'/proc/{pid}').exists() for pid in workers):  # they end with their launcher
            time.sleep(0.01)
        files = {path.name: path.stat().st_mtime_ns for path in state.glob('*.safetensors')}
        assert before.items() <= files.items()  # what was finished was not done again
        before = files
        if process.returncode == 0:
            assert out.count('worst case') == 1  # only the first process speaks
            return killed
        assert killed, err


def test_killed_at_any_moment_it_ends_with_the_same_verdicts(run: Path, alone: dict[str, str], tmp_path: Path) -> None:
    seed = random.randrange(1000)
    killed = kill_and_go_on(run, tmp_path, random.Random(seed), 1)
    assert verdicts(tmp_path) == alone, (seed, killed)
    assert json.loads((tmp_path / 'evaluation.json').read_text())['processes'] == 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(('.part', '.lock', '.old'))]


@pytest.mark.slow
def test_killed_many_times_with_autoattack(run: Path, tmp_path: Path) -> None:
    more = ('--attacks', 'clean,pgd-4,autoattack')
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    evaluate.main(command(run, whole, *more))
    seed = random.randrange(1000)
    killed = kill_and_go_on(run, parts, random.Random(seed), 12, more)
    assert verdicts(parts) == verdicts(whole), (seed, killed)
    assert len(killed) > 4  # the last ones may come too late


def fails(*args: str) -> str:
    """The one line that the program ends with."""
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main(list(args))
    message = exit_info.value.code
    assert isinstance(message, str)
    assert '\n' not in message
    return message


def test_another_evaluation_is_refused_and_nothing_lost(
        run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ('--attacks', 'clean,pgd-1', '--n', '4')
    evaluate.main(command(run, tmp_path, *small, '--keep-state'))
    before = (tmp_path / 'evaluation.json').read_bytes()
    assert 'is of another evaluation (seed 3, now 4)' in fails(*command(run, tmp_path, *small, '--seed', 4))
    assert 'has pgd-1 too' in fails(*command(run, tmp_path, '--attacks', 'clean', '--n', 4))
    with open(tmp_path / '.evaluation.json.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        more = ('--attacks', 'clean,pgd-1,pgd-2', '--n', 4)
        assert 'another evaluation is at work' in fails(*command(run, tmp_path, *more))
    capsys.readouterr()
    evaluate.main(command(run, tmp_path, *small, '--keep-state'))
    assert 'it was complete already, and ' in capsys.readouterr().out
    assert "pgd_step '8/255', now '2/255'" in fails(*command(run, tmp_path, *small, '--attack-step', '2/255'))
    assert (tmp_path / 'evaluation.json').read_bytes() == before
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / 'evaluation.state').glob('*.safetensors')}
    evaluate.main(command(run, tmp_path, *more, '--keep-state'))
    assert list(json.loads((tmp_path / 'evaluation.json').read_text())['attacks']) == ['clean', 'pgd-1', 'pgd-2']
    assert all(path.stat().st_mtime_ns == made for path, made in files.items())
    capsys.readouterr()
    evaluate.main(command(run, tmp_path, *small, '--seed', 4, '--overwrite'))
    assert 'was of another evaluation (seed 3, now 4) and is given up' in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ['evaluation.json', 'evidence.npz']  # none is fooled
    assert 'exists with other seed; give another --output DIR, or --overwrite' in fails(*command(run, tmp_path, *small))


def test_a_range_has_the_verdicts_that_it_has_among_all(
        run: Path, alone: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(command(run, tmp_path, '--images', '4:10', '--keep-state'))
    assert 'test images 4 to 9 (counted from 0) of digits, Linf eps 32/255' in capsys.readouterr().out
    found = json.loads((tmp_path / 'evaluation.json').read_text())
    assert (found['images'], found['n']) == ('4:10', 6)
    assert verdicts(tmp_path) == {name: each[4:10] for name, each in alone.items()}
    assert len({each[4:10] for each in alone.values()}) > 1
    evaluate.main(command(run, tmp_path, '--images', '4:10', '--keep-state'))
    assert 'it was complete already' in capsys.readouterr().out
    for images in ('6', '5:11', '4:12'):
        for more in ((), ('--attacks', f'{ATTACKS},pgd-2')):
            assert "is of another evaluation (images '4:10', now" in fails(
                *command(run, tmp_path, '--images', images, *more))
    assert verdicts(tmp_path)['clean'] == alone['clean'][4:10]


@pytest.mark.parametrize('images', ['0:6', '353:', '353:359'])
def test_other_words_for_the_same_images_are_the_same_evaluation(
        run: Path, tmp_path: Path, images: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those at the end of the data; a number larger than it means all."""
    small = ('--attacks', 'clean')
    evaluate.main(command(run, tmp_path, *small, '--images', images))
    capsys.readouterr()
    evaluate.main(command(run, tmp_path, *small, '--images', '6' if images == '0:6' else '353:359'))
    assert 'it was complete already' in capsys.readouterr().out
    evaluate.main(command(run, tmp_path, *small, '--images', '9999', '--batch-size', '250', '--overwrite'))
    assert json.loads((tmp_path / 'evaluation.json').read_text())['images'] == 'first 359'


@pytest.mark.parametrize(('dataset', 'which'), [
    ('folder', 'evenly spaced ones'), ('imagenet', "the first ones of RobustBench's list")])
def test_images_of_files_have_no_range(dataset: str, which: str, tmp_path: Path) -> None:
    assert f'--images is 0:4 and those of {dataset} are {which}; expected their number' in fails(
        'wrn10_1_relu', '--dataset', dataset, '--data-dir', str(tmp_path), '--images', '0:4')


@pytest.mark.parametrize('compiled', [True, False])
def test_a_compiled_evaluation_is_told_of_idle_bfloat16_units(
        run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled: bool) -> None:
    evaluate.main(command(run, tmp_path, '--n', 2, '--attacks', 'clean', '--compile' if compiled else '--no-compile'))
    assert json.loads((tmp_path / 'evaluation.json').read_text())['standard']
    expected = compiled and has_bfloat16_units(torch.device('cpu'))
    assert capsys.readouterr().out.count('--fast is faster') == expected


def test_fast_is_marked_and_masking_is_looked_for(
        run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(command(run, tmp_path, '--n', 4, '--batch-size', 4, '--attacks', 'clean', '--fast', '--no-compile',
                          '--masking', '--transfer-from', run))
    found = json.loads((tmp_path / 'evaluation.json').read_text())
    assert (found['standard'], found['precision']) == (False, 'bfloat16 autocast')
    assert found['threat_model'] == {'norm': 'Linf', 'eps': '32/255'}
    assert found['masking']['n'] == 4
    masking = found['masking']
    assert masking['transfer_from'] == masking['sources'][''] == {
        'architecture': found['architecture'], 'weights_sha256': found['weights_sha256']}
    assert masking['transfers'] == {'': masking['transfer']}
    assert (masking['bpda'], masking['flat']) == (None, [])
    check_evaluation(found, tmp_path / 'evaluation.json')
    said = capsys.readouterr().out
    assert found['masking']['verdict'] in said
    assert '--fast is faster' not in said
    assert said.count('faster without --fast') == emulates_bfloat16(torch.device('cpu'))
    assert (tmp_path / 'masking.png').read_bytes().startswith(b'\x89PNG')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    evaluate.main(command(run, tmp_path, '--n', 4, '--batch-size', 4, '--attacks', 'clean', '--fast', '--no-compile',
                          '--masking', '--transfer-from', run))
    assert 'it was complete already' in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(('evaluated', 'expected'), [
    ('wrn10_1_relu', ['resnet18_w16_pssilu', 'wrn10_1_pssilu']),
    ('resnet18_w16_pssilu', ['wrn10_1_pssilu', 'wrn10_1_relu'])])
def test_the_networks_of_the_package_are_those_of_transfer_attacks(
        evaluated: str, expected: list[str]) -> None:
    about = load(evaluated)[1]
    data = ImageSet('cifar10', torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), 10)
    args = argparse.Namespace(transfer_from=None, device='cpu')
    assert list(transfer_sources(args, data, about['sha256'])) == expected
    assert not transfer_sources(args, replace(data, name='cifar100'), about['sha256'])
    args.transfer_from = str(ROOT / 'hub' / 'models' / 'wrn10_1_pssilu')  # one of them is attacked from once
    given = transfer_sources(args, data, about['sha256'])
    assert list(given) == ['', *(name for name in expected if name != 'wrn10_1_pssilu')]
    assert given[''].about['architecture'] == 'wrn10_1_pssilu'


@pytest.mark.slow
def test_masking_is_looked_for_from_the_networks_of_the_package(cifar10_root: Path, tmp_path: Path) -> None:
    evaluate.main(['wrn10_1_relu', '--data-dir', str(cifar10_root), '--n', '8', '--attacks', 'clean', '--masking',
                   '--output', str(tmp_path)])
    masking = json.loads((tmp_path / 'evaluation.json').read_text())['masking']
    assert masking['transfers'].keys() == masking['sources'].keys() == {'resnet18_w16_pssilu', 'wrn10_1_pssilu'}
    assert masking['transfer'] == min(masking['transfers'].values())
    assert 'transfer_from' not in masking


@pytest.mark.parametrize(('section', 'flag'), [
    ({'masking': {}}, '--masking'), ({'corruptions': {}}, '--corruptions'),
    ({'norms': {'L2': {'threat_model': {'eps': '1/2'}}}}, '--norms')])
def test_what_an_earlier_evaluation_found_beside_its_attacks_is_not_lost(
        section: dict[str, object], flag: str, tmp_path: Path) -> None:
    output = tmp_path / 'evaluation.json'
    output.with_suffix('.state').mkdir()
    arguments = output, ['clean'], {'n': 4}, {}, True, None, None
    write_record(output, {'n': 4, 'attacks': {'clean': {}}, 'complete': True})
    assert evaluate.check_output(*arguments) is None
    write_record(output, {'n': 4, 'attacks': {'clean': {}}, 'complete': True, **section})
    with pytest.raises(FileExistsError, match=f'has what {flag} found; give that too, or --overwrite'):
        evaluate.check_output(*arguments)
