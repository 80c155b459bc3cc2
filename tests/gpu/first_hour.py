"""The first hour on a GPU: everything that only a GPU can show, in order, each part with a time limit of its own.

    python tests/gpu/first_hour.py --data-dir data --output runs/first_hour
    python tests/gpu/first_hour.py --data-dir data --output runs/rehearsal --tiny    (on any machine, in minutes)

The parts are the tests of tests/gpu, the benchmarks, a training run, and its evaluation. The output of one goes to
OUTPUT/<part>.log as it comes, its results into OUTPUT; first_hour.json has commands, exit statuses and seconds of
those that have ended. Started again, the program leaves out what has passed, and training goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from timm_paf.files import environment, write_json

ROOT = Path(__file__).resolve().parents[2]


def parts(args: argparse.Namespace) -> dict[str, tuple[float, list[str]]]:
    """Returns the parts: their limit in minutes, and their command without the interpreter."""
    out, tiny, data = args.output.resolve(), args.tiny, ['--data-dir', args.data_dir]
    run = out / 'run'
    train = ['--model', 'wrn10_1_pssilu', '--max-steps', '4', '--no-compile', '--batch-size', '16'] if tiny else [
        '--model', 'resnet18_pssilu', '--max-minutes', str(args.train_minutes)]
    return {
        'tests': (6, ['-m', 'pytest', '-m', 'gpu', '-p', 'no:cacheprovider', 'tests/gpu']),
        'bench': (12, ['tests/benchmarks/bench.py', '--device', 'cpu' if tiny else 'cuda',
                       '--rounds', '1' if tiny else '3', *(['--tiny'] if tiny else []), '--only', args.bench,
                       '--output', str(out / 'bench.json')]),
        'train': (args.train_minutes + 3, [
            'train_robust.py', '--config', args.config, *train, *data, '--output', str(run)]),
        'evaluate': (10, ['-m', 'hub.evaluate', str(run), *data, '--images', '2' if tiny else '1000',
                          '--attacks', 'clean,pgd-2' if tiny else 'clean,pgd-50,autoattack']),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--data-dir', required=True, help='with cifar-10-batches-py')
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--config', default='hub/recipes/fastat_ema.yaml', help='recipe of the training run')
    parser.add_argument('--train-minutes', type=float, default=15.0)
    parser.add_argument('--bench', default='', help='comparisons to make; default: all')
    parser.add_argument('--parts', default='tests,bench,train,evaluate')
    parser.add_argument('--tiny', action='store_true', help='see that all of it runs; the numbers mean nothing')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / 'first_hour.json'
    done: dict[str, Any] = json.loads(record.read_text())['parts'] if record.exists() else {}
    for name in args.parts.split(','):
        limit, command = parts(args)[name]
        if done.get(name, {}).get('exit') == 0:
            continue
        started = time.monotonic()
        with open(args.output / f'{name}.log', 'ab') as log:
            try:
                status: int | None = subprocess.run(
                    [sys.executable, '-W', 'ignore', *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                    timeout=60 * limit, env={**os.environ, 'PYTHONUNBUFFERED': '1'}).returncode
            except subprocess.TimeoutExpired:
                status = None
        done[name] = {'command': shlex.join(['python', *command]), 'exit': status, 'limit_minutes': limit,
                      'seconds': round(time.monotonic() - started, 1)}
        print(json.dumps({name: done[name]}), flush=True)
        write_json(record, {**environment(), 'parts': done})


if __name__ == '__main__':
    main()
