"""Pictures of what a network learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import whole_file

__all__ = ['plot_activations', 'plot_masking']


def plot_activations(activations: dict[str, nn.Module], path: str | Path, span: float = 4.0) -> None:
    """Save a picture of activations over [-span, span], ReLU among them, as PNG.

    Args:
        activations: by the name in the legend.
        path: of the picture.
        span: of the horizontal axis.

    Raises:
        ModuleNotFoundError: without matplotlib (``pip install 'timm-paf[train]'``).
    """
    from matplotlib.figure import Figure

    x = torch.linspace(-span, span, 801)
    figure = Figure(figsize=(6, 4), dpi=120, layout='constrained')
    axes = figure.subplots()
    axes.axhline(0, color='0.85', linewidth=1)
    axes.axvline(0, color='0.85', linewidth=1)
    for name, activation in {**activations, 'ReLU': nn.ReLU()}.items():
        with torch.no_grad():
            y = activation.cpu()(x)
        axes.plot(x, y, '--' if name == 'ReLU' else '-', label=name)
    axes.set_xlabel('x')
    axes.set_ylabel('f(x)')
    axes.legend()
    with whole_file(path) as part:
        figure.savefig(part, format='png')


def plot_masking(report: dict[str, Any], norm: str, path: str | Path) -> None:
    """Save a picture of accuracy against eps and against steps, as PNG.

    Args:
        report: as `timm_paf.masking.masking_report` makes it.
        norm: of eps.
        path: of the picture.

    Raises:
        ModuleNotFoundError: without matplotlib (``pip install 'timm-paf[train]'``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot([100 * value for _, value in report['eps']], 'o-')
    usual, accuracy = report['eps'][2]
    left.plot([2], [100 * accuracy], 'o', color='C3', label=f'the threat model, eps {usual}')
    left.set_xticks(range(len(report['eps'])), [eps for eps, _ in report['eps']], rotation=30)
    left.set_xlabel(f'{norm} eps (PGD-20)')
    left.set_ylabel(f'accuracy on {report["n"]} images (%)')
    right.plot(*zip(*((count, 100 * value) for count, value in report['steps'])), 'o-', label='one random start')
    restarts, value = report['restarts'][-1]
    right.plot([20], [100 * value], 's', color='C1', label=f'{restarts} random starts')
    if report['transfer'] is not None:
        right.axhline(100 * report['transfer'], linestyle='--', color='C2', label='made on another network')
    right.set_xscale('log')
    counts = [count for count, _ in report['steps']]
    right.set_xticks(counts, [str(count) for count in counts])
    right.minorticks_off()
    right.set_xlabel(f'PGD steps at eps {usual}')
    for axes in (left, right):
        axes.set_ylim(-2, 102)
        axes.grid(color='0.9')
        axes.legend()
    title = 'No sign of gradient masking' if report['passed'] else 'Signs of gradient masking'
    figure.suptitle(f'{title} ({norm})')
    with whole_file(path) as part:
        figure.savefig(part, format='png')
