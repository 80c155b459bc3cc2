"""GPU hours of the recipes for CIFAR, computed from the training speed that one H200 had in bf16.

    python tests/benchmarks/hours.py

Time is images times passes through the network, forward or back with respect to images or weights, of which PGD-10
training has 23, times the arithmetic of the network beside one that was measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch

import timm_paf  # noqa: F401  registers the networks
from timm_paf.files import read_json
from timm_paf.objectives import OBJECTIVES
from timm_paf.speed import forward_flops
from timm_paf.training.config import parse, shipped_recipes

TRAIN_IMAGES = 50_000
RESULT = Path(__file__).resolve().parent / 'results' / 'H200.json'


def passes(config: Any) -> int:
    """Passes per image of a step: attack, objective, AWP, and the extra pass of clean images."""
    objective = OBJECTIVES[config.objective]
    attack = 2 * (1 if objective.one_step else config.attack_steps) + (objective.attack_loss == 'kl')
    loss = 6 if objective.sees_clean else 3
    return attack + loss * (2 if config.awp else 1) + (config.clean_pass != 'none')


def images(config: Any) -> int:
    """Images of a run, generated ones too."""
    share = float(config.synthetic.rpartition(':')[2]) if config.synthetic else 0.0
    real = config.batch_size - round(config.batch_size * share)
    steps, rest = divmod(TRAIN_IMAGES - config.val, real)
    made = config.batch_size - real
    return config.epochs * (steps * config.batch_size + (0 if config.drop_last or not rest else rest + made))


def flops(model: str) -> float:
    with torch.device('meta'):
        return forward_flops(timm.create_model(model).eval(), torch.zeros(1, 3, 32, 32, device='meta'))


def speed_in_bf16(rows: list[dict[str, Any]], name: str) -> float:
    """Images per second of our compiled PGD-10 training in bf16, in the rows of a record of bench.py.

    Raises:
        ValueError: if the record has none in bf16.
    """
    found = {row['case']: row.get('images_per_second') for row in rows
             if row['what'].startswith(f'training step PGD-10, {name},')}
    # Where bench.py compared bf16 at all it once had our training in bf16 alone, without saying so in its name.
    case = 'Trainer compiled bf16' if 'Trainer compiled bf16' in found else (
        'Trainer compiled' if "paper's loop bf16" in found else None)
    if case is None or found.get(case) is None:
        raise ValueError(f'no training of {name} in bf16 is in the record; expected that of bench.py on a GPU')
    return float(found[case])


def hours(record: Path = RESULT) -> dict[str, float]:
    """GPU hours by recipe."""
    rows = read_json(record)['rows']
    speed = {name: speed_in_bf16(rows, name) for name in ('resnet18', 'wrn28_10')}
    found = {}
    for name in shipped_recipes():
        config = parse(['--config', name, '--output', 'x'])
        if config.dataset != 'cifar10' or config.init == 'pretrained' or name.startswith(('cpu_', 'study_')):
            continue
        like = 'resnet18' if 'resnet18' in config.model else 'wrn28_10'
        work = flops(config.model) / flops(f'{like}_{config.model.rpartition("_")[2]}')
        found[name] = images(config) * passes(config) / 23 * work / speed[like] / 3600
    return found


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0]).parse_args()
    for recipe, value in hours().items():
        print(f'{recipe}: {value:.2g}')


if __name__ == '__main__':
    main()
