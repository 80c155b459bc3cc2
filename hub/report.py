"""The tables and pictures of README.md, the pages of hub/results and timm_paf/weights/README.md, from the records.

    python -m hub.report           # after an evaluation or a study
    python -m hub.report --check   # says what is not as the records have it, and changes nothing

The records are those of hub/models and hub/results. No number is typed: what stands between
``<!-- hub.report: NAME -->`` and ``<!-- end -->`` is replaced as a whole, and a picture carries the numbers that it was
drawn from (delete it to have it drawn anew).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open

from timm_paf.activations import create_paf, list_pafs
from timm_paf.attacks import parse_fraction
from timm_paf.files import atomic_write, read_json
from timm_paf.plots import plot_activations, plot_corruptions, plot_eps, plot_shapes
from timm_paf.second_derivative import curvature

from .cli import Parser, one_line
from .evaluation_tables import CORRUPTED, corruptions_of_networks, norms_of_networks
from .leaderboard import Result, of_package
from .quickstart import EMBEDDED
from .study.convergence import (
    BASE,
    CONVERGENCE,
    MEASURE,
    PLAIN,
    comparisons,
    convergence_points,
    convergence_table,
    differences,
    interval_of_seeds,
    later_table,
    rows_of_test,
)
from .study.one_epoch import activations, correlations, records, settings, shape_points, shape_table, study_table
from .study.pilots import pilots_table, recipes_table
from .study.records import RESULTS, finished, in_effect
from .study.tables import difference, named
from .twins import LATER, Twins, bundle_of_embedded, strongest, twins
from .weights_tables import refused_table, weights_table, zoo_tables
from .wording import down, label, markdown, plural

EPS = RESULTS / 'eps'
PAGES = (Path('README.md'), RESULTS / 'README.md', CONVERGENCE / 'README.md', Path('timm_paf/weights/README.md'))
PUBLISHED = ('Dai2021Parameterizing', 'Addepalli2022Efficient_RN18', 'Andriushchenko2020Understanding', 'Wong2020Fast')
"""The paper's network, and ResNet-18s without extra data: the best, and two that were trained with one step."""
LEGEND = {'pssilu': 'PSSiLU', 'pssilu_free': 'PSSiLU without its penalty', 'psilu_curvature8': 'PSiLU from curvature 8',
          'silu': 'SiLU'}
"""The rows of part 1 of the study at convergence, as prose names them."""
_BEGIN, _END = re.compile(r'<!--\s*hub\.report:\s*(\w+)\s*-->'), '<!-- end -->'


# ---- tables


def embedded() -> str:
    """Returns the text on what was measured of the network in the package, and how it was made."""
    bundle = bundle_of_embedded()
    run, found = read_json(bundle / 'run.json'), read_json(bundle / 'evaluation.json')
    recipe, threat = run['recipe'], found['threat_model']
    measured = ', '.join(f'{label(name)} {100 * result["accuracy"]:.1f} %' for name, result in found['attacks'].items())
    hardware, weights = run['hardware'], run['weights']
    kind = 'averaged weights' if weights['of'] != 'model' else 'weights'
    parameters = learned(bundle)
    values = ' and '.join(f'{name} = {value:.2g}' for name, value in parameters.items())
    largest = curvature(create_paf('pssilu', **parameters))
    return (f'{size_of(EMBEDDED):,} parameters, {recipe["epochs"]} epochs of {recipe["objective"]} with '
            f'{plural(recipe["threat"]["steps"], "step")} in {run["seconds"] / 60:.0f} minutes ({hardware["cpu"]}, '
            f'{plural(hardware["threads"], "thread")}), seed {recipe["seed"]}, {kind} of epoch {weights["epoch"] + 1}, '
            f'chosen by {weights["chosen_by"]}: **{measured}** of the first {found["n"]:,} test images, '
            f'{threat["norm"]} {threat["eps"]}. It learned {values}, so its largest second '
            f'derivative is {largest:.2g}.')


def size_of(model: str) -> int:
    """Returns the number of parameters of a model by its name."""
    return sum(p.numel() for p in timm.create_model(model, device='meta').parameters())


def board() -> list[Result]:
    """Returns the published results that stand beside ours, from the installed RobustBench's table.

    Raises:
        ValueError: if the table lacks one of them.
    """
    found = {result.name: result for result in of_package(('cifar10', 'Linf'))}
    if set(PUBLISHED) - found.keys():
        raise ValueError(f'the installed robustbench has no {", ".join(sorted(set(PUBLISHED) - found.keys()))}')
    return [found[name] for name in PUBLISHED]


def results() -> str:
    """Returns one sentence on the network in the package, beside what others have published without extra data."""
    bundle = bundle_of_embedded()
    run, found = read_json(bundle / 'run.json'), read_json(bundle / 'evaluation.json')
    others = sorted(result.robust for result in board()[1:])
    return (f'`{EMBEDDED}` ({size_of(EMBEDDED) / 1e6:.2f} M parameters, trained in {run["seconds"] / 60:.0f} minutes '
            f'with {plural(run["hardware"]["threads"], "thread")} of a CPU) has '
            f'{down(100 * found["attacks"]["autoattack"]["accuracy"]):.1f} % AutoAttack accuracy on the first '
            f'{found["n"]:,} test images; full-size ResNet-18s without extra data that RobustBench lists have '
            f'{others[0]:.2f} to {others[-1]:.2f} % on all 10,000.')


def claim() -> str:
    """Returns what our own networks, in the study and the twins of 30 epochs, say of the paper's claim."""
    groups = activations()

    def of_one_epoch(attack: str) -> str:
        words = [f'{legend} {re.sub(r" [(].*?[)]", "", difference(groups[variant], groups["relu"], attack))}'
                 for variant, legend in (('pssilu', 'PSSiLU'), ('psoftplus', 'PSoftplus'))]
        return f'{" and ".join(words)} points under {label(attack)}'

    epochs, seeds = records()[0].run['recipe']['epochs'], len(groups['pssilu'])
    rows = rows_of_test()
    compared = comparisons(rows)
    middle = '; '.join(f'{LEGEND.get(name, named(name))} {difference(rows[name], rows[BASE], MEASURE)}, '
                       f'{plural(len(compared[name].pairs), "seed")}, p {compared[name].p:.2g}'
                       for name in sorted(compared, key=lambda name: -compared[name].pairs.mean()))
    against_plain = interval_of_seeds(differences(rows['pssilu'], rows[PLAIN]))[2]
    found, later = Twins(), Twins(LATER)
    (ours, theirs), (gained, lost, p) = found.accuracies('autoattack'), found.mcnemar('autoattack')
    more, only = later.accuracies('apgd'), later.mcnemar('apgd')
    return (f'- **{plural(epochs, "epoch")}** of a narrow ResNet-18, {seeds} seeds, difference to ReLU (± twice the '
            f'standard error over images): {of_one_epoch("pgd-50")}; {of_one_epoch("apgd")}.\n'
            f'- **{plural(rows[BASE][0].run["recipe"]["epochs"], "epoch")}** of one twice as wide '
            f'([study](hub/results/convergence/README.md)), the same difference under {label(MEASURE)}, p over the '
            f"seeds after Holm's correction: {middle}. Beside SiLU, which learns nothing, PSSiLU has "
            f'{difference(rows["pssilu"], rows[PLAIN], MEASURE)} (p {against_plain:.2g}).\n'
            f'- **{plural(found.epochs, "epoch")}** of `{EMBEDDED}` and of its twin with ReLU, one seed each: '
            f'{ours:.1f} and {theirs:.1f} % AutoAttack accuracy on the {found.images}. PSSiLU '
            f'alone is right on {gained} of them, ReLU alone on {lost} (McNemar p = {p:.1g} over images). Under '
            f'{label("apgd")} on {later.images}: {more[0]:.1f} and {more[1]:.1f} %, PSSiLU alone right on {only[0]}, '
            f'ReLU alone on {only[1]} (p = {only[2]:.1g}).')


def published() -> str:
    """Returns the table of what others have published."""
    rows = [(found.name, found.architecture, f'{found.clean:.2f}', f'{found.robust:.2f}') for found in board()]
    return markdown(('published by others (RobustBench), not measured here', 'network', 'clean %', 'AutoAttack %'),
                    rows)


BLOCKS: dict[str, Callable[[], str]] = {
    'claim': claim, 'weights': weights_table, 'results': results, 'embedded': embedded, 'published': published,
    'twins': twins, 'settings': settings, 'study': study_table, 'shapes': shape_table, 'correlations': correlations,
    'convergence': convergence_table, 'later': later_table, 'strongest': strongest,
    'corruptions': corruptions_of_networks, 'norms': norms_of_networks, 'pilots': pilots_table,
    'recipes': recipes_table, 'zoo': zoo_tables, 'refused': refused_table}


def blocks_of(text: str, page: Path) -> tuple[str, list[tuple[str, str]]]:
    """Returns what a text begins with, and its blocks: the name of each, and what stands behind it.

    Raises:
        ValueError: if a mark is unknown, or has no end of its own.
    """
    first, *pieces = _BEGIN.split(text)
    blocks = []
    for name, after in zip(pieces[::2], pieces[1::2]):
        if name not in BLOCKS or after.count(_END) != 1:
            raise ValueError(f'{page}: the mark of {name!r} is unknown or not followed by its own {_END}; expected '
                             f'one of {", ".join(BLOCKS)}')
        blocks.append((name, after.partition(_END)[2]))
    return first, blocks


# ---- pictures


def eps_curves() -> dict[str, list[tuple[str, float]]]:
    """Returns for every network that was attacked at several eps: name -> (eps, accuracy in percent), clean at 0.

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
    """Returns alpha and beta of the weights in a bundle of a PSSiLU network."""
    with safe_open(bundle / 'model.safetensors', framework='pt') as file:
        return in_effect('pssilu', {name: file.get_tensor(f'act.{name}').item() for name in ('alpha', 'beta')})


def learned_shapes() -> dict[str, tuple[str, dict[str, float]]]:
    """Returns by title the activation and what it learned: in the package's network, and in the study with seed 0."""
    groups = activations()
    found = [('pssilu', EMBEDDED, learned(bundle_of_embedded()))]
    found += [(act, act, r.learned) for act in list_pafs() for r in groups[act] if r.case.seed == 0 and r.learned]
    return {f'{name}: {", ".join(f"{key} {value:.2g}" for key, value in values.items())}': (act, values)
            for act, name, values in found}


def draw_activations(found: dict[str, tuple[str, dict[str, float]]], path: Path, source: str) -> None:
    """Draws the shapes that `learned_shapes` found."""
    plot_activations({name: create_paf(act, **values) for name, (act, values) in found.items()}, path, source=source)


def embedded_corrupted() -> dict[str, Any]:
    """Returns the section of the record of the package's network under common corruptions, with its clean accuracy."""
    found = finished(CORRUPTED / EMBEDDED / 'evaluation.json')
    return {**found['corruptions'], 'clean': found['attacks']['clean']['accuracy']}


def draw_corruptions(found: dict[str, Any], path: Path, source: str) -> None:
    """Draws what `embedded_corrupted` found."""
    plot_corruptions(found, found['clean'], path, source=source)


PICTURES: dict[str, tuple[Callable[[], Any], Callable[..., None]]] = {
    'activations.png': (learned_shapes, draw_activations), 'eps.png': (eps_curves, plot_eps),
    'shapes.png': (shape_points, plot_shapes), 'convergence.png': (convergence_points, plot_shapes),
    'corruptions.png': (embedded_corrupted, draw_corruptions)}


def drawn_from(picture: Path) -> str | None:
    """Returns the numbers that a picture was drawn from, None without it."""
    from PIL import Image

    if not picture.is_file():
        return None
    with Image.open(picture) as opened:
        return opened.info.get('Description')


def run(check: bool) -> list[Path]:
    """Writes what is stale, or with ``check`` only finds it; returns the files.

    Raises:
        ValueError, OSError: if a page, a mark or a record is missing or damaged.
    """
    texts = {page: page.read_text(encoding='utf-8') for page in PAGES}
    pages = {page: blocks_of(text, page) for page, text in texts.items()}
    missing = BLOCKS.keys() - {name for _, blocks in pages.values() for name, _ in blocks}
    if missing:
        raise ValueError(f'{" and ".join(map(str, PAGES))} have no mark of {", ".join(sorted(missing))}')
    news = {page: first + ''.join(f'<!-- hub.report: {name} -->\n{BLOCKS[name]()}\n{_END}{rest}'
                                  for name, rest in blocks) for page, (first, blocks) in pages.items()}
    stale = [page for page, new in news.items() if new != texts[page]]
    for page in () if check else stale:
        with atomic_write(page) as part:
            part.write_text(news[page], encoding='utf-8')
    for name, (numbers, draw) in PICTURES.items():
        path, found = RESULTS / name, numbers()
        source = json.dumps(found)
        if drawn_from(path) != source:
            stale.append(path)
            if not check:
                draw(found, path, source=source)
    return stale


def main(args: Sequence[str] | None = None, prog: str = 'hub.report') -> None:
    """Runs the program."""
    parser = Parser(prog=prog, description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--check', action=argparse.BooleanOptionalAction, default=False,
                        help='change nothing; exit 1 if something is not up to date')
    check = parser.parse_args(args).check
    with one_line(prog):
        stale = run(check)
    for path in stale:
        print(f'{path} is not what the records say; run python -m hub.report' if check else f'{path} written')
    if check and stale:
        sys.exit(1)


if __name__ == '__main__':
    main()
