"""The tables of named weights, for README.md and timm_paf/weights/README.md."""

from __future__ import annotations

from pathlib import Path

import timm_paf
from timm_paf.files import read_json
from timm_paf.weights.zoo import Weights, list_weights, weights_of

from .wording import down, markdown

ZOO = Path(timm_paf.__file__).parent / 'weights' / 'robustbench.json'
BEST = 2


def name_of(weights: Weights) -> str:
    """Returns the name that is enough for ``timm.create_model``: of default weights that of the model alone."""
    return weights.model if weights == weights_of(weights.model)[0] else weights.name


def accuracy(weights: Weights, attack: str) -> str:
    """Returns an accuracy with the number of images where it was measured here, or with who measured it."""
    # Published accuracies are of all images of the board and have two digits.
    found = [f'{down(m.accuracy):.1f} (n = {m.images:,})' if weights.bundle else f'{m.accuracy:.2f} ({m.by})'
             for m in weights.measured if m.attack == attack]
    return '; '.join(found) or 'not measured'


def where(weights: Weights) -> str:
    """Returns a link to the weights."""
    if weights.bundle is None:
        return f'[{weights.robustbench or "download"}]({weights.location})'
    link = f'hub/models/{weights.bundle.name}'
    return f'[bundle]({link}), {(weights.size or 0) / 1e6:.1f} MB, [record]({link}/evaluation.json)'


def table(rows: list[Weights], attack: str = 'autoattack', title: str = 'AutoAttack %') -> str:
    """Returns the table of these weights."""
    return markdown(
        ('name', 'trained on', 'threat model', 'clean %', title, 'where'),
        [(f'`{name_of(w)}`', w.training_data, f'{w.norm} {w.eps}'.strip(), accuracy(w, 'clean'), accuracy(w, attack),
          where(w)) for w in rows])


def robust(weights: Weights) -> float:
    """Returns the AutoAttack accuracy in percent, 0 where there is none."""
    return max((m.accuracy for m in weights.measured if m.attack == 'autoattack'), default=0.0)


def weights_table() -> str:
    """Returns the table of README.md: the weights in the package, the paper's, and the best of CIFAR-10, Linf."""
    board = [w for w in list_weights() if not w.bundle and (w.dataset, w.norm) == ('cifar10', 'Linf')]
    best = sorted(board, key=robust, reverse=True)[:BEST]
    return table([w for w in list_weights() if w.bundle or w in best or w.source == 'dai2021'])


def zoo_tables() -> str:
    """Returns a table of each board."""
    parts = []
    for dataset in ('cifar10', 'cifar100', 'imagenet'):
        for norm in ('Linf', 'L2', 'corruptions'):
            rows = [w for w in list_weights() if not w.bundle and (w.dataset, w.norm) == (dataset, norm)]
            if rows:
                column = ('corruptions', 'corruptions %') if norm == 'corruptions' else ('autoattack', 'AutoAttack %')
                parts.append(f'### {dataset}, {norm}\n\n{table(rows, *column)}')
    return '\n\n'.join(parts)


def refused_table() -> str:
    """Returns the table of the entries that no network here computes."""
    return markdown(('entry', 'board', 'why it has no name here'), [
        (row['name'], f'{row["dataset"]} {row["threat"]}', row['reason']) for row in read_json(ZOO)['refused']])
