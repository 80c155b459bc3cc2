"""Pictures of what a network learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attacks import parse_fraction
from .files import whole_file

__all__ = ['plot_activations', 'plot_eps', 'plot_masking', 'plot_shapes']


def plot_activations(
        activations: dict[str, nn.Module], path: str | Path, span: float = 4.0, source: str | None = None) -> None:
    """Save a picture of activations over [-span, span], ReLU among them, as PNG.

    Args:
        activations: by the name in the legend.
        path: of the picture.
        span: of the horizontal axis.
        source: the numbers that it was drawn from, kept in the file as its description.

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
        style: dict[str, Any] = {'color': 'black', 'linestyle': '--'} if name == 'ReLU' else {}
        axes.plot(x, y, label=name, **style)
    axes.set_xlabel('x')
    axes.set_ylabel('f(x)')
    axes.legend(fontsize='small' if len(activations) < 6 else 'x-small')
    _save(figure, path, source)


def plot_eps(curves: dict[str, list[tuple[str, float]]], path: str | Path, source: str | None = None) -> None:
    """Save a picture of accuracy against eps, as PNG.

    Args:
        curves: by the name in the legend: (eps such as '8/255', accuracy in percent), in order.
        path: of the picture.
        source: the numbers that it was drawn from, kept in the file as its description.

    Raises:
        ModuleNotFoundError: without matplotlib (``pip install 'timm-paf[train]'``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout='constrained')
    axes = figure.subplots()
    ticks = {eps: float(parse_fraction(eps)) for points in curves.values() for eps, _ in points}
    for name, points in curves.items():
        axes.plot([ticks[eps] for eps, _ in points], [accuracy for _, accuracy in points], 'o-', label=name)
    axes.set_xticks(list(ticks.values()), list(ticks))
    axes.set_xlabel('eps')
    axes.set_ylabel('accuracy (%)')
    axes.set_ylim(bottom=0)
    axes.grid(color='0.9')
    axes.legend()
    _save(figure, path, source)


def plot_shapes(points: list[tuple[str, float, float, float]], path: str | Path, source: str | None = None) -> None:
    """Save a picture of accuracy against an activation's curvature and against its output on negative inputs, as PNG.

    Args:
        points: (activation, largest second derivative, output at -1, accuracy in percent); an infinite derivative is
            drawn at the right edge, as a kink.
        path: of the picture.
        source: the numbers that it was drawn from, kept in the file as its description.

    Raises:
        ModuleNotFoundError: without matplotlib (``pip install 'timm-paf[train]'``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    finite = [curvature for _, curvature, *_ in points if math.isfinite(curvature)]
    edge = 2 * max(finite, default=1.0)
    for i, act in enumerate(dict.fromkeys(act for act, *_ in points)):
        chosen = [point[1:] for point in points if point[0] == act]
        style = {'color': f'C{i % 10}', 'marker': 'os^D'[i % 4], 'linestyle': 'none', 'label': act}
        left.plot([min(curvature, edge) for curvature, *_ in chosen], [point[2] for point in chosen], **style)
        right.plot([at for _, at, _ in chosen], [point[2] for point in chosen], **style)
    left.set_xscale('log')
    left.axvline(edge / 2 ** 0.5, color='0.8', linestyle='--')
    left.text(edge, 0.02, 'kink', transform=left.get_xaxis_transform(), ha='center')
    left.set_xlabel('largest second derivative')
    left.set_ylabel('accuracy under attack (%)')
    right.set_xlabel('output at -1')
    right.legend(fontsize='x-small')
    for axes in (left, right):
        axes.grid(color='0.9')
    _save(figure, path, source)


def _save(figure: Any, path: str | Path, source: str | None = None) -> None:
    with whole_file(path) as part:
        figure.savefig(part, format='png', metadata={} if source is None else {'Description': source})


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
    _save(figure, path)
