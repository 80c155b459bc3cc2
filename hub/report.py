"""The README's tables of accuracies and its pictures, from the records in hub/models and hub/results.

    python -m hub.report           # after an evaluation or a study
    python -m hub.report --check   # says what is not as the records have it, and changes nothing

No number is typed: what stands between ``<!-- hub.report: NAME -->`` and ``<!-- end -->`` is replaced as a whole, and a
picture carries the numbers that it was drawn from (delete it to have it drawn anew).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import timm
import torch
from safetensors import safe_open

from timm_paf.activations import create_paf
from timm_paf.attacks import parse_fraction
from timm_paf.files import read_json, whole_file
from timm_paf.plots import plot_activations, plot_eps, plot_shapes
from timm_paf.zoo import list_weights, table, weights_of

from .card import label, plural
from .leaderboard import of_package
from .quickstart import EMBEDDED
from .study import ARCHITECTURE, RESULTS
from .study_records import (
    ATTACK,
    Record,
    activations,
    by_seed,
    finished,
    fixed_shapes,
    in_effect,
    last_line,
    parameters,
    records,
)

PILOTS, EPS = RESULTS.with_name('pilots'), RESULTS.with_name('eps')
PAGES = (Path('README.md'), RESULTS.with_name('README.md'))
PUBLISHED = ('Dai2021Parameterizing', 'Addepalli2022Efficient_RN18', 'Andriushchenko2020Understanding', 'Wong2020Fast')
"""The paper's network, and ResNet-18s without extra data: the best, and two that were trained with one step."""
_BEGIN, _END = re.compile(r'<!--\s*hub\.report:\s*(\w+)\s*-->'), '<!-- end -->'


# ---- tables


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f'| {" | ".join(row)} |' for row in (header, *rows)]
    return '\n'.join([lines[0], '|---' * len(header) + '|', *lines[1:]])


def named(variant: str) -> str:
    return variant.replace('_free', ', no penalty')


def down(percent: float) -> float:
    """No accuracy is rounded up."""
    return math.floor(10 * percent + 1e-6) / 10


def ends(values: Sequence[float], form: str = '.1f') -> str:
    """Least and most, where there are several."""
    return f' ({min(values):{form}} to {max(values):{form}})' if len(values) > 1 else ''


def accuracy(found: Sequence[Record], attack: str) -> str:
    """In percent: mean, least and most over the seeds."""
    values = [v.mean().item() for v in by_seed(found, attack).values()]
    return f'{down(mean(values)):.1f}{ends(values)}' if values else ''


def difference(found: Sequence[Record], relu: Sequence[Record], attack: str) -> str:
    """To ReLU with the same seed, in points: over the seeds, and ± twice the standard error over the images."""
    base = by_seed(relu, attack)
    pairs = [v - base[seed] for seed, v in by_seed(found, attack).items() if seed in base]
    if not pairs or found is relu:
        return ''
    images = torch.stack(pairs).mean(0)
    seeds = [p.mean().item() for p in pairs]
    error = images.std().item() / math.sqrt(len(images))
    return f'{mean(seeds):+.1f}{ends(seeds, "+.1f")} ± {2 * error:.1f}'


def study_table() -> str:
    """Every activation, the most robust first, and how to read the table."""
    groups = activations()
    attacks = list(dict.fromkeys(name for group in groups.values() for r in group for name in r.evaluation['attacks']))
    rows = []
    for variant, group in groups.items():
        values = {name: [r.learned[name] for r in group] for name in group[0].learned}
        learned = ', '.join(f'{name} {mean(found):.2g}{ends(found, ".2g")}' for name, found in values.items())
        rows.append((mean(r.robust for r in group), (
            named(variant), str(parameters(group[0].case.act)), learned, str(len(group)),
            *(accuracy(group, attack) for attack in attacks),
            *(difference(group, groups['relu'], attack) for attack in attacks[1:]))))
    lines = markdown(('activation', 'parameters', 'learned', 'seeds', *(f'{label(attack)} %' for attack in attacks),
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
    """Every shape that stays, the most robust first."""
    found = sorted(fixed_shapes(), key=lambda each: -each[0].robust)
    relu = [r for r, *_ in found if r.case.variant == 'relu']
    return markdown(
        ('shape', 'largest second derivative', 'output at -1', 'Clean %', 'PGD-50 %', 'PGD-50 minus ReLU'),
        [(r.case.variant.replace('_', ' '), 'kink' if math.isinf(curvature) else f'{curvature:.2f}', f'{at:+.3f}',
          accuracy([r], 'clean'), accuracy([r], ATTACK), difference([r], relu, ATTACK) if r not in relu else '')
         for r, curvature, at in found])


def correlations() -> str:
    """Spearman's rank correlation of the accuracy under PGD-50 with each property of the shape."""
    from scipy.stats import spearmanr

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
    """What was tried before the embedded network was trained, on held-out training images."""
    rows = []
    for path in PILOTS.glob('*/run.json'):
        run, last = read_json(path), last_line(path.with_name('metrics.jsonl'))
        recipe = run['recipe']
        steps = '' if recipe['objective'] == 'fgsm-rs' else f', {plural(recipe["threat"]["steps"], "step")}'
        rows.append((last['val_adv_accuracy'], (
            run['architecture'], f'{recipe["objective"]}{steps}', f'{run["seconds"] / 60:.1f}',
            f'{run["steps"] * recipe["batch_size"]:,}', f'{recipe["val"]:,}',
            *(f'{down(100 * last[f"val_{kind}_accuracy"]):.1f}' for kind in ('clean', 'adv')))))
    return markdown(('network', 'objective', 'minutes', 'images trained on', 'images held out', 'clean %',
                     'under attack %'), [row for _, row in sorted(rows, reverse=True)])


def settings() -> str:
    """What all networks of the study share."""
    found = records()
    first, minutes = found[0], [r.run['seconds'] / 60 for r in found]
    where = sorted({f'{r.run["hardware"]["cpu"]} with {r.run["hardware"]["threads"]} thread' for r in found})
    used = sorted({f'torch {r.run["versions"]["torch"]}, timm {r.run["versions"]["timm"]}' for r in found})
    threat = first.evaluation['threat_model']
    return (f'{len(found)} networks `{ARCHITECTURE}_<activation>`, each {first.run["steps"]:,} steps of '
            f'{first.run["recipe"]["batch_size"]} images in {min(minutes):.1f} to {max(minutes):.1f} minutes '
            f'({"; ".join(where)}); the first {first.evaluation["n"]:,} test images of CIFAR-10, '
            f'{threat["norm"]} {threat["eps"]}; {"; ".join(used)}.')


def embedded() -> str:
    """What was measured of the network that comes along, and how it was made."""
    bundle = next((w.bundle for w in weights_of(EMBEDDED) if w.bundle), None)
    if bundle is None:
        raise ValueError(f'hub/models has no {EMBEDDED}')
    run, found = read_json(bundle / 'run.json'), read_json(bundle / 'evaluation.json')
    recipe, threat = run['recipe'], found['threat_model']
    size = sum(p.numel() for p in timm.create_model(EMBEDDED, device='meta').parameters())
    measured = ', '.join(f'{label(name)} {100 * result["accuracy"]:.1f} %' for name, result in found['attacks'].items())
    hardware, weights = run['hardware'], run['weights']
    kind = 'averaged weights' if weights['of'] == 'ema' else 'weights'
    values = ' and '.join(f'{name} = {value:.2g}' for name, value in learned(bundle).items())
    return (f'{size:,} parameters, {recipe["epochs"]} epochs of {recipe["objective"]} with {recipe["threat"]["steps"]} '
            f'steps in {run["seconds"] / 60:.0f} minutes ({hardware["cpu"]}, {hardware["threads"]} thread), '
            f'seed {recipe["seed"]}, {kind} of epoch {weights["epoch"] + 1}, chosen by '
            f'{weights["chosen_by"]}: **{measured}** of the first {found["n"]:,} test images, {threat["norm"]} '
            f'{threat["eps"]}. It learned {values}.')


def published() -> str:
    """What others have published beside ours, of the installed RobustBench's table."""
    board = {result.name: result for result in of_package(('cifar10', 'Linf'))}
    if set(PUBLISHED) - board.keys():
        raise ValueError(f'the installed robustbench has no {", ".join(sorted(set(PUBLISHED) - board.keys()))}')
    rows = [(name, found.architecture, f'{found.clean:.2f}', f'{found.robust:.2f}')
            for name in PUBLISHED for found in [board[name]]]
    return markdown(('published by others (RobustBench), not measured here', 'network', 'clean %', 'AutoAttack %'),
                    rows)


BLOCKS = {'weights': table, 'embedded': embedded, 'published': published, 'settings': settings, 'study': study_table,
          'shapes': shape_table, 'correlations': correlations, 'pilots': pilots_table}


def filled(text: str, page: Path) -> tuple[str, set[str]]:
    """The text with every block as the records have it, and the blocks that it has.

    Raises:
        ValueError: if a mark is unknown, or has no end of its own.
    """
    pieces, names = _BEGIN.split(text), set()
    for i in range(1, len(pieces), 2):
        name, (_, end, rest) = pieces[i], pieces[i + 1].partition(_END)
        if name not in BLOCKS or not end or _END in rest:
            raise ValueError(f'{page}: the mark of {name!r} is unknown or not followed by its own {_END}; expected '
                             f'one of {", ".join(BLOCKS)}')
        names.add(name)
        pieces[i], pieces[i + 1] = f'<!-- hub.report: {name} -->', f'\n{BLOCKS[name]()}\n{end}{rest}'
    return ''.join(pieces), names


# ---- pictures


def eps_curves() -> dict[str, list[tuple[str, float]]]:
    """Of every network that was attacked at several eps: name -> (eps, accuracy in percent), clean at 0.

    Raises:
        ValueError: if one has more than clean images and PGD-20 at several eps.
    """
    curves = {}
    for path in sorted(EPS.glob('*/evaluation.json')):
        points = []
        for attack, found in finished(path)['attacks'].items():
            name, _, eps = attack.partition('@')
            if (name, eps) != ('clean', '') and (name != 'pgd-20' or not eps):
                raise ValueError(f'{path} has {attack}; expected clean and pgd-20@EPS alone')
            points.append((eps or '0', round(100 * found['accuracy'], 2)))
        curves[path.parent.name] = sorted(points, key=lambda point: parse_fraction(point[0]))
    return curves


def learned(bundle: Path) -> dict[str, float]:
    """Alpha and beta of the weights in a bundle of a PSSiLU network."""
    with safe_open(bundle / 'model.safetensors', framework='pt') as file:
        return in_effect('pssilu', {name: file.get_tensor(f'act.{name}').item() for name in ('alpha', 'beta')})


def learned_shapes() -> dict[str, tuple[str, dict[str, float]]]:
    """Legend -> activation and what it learned: in the study with seed 0, and in the networks of hub/models."""
    found = [(r.case.act, named(r.case.variant), r.learned)
             for group in activations().values() for r in group if r.case.seed == 0 and r.learned]
    found += [('pssilu', weights.bundle.name, learned(weights.bundle))
              for weights in list_weights('*_pssilu.*') if weights.bundle]
    return {f'{name}: {", ".join(f"{key} {value:.2g}" for key, value in values.items())}': (act, values)
            for act, name, values in found}


def shape_points() -> list[tuple[str, float, float, float]]:
    return [(r.case.act, round(curvature, 4), round(at, 4), round(r.robust, 2)) for r, curvature, at in fixed_shapes()]


def draw_activations(found: dict[str, tuple[str, dict[str, float]]], path: Path, source: str) -> None:
    plot_activations({name: create_paf(act, **values) for name, (act, values) in found.items()}, path, source=source)


PICTURES = {'activations.png': (learned_shapes, draw_activations), 'eps.png': (eps_curves, plot_eps),
            'shapes.png': (shape_points, plot_shapes)}


def drawn_from(picture: Path) -> str | None:
    from PIL import Image

    if not picture.is_file():
        return None
    with Image.open(picture) as opened:
        return opened.info.get('Description')


def run(check: bool) -> list[Path]:
    """Write what is stale, or with ``check`` only find it.

    Raises:
        ValueError, OSError: if a page, a mark or a record is missing or damaged.
    """
    texts = {page: page.read_text(encoding='utf-8') for page in PAGES}
    news = {page: filled(text, page) for page, text in texts.items()}
    missing = BLOCKS.keys() - set().union(*(names for _, names in news.values()))
    if missing:
        raise ValueError(f'{" and ".join(map(str, PAGES))} have no mark of {", ".join(sorted(missing))}')
    stale = [page for page, (new, _) in news.items() if new != texts[page]]
    for page in () if check else stale:
        with whole_file(page) as part:
            part.write_text(news[page][0], encoding='utf-8')
    for name, (numbers, draw) in PICTURES.items():
        path, found = RESULTS.with_name(name), numbers()
        source = json.dumps(found)
        if drawn_from(path) != source:
            stale.append(path)
            if not check:
                draw(found, path, source=source)
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(prog='hub.report', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--check', action='store_true', help='change nothing; exit 1 if something is not up to date')
    check = parser.parse_args().check
    try:
        stale = run(check)
    except ModuleNotFoundError as error:
        sys.exit(f"hub.report: {error}; pip install 'timm-paf[train]'")
    except (ValueError, OSError) as error:
        if os.environ.get('TIMM_PAF_DEBUG'):
            raise
        sys.exit(f'hub.report: {error}')
    for path in stale:
        print(f'{path} is not what the records say; run python -m hub.report' if check else f'{path} written')
    if check and stale:
        sys.exit(1)


if __name__ == '__main__':
    main()
