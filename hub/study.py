"""The paper's question on a small network: every activation in it, with the same recipe, data order and seeds.

    python -m hub.study --data-dir data [--keep hub/results/study] [--minutes 60] [--only 'psilu*_s0']

Two parts. *Activations*: each of ``timm_paf.list_pafs(plain=True)``, with every seed. *Shapes*: PReLU, PELU, PSiLU and
PSSiLU with their parameters fixed at several values, as in the paper's first experiments. Each network is trained by
train_robust.py and attacked by hub.evaluate, as a user would call them. What is complete is kept: stopped, the same
command goes on. With ``--keep DIR`` the records without the weights are copied to DIR; `hub.report` makes the README's
tables and pictures from those in hub/results/study.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from timm_paf.activations import create_paf, list_pafs
from timm_paf.files import read_json, whole_file

RECIPE = Path('hub/recipes/study_resnet18_w8.yaml')
RESULTS = Path('hub/results/study')
ARCHITECTURE = 'resnet18_w8'
RECORDS = ('run.json', 'metrics.jsonl', 'evaluation.json')
SHAPES: dict[str, tuple[str, tuple[float, ...]]] = {
    'prelu': ('alpha', (-0.3, -0.1, 0.3)),
    'pelu': ('alpha', (-0.5, 0.5)),
    'psilu': ('alpha', (0.5, 4.0, 10.0)),
    'pssilu': ('beta', (0.1, 0.5)),
}
"""What is fixed in the study of shapes, and at which values; ReLU, ELU, SiLU and SSiLU (beta 0.3) complete each row."""


@dataclass(frozen=True)
class Case:
    """One network of the study: an activation or a shape that stays, and a seed.

    ``free`` is without the paper's penalty on beta and the clipping of its gradient, which between them hold beta at 0.
    """

    act: str
    seed: int
    fixed: dict[str, float] = field(default_factory=dict)
    free: bool = False

    @property
    def variant(self) -> str:
        """The name without the seed."""
        return ''.join((self.act, *(f'_{key}{value:g}' for key, value in self.fixed.items()), '_free' * self.free))

    @property
    def name(self) -> str:
        return f'{self.variant}_s{self.seed}'

    @property
    def attacks(self) -> str:
        """APGD, which takes most of the time, on one network of each activation, and on all of three.

        PSoftplus and PSSiLU led ReLU with seed 0; the others were attacked to see whether that holds.
        """
        strong = self.variant in ('relu', 'psoftplus', 'pssilu') or (self.seed == 0 and not self.fixed)
        return 'clean,pgd-50' + (',apgd' if strong else '')

    def train(self) -> list[str]:
        """Options for train_robust.py."""
        kwargs = {**self.fixed, 'frozen': True}
        return ['--config', str(RECIPE), '--model', f'{ARCHITECTURE}_{self.act}', '--seed', str(self.seed),
                *(['--act-kwargs', json.dumps(kwargs)] if self.fixed else []),
                *(['--paf-penalty', '0', '--paf-clip', '0'] if self.free else [])]


def cases(seeds: int) -> Iterator[Case]:
    """All of them, those first that say most: each activation once, the shapes, then the other seeds."""
    for seed in range(seeds):
        yield from (Case(act, seed) for act in list_pafs(plain=True))
        yield Case('pssilu', seed, free=True)
        if seed == 0:
            for act, (name, values) in SHAPES.items():
                yield from (Case(act, 0, {name: value}) for value in values)


def shape(act: str, **values: float) -> tuple[float, float]:
    """Of an activation: its largest second derivative (infinite at a kink), and its output at -1."""
    paf = create_paf(act, **values).double()
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    with torch.no_grad():
        y, at = paf(x), paf(torch.tensor([-1.0], dtype=torch.float64)).item()
    second = (y[2:] - 2 * y[1:-1] + y[:-2]).abs().max().item() / (x[1] - x[0]).item() ** 2
    return (math.inf if second > 100 else second), at


def complete(directory: Path, images: int, attacks: str) -> bool:
    """Whether all records of a network are there, whole, and of as many images and at least these attacks."""
    if not all((directory / name).is_file() for name in RECORDS):
        return False
    found = read_json(directory / 'evaluation.json')
    return found.get('complete', False) and found['n'] == images and set(attacks.split(',')) <= found['attacks'].keys()


def call(*command: str) -> None:
    """A program of this repository, as a user would type it; ends the study where it fails."""
    print(f'\n$ {shlex.join(("python", *command))}', flush=True)
    done = subprocess.run([sys.executable, '-W', 'ignore', *command])
    if done.returncode:
        sys.exit(done.returncode)


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
            print(f'{args.minutes:g} minutes are over; the same command goes on with {case.name}')
            break
        if not complete(directory, args.images, attacks):
            call('train_robust.py', *case.train(), '--data-dir', args.data_dir, '--output', str(directory),
                 *args.overrides)
            call('-m', 'hub.evaluate', str(directory), '--data-dir', args.data_dir, '--images', str(args.images),
                 '--attacks', attacks)
        if args.keep:
            kept.mkdir(parents=True, exist_ok=True)
            for name in RECORDS:  # the one last that says that all are there
                with whole_file(kept / name) as part:
                    shutil.copyfile(directory / name, part)
        done += 1
    print(f'{done} of {len(chosen)} networks are complete')


def main() -> None:
    parser = argparse.ArgumentParser(prog='hub.study', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--data-dir', help='directory with cifar-10-batches-py')
    parser.add_argument('--output', type=Path, help='directory for the runs (default: runs/study)')
    parser.add_argument('--keep', type=Path, metavar='DIR',
                        help='copy the records there; what is complete there is not run again')
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help='0 to N - 1 (default: 3)')
    parser.add_argument('--only', default='*', help="cases whose name matches, such as 'psilu*_s0'")
    parser.add_argument('--attacks', help='of hub.evaluate, for all; default: clean,pgd-50, and apgd for some')
    parser.add_argument('--images', type=int, default=1000, help='the first test images (default: 1000)')
    parser.add_argument('--minutes', type=float, default=math.inf, help='begin no network after that')
    parser.add_argument('--list', action='store_true', help='say what is complete, and end')
    parser.add_argument('overrides', nargs='*', metavar='-- OPTION', help='for train_robust.py, such as --max-steps 2')
    try:
        run(parser.parse_args())
    except KeyboardInterrupt:
        sys.exit('hub.study: stopped; the same command goes on')
    except (ValueError, OSError) as error:
        if os.environ.get('TIMM_PAF_DEBUG'):
            raise
        sys.exit(f'hub.study: {error}')


if __name__ == '__main__':
    main()
