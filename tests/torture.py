"""Kills, flips bits in, starves and deceives the programs, and counts what was lost or wrong; with real processes.

    make torture                                     (an hour at most on two cores)
    python tests/torture.py --scale 0.1 --seed 1     (a tenth of it)

200 SIGKILLs over a training in one process, one in two processes and an evaluation, each started again until it is done
and compared with one that nothing stopped; 2,000 flipped bits over every kind of file that the programs write; the
hostile files of tests; full disks and a read-only directory. The table at the end says what was
tried; how often something was lost (a result that did not come, or another one); silent (a damaged file gave another
result without a word, or a traceback in place of a message); and ran (a stranger's code was run).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from hub.sources import load_run, read_run
from timm_paf.evaluation import State
from timm_paf.files import environment, is_of_machine, read_record, write_json
from timm_paf.training.run_directory import read_checkpoint
from timm_paf.weights import load_bundle
from timm_paf.weights.bundle_files import check_checksums

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ['train_robust.py', '--model', 'wrn10_1_pssilu', '--dataset', 'digits', '--epochs', '1', '--batch-size', '32',
         '--attack-steps', '1', '--max-steps', '12', '--checkpoint-steps', '1', '--ema', '0.9']
TWO = ['-m', 'torch.distributed.run', '--nproc_per_node', '2']
EVALUATE = ['-m', 'hub.evaluate', '--images', '48', '--batch-size', '16', '--attacks', 'clean,pgd-10,apgd']
MESSAGES = (ValueError, OSError, safetensors.SafetensorError)
"""The exceptions that the programs show as one line."""


@dataclass
class Row:
    """What came of one kind of trouble."""

    what: str
    tried: int = 0
    lost: int = 0
    silent: int = 0
    ran: int = 0


def program(args: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'ACCELERATE_USE_CPU': 'true'}
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True, **options)


def finish(args: Sequence[object], **options: Any) -> tuple[int, str]:
    process = program(args, **options)
    out, _ = process.communicate(timeout=600)
    return process.returncode, out


def result(run: Path) -> Any:
    """What must not change: weights, and metrics or verdicts."""
    weights = (run / 'model.safetensors').read_bytes()
    if not (run / 'evaluation.json').exists():
        return weights, (run / 'metrics.jsonl').read_text()
    found = read_record(run / 'evaluation.json')
    return weights, found['complete'], {name: attack['verdicts'] for name, attack in found['attacks'].items()}


def kills(row: Row, count: int, draw: random.Random, command: Callable[[Path], list[object]],
          fresh: Callable[[Path], None], folder: Path) -> None:
    """Kills a program at random moments, starts it again until it is done, and compares."""
    whole = folder / 'whole'
    fresh(whole)
    began = time.monotonic()
    status, out = finish(command(whole))
    assert status == 0, out
    seconds, expected = time.monotonic() - began, result(whole)
    while row.tried < count:
        run = folder / f'run{row.tried}'
        fresh(run)
        while True:
            process, last = program(command(run)), row.tried >= count
            try:
                out, _ = process.communicate(timeout=600 if last else draw.uniform(0.3, 1.1) * seconds)
                break
            except subprocess.TimeoutExpired:
                process.kill()  # the launcher alone, where there is one: its workers have to end with it
                out, _ = process.communicate()
                if last:
                    break
                row.tried += 1
        row.lost += process.returncode != 0 or result(run) != expected
        if process.returncode:
            print(out[-2000:])
        shutil.rmtree(run)


def flips(row: Row, count: int, draw: random.Random, file: Path, read: Callable[[], Any]) -> None:
    """Flips one bit at a time of a file, and compares what is read of it with what was."""
    whole, expected = file.read_bytes(), read()
    for _ in range(count):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        row.tried += 1
        try:
            with contextlib.redirect_stdout(None):
                row.silent += read() != expected
        except MESSAGES as error:
            row.silent += '\n' in str(error)
        except Exception as error:  # a traceback
            if is_of_machine(error):
                raise
            print(file.name, repr(error)[:300])
            row.silent += 1
        # What is damaged may have been removed, to be made again.
        file.write_bytes(whole)


def state_dict(network: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in network.state_dict().items()}


def flip_everything(count: int, draw: random.Random, folder: Path) -> list[Row]:
    """Flips bits of each kind of file of a run, its evaluation and its bundle."""
    run, bundle = folder / 'run', folder / 'bundle'
    for args in ([*TRAIN, '--output', run], [*EVALUATE, run, '--keep-state'],
                 ['-m', 'hub.bundle', run, '--out', bundle]):
        status, out = finish(args)
        assert status == 0, out
    checkpoint = max((run / 'checkpoints').iterdir())
    about = read_record(checkpoint / 'checkpoint.json')
    record = read_record(run / 'evaluation.state' / 'record.json')
    piece = sorted((run / 'evaluation.state').glob('pgd-10.attack.*.safetensors'))[0]
    work = ('pgd-10', 'attack', int(piece.name.split('.')[2]))

    def resumed() -> Any:
        state = read_checkpoint(checkpoint, about['recipe'], 1)
        return str(state['step']), {name: value.numpy().tobytes() for name, value in state['model'].items()}

    def verdicts() -> Any:
        state = State(run / 'evaluation.state', record)
        if work not in state:
            raise ValueError('it is done again')
        found = state.load(work, images=True)
        return [tensor.numpy().tobytes() for tensor in found[:3]], found[3:]

    def whole_bundle() -> Any:
        weights = state_dict(load_bundle(bundle))
        check_checksums(bundle)  # as the programs do that publish it
        return weights, {name: (bundle / name).read_bytes() for name in ('run.json', 'evaluation.json', 'README.md')}

    readers: dict[Path, Callable[[], Any]] = {
        run / 'run.json': lambda: read_run(run), run / 'model.safetensors': lambda: state_dict(load_run(run)),
        run / 'metrics.jsonl': lambda: read_metrics(run), checkpoint / 'checkpoint.json': resumed,
        checkpoint / 'state.pt': resumed, run / 'evaluation.json': lambda: read_record(run / 'evaluation.json'),
        run / 'evaluation.state' / 'record.json': verdicts, piece: verdicts,
        **{bundle / name: whole_bundle for name in (
            'config.json', 'model.safetensors', 'SHA256SUMS', 'run.json', 'evaluation.json', 'README.md')}}
    rows = []
    for file, read in readers.items():
        rows.append(Row(f'flipped bits of {"a bundle, " if file.parent == bundle else ""}{file.name.split(".0")[0]}'))
        flips(rows[-1], max(1, count // len(readers)), draw, file, read)
    return rows


def read_metrics(run: Path) -> str:
    """What another start of the training, which changes nothing, takes for whole."""
    from timm_paf.training.run_directory import is_complete

    if not is_complete(run):
        raise ValueError('it is written again')
    return (run / 'metrics.jsonl').read_text()


def full_disks(row: Row, count: int, draw: random.Random, folder: Path) -> None:
    """Trainings whose files may not grow beyond a random size, and then may."""
    whole = folder / 'whole'
    status, out = finish([*TRAIN, '--output', whole])
    assert status == 0, out
    largest = max(file.stat().st_size for file in whole.rglob('*') if file.is_file())
    for number in range(count):
        run, limit = folder / f'run{number}', draw.randrange(100, largest)

        def limited(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        status, out = finish([*TRAIN, '--output', run], preexec_fn=limited)
        row.tried += 1
        row.silent += status == 0 or 'Traceback' in out
        status, out = finish([*TRAIN, '--output', run])
        if status or result(run) != result(whole):
            print(out[-2000:])
            row.lost += 1


def without_root() -> None:
    """Takes from a process that is about to start what lets root pass over permissions (CAP_DAC_*)."""
    if os.getuid() == 0:
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP


def read_only(row: Row, folder: Path) -> None:
    """A training into a directory that may not be written."""
    (folder / 'run').mkdir()
    (folder / 'run').chmod(0o555)
    status, out = finish([*TRAIN, '--output', folder / 'run' / 'new'], preexec_fn=without_root)
    row.tried += 1
    row.silent += status == 0 or 'Traceback' in out or 'Permission denied' not in out
    row.lost += any((folder / 'run').iterdir())


def hostile(row: Row) -> None:
    """The corpus of hostile files, each of which must be refused without running what it holds."""
    status, out = finish(['-m', 'pytest', *sorted(map(str, (ROOT / 'tests').glob('*/test_hostile*.py')))])
    words = out.strip().splitlines()[-1].split()
    count = {words[i + 1].strip(','): int(words[i]) for i in range(len(words) - 1) if words[i].isdigit()}
    row.tried += count.get('passed', 0) + count.get('failed', 0)
    row.ran += count.get('failed', 0) + (status not in (0, 1))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a result, and their sums, as Markdown."""
    keys = ('tried', 'lost', 'silent', 'ran')
    total = {'what': 'all', **{key: sum(row[key] for row in rows) for key in keys}}
    return '\n'.join(['| | tried | lost | silent | ran |', '|---|---|---|---|---|',
                      *(f'| {row["what"]} | {" | ".join(f"{row[key]:,}" for key in keys)} |'
                        for row in [*rows, total])])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--scale', type=float, default=1.0, help='of the number of tries')
    parser.add_argument('--only', default='kills,flips,disks,hostile')
    parser.add_argument('--output', type=Path, help='a JSON file')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    draw, began, rows = random.Random(args.seed), time.monotonic(), []
    print(f'seed {args.seed}')

    def number(count: int) -> int:
        return max(1, round(args.scale * count))

    with tempfile.TemporaryDirectory() as name:
        def folder(part: str) -> Path:
            (path := Path(name) / part).mkdir()
            return path

        if 'kills' in args.only:
            trained = folder('trained') / 'run'
            assert finish([*TRAIN, '--output', trained])[0] == 0
            for what, count, command, fresh in (
                    ('SIGKILLs of a training', 90, lambda run: [*TRAIN, '--output', run], lambda run: None),
                    ('SIGKILLs of a training in two processes', 40, lambda run: [*TWO, *TRAIN, '--output', run],
                     lambda run: None),
                    ('SIGKILLs of an evaluation', 70, lambda run: [*EVALUATE, run],
                     lambda run: shutil.copytree(trained, run))):
                rows.append(Row(what))
                kills(rows[-1], number(count), draw, command, fresh, folder(what.replace(' ', '_')))
                print(rows[-1], flush=True)
        if 'flips' in args.only:
            rows += flip_everything(number(2000), draw, folder('flips'))
        if 'disks' in args.only:
            rows += [Row('full disks'), Row('a read-only directory')]
            full_disks(rows[-2], number(10), draw, folder('full'))
            read_only(rows[-1], folder('read_only'))
        if 'hostile' in args.only:
            rows.append(Row('hostile cases'))
            hostile(rows[-1])
    print(table([vars(row) for row in rows]))
    if args.output:
        write_json(args.output, {'seed': args.seed, 'seconds': round(time.monotonic() - began), **environment(),
                                 'rows': [vars(row) for row in rows]})
    sys.exit(any(row.lost or row.silent or row.ran for row in rows))


if __name__ == '__main__':
    main()
