"""The paper's question on a small network: every activation in it, with the same recipe, data order and seeds.

    python -m hub.study --data-dir data [--keep hub/results/study] [--minutes 60] [--only 'psilu*_s0']

Two parts. *Activations*: each that the paper compares, with every seed. *Shapes*: PReLU, PELU, PSiLU and
PSSiLU with their parameters fixed at several values, as in the paper's first experiments. Each network is trained by
train_robust.py and attacked by hub.evaluate, as a user would call them. What is complete is kept: stopped, the same
command resumes. With ``--keep DIR`` the records without the weights are copied to DIR; `hub.report` makes the
tables and pictures of hub/results/README.md from those in hub/results/study.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from timm_paf.files import atomic_write

from ..cli import Parser, call, one_line, user_path
from .cases import RECORDS, cases, complete


def run(args: argparse.Namespace) -> None:
    chosen = [case for case in cases(args.seeds) if fnmatch.fnmatch(case.name, args.only)]
    if not chosen:
        raise ValueError(f'no case matches {args.only!r}; --list without --only shows them')
    if args.overrides and args.output is None:
        raise ValueError('options for train_robust.py make another study; give it an --output of its own')
    output, started, done = args.output or Path('runs/study'), time.monotonic(), 0
    for case in chosen:
        directory, kept = output / case.name, (args.keep or output) / case.name
        attacks = args.attacks or case.attacks
        ready = complete(kept, args.images, attacks)
        done += ready
        if args.list:
            print(f'{case.name:24s}{"complete" if ready else "to do"}')
        if ready or args.list:
            continue
        if args.data_dir is None:
            raise ValueError('expected --data-dir DIR with cifar-10-batches-py in it')
        if time.monotonic() - started > 60 * args.minutes:
            print(f'{args.minutes:g} minutes are over; the same command resumes with {case.name}')
            break
        if not complete(directory, args.images, attacks):
            call('train', *case.train(), '--data-dir', args.data_dir, '--output', str(directory),
                 *args.overrides)
            call('evaluate', str(directory), '--data-dir', args.data_dir, '--images', str(args.images),
                 '--attacks', attacks)
        if args.keep:
            kept.mkdir(parents=True, exist_ok=True)
            for name in RECORDS:  # the last record is the one that says that all are there
                with atomic_write(kept / name) as part:
                    shutil.copyfile(directory / name, part)
        done += 1
    print(f'{done} of {len(chosen)} networks are complete')


def main(args: Sequence[str] | None = None, prog: str = 'hub.study') -> None:
    parser = Parser(prog=prog, description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--data-dir', help='directory with cifar-10-batches-py')
    parser.add_argument('--output', type=user_path, help='directory for the runs (default: runs/study)')
    parser.add_argument('--keep', type=user_path, metavar='DIR',
                        help='copy the records there; what is complete there is not run again')
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help='0 to N - 1 (default: 3)')
    parser.add_argument('--only', default='*', help="cases whose name matches, such as 'psilu*_s0'")
    parser.add_argument('--attacks', help='of hub.evaluate, for all; default: clean,pgd-50, and apgd for some')
    parser.add_argument('--images', type=int, default=1000, help='the first test images (default: 1000)')
    parser.add_argument('--minutes', type=float, default=math.inf, help='begin no network after that')
    parser.add_argument('--list', action='store_true', help='say what is complete, and end')
    parser.add_argument('overrides', nargs='*', metavar='-- OPTION', help='for train_robust.py, such as --max-steps 2')
    with one_line(prog):
        run(parser.parse_args(args))


if __name__ == '__main__':
    main()
