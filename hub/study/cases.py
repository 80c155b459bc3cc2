"""The networks of the study: their activations, seeds and attacks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from timm_paf.activations import create_paf, list_pafs
from timm_paf.files import read_json
from timm_paf.second_derivative import curvature

RECIPE = Path('hub/recipes/study_resnet18_w8.yaml')
RESULTS = Path('hub/results/study')
ARCHITECTURE = 'resnet18_w8'
ACTIVATIONS = ('relu', 'elu', 'softplus', 'silu', *list_pafs())
"""Those that the paper compares."""
RECORDS = ('run.json', 'metrics.jsonl', 'evaluation.json')
SHAPES: dict[str, tuple[str, tuple[float, ...]]] = {
    'prelu': ('alpha', (-0.3, -0.1, 0.3)),
    'pelu': ('alpha', (-0.5, 0.5)),
    'psilu': ('alpha', (0.5, 4.0, 10.0)),
    'pssilu': ('beta', (0.1, 0.5)),
}
"""The parameter that the study of shapes fixes, and its values; ReLU, ELU, SiLU and SSiLU (beta 0.3) complete a row."""


@dataclass(frozen=True)
class Case:
    """One network of the study: an activation or a fixed shape, and a seed.

    A ``free`` network is trained without the paper's penalty on beta and the clipping of beta's gradient, which between
    them hold beta at 0.
    """

    act: str
    seed: int
    fixed: dict[str, float] = field(default_factory=dict)
    free: bool = False

    @property
    def variant(self) -> str:
        """The name without the seed."""
        return ''.join((self.act, *(f'_{key}{value:g}' for key, value in self.fixed.items()), '_free' * self.free))

    @property
    def name(self) -> str:
        return f'{self.variant}_s{self.seed}'

    @property
    def attacks(self) -> str:
        """The attacks on the network: APGD, which takes most of the time, only with one seed for most activations.

        PSoftplus and PSSiLU led ReLU with seed 0, so these three have APGD with every seed, to see whether that holds.
        """
        strong = self.variant in ('relu', 'psoftplus', 'pssilu') or (self.seed == 0 and not self.fixed)
        return 'clean,pgd-50' + (',apgd' if strong else '')

    def train(self) -> list[str]:
        """Returns the options for train_robust.py."""
        kwargs = {**self.fixed, 'frozen': True}
        return ['--config', str(RECIPE), '--model', f'{ARCHITECTURE}_{self.act}', '--seed', str(self.seed),
                *(['--act-kwargs', json.dumps(kwargs)] if self.fixed else []),
                *(['--paf-penalty', '0', '--paf-clip', '0'] if self.free else [])]


def cases(seeds: int) -> Iterator[Case]:
    """Yields all networks of the study, the most telling first: each activation once, the shapes, then other seeds."""
    for seed in range(seeds):
        yield from (Case(act, seed) for act in ACTIVATIONS)
        yield Case('pssilu', seed, free=True)
        if seed == 0:
            for act, (name, values) in SHAPES.items():
                yield from (Case(act, 0, {name: value}) for value in values)


def shape(act: str, **values: float) -> tuple[float, float]:
    """Returns an activation's largest second derivative (infinite at a kink), and its output at -1."""
    paf = create_paf(act, **values).double()
    return curvature(paf), paf(torch.tensor([-1.0], dtype=torch.float64)).item()


def complete(directory: Path, images: int, attacks: str) -> bool:
    """Returns whether all records of a network are there, whole, of as many images and of at least these attacks."""
    if not all((directory / name).is_file() for name in RECORDS):
        return False
    found = read_json(directory / 'evaluation.json')
    return found.get('complete', False) and found['n'] == images and set(attacks.split(',')) <= found['attacks'].keys()
