"""Makes the tables of the study and the points of its pictures from its records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

import torch
from scipy.stats import spearmanr

from timm_paf.files import read_json
from timm_paf.objectives import ONE_STEP

from ..wording import down, ends, label, markdown, plural
from .records import (
    ATTACK,
    RESULTS,
    Record,
    activations,
    by_seed,
    finished,
    fixed_shapes,
    grouped,
    last_line,
    parameters,
    records,
)

PILOTS = RESULTS.with_name('pilots')
RECIPES = RESULTS.with_name('recipes')
RECIPE_ARMS = {'pgd': '', 'pgd_ema_ls': 'pgd', 'n_fgsm': 'pgd', 'trades': 'pgd', 'ikl': 'trades'}
"""The arms of the pilot of recipes, and what each is compared with."""


def named(variant: str) -> str:
    """Returns the name of a variant for the tables."""
    return variant.replace('_free', ', no penalty')


def second_derivative(found: Sequence[Record]) -> str:
    """Returns the largest second derivative of the activation: mean, least and most over the seeds."""
    values = [r.curvature for r in found]
    return 'kink' if math.inf in values else f'{mean(values):.2g}{ends(sorted(set(values)), ".2g")}'


def accuracy(found: Sequence[Record], attack: str) -> str:
    """Returns the accuracy in percent: mean, least and most over the seeds."""
    values = [v.mean().item() for v in by_seed(found, attack).values()]
    return f'{down(mean(values)):.1f}{ends(values)}' if values else ''


def difference(found: Sequence[Record], relu: Sequence[Record], attack: str) -> str:
    """Returns the difference to ReLU by seed, in points: over seeds, ± twice the standard error over the images."""
    return '' if found is relu else paired(by_seed(found, attack), by_seed(relu, attack))


def paired(found: dict[int, torch.Tensor], base: dict[int, torch.Tensor]) -> str:
    """Returns the difference of verdicts by seed, in points: over seeds, ± twice the standard error over the images."""
    pairs = [v - base[seed] for seed, v in found.items() if seed in base]
    if not pairs:
        return ''
    images = torch.stack(pairs).mean(0)
    seeds = [p.mean().item() for p in pairs]
    error = images.std().item() / math.sqrt(len(images))
    return f'{mean(seeds):+.1f}{ends(seeds, "+.1f")} ± {2 * error:.1f}'


def compared(found: Sequence[Record], base: str) -> str:
    """Returns the table of a study's networks, in its order, each beside the base with the same seed.

    A difference is only of the same images and threat model; what networks were attacked on is said where it differs.
    """
    groups = grouped(found)
    attacks = list(dict.fromkeys(name for r in found for name in r.evaluation['attacks']))
    relative = [attack for attack in attacks if attack != 'clean' and base in groups]
    of_base = {r.case.seed: r.attacked_on for r in groups.get(base, ())}
    various = len({r.attacked_on for r in found}) > 1
    rows = []
    for network, group in groups.items():
        alike = network != base and all(of_base.get(r.case.seed, r.attacked_on) == r.attacked_on for r in group)
        rows.append((
            network, ', '.join(str(r.case.seed) for r in group), f'{mean(r.minutes for r in group):.1f}',
            *(['; '.join(dict.fromkeys(r.attacked_on[0] for r in group))] if various else ()),
            *(accuracy(group, attack) for attack in attacks),
            *(difference(group, groups[base], attack) if alike else '' for attack in relative)))
    return markdown(
        ('network', 'seeds', 'minutes', *(['attacked on'] if various else ()), *(f'{label(a)} %' for a in attacks),
         *(f'{label(attack)} minus {base}' for attack in relative)), rows)


def study_table() -> str:
    """Returns the table of every activation, the most robust first, and how to read it."""
    groups = activations()
    attacks = list(dict.fromkeys(name for group in groups.values() for r in group for name in r.evaluation['attacks']))
    rows = []
    for variant, group in groups.items():
        values = {name: [r.learned[name] for r in group] for name in group[0].learned}
        learned = ', '.join(f'{name} {mean(found):.2g}{ends(found, ".2g")}' for name, found in values.items())
        rows.append((mean(r.robust for r in group), (
            named(variant), str(parameters(group[0].act)), learned, second_derivative(group), str(len(group)),
            *(accuracy(group, attack) for attack in attacks),
            *(difference(group, groups['relu'], attack) for attack in attacks[1:]))))
    lines = markdown(('activation', 'parameters', 'learned', 'largest second derivative', 'seeds',
                      *(f'{label(attack)} %' for attack in attacks),
                      *(f'{label(attack)} minus ReLU' for attack in attacks[1:])),
                     [row for _, row in sorted(rows, reverse=True)])
    said = []
    for attack in attacks:
        seeds = {variant: ', '.join(map(str, sorted(by_seed(group, attack)))) for variant, group in groups.items()}
        sets = {found: [named(variant) for variant in seeds if seeds[variant] == found] for found in seeds.values()}
        usual = max(sets, key=lambda found: len(sets[found]))
        said.append(f'{label(attack)}: seed {usual}' + ''.join(
            f' ({found} of {", ".join(variants)})' for found, variants in sets.items() if found != usual))
    return (f'{lines}\n\nMean over the seeds (least to most), accuracies rounded down. Differences are in points, on '
            'the same images between networks with the same seed, ± twice the standard error over the images, which '
            f'knows nothing of other seeds. {"; ".join(said)}.')


def shape_table() -> str:
    """Returns the table of every fixed shape, the most robust first."""
    found = sorted(fixed_shapes(), key=lambda each: -each[0].robust)
    relu = [r for r, *_ in found if r.case.network == 'relu']
    return markdown(
        ('shape', 'largest second derivative', 'output at -1', 'Clean %', 'PGD-50 %', 'PGD-50 minus ReLU'),
        [(r.case.network.replace('_', ' '), 'kink' if math.isinf(curvature) else f'{curvature:.2f}', f'{at:+.3f}',
          accuracy([r], 'clean'), accuracy([r], ATTACK), difference([r], relu, ATTACK) if r not in relu else '')
         for r, curvature, at in found])


def correlations() -> str:
    """Returns Spearman's rank correlation of the accuracy under PGD-50 with each property of the shape."""
    found = [(curvature, at, r.robust) for r, curvature, at in fixed_shapes()]
    lines = []
    for what, pairs in (
            ('the largest second derivative, smooth shapes', [(c, a) for c, _, a in found if math.isfinite(c)]),
            ('the output at -1, smooth shapes', [(at, a) for c, at, a in found if math.isfinite(c)]),
            ('the output at -1, shapes with a kink', [(at, a) for c, at, a in found if math.isinf(c)])):
        rank = f'{spearmanr(*zip(*pairs)).statistic:+.2f}' if len(pairs) > 2 else ''
        lines.append((what, str(len(pairs)), rank))
    return markdown(('PGD-50 accuracy and', 'networks', 'rank correlation'), lines)


def pilots_table() -> str:
    """Returns the table of what was tried before the embedded network was trained, on held-out training images."""
    rows = []
    for path in PILOTS.glob('*/run.json'):
        run, last = read_json(path), last_line(path.with_name('metrics.jsonl'))
        recipe = run['recipe']
        steps = '' if recipe['objective'] in ONE_STEP else f', {plural(recipe["threat"]["steps"], "step")}'
        rows.append((last['val_adv_accuracy'], (
            run['architecture'], f'{recipe["objective"]}{steps}', f'{run["seconds"] / 60:.1f}',
            f'{run["steps"] * recipe["batch_size"]:,}', f'{recipe["val"]:,}',
            *(f'{down(100 * last[f"val_{kind}_accuracy"]):.1f}' for kind in ('clean', 'adv')))))
    return markdown(('network', 'objective', 'minutes', 'images trained on', 'images held out', 'clean %',
                     'under attack %'), [row for _, row in sorted(rows, reverse=True)])


def recipes_table() -> str:
    """Returns the table of the pilot of recipes, each arm beside the one that its protocol compares it with."""
    arms: dict[str, dict[str, dict[int, torch.Tensor]]] = {name: {} for name in RECIPE_ARMS}
    minutes: dict[str, list[float]] = {name: [] for name in RECIPE_ARMS}
    for path in sorted(RECIPES.glob('*/evaluation.json')):
        arm, _, seed = path.parent.name.rpartition('_s')
        minutes[arm].append(read_json(path.with_name('run.json'))['seconds'] / 60)
        for attack, result in finished(path)['attacks'].items():
            verdicts = torch.tensor([100 * int(c) for c in result['verdicts']], dtype=torch.float64)
            arms[arm].setdefault(attack, {})[int(seed)] = verdicts
    attacks = list(dict.fromkeys(attack for found in arms.values() for attack in found))
    rows = [(arm, ', '.join(map(str, sorted(found['clean']))), f'{mean(minutes[arm]):.0f}',
             *(f'{down(mean(v.mean().item() for v in found[a].values())):.1f}' if a in found else '' for a in attacks),
             f'{base}: {paired(found["pgd-50"], arms[base]["pgd-50"])}' if base and arms[base] else '')
            for arm, base in RECIPE_ARMS.items() if (found := arms[arm])]
    if not rows:
        return 'No arm of it is evaluated yet.'
    return markdown(('arm', 'seeds', 'minutes', *(f'{label(attack)} %' for attack in attacks), 'PGD-50 minus'), rows)


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


def shape_points() -> list[tuple[str, float, float, float]]:
    """Returns for each fixed shape its activation, curvature, output at -1 and accuracy under PGD-50 in percent."""
    return [(r.act, round(curvature, 4), round(at, 4), round(r.robust, 2)) for r, curvature, at in fixed_shapes()]
