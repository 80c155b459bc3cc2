"""Accuracy under common corruptions for `hub.evaluate`: which images, how far it is, and the results in words."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch

from timm_paf.data import ImageSet, find_root
from timm_paf.data.corrupted import CORRUPTIONS, SEVERITIES, CorruptedImages, generate_cifar_c, open_cifar_c
from timm_paf.evaluation.corruptions import CorruptionEvaluation
from timm_paf.processes import RANK

from .imagenet import open_imagenet_c
from .progress import ProgressBar
from .publish.boards import TITLES
from .wording import down, markdown

PICTURE = 'corruptions.png'
FOLDERS = {name: f'{TITLES[name]}-C' for name in ('cifar10', 'cifar100')}
"""The directory of the corrupted images of a data set, which RobustBench knows by the same name."""


def open_corrupted(args: argparse.Namespace, data: ImageSet, n: int) -> CorruptedImages:
    """Returns the corrupted test images below ``--data-dir``; where that lacks those of CIFAR, they are made here.

    Raises:
        ValueError: for a data set that has none, or files that are not as they should be.
        FileNotFoundError: if files are missing.
    """
    if data.name == 'imagenet':
        return open_imagenet_c(args.data_dir, n)
    if data.name not in FOLDERS:
        raise ValueError(f'--corruptions is for {", ".join((*FOLDERS, "imagenet"))}; there are none of {data.name}')
    places = [Path(os.path.expanduser(args.data_dir))] if args.data_dir else []
    with contextlib.suppress(FileNotFoundError):
        places += filter(None, [find_root(data.name, args.data_dir)])
    folder = next((path for place in places if (path := place / FOLDERS[data.name]).is_dir()), None)
    if folder is None:
        return generate_cifar_c(data, n, args.seed)
    images = open_cifar_c(folder, n)
    if not torch.equal(images.labels, data.labels[:n]):
        raise ValueError(f'{folder}/labels.npy has other labels than the test images of {data.name}; expected the same '
                         'ones: fetch it again')
    return images


def run_corruptions(evaluation: CorruptionEvaluation) -> dict[str, Any]:
    """Does the work and returns the section of the record; the first process shows how far all are."""
    work = evaluation.work()
    with ProgressBar('corruptions', len(work)) as bar:
        again = 0.0
        for _ in evaluation.run():
            if RANK == 0 and time.monotonic() >= again:
                again = time.monotonic() + 1  # to count what all have done takes longer than a batch of a fast network
                bar.show(sum(item in evaluation.state for item in work))
        bar.show(len(work))
    return evaluation.result()


def corruptions_table(section: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns header and rows of a table of accuracies in percent, corruption by severity, each rounded down."""
    rows = [(name, *(f'{down(100 * value):.1f}' for value in (*values, sum(values) / len(values))))
            for name in CORRUPTIONS for values in [section['by'][name]]]
    means = [sum(section['by'][row[0]][severity - 1] for row in rows) / len(rows) for severity in SEVERITIES]
    return ('corruption', *map(str, SEVERITIES), 'mean'), [
        *rows, ('mean', *(f'{down(100 * value):.1f}' for value in (*means, section['accuracy'])))]


def corruptions_text(section: dict[str, Any]) -> str:
    """Returns the table in Markdown, with which images it is of."""
    header, rows = corruptions_table(section)
    return (f'Under [common corruptions](https://arxiv.org/abs/1903.12261), the accuracy in percent by severity on '
            f'{section["n"]} test images each, {which(section)}:\n\n{markdown(header, rows)}')


def which(section: dict[str, Any]) -> str:
    """Returns which images a section of a record is of, in words."""
    return f'**generated** with seed {section["seed"]}' if section['generated'] else "of their authors' files"


def show_corruptions(section: dict[str, Any], picture: Path) -> None:
    """Prints the table, and where its picture is."""
    header, rows = corruptions_table(section)
    print(f'common corruptions: % of {section["n"]} images, {which(section).replace("*", "")} (picture: {picture})')
    for row in (header, *rows):
        print(f'{row[0]:20s}{"".join(f"{value:>7s}" for value in row[1:])}')
