"""Train and attack the networks of a study, which a YAML names, and compare them image by image.

    timm-paf study STUDY.yaml [--data-dir data] [--output runs/study] [--minutes 60] [--only 'psilu*_s0']
    timm-paf study STUDY.yaml --list    (what is complete, and its table)

Each network is trained by train and attacked by evaluate, as a user would call them. What is complete is kept:
stopped, the same command resumes, and several of it at once share the networks among them. With ``--keep DIR`` the
records without the weights are copied to DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from timm_paf.data import DATASETS, load_dataset
from timm_paf.files import atomic_write
from timm_paf.processes import exclusive_lock

from ..cli import Parser, call, one_line, split_options, user_path
from ..paths import publish_record
from ..sources import add_data_options
from .cases import FILE, RECORDS, Case, open_study
from .records import Record, is_complete, refuse_other_evaluation, refuse_other_kept_run, state_of
from .tables import compared


def run(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Runs what is left of a study, or lists it.

    Args:
        args: as `main` has them.
        overrides: options of train for every network.

    Raises:
        ValueError: if the study, one of its networks or an option can't be meant, a record is damaged or of another
            network, or a network failed.
    """
    study = [replace(case, more=tuple(overrides)) for case in open_study(args.study)]
    chosen = [case for case in study if fnmatch.fnmatch(case.name, args.only)]
    if not chosen:
        raise ValueError(f'no network matches {args.only!r}; --list without --only shows them')
    if overrides and args.output is None:
        raise ValueError('options for train make another study; give it an --output of its own')
    named = args.study.resolve().parent.name if args.study.name == FILE else args.study.stem
    output = args.output or Path('runs', named)
    kept = args.keep or output
    for case in chosen:
        case.check()
    done = [case for case in chosen if is_complete(case, kept / case.name)]
    if args.list:
        width = max(len(case.name) for case in chosen) + 1
        for case in chosen:
            print(f'{case.name:{width}s}{"complete" if case in done else state_of(output / case.name)}')
        show(done, kept, study[0].network)
        print(f'{len(done)} of {len(chosen)} networks are complete')
        return
    left = [case for case in chosen if case not in done]
    for case in left:
        for directory in {output, kept}:
            refuse_other_evaluation(case, directory / case.name)
        refuse_other_kept_run(output / case.name, kept / case.name)
    data = [*(('--data-dir', args.data_dir) if args.data_dir else ()), *(['--download'] if args.download else [])]
    wanted: dict[str, bool] = {}  # by data set, whether to download it: each network would fail without
    for config, recipe in map(Case.meant, left):
        wanted[recipe.dataset] = args.download or config.download or wanted.get(recipe.dataset, False)
    for dataset, download in wanted.items():
        if dataset in DATASETS:
            load_dataset(dataset, args.data_dir, train=False, download=download)
        elif args.data_dir is None and not dataset.startswith('hfds/'):
            raise ValueError(f'{dataset} needs a directory; expected --data-dir DIR, as train takes it')
    started, failed = time.monotonic(), []
    for case in left:
        if time.monotonic() - started > 60 * args.minutes:
            print(f'{args.minutes:g} minutes are over; the same command resumes with {case.name}')
            break
        try:
            made = make(case, output, kept, data)
        except SystemExit as error:
            if error.code != 1:  # a signal ended it, not a mistake or a loss that is not finite
                raise
            failed.append(case.name)
            continue
        if made:
            done = [case for case in chosen if is_complete(case, kept / case.name)]  # others may have ended some too
            show(done, kept, study[0].network)
    print(f'{len(done)} of {len(chosen)} networks are complete')
    if failed:
        raise ValueError(f'{", ".join(failed)} failed, as said above; the same command tries again')


def make(case: Case, output: Path, keep_in: Path, data: Sequence[str]) -> bool:
    """Trains and attacks a network, as far as it is not done; returns whether it is complete.

    Args:
        case: the network.
        output: the directory of the runs.
        keep_in: that of the records.
        data: options of train and evaluate that say where the data is.
    """
    directory, kept = output / case.name, keep_in / case.name
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(output / f'{case.name}.study', 'study'))
        except ValueError:
            print(f"{case.name} is another process's, which is at work on it")
            return False
        if not is_complete(case, directory) and not is_complete(case, kept):  # another process may have ended it since
            call('train', *case.train(), *data, '--output', directory)
            call('evaluate', directory, *data, '--images', case.images, '--attacks', case.attacks)
            refuse_other_evaluation(case, directory)  # there may be fewer images
        if not is_complete(case, kept):
            refuse_other_kept_run(directory, kept)
            keep(directory, kept)
    return True


def keep(directory: Path, kept: Path) -> None:
    """Copies the records of a network, without paths; the last is the one that says that all are there."""
    kept.mkdir(parents=True, exist_ok=True)
    for name in RECORDS:
        with atomic_write(kept / name) as part:
            shutil.copyfile(directory / name, part)
            if name.endswith('.json'):
                publish_record(part)


def show(done: Sequence[Case], directory: Path, base: str) -> None:
    """Prints the table of what is complete."""
    if done:
        print(f'\n{compared([Record(directory / case.name, case) for case in done], base)}\n', flush=True)


def main(args: Sequence[str] | None = None, prog: str = 'hub.study') -> None:
    """Runs the program."""
    parser = Parser(prog=prog, takes_train=True, description=(__doc__ or '').split('\n')[0],
                    usage=f'{prog} STUDY.yaml [options] [-- options of train]',
                    epilog=f'example: {prog} hub/results/study/study.yaml --data-dir data --only "*_s0"')
    parser.add_argument('study', type=user_path, metavar='STUDY.yaml',
                        help='the networks, with options of train, seeds and attacks')
    add_data_options(parser)
    parser.add_argument('--output', type=user_path, help='directory for the runs (default: runs/ and the study)')
    parser.add_argument('--keep', type=user_path, metavar='DIR',
                        help='copy the records there; what is complete there is not run again')
    parser.add_argument('--only', default='*', help="networks whose name matches, such as 'psilu*_s0'")
    parser.add_argument('--minutes', type=float, default=math.inf, help='begin no network after that')
    parser.add_argument('--list', action='store_true', help='say what is complete, and end')
    own, overrides = split_options(args)
    with one_line(prog):
        run(parser.parse_args(own), overrides)
