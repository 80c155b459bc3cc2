"""The first hour on a GPU: everything that only a GPU can show, in order, each part with a time limit of its own.

    python tests/gpu/first_hour.py --data-dir data --output runs/first_hour
    python tests/gpu/first_hour.py --data-dir data --output runs/rehearsal --tiny    (on any machine, in minutes)

The parts are the tests of tests/gpu, the benchmarks, a training run, and its evaluation. The output of one goes to
OUTPUT/<part>.log as it comes, its results into OUTPUT; first_hour.json has command, exit status and seconds of each
start of a part. Started again with the same arguments (--parts and --train-minutes may differ), the program leaves out
what has passed, and a training that its time limit stopped goes on where it stopped; the evaluation comes when the
training is at its end. Tiny steps and --train-minutes 0.001 rehearse that: one step is trained before the limit, and
the rest by the same command without it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from timm_paf.files import environment, read_record, write_json

ROOT = Path(__file__).resolve().parents[2]
TIME = re.compile(r'--max-minutes \S+')
"""What may change in a command from one start of a part to the next."""


def parts(args: argparse.Namespace) -> dict[str, tuple[float, list[str]]]:
    """Returns the parts: their limit in minutes, and their command without the interpreter, to be run in ROOT."""
    # From ROOT, so that a record of paths below it names no directory of the machine.
    out, data_dir = (Path(os.path.relpath(path, ROOT)) for path in (args.output, args.data_dir))
    tiny, run, data = args.tiny, str(out / 'run'), ['--data-dir', str(data_dir)]
    train = ['--model', 'wrn10_1_pssilu', '--max-steps', '4', '--no-compile', '--batch-size', '16', '--val', '20'] if (
        tiny) else ['--model', 'resnet18_pssilu']
    return {
        'tests': (6, ['-m', 'pytest', '-m', 'gpu', '-p', 'no:cacheprovider', 'tests/gpu']),
        'bench': (18, ['tests/benchmarks/bench.py', '--device', 'cpu' if tiny else 'cuda',
                       '--rounds', '1' if tiny else '3', *(['--tiny'] if tiny else []), '--only', args.bench,
                       '--output', str(out / 'bench.json')]),
        'train': (args.train_minutes + 3, [
            'train_robust.py', '--config', args.config, *train, '--mixed-precision', 'bf16', '--max-minutes',
            str(args.train_minutes), *data, '--output', run]),
        'evaluate': (10, ['-m', 'hub.evaluate', run, *data, '--images', '2' if tiny else '1000',
                          '--attacks', 'clean,pgd-2' if tiny else 'clean,pgd-50,autoattack']),
    }


def trained(run: Path) -> bool:
    """Returns whether a training is at its end; its exit status is 0 where its time limit stopped it, too."""
    return (run / 'run.json').is_file() and read_record(run / 'run.json')['status'] == 'complete'


def start(name: str, limit: float, command: list[str], output: Path) -> dict[str, Any]:
    """Runs a part and returns its entry in the record."""
    started = time.monotonic()
    with open(output / f'{name}.log', 'ab') as log:
        try:
            status: int | None = subprocess.run(
                [sys.executable, '-W', 'ignore', *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                timeout=60 * limit, env={**os.environ, 'PYTHONUNBUFFERED': '1'}).returncode
        except subprocess.TimeoutExpired:
            status = None
    return {'part': name, 'command': shlex.join(['python', *command]), 'exit': status, 'limit_minutes': limit,
            'seconds': round(time.monotonic() - started, 1),
            'passed': status == 0 and (name != 'train' or trained(output / 'run'))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--data-dir', required=True, help='with cifar-10-batches-py')
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--config', default='hub/recipes/fastat_ema.yaml', help='recipe of the training run')
    parser.add_argument('--train-minutes', type=float, default=15.0, help='of one start; the next one goes on')
    parser.add_argument('--bench', default='', help='comparisons to make; default: all')
    parser.add_argument('--parts', default='tests,bench,train,evaluate')
    parser.add_argument('--tiny', action='store_true', help='see that all of it runs; the numbers mean nothing')
    args = parser.parse_args()
    commands = {name: shlex.join(['python', *command]) for name, (_, command) in parts(args).items()}
    if unknown := set(args.parts.split(',')) - commands.keys():
        sys.exit(f'--parts has no {", ".join(sorted(map(repr, unknown)))}; expected some of {",".join(commands)}')
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / 'first_hour.json'
    starts: list[dict[str, Any]] = json.loads(record.read_text())['starts'] if record.exists() else []
    for each in starts:
        if each['exit'] in (0, None) and TIME.sub('', each['command']) != TIME.sub('', commands[each['part']]):
            sys.exit(f'{record} has the part {each["part"]} by other arguments ({each["command"]}); expected these, or '
                     'another --output')
    left = [name for name in args.parts.split(',')
            if not any(each['part'] == name and each['passed'] for each in starts)]
    for name in list(left):
        if name == 'evaluate' and not trained(args.output / 'run'):
            continue
        starts.append(start(name, *parts(args)[name], args.output))
        print(json.dumps(starts[-1]), flush=True)
        write_json(record, {**environment(), 'starts': starts})
        if starts[-1]['passed']:
            left.remove(name)
    if left:
        sys.exit(f'not done: {", ".join(left)}; the same command goes on')


if __name__ == '__main__':
    main()
