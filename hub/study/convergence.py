"""The comparison of the study at convergence, as its protocol fixes it: hub/results/convergence/PROTOCOL.md."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

from ..chosen_images import in_words
from ..wording import ends, label, markdown
from .cases import RECORDS
from .records import RESULTS, Record, attacked_otherwise, finished, grouped, records_of
from .tables import accuracy, learned, machine_time, named, pairs_of, second_derivative

CONVERGENCE = RESULTS / 'convergence'
MEASURE, GROUP, BASE, PLAIN = 'apgd', 'gpu/', 'relu', 'silu'
"""The attack of the measure, the networks that are compared, what with, and a smooth one that learns nothing."""
STRONGEST = 'strongest/'
"""The networks of part 4, of another recipe and more epochs."""
LATER = CONVERGENCE / 'images_1000_1999'
"""The evaluations of some of these networks on a second thousand of the test images."""
COMPARISONS = 4
"""The other rows of part 1, which Holm's correction counts."""
FIRST_LOOK = 3
"""The number of seeds that part 1 was looked at with before."""
DRAWS = 10_000


def differences(found: Sequence[Record], base: Sequence[Record]) -> NDArray[np.float64]:
    """Returns by seed and image, (seeds, images), the points that a network has and the base has not, -100 to 100."""
    return np.array([pair.numpy() for pair in pairs_of(found, base, MEASURE).values()])


def interval_of_seeds(pairs: NDArray[np.float64]) -> tuple[float, float, float]:
    """Returns the 95 % interval of Student's t over the seeds' differences, and p of none.

    Args:
        pairs: (seeds, images), of at least two seeds. Where their differences are equal no interval is defined, which
            is nan, and p of 1 claims nothing.
    """
    if not np.ptp(pairs.mean(1)):
        return math.nan, math.nan, 1.0
    found = ttest_1samp(pairs.mean(1), 0.0)
    low, high = found.confidence_interval(0.95)
    return float(low), float(high), float(found.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Returns p of several comparisons by Holm's correction, https://www.jstor.org/stable/4615733."""
    found, least = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[i]))
        found[i] = least
    return found


def bootstrap(pairs: NDArray[np.float64], draws: int = DRAWS) -> tuple[float, float]:
    """Returns the 95 % interval of the mean difference over draws of seeds and of images, with seed 0.

    Both are drawn at once, which ``scipy.stats.bootstrap`` does not do.
    """
    seeds, images = pairs.shape
    generator = np.random.default_rng(0)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    of_images = generator.multinomial(images, np.full(images, 1 / images), draws) / images
    low, high = np.quantile(((of_seeds @ pairs) * of_images).sum(1), (0.025, 0.975))
    return float(low), float(high)


def rows_of_test() -> dict[str, list[Record]]:
    """Returns the records of part 1, by the name of the row."""
    return {network.removeprefix(GROUP): group for network, group in grouped(records_of(CONVERGENCE)).items()
            if network.startswith(GROUP)}


class Comparison(NamedTuple):
    """A row of part 1 beside the base: its `differences`, the interval over the seeds, p after Holm's correction."""

    pairs: NDArray[np.float64]
    low: float
    high: float
    p: float


def comparisons(groups: Mapping[str, Sequence[Record]]) -> dict[str, Comparison]:
    """Returns the comparison of each row of part 1 but the base, with no interval and p of 1 for fewer than two seeds.

    Args:
        groups: as `rows_of_test` returns them.
    """
    pairs = {name: differences(group, groups[BASE]) for name, group in groups.items() if name != BASE}
    seeds = [interval_of_seeds(found) if len(found) > 1 else (math.nan, math.nan, 1.0) for found in pairs.values()]
    missing = [1.0] * (COMPARISONS - len(pairs))  # what is not there yet counts too
    corrected = holm([*(p for *_, p in seeds), *missing])
    return {name: Comparison(found, low, high, p)
            for (name, found), (low, high, _), p in zip(pairs.items(), seeds, corrected)}


def convergence_table() -> str:
    """Returns the table of part 1: every row, its difference to ReLU, and what the protocol says of it."""
    groups = rows_of_test()
    compared = comparisons(groups)
    rows = []
    for name, group in sorted(groups.items(), key=lambda each: -mean(r.accuracy(MEASURE) for r in each[1])):
        cells = [named(name), learned(group),
                 second_derivative(group), ', '.join(str(r.case.seed) for r in group),
                 *(accuracy(group, attack) for attack in ('clean', 'pgd-50', MEASURE))]
        if name == BASE or not len(compared[name].pairs):
            rows.append((*cells, '', '', '', ''))
            continue
        pairs, low, high, p = compared[name]
        least, most = bootstrap(pairs)
        rows.append((*cells, gain(pairs), *(
            ('', '') if math.isnan(low) else (f'{low:+.1f} to {high:+.1f}', f'{p:.2g}')),
            f'{least:+.1f} to {most:+.1f}'))
    later = {name: float(found.pairs.mean()) for name, found in comparisons(later_rows(groups)).items()
             if len(found.pairs)}
    n = next(iter(groups.values()))[0].evaluation['n']
    twice = [name for name, found in compared.items() if 2 * found.p < 0.05]
    looks = '' if all(len(found.pairs) <= FIRST_LOOK for found in compared.values()) else (
        f' That part 1 was looked at with {FIRST_LOOK} seeds before is not in p; doubled for it, p is below 0.05 of '
        f'{"; ".join(map(named, twice)) or "no row"}.')
    return markdown(
        ('activation', 'learned', 'largest second derivative', 'seeds', 'Clean %', 'PGD-50 %', f'{label(MEASURE)} %',
         f'{label(MEASURE)} minus ReLU', 't over seeds', 'p (Holm)', 'bootstrap'), rows) + (
        f'\n\nMean over the seeds (least to most) on the first {n:,} test images, accuracies rounded down; differences '
        'in points between networks with the same seed on the same images. *t over seeds*: the 95 % interval of '
        "Student's t over the seeds' differences, and its p after Holm's correction over the rows; both need two "
        'seeds. *bootstrap*: of seeds and images, which with so few seeds is too narrow and decides nothing. '
        f'{machine_time([r for group in groups.values() for r in group])}\n\n{claim(compared, later)}{looks}'
        f'{beside_plain(groups)}')


def beside_plain(groups: Mapping[str, Sequence[Record]]) -> str:
    """Returns a paragraph on the rows that learn beside the one that does not; '' where no two seeds have both."""
    said = []
    for name in sorted(groups.keys() - {BASE, PLAIN}):
        if len(pairs := differences(groups[name], groups.get(PLAIN, ()))) > 1:
            low, high, p = interval_of_seeds(pairs)
            said.append(f'{named(name)} {gain(pairs)}, t {low:+.1f} to {high:+.1f}, p {p:.2g}')
    return '' if not said else ('\n\nBeside SiLU, which learns nothing, with the seeds that both have and without a '
                                f'correction: {"; ".join(said)}.')


def gain(pairs: NDArray[np.float64]) -> str:
    """Returns the difference to the base in points: the mean, the least and the most over the seeds."""
    return f'{pairs.mean():+.1f}{ends(pairs.mean(1), "+.1f")}'


def claim(compared: Mapping[str, Comparison], later: Mapping[str, float]) -> str:
    """Returns what the intervals over the seeds and the second thousand images allow to claim, in a few sentences.

    Args:
        compared: the rows.
        later: the mean difference on the second thousand, of the rows that were attacked on it.
    """
    if all(len(found.pairs) < 2 for found in compared.values()):
        return 'No row has two seeds beside those of ReLU yet, so there is no claim.'
    shown = {name: float(found.pairs.mean()) for name, found in compared.items() if found.p < 0.05}
    said = {
        'More robust than ReLU, beyond what seeds do and on the second thousand images': [
            name for name, more in shown.items() if more > 0 and later.get(name, 0) > 0],
        'Less robust than ReLU, beyond what seeds do and on the second thousand images': [
            name for name, more in shown.items() if more < 0 and later.get(name, 0) < 0],
        'Beyond what seeds do, and otherwise on the second thousand images, so there is no claim': [
            name for name in shown if name in later and shown[name] * later[name] <= 0],
        'Beyond what seeds do, and not attacked on the second thousand images, so there is no claim': [
            name for name in shown if name not in later],
        'Undecided, over a point from ReLU but not beyond what seeds do after the correction': [
            name for name, found in compared.items()
            if name not in shown and len(found.pairs) > 1 and abs(found.pairs.mean()) > 1]}
    return ' '.join(f'{how}: {"; ".join(map(named, names))}.' for how, names in said.items() if names) or (
        'No row is shown to differ from ReLU, so there is no claim.')


def later_rows(groups: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """Returns those of the networks that were attacked on the second thousand, with that evaluation; the base is there.

    Raises:
        ValueError: if an evaluation there is of no network of part 1 or of other weights, or not made as the others.
    """
    found: dict[str, list[Record]] = {BASE: []}
    left = set((LATER / GROUP).rglob(RECORDS[-1]))  # those of part 5 stand beside it
    for name, group in groups.items():
        for record in group:
            if (path := LATER / record.case.name / RECORDS[-1]) not in left:
                continue
            left.remove(path)
            later = copy.copy(record)
            later.evaluation = finished(path)
            if later.evaluation['weights_sha256'] != record.evaluation['weights_sha256']:
                raise ValueError(f'{path} is of other weights than those of {record.case.name}')
            found.setdefault(name, []).append(later)
    if left:
        raise ValueError(f'{min(left)} is of no network of part 1; expected a name such as {GROUP}{BASE}_s0')
    every = [record.evaluation for group in found.values() for record in group]
    if unlike := sorted({key for each in every for key in attacked_otherwise(every[0], each)}):
        raise ValueError(f'{LATER} has evaluations with other {", ".join(unlike)}; expected the same of all')
    return found


def later_table() -> str:
    """Returns the table of the networks that were attacked on a second thousand of the test images."""
    groups = later_rows(rows_of_test())
    every = [record for group in groups.values() for record in group]
    if not every:
        return 'No network is attacked on them yet.'
    gains = {name: gain(found.pairs) for name, found in comparisons(groups).items() if len(found.pairs)}
    rows = [(named(name), ', '.join(str(r.case.seed) for r in group),
             *(accuracy(group, attack) for attack in ('clean', 'pgd-50', MEASURE)), gains.get(name, ''))
            for name, group in groups.items() if group]
    return markdown(('activation', 'seeds', 'Clean %', 'PGD-50 %', f'{label(MEASURE)} %',
                     f'{label(MEASURE)} minus ReLU'), rows) + (
        f'\n\nOf {in_words(every[0].evaluation["images"])}. {machine_time(every, ("attacks",))}')


def convergence_points() -> list[tuple[str, float, float, float]]:
    """Returns for each network its activation, curvature and output at -1 at the end, and accuracy in percent."""
    return [(r.act, round(r.curvature, 4), round(r.at_minus_one, 4), round(r.accuracy(MEASURE), 2))
            for r in records_of(CONVERGENCE) if not r.case.network.startswith(STRONGEST)]
