"""Shows how far an evaluation is: the bar of the first process, with the work of all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from timm_paf.evaluation import Evaluation, passes
from timm_paf.processes import RANK

BAR = '{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}'
BAR_REMAINING = BAR.replace('{elapsed}', '{elapsed}<{remaining}')
"""The second from a hundredth of the work on: before, the time is that of the compiler and says nothing of the rest."""


def progress_bar(what: str, total: float, done: float = 0) -> tqdm[Any]:
    """Returns the bar of some work, which the first process shows: each second, in a log every half minute."""
    return tqdm(total=total, initial=done, desc=what, disable=RANK > 0, dynamic_ncols=True,
                mininterval=1 if sys.stderr.isatty() else 30, bar_format=BAR)


def show_progress(bar: tqdm[Any], done: float, last: str = '') -> None:
    """Shows how much of the work is done, and what was done last."""
    if done - bar.initial >= bar.total / 100:
        bar.bar_format = BAR_REMAINING
    bar.set_postfix_str(last, refresh=False)
    bar.update(done - bar.n)


def run_with_progress(evaluation: Evaluation, what: str, report: Callable[[], Any]) -> None:
    """Does the work; the first process shows how far all are, and reports whenever a part of an attack is complete."""
    total = sum(passes(*work[:2]) * len(evaluation.labels[work[2]:work[2] + evaluation.batch_size])
                for work in evaluation.work())
    reported, again = None, time.monotonic()
    with progress_bar(what, total, evaluation.progress()[0]) as bar:
        for _ in evaluation.run():
            if RANK > 0 or time.monotonic() < again:
                continue
            again = time.monotonic() + 1  # a fast network does not show the progress of every batch
            show_progress(bar, *evaluation.progress())
            bounds = evaluation.bounds()
            if (list(evaluation.results()), bounds) != reported:
                reported = list(evaluation.results()), bounds
                for attack, bound in bounds.items():
                    bar.write(f'{attack} after {bound["after"]}: at most {bound["accuracy"]:.1%}')
                report()
        show_progress(bar, *evaluation.progress())
