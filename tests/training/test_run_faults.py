"""What becomes of a run whose files are damaged, that is started twice, or whose launcher is killed."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Program, assert_one_line
from safetensors.torch import load_file
from test_train_robust import SMALL, finished, metrics, start, wait_for_step
from torture import without_root

from hub.sources import load_run, read_run
from timm_paf.files import atomic_directory, atomic_write, read_record, write_record
from timm_paf.processes import exclusive_lock
from timm_paf.training.interruption import Interruption
from timm_paf.training.run_directory import (
    append_metrics,
    is_complete,
    prepare_output,
    read_checkpoint,
    write_checkpoint,
)

__all__ = ['finished']

CONTENT = {'a': 1.5, 'b': ['x', None], 'c': {'d': True}, '8': (0, 1e-9)}


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_no_flipped_bit_changes_a_record(tmp_path: Path) -> None:
    path, draw, refused = tmp_path / 'run.json', random.Random(0), 0
    write_record(path, CONTENT)
    whole, expected = path.read_bytes(), read_record(path)
    assert expected == json.loads(json.dumps(CONTENT))
    for _ in range(500):
        path.write_bytes(whole)
        flip(path, draw)
        try:
            found = read_record(path)
        except ValueError:
            refused += 1
        else:
            assert found == expected
    assert refused > 350  # the others changed white space
    path.write_text('{"a": 1}')  # of before there were checksums
    assert read_record(path) == {'a': 1}


def test_no_flipped_bit_changes_a_finished_run(finished: Path, tmp_path: Path) -> None:
    run, draw = tmp_path / 'run', random.Random(1)
    shutil.copytree(finished, run)
    record, weights = read_run(run), load_file(run / 'model.safetensors')
    for name in ('run.json', 'model.safetensors'):
        whole, refused = (run / name).read_bytes(), 0
        for _ in range(60):
            (run / name).write_bytes(whole)
            flip(run / name, draw)
            try:
                found, network = read_run(run), load_run(run)
            except ValueError:
                refused += 1
            else:
                assert found == record
                assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
        (run / name).write_bytes(whole)
        assert refused > 40


def test_a_damaged_file_of_a_finished_run_is_written_anew_or_named(
        finished: Path, tmp_path: Path, program: Program) -> None:
    run = tmp_path / 'run'
    shutil.copytree(finished, run)
    whole = {name: (run / name).read_bytes() for name in ('run.json', 'model.safetensors', 'metrics.jsonl')}
    flip(run / 'model.safetensors', random.Random(0))
    flip(run / 'run.json', random.Random(0))
    done = program('train_robust.py', *SMALL, '--output', run)
    assert done.returncode == 0, done.stderr
    assert 'run.json is damaged' in done.stdout or 'run.json is not JSON' in done.stdout
    assert (run / 'model.safetensors').read_bytes() == whole['model.safetensors']
    assert read_run(run)['files'] == json.loads(whole['run.json'])['files']
    flip(run / 'metrics.jsonl', random.Random(0))
    assert_one_line(program('train_robust.py', *SMALL, '--output', run), 'metrics.jsonl is damaged', 'from a copy')
    (run / 'metrics.jsonl').write_bytes(whole['metrics.jsonl'])
    shutil.rmtree(run / 'checkpoints')
    flip(run / 'model.safetensors', random.Random(0))
    assert_one_line(program('train_robust.py', *SMALL, '--output', run), 'model.safetensors is damaged', 'from a copy')


def test_an_older_checkpoint_serves_where_the_newer_is_damaged(tmp_path: Path) -> None:
    recipe, draw = {'model': 'x', 'lr': 0.1}, random.Random(2)
    for step in (1, 2):
        write_checkpoint(tmp_path, step, {'step': step}, recipe, 1, 2)
    write_record(tmp_path / 'run.json', {'status': 'running', 'recipe': recipe})
    older, newer = sorted((tmp_path / 'checkpoints').iterdir())
    for file in (newer / 'checkpoint.json', newer / 'state.pt'):
        whole, skipped = file.read_bytes(), 0
        for _ in range(100):
            file.write_bytes(whole)
            flip(file, draw)
            said: list[str] = []
            found = prepare_output(tmp_path, recipe, 'auto', said.append)
            skipped += found == older
            assert found == (older if said else newer)
        file.write_bytes(whole)
        assert skipped > 70
    assert prepare_output(tmp_path, recipe, 'auto') == newer


def test_what_can_be_resumed_with_damaged_files(tmp_path: Path) -> None:
    recipe = {'model': 'x'}
    one, two = tmp_path / 'one', tmp_path / 'two'
    for run in (one, two):
        for step in (1, 2):
            write_checkpoint(run, step, {'step': step}, recipe, 1, 2)
        write_record(run / 'run.json', {'status': 'running', 'recipe': recipe})
    older, newer = sorted((one / 'checkpoints').iterdir())
    with pytest.raises(FileExistsError, match='step-00000002, later than --resume'):
        prepare_output(two, recipe, str(older))
    (older / 'state.pt').write_bytes(b'')  # it begins no run, so no run began at it
    with pytest.raises(FileExistsError, match='step-00000002, later than --resume'):
        prepare_output(two, recipe, str(older))
    flip(newer / 'state.pt', random.Random(0))
    with pytest.raises(ValueError, match='without --resume the newest whole one'):
        read_checkpoint(newer, recipe, 1)
    (two / 'run.json').write_text('{')
    said: list[str] = []
    assert prepare_output(two, recipe, 'auto', said.append) == two / 'checkpoints' / 'step-00000002'
    assert said[0].endswith('it is written anew')
    with pytest.raises(FileExistsError, match='model x, now y'):  # its checkpoint knows the recipe
        prepare_output(two, {'model': 'y'}, 'auto', said.append)
    write_record(two / 'run.json', {'status': 'complete', 'recipe': recipe})  # of before there were checksums
    assert not is_complete(two)  # it has no weights and a checkpoint


def test_lines_of_metrics_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    path, said = tmp_path / 'metrics.jsonl', []
    rows = [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0}]
    damaged = [b'{"step": 2, "lo', b'[1]', b'\xff\xfe', b'{"step": "2"}']
    path.write_bytes(b'\n'.join([json.dumps(rows[0]).encode(), *damaged]))
    append_metrics(path, rows[1], said.append)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert said == [f'{path}: 4 of 5 lines cannot be read and are left out']


def test_a_run_that_began_at_a_checkpoint_goes_on_with_the_same_command(
        finished: Path, tmp_path: Path, program: Program) -> None:
    first, output = tmp_path / 'first', tmp_path / 'new'
    stopped = ('--max-minutes', '0.0001', '--checkpoint-steps', '1')
    for _ in range(2):
        assert program('train_robust.py', *SMALL, '--output', first, *stopped).returncode == 0
    given = max((first / 'checkpoints').iterdir())
    command = ['--resume', str(given)]
    assert program('train_robust.py', *SMALL, '--output', output, *command, *stopped).returncode == 0
    assert len(list((output / 'checkpoints').iterdir())) == 1
    flip(output / 'run.json', random.Random(0))  # it is made again from the checkpoint, with what it began at
    done = program('train_robust.py', *SMALL, '--output', output, *command)
    assert done.returncode == 0, done.stderr
    assert (output / 'model.safetensors').read_bytes() == (finished / 'model.safetensors').read_bytes()
    assert read_run(output)['resumed_from']['step'] == int(given.name[5:])
    done = program('train_robust.py', *SMALL, '--output', output, *command)
    assert 'is complete' in done.stdout
    other = min((first / 'checkpoints').iterdir())
    if other != given:
        assert_one_line(program('train_robust.py', *SMALL, '--output', output, '--resume', other), 'later than')
    record = read_record(first / 'run.json')
    write_record(first / 'run.json', {**record, 'data': {**record['data'], 'sha256': '0' * 64}})
    assert_one_line(program('train_robust.py', *SMALL, '--output', tmp_path / 'third', *command), 'on other images')


def test_of_two_starts_one_trains(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / 'run'
    first = start(output)
    wait_for_step(first, output, 1)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second looks
    second = start(output)
    _, err = second.communicate(timeout=200)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert err.strip().splitlines()[-1].startswith(f'train_robust.py: another training is at work on {output}')
    _, err = first.communicate(timeout=200)
    assert first.returncode == 0, err
    assert (output / 'model.safetensors').read_bytes() == (finished / 'model.safetensors').read_bytes()
    assert metrics(output) == metrics(finished)
    assert [path.name for path in tmp_path.iterdir()] == ['run']


def test_one_of_many_has_the_lock(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from timm_paf.processes import exclusive_lock
out, seen, end = Path(sys.argv[1]), 0, time.monotonic() + 8
while time.monotonic() < end and seen < 300:
    try:
        with exclusive_lock(out, 'test'):
            mark = out.with_name('mark')
            mark.touch(exist_ok=False)
            mark.unlink()
            seen += 1
    except ValueError:
        pass
print(seen)
"""
    programs = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code, str(tmp_path / 'run')], cwd=ROOT,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ends = [process.communicate(timeout=120) for process in programs]
    assert all(process.returncode == 0 for process in programs), [err for _, err in ends]
    assert sum(int(out) for out, _ in ends) > 100
    with exclusive_lock(tmp_path / 'run', 'test'), pytest.raises(ValueError, match='another test is at work'), \
            exclusive_lock(tmp_path / 'run', 'test'):
        pass


@pytest.mark.parametrize('step', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_workers_end_with_their_launcher(tmp_path: Path, step: int) -> None:
    """Also those that have not come further than their imports (step 0)."""
    launcher = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node', '2', 'train_robust.py',
         '--model', 'wrn10_1_pssilu', '--dataset', 'digits', '--batch-size', '32', '--checkpoint-steps', '1',
         '--output', str(tmp_path / 'run')], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})

    def facts(pid: str, kind: str) -> str:
        try:
            return Path(f'/proc/{pid}/{kind}').read_text()
        except OSError:  # it has ended meanwhile
            return ''

    if step:
        wait_for_step(launcher, tmp_path / 'run', step)
    workers: list[str] = []
    while len(workers) < 2:
        assert launcher.poll() is None
        children = facts(str(launcher.pid), f'task/{launcher.pid}/children').split()
        workers = [pid for pid in children if 'train_robust.py' in facts(pid, 'cmdline')]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 60
    while any(facts(pid, 'stat').rpartition(')')[2].split()[:1] not in ([], ['Z']) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_below_a_wrapper_has_a_launcher() -> None:
    code = 'from timm_paf.processes import end_with_launcher; end_with_launcher()'
    done = subprocess.run(['bash', '-c', f'{sys.executable} -W ignore -c "{code}"; exit $?'], cwd=ROOT, check=False,
                          env={**os.environ, 'TORCHELASTIC_RUN_ID': 'x', 'LOCAL_RANK': '0'})
    assert done.returncode == 0


def test_all_processes_say_that_another_training_is_at_work(tmp_path: Path, program: Program) -> None:
    with exclusive_lock(tmp_path / 'run', 'training'):
        done = program('-m', 'torch.distributed.run', '--nproc_per_node', '2', 'train_robust.py', *SMALL, '--output',
                       tmp_path / 'run', env={'ACCELERATE_USE_CPU': 'true'})
    assert done.stderr.count('another training is at work on') == 2
    assert 'Connection closed' not in done.stderr


def test_locks_of_directories_named_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'run').mkdir()
    (tmp_path / 'link').symlink_to('run')
    monkeypatch.chdir(tmp_path / 'run')
    for name in (Path(), tmp_path / 'link', Path('../run')):
        with exclusive_lock(tmp_path / 'run', 'test'), pytest.raises(ValueError, match='another test is at work'), \
                exclusive_lock(name, 'test'):
            pass
    assert prepare_output(Path(), {}, 'auto') is None


@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / 'file') as part:
            part.touch(mode=0o600)
        with atomic_directory(tmp_path / 'directory') as part:
            (part / 'inner').mkdir(mode=0o700)
            (part / 'inner' / 'file').touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ('file', 'directory', 'directory/inner')}
    assert modes == {'file': 0o666 & ~mask, 'directory': 0o777 & ~mask, 'directory/inner': 0o777 & ~mask}
    assert stat.S_IMODE((tmp_path / 'directory' / 'inner' / 'file').stat().st_mode) == 0o666 & ~mask


def test_all_files_of_a_run_have_one_mode(finished: Path) -> None:
    files = [path for path in finished.rglob('*') if path.is_file() and 'trackers' not in path.parts]
    assert len(files) > 4
    assert len({stat.S_IMODE(path.stat().st_mode) for path in files}) == 1


def test_what_may_not_be_read_or_written_is_named(finished: Path, tmp_path: Path, program: Program) -> None:
    """As an ordinary user has it: root's power to pass over permissions is taken from the programs."""
    run, bundle = tmp_path / 'run', tmp_path / 'bundle'
    shutil.copytree(finished, run)

    def refused(*args: object) -> None:
        assert_one_line(program(*args, preexec_fn=without_root), 'ermission denied')

    for name in ('model.safetensors', 'run.json'):
        (run / name).chmod(0)
        refused('-m', 'hub.bundle', run, '--out', bundle)
        (run / name).chmod(0o644)
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    for directory in (run, tmp_path):
        directory.chmod(0o555)
    refused('-m', 'hub.evaluate', run, '--n', '4', '--attacks', 'clean')
    refused('-m', 'hub.bundle', run, '--out', bundle)
    refused('train_robust.py', *SMALL, '--output', tmp_path / 'new')
    for directory in (run, tmp_path):
        directory.chmod(0o755)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}


def test_a_disk_that_fails_gives_up_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step, CONTENT, {}, 1, keep=2)
    (tmp_path / 'run.json').write_text('{')  # the checkpoints are looked at

    def failing(_: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr('timm_paf.training.run_directory.sha256', failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        is_complete(tmp_path)


def test_a_compiler_that_ctrl_c_ends_is_no_traceback(tmp_path: Path, program: Program) -> None:
    """A terminal sends the signal to the compiler too; this one sends it on and fails, as one that it ended."""
    compiler = tmp_path / 'compiler'
    compiler.write_text(f"""#!/bin/sh
case "$1" in --version|-dumpversion|-v) exec c++ "$@";; esac
[ -e '{tmp_path}/sent' ] || {{ touch '{tmp_path}/sent'; kill -INT $PPID; }}
exit 1
""")
    compiler.chmod(0o755)
    done = program('train_robust.py', *SMALL, '--compile', '--output', tmp_path / 'run', env={
        'CXX': str(compiler), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'), 'TORCHINDUCTOR_COMPILE_THREADS': '1'})
    assert done.returncode == 75, done.stderr
    assert 'stopped by SIGINT while the network was compiled; the same command goes on' in done.stdout
    assert 'Traceback' not in done.stderr
    interruption = object.__new__(Interruption)  # without its handlers
    interruption.signal = 'SIGUSR1'  # after which another fault is still one
    assert not interruption.ended_compiler(torch.OutOfMemoryError('CUDA out of memory'))
