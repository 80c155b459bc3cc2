"""Times of cases that run in turns, and the table of such a file of results."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ['Bench', 'Case', 'table']

Case = Callable[[], object]


class Bench:
    """The rows so far, on one device, in seconds of a clock."""

    def __init__(self, device: str, rounds: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.rounds, self.clock = torch.device(device), rounds, clock
        self.rows: list[dict[str, Any]] = []
        self.best_rate: float | None = None

    def wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def seconds(self, case: Case) -> float:
        torch.compiler.cudagraph_mark_step_begin()  # nothing of the case before is in use, should it be a CUDA graph's
        self.wait()
        started = self.clock()
        case()
        self.wait()
        return self.clock() - started

    def compare(
            self, what: str, cases: dict[str, Case], images: int | None = None, flops: float | None = None,
            rounds: int | None = None) -> None:
        """Time the cases in turns, once more than counts; the first is the one that ratios are to.

        Args:
            images: worked on by each case.
            flops: of each case.
        """
        first = {name: self.seconds(case) for name, case in cases.items()}
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds or self.rounds):
            for name, case in cases.items():
                times[name].append(self.seconds(case))
        base = next(iter(times.values()))
        for name, seconds in times.items():
            ratios = sorted(b / s for b, s in zip(base, seconds))
            median = statistics.median(seconds)
            self.add(what, name, seconds=median, first_call=first[name], ratio=statistics.median(ratios),
                     ratio_min=ratios[0], ratio_max=ratios[-1], rounds=len(seconds),
                     **{'images_per_second': images / median} if images else {},
                     **{'share_of_best_rate': flops / median / self.best_rate} if flops and self.best_rate else {})

    def grow(self, what: str, unit: str, counts: tuple[int, ...], case: Callable[[int], object]) -> None:
        """The median of three for each count, and seconds per unit."""
        for count in counts:
            case(count)
            median = statistics.median(self.seconds(functools.partial(case, count)) for _ in range(3))
            self.add(what, f'{count} {unit}', seconds=median, milliseconds_per_unit=1e3 * median / count)

    def add(self, what: str, case: str, **values: Any) -> None:
        row = {'what': what, 'case': case, **{k: float(f'{v:.4g}') if isinstance(v, float) else v
                                              for k, v in values.items()}}
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def table(path: Path) -> str:
    """The comparisons of a result file as Markdown: the first case of each against the compiled ones, else the last."""
    comparisons: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text())['rows']:
        if 'ratio_min' in row:
            comparisons.setdefault(row['what'], []).append(row)
    lines = ['| | compared with | ours | ratio (least to most) |', '|---|---|---|---|']
    for what, (first, *others) in comparisons.items():
        for ours in [row for row in others if 'compiled' in row['case']] or others[-1:]:
            lines.append(f'| {what} | {first["case"]}: {_rate(first)} | {ours["case"]}: {_rate(ours)} | '
                         f'{ours["ratio"]:.2f} ({ours["ratio_min"]:.2f} to {ours["ratio_max"]:.2f}) |')
    return '\n'.join(lines)


def _rate(row: dict[str, Any]) -> str:
    rate = row.get('images_per_second')
    return f'{1e3 * row["seconds"]:.1f} ms' if rate is None else f'{rate:,.{2 if rate < 10 else 0}f} images/s'
