"""Shows how far an evaluation is: the bar of the first process, with the work of all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from timm_paf.evaluation import Evaluation, passes
from timm_paf.processes import RANK


class ProgressBar(tqdm):  # type: ignore[misc]
    """The bar of some work, which the first process shows: each second, in a log every half minute.

    Its clock begins when the first work is done. What comes before is for the most part the compiler's time, which
    says nothing of what remains.
    """

    n: float

    def __init__(self, what: str, total: float, done: float = 0) -> None:
        self.begun = False
        super().__init__(total=total, initial=done, desc=what, disable=RANK > 0, dynamic_ncols=True,
                         mininterval=1 if sys.stderr.isatty() else 30,
                         bar_format='{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}')

    def show(self, done: float, last: str = '') -> None:
        """Shows how much of the work is done, and what was done last."""
        if self.disable:
            return
        self.set_postfix_str(last, refresh=False)
        if self.begun or done == self.n:
            self.update(done - self.n)
            return
        self.begun = True
        self.start_t = self.last_print_t = self._time()
        self.initial = self.n = self.last_print_n = done
        self.refresh()


def run_with_progress(evaluation: Evaluation, what: str, report: Callable[[], Any]) -> None:
    """Does the work; the first process shows how far all are, and reports whenever a part of an attack is complete."""
    total = sum(passes(*work[:2]) * len(evaluation.labels[work[2]:work[2] + evaluation.batch_size])
                for work in evaluation.work())
    reported, again = None, time.monotonic()
    with ProgressBar(what, total, evaluation.progress()[0]) as bar:
        for _ in evaluation.run():
            if RANK > 0 or time.monotonic() < again:
                continue
            again = time.monotonic() + 1  # a fast network does not show the progress of every batch
            bar.show(*evaluation.progress())
            bounds = evaluation.bounds()
            if (list(evaluation.results()), bounds) != reported:
                reported = list(evaluation.results()), bounds
                for attack, bound in bounds.items():
                    bar.write(f'{attack} after {bound["after"]}: at most {bound["accuracy"]:.1%}')
                report()
        bar.show(*evaluation.progress())
