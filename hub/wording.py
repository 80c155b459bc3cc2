"""Puts results into words: names of attacks, accuracies that are never rounded up, intervals, tables, safe Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest


def interval(correct: int, n: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share of ``n`` images, https://doi.org/10.1080/01621459.1927.10502953."""
    found = binomtest(correct, n).proportion_ci(method='wilson')
    return float(found.low), float(found.high)


def plural(n: int, one: str, more: str | None = None) -> str:
    """Returns a number with its noun: '1 step', '2 steps'."""
    return f'{n} {one if n == 1 else more or one + "s"}'


def label(attack: str) -> str:
    """Returns the name of an attack as prose has it."""
    return {'clean': 'Clean', 'autoattack': 'AutoAttack', 'apgd': 'APGD-CE + APGD-T'}.get(attack, attack.upper())


def is_standard(evaluation: dict[str, Any]) -> bool:
    """Returns whether numbers are comparable with RobustBench's; hub.evaluate marks those that are not."""
    return all(part.get('standard', True) for part in (evaluation, *evaluation['attacks'].values()))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [f'| {" | ".join(row)} |' for row in (header, *rows)]
    return '\n'.join([lines[0], '|---' * len(header) + '|', *lines[1:]])


def down(percent: float) -> float:
    """Returns the percentage rounded down to one digit; no accuracy is rounded up."""
    return math.floor(10 * percent + 1e-6) / 10


def ends(values: Sequence[float], form: str = '.1f') -> str:
    """Returns ' (least to most)' of several values, '' for a single value."""
    return f' ({min(values):{form}} to {max(values):{form}})' if len(values) > 1 else ''


def escape_markdown(text: str) -> str:
    """Returns a text for Markdown in which no character is markup, HTML or part of an address."""
    return re.sub(r'([\\`*_{}\[\]<>#|~&$!:@]|(?<=www)\.)', r'\\\1', text, flags=re.IGNORECASE)
