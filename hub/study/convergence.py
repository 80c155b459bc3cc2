"""The comparison of the study at convergence, as its protocol fixes it: hub/results/convergence/PROTOCOL.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

from ..chosen_images import in_words
from ..wording import down, ends, label, markdown
from .cases import RECORDS
from .records import RESULTS, Record, finished, grouped, records_of
from .tables import accuracy, learned, machine_time, named, pairs_of, second_derivative

CONVERGENCE = RESULTS / 'convergence'
MEASURE, GROUP, BASE = 'apgd', 'gpu/', 'relu'
"""The attack of the measure, the networks that are compared, and what with."""
LATER = CONVERGENCE / 'images_1000_1999'
"""The evaluations of some of these networks on a second thousand of the test images."""
COMPARISONS = 4
"""The other rows of part 1, which Holm's correction counts."""
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
    """Returns the 95 % interval of the mean difference over draws of seeds and of images, with seed 0."""
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


def comparisons() -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
    """Returns of each row of part 1 but the base its `differences`, and p over the seeds after Holm's correction."""
    groups = rows_of_test()
    pairs = {name: differences(group, groups[BASE]) for name, group in groups.items() if name != BASE}
    missing = [1.0] * (COMPARISONS - len(pairs))  # what is not there yet counts too
    return pairs, dict(zip(pairs, holm([*(_over_seeds(found)[2] for found in pairs.values()), *missing])))


def _over_seeds(pairs: NDArray[np.float64]) -> tuple[float, float, float]:
    return interval_of_seeds(pairs) if len(pairs) > 1 else (math.nan, math.nan, 1.0)


def convergence_table() -> str:
    """Returns the table of part 1: every row, its difference to ReLU, and what the protocol says of it."""
    groups, (pairs, corrected) = rows_of_test(), comparisons()
    rows = []
    for name, group in sorted(groups.items(), key=lambda each: -mean(r.accuracy(MEASURE) for r in each[1])):
        cells = [named(name), learned(group),
                 second_derivative(group), ', '.join(str(r.case.seed) for r in group),
                 *(accuracy(group, attack) for attack in ('clean', 'pgd-50', MEASURE))]
        if name == BASE or not len(pairs[name]):
            rows.append((*cells, '', '', '', ''))
            continue
        low, high = bootstrap(pairs[name])
        from_t, to_t, _ = _over_seeds(pairs[name])
        rows.append((*cells, f'{pairs[name].mean():+.1f}{ends(pairs[name].mean(1), "+.1f")}', *(
            ('', '') if math.isnan(from_t) else (f'{from_t:+.1f} to {to_t:+.1f}', f'{corrected[name]:.2g}')),
            f'{low:+.1f} to {high:+.1f}'))
    n = next(iter(groups.values()))[0].evaluation['n']
    return markdown(
        ('activation', 'learned', 'largest second derivative', 'seeds', 'Clean %', 'PGD-50 %', f'{label(MEASURE)} %',
         f'{label(MEASURE)} minus ReLU', 't over seeds', 'p (Holm)', 'bootstrap'), rows) + (
        f'\n\nMean over the seeds (least to most) on the first {n:,} test images, accuracies rounded down; differences '
        'in points between networks with the same seed on the same images. *t over seeds*: the 95 % interval of '
        "Student's t over the seeds' differences, and its p after Holm's correction over the rows; both need two "
        'seeds. *bootstrap*: of seeds and images, which with so few seeds is too narrow and decides nothing. '
        f'{machine_time([r for group in groups.values() for r in group])}\n\n{claim(corrected, pairs)}')


def claim(corrected: Mapping[str, float], pairs: Mapping[str, NDArray[np.float64]]) -> str:
    """Returns what the intervals over the seeds allow to claim, in a sentence or two.

    Args:
        corrected: p of each row after Holm's correction.
        pairs: its `differences`.
    """
    if all(len(found) < 2 for found in pairs.values()):
        return 'No row has two seeds beside those of ReLU yet, so there is no claim.'
    shown = {name: pairs[name].mean() > 0 for name, p in corrected.items() if p < 0.05}
    undecided = [named(name) for name, found in pairs.items()
                 if name not in shown and len(found) > 1 and abs(found.mean()) > 1]
    said = [f'{how}: {"; ".join(names)}.' for how, names in (
        ('More robust than ReLU, beyond what seeds do', [named(name) for name, more in shown.items() if more]),
        ('Less robust than ReLU, beyond what seeds do', [named(name) for name, more in shown.items() if not more]),
        ('Undecided, over a point from ReLU but not beyond what seeds do after the correction', undecided)) if names]
    return ' '.join([*said, *(['A claim waits for other images to agree.'] if shown else [])]) or (
        'No row is shown to differ from ReLU, so there is no claim.')


def later_table() -> str:
    """Returns the table of the networks that were attacked on a second thousand of the test images.

    Raises:
        ValueError: if an evaluation there is of other weights than that beside the training, or not of the same images.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in (record for group in rows_of_test().values() for record in group):
        if (path := LATER / record.case.name / RECORDS[-1]).is_file():
            evaluation = finished(path)
            if evaluation['weights_sha256'] != record.evaluation['weights_sha256']:
                raise ValueError(f'{path} is of other weights than those of {record.case.name}')
            found.setdefault(record.case.network.removeprefix(GROUP), {})[record.case.seed] = evaluation
    every = [evaluation for seeds in found.values() for evaluation in seeds.values()]
    if not every:
        return 'No network is attacked on them yet.'
    if len(images := {evaluation['images'] for evaluation in every}) > 1:
        raise ValueError(f'{LATER} has {", ".join(sorted(images))}; expected the same images of all')

    def correct(name: str, seed: int, attack: str) -> float:
        return 100 * float(found[name][seed]['attacks'][attack]['accuracy'])

    rows = []
    for name, seeds in found.items():
        each = {attack: [correct(name, seed, attack) for seed in seeds] for attack in ('clean', 'pgd-50', MEASURE)}
        gains = [correct(name, seed, MEASURE) - correct(BASE, seed, MEASURE)
                 for seed in seeds if name != BASE and seed in found.get(BASE, {})]
        rows.append((named(name), ', '.join(map(str, seeds)), *(
            f'{down(mean(values)):.1f}{ends(values)}' for values in each.values()),
            f'{mean(gains):+.1f}{ends(gains, "+.1f")}' if gains else ''))
    return markdown(('activation', 'seeds', 'Clean %', 'PGD-50 %', f'{label(MEASURE)} %',
                     f'{label(MEASURE)} minus ReLU'), rows) + f'\n\nOf {in_words(images.pop())}.'


def convergence_points() -> list[tuple[str, float, float, float]]:
    """Returns for each network its activation, curvature and output at -1 at the end, and accuracy in percent."""
    return [(r.act, round(r.curvature, 4), round(r.at_minus_one, 4), round(r.accuracy(MEASURE), 2))
            for r in records_of(CONVERGENCE)]
