"""How close to ReLU a PAF network with its weights starts: ``python tests/benchmarks/relu_start.py --output JSON``.

For every PAF, relative to ReLU: the activation on [-4, 4], and the logits of resnet18 with the ImageNet stem and random
weights (He et al. 2015), on images of noise. Without ``--output`` it prints alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor

import timm_paf
from timm_paf.models.resnet_imagenet import weights_from_timm
from timm_paf.starts import STARTS

ALPHAS = (1.0, 10.0, 100.0, 1000.0)


def difference(found: Tensor, expected: Tensor) -> dict[str, float]:
    error = (found - expected).abs()
    return {'max': error.max().item(), 'mean': error.mean().item()}


@torch.no_grad()
def measure(images: int = 4, size: int = 224, seed: int = 0) -> list[dict[str, object]]:
    """A row for every PAF with its start, and for other alphas where no alpha makes it ReLU."""
    torch.manual_seed(seed)
    state = timm.create_model('resnet18', zero_init_last=False).state_dict()
    batch = torch.rand(images, 3, size, size)
    relu = timm.create_model('resnet18_in_relu')
    relu.load_state_dict(weights_from_timm(state, relu))
    # in training mode: BatchNorm takes this batch's statistics, those of a network without training are no one's
    logits = relu.train()(batch)
    x = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    rows = []
    for name in timm_paf.list_pafs():
        start = STARTS['relu'].get(name, {})
        for values in [{'alpha': alpha} for alpha in ALPHAS] if start.get('alpha') == 100 else [{}]:
            model = timm.create_model(f'resnet18_in_{name}', act_kwargs=values)
            model.load_state_dict(weights_from_timm(state, model))
            act = model.act.double()(x)
            found = model.float().train()(batch)
            scaled = difference(found / logits.std(), logits / logits.std())
            rows.append({
                'activation': name, 'values': {key: value.item() for key, value in model.act.state_dict().items()},
                'start': values in ({}, {'alpha': 100.0}), 'activation_difference': difference(act, x.relu()),
                'logits_difference': scaled,
                'same_class': (found.argmax(1) == logits.argmax(1)).float().mean().item()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--output', type=Path, help='write the rows there, as JSON')
    output = parser.parse_args().output
    rows = measure()
    for row in rows:
        print(*row.values())
    if output:
        output.write_text(json.dumps({
            'command': 'python tests/benchmarks/relu_start.py', 'seed': 0, 'images': 4, 'size': 224,
            'logits_difference_in': "standard deviations of the ReLU network's logits",
            'versions': {'python': sys.version.split()[0], 'torch': torch.__version__, 'timm': timm.__version__,
                         'timm_paf': timm_paf.__version__}, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
