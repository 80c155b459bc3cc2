"""The study of one epoch: its records, its tables, and the points of its picture."""

from __future__ import annotations

import math
from statistics import mean

from scipy.stats import spearmanr

from ..wording import label, markdown
from .cases import FILE
from .records import RESULTS, Record, attacks_of, grouped, parameters, records_of, shape
from .tables import accuracy, difference, learned, named, second_derivative, seeds_in_words

STUDY = RESULTS / 'study'
ATTACK = 'pgd-50'
"""The attack on every network of it."""


def records() -> list[Record]:
    """Returns the record of every network of the study of one epoch that is complete.

    Raises:
        ValueError: if there are no records, none with ReLU, or they were not all made in the same way.
    """
    found = records_of(STUDY)
    if not any(record.case.name == 'relu_s0' for record in found):
        raise ValueError(f'{STUDY} has no relu_s0; run timm-paf study {STUDY / FILE} --keep {STUDY}')
    unlike = [record.case.name for record in found if record.shared != found[0].shared]
    if unlike:
        raise ValueError(f'{", ".join(unlike)} in {STUDY} were made in another way than {found[0].case.name}')
    return found


def activations() -> dict[str, list[Record]]:
    """Returns the records of networks with nothing fixed, by name, seed after seed."""
    return grouped([record for record in records() if not record.fixed])


def fixed_shapes() -> list[tuple[Record, float, float]]:
    """Returns the records with seed 0 and an activation that learned nothing, with its curvature and output at -1."""
    return [(r, *shape(r.act, **r.fixed)) for r in records() if r.case.seed == 0 and (r.fixed or not parameters(r.act))]


def settings() -> str:
    """Returns the settings that all networks of the study share."""
    found = records()
    first, minutes = found[0], [r.run['seconds'] / 60 for r in found]
    where = sorted({f'{r.run["hardware"]["cpu"]} with {r.run["hardware"]["threads"]} thread' for r in found})
    used = sorted({f'torch {r.run["versions"]["torch"]}, timm {r.run["versions"]["timm"]}' for r in found})
    threat = first.evaluation['threat_model']
    return (f'{len(found)} networks `resnet18_w8_<activation>`, each {first.run["steps"]:,} steps of '
            f'{first.run["recipe"]["batch_size"]} images in {min(minutes):.1f} to {max(minutes):.1f} minutes '
            f'({"; ".join(where)}); the first {first.evaluation["n"]:,} test images of CIFAR-10, '
            f'{threat["norm"]} {threat["eps"]}; {"; ".join(used)}.')


def study_table() -> str:
    """Returns the table of every activation, the most robust first, and how to read it."""
    groups = activations()
    attacks = attacks_of([r for group in groups.values() for r in group])
    rows = []
    for variant, group in groups.items():
        rows.append((mean(r.accuracy(ATTACK) for r in group), (
            named(variant), str(parameters(group[0].act)), learned(group), second_derivative(group), str(len(group)),
            *(accuracy(group, attack) for attack in attacks),
            *(difference(group, groups['relu'], attack) for attack in attacks[1:]))))
    lines = markdown(('activation', 'parameters', 'learned', 'largest second derivative', 'seeds',
                      *(f'{label(attack)} %' for attack in attacks),
                      *(f'{label(attack)} minus ReLU' for attack in attacks[1:])),
                     [row for _, row in sorted(rows, reverse=True)])
    return (f'{lines}\n\nMean over the seeds (least to most), accuracies rounded down. Differences are in points, on '
            'the same images between networks with the same seed, ± twice the standard error over the images, which '
            f'knows nothing of other seeds. {seeds_in_words(groups, attacks)}.')


def shape_table() -> str:
    """Returns the table of every fixed shape, the most robust first."""
    found = sorted(fixed_shapes(), key=lambda each: -each[0].accuracy(ATTACK))
    relu = [r for r, *_ in found if r.case.network == 'relu']
    return markdown(
        ('shape', 'largest second derivative', 'output at -1', 'Clean %', 'PGD-50 %', 'PGD-50 minus ReLU'),
        [(r.case.network.replace('_', ' '), 'kink' if math.isinf(curvature) else f'{curvature:.2f}', f'{at:+.3f}',
          accuracy([r], 'clean'), accuracy([r], ATTACK), difference([r], relu, ATTACK) if r not in relu else '')
         for r, curvature, at in found])


def correlations() -> str:
    """Returns Spearman's rank correlation of the accuracy under PGD-50 with each property of the shape."""
    found = [(curvature, at, r.accuracy(ATTACK)) for r, curvature, at in fixed_shapes()]
    lines = []
    for what, pairs in (
            ('the largest second derivative, smooth shapes', [(c, a) for c, _, a in found if math.isfinite(c)]),
            ('the output at -1, smooth shapes', [(at, a) for c, at, a in found if math.isfinite(c)]),
            ('the output at -1, shapes with a kink', [(at, a) for c, at, a in found if math.isinf(c)])):
        rank = f'{spearmanr(*zip(*pairs)).statistic:+.2f}' if len(pairs) > 2 else ''
        lines.append((what, str(len(pairs)), rank))
    return markdown(('PGD-50 accuracy and', 'networks', 'rank correlation'), lines)


def shape_points() -> list[tuple[str, float, float, float]]:
    """Returns for each fixed shape its activation, curvature, output at -1 and accuracy under PGD-50 in percent."""
    return [(r.act, round(curvature, 4), round(at, 4), round(r.accuracy(ATTACK), 2))
            for r, curvature, at in fixed_shapes()]
