"""Pictures of what a network learned."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .activations import ChannelPAF
from .attacks import parse_fraction
from .data.corrupted import KINDS, SEVERITIES
from .files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    'FEW', 'activations_figure', 'plot_activations', 'plot_corruptions', 'plot_eps', 'plot_evidence', 'plot_masking',
    'plot_shapes',
]

FEW = 4
"""Activations whose curves can still be told apart in the same axes."""


def activations_figure(activations: dict[str, nn.Module], span: float = 4.0) -> Figure:
    """Returns the figure that `plot_activations` saves.

    Args:
        activations: by name; up to four share one pair of axes, more get a small panel each, all on the same scale. Of
            one with a value per channel it is the mean over the channels, with their range shaded.
        span: of the horizontal axis, from -span to span.

    Raises:
        ModuleNotFoundError: without matplotlib (``pip install 'timm-paf[train]'``).
    """
    from matplotlib.figure import Figure

    x = torch.linspace(-span, span, 801)
    with torch.no_grad():  # of copies: the networks that they are of stay on their device
        curves = {name: _values(copy.deepcopy(activation).cpu(), x) for name, activation in activations.items()}
    curves['ReLU'] = x.relu()[:, None]
    few = len(curves) - 1 <= FEW
    figure = Figure(figsize=(6, 4), dpi=120, layout='constrained') if few else Figure(dpi=120, layout='constrained')
    (_one_panel if few else _panels)(figure, x, curves)
    return figure


def _values(activation: nn.Module, x: Tensor) -> Tensor:
    """Returns the values (points, channels) of an activation, with one channel where all have the same."""
    channels = len(getattr(activation, next(iter(activation.init)))) if isinstance(activation, ChannelPAF) else 1
    return activation(x[:, None].expand(-1, channels))


def _one_panel(figure: Figure, x: Tensor, curves: dict[str, Tensor]) -> None:
    """Draws all curves into the same axes, with a legend."""
    axes = figure.subplots()
    _cross(axes)
    for name, y in curves.items():
        style: dict[str, Any] = {'color': 'black', 'linestyle': '--'} if name == 'ReLU' else {}
        axes.plot(x, y.mean(1), label=name, **style)
        if y.shape[1] > 1:
            axes.fill_between(x, y.amin(1), y.amax(1), alpha=0.2, linewidth=0)
    axes.set_xlabel('x')
    axes.set_ylabel('f(x)')
    axes.legend(fontsize='small')


def _panels(figure: Figure, x: Tensor, curves: dict[str, Tensor]) -> None:
    """Draws a panel for each curve, with ReLU dashed and the area between the two shaded."""
    relu = curves['ReLU'][:, 0]
    others = {name: y for name, y in curves.items() if name != 'ReLU'}
    columns = 3 if len(others) <= 6 else 4
    rows = math.ceil(len(others) / columns)
    figure.set_size_inches(7, 0.6 + 1.75 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    span = x[-1].item()
    grid[0, 0].set_xticks([-span, -span / 2, 0, span / 2, span])  # of all, since they share it
    for i, axes in enumerate(grid.flat):
        if i >= len(others):
            axes.remove()
        elif i + columns >= len(others):  # the lowest of its column
            axes.tick_params(labelbottom=True)
    for axes, (name, y) in zip(grid.flat, others.items()):
        _cross(axes)
        low, high = (y.amin(1), y.amax(1)) if y.shape[1] > 1 else (y[:, 0], relu)
        axes.fill_between(x, low, high, color='C0', alpha=0.2, linewidth=0)
        line, = axes.plot(x, y.mean(1), color='C0', label=name)
        dashes, = axes.plot(x, relu, color='black', linestyle='--', linewidth=1, label='ReLU')
        lines = [textwrap.fill(line, 26) for line in name.split(': ', 1)]
        axes.set_title('\n'.join(lines), fontsize=7.5)
        axes.tick_params(labelsize=7.5)
    figure.legend([line, dashes], ['activation f', 'ReLU'], loc='outside upper right', ncols=2, fontsize=8)
    figure.supxlabel('x', fontsize=9)
    figure.supylabel('f(x)', fontsize=9)


def _cross(axes: Any) -> None:
    axes.axhline(0, color='0.85', linewidth=1)
    axes.axvline(0, color='0.85', linewidth=1)


def plot_activations(
        activations: dict[str, nn.Module], path: str | Path, span: float = 4.0, source: str | None = None) -> None:
    """Saves a picture of activations over [-span, span] beside ReLU, as PNG.

    Up to four are drawn in the same axes; more get a small panel each.

    Args:
        activations: by the name in the legend, or for panels in the title, which has what follows ': ' in a line of
            its own.
        path: of the picture.
        span: of the horizontal axis.
        source: the numbers that it was drawn from, kept in the file as its description.

    Raises:
        TypeError: if ``activations`` is no mapping.
        ModuleNotFoundError: without matplotlib (``pip install 'timm-paf[train]'``).
    """
    if not hasattr(activations, 'items'):
        raise TypeError(f'activations is a {type(activations).__name__}; expected a dict of them by name, such as '
                        "{'learned': model.act}")
    _save(activations_figure(activations, span), path, source)


def plot_eps(curves: dict[str, list[tuple[str, float]]], path: str | Path, source: str | None = None) -> None:
    """Saves a picture of accuracy against eps, as PNG.

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
    """Saves a picture of accuracy against an activation's curvature and against its output on negative inputs, as PNG.

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
    least = math.floor(math.log2(min(finite, default=1.0)))
    ticks = [2.0 ** power for power in range(least, math.ceil(math.log2(edge))) if 2.0 ** power < edge / 1.5]
    left.set_xticks([*ticks, edge], [*(f'{tick:g}' for tick in ticks), 'kink'])
    left.minorticks_off()
    left.set_xlabel('largest second derivative')
    left.set_ylabel('accuracy under attack (%)')
    right.set_xlabel('output at -1')
    right.legend(fontsize='x-small')
    for axes in (left, right):
        axes.grid(color='0.9')
    _save(figure, path, source)


def _save(figure: Any, path: str | Path, source: str | None = None) -> None:
    with atomic_write(path) as part:
        figure.savefig(part, format='png', metadata={} if source is None else {'Description': source})


def plot_masking(report: dict[str, Any], norm: str, path: str | Path) -> None:
    """Saves a picture of accuracy against eps and against steps, as PNG.

    Args:
        report: as `timm_paf.evaluation.masking.masking_report` makes it.
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
    if report['bpda'] is not None:
        right.plot([20], [100 * report['bpda']], 'v', color='C4', label='the identity for flat operations')
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
    title = report['verdict'].partition(':')[0]
    figure.suptitle(f'{title[0].upper()}{title[1:]} ({norm})')
    _save(figure, path)


def plot_corruptions(
        section: dict[str, Any], clean: float | None, path: str | Path, source: str | None = None) -> None:
    """Saves a picture of accuracy against severity, with a panel for each kind of corruption, as PNG.

    Args:
        section: as `timm_paf.evaluation.corruptions.CorruptionEvaluation.result` makes it.
        clean: accuracy without a corruption, drawn as severity 0; None where it is not known.
        path: of the picture.
        source: the numbers that it was drawn from, kept in the file as its description.

    Raises:
        ModuleNotFoundError: without matplotlib (``pip install 'timm-paf[train]'``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), dpi=120, layout='constrained')
    panels = figure.subplots(1, len(KINDS), sharex=True, sharey=True)
    start = {} if clean is None else {0: 100 * clean}
    for axes, (kind, names) in zip(panels, KINDS.items()):
        for name in names:
            points = {**start, **{severity: 100 * section['by'][name][severity - 1] for severity in SEVERITIES}}
            axes.plot([*points], [*points.values()], 'o-', label=name.replace('_', ' '))
        axes.set_title(kind, fontsize='medium')
        axes.set_xlabel('severity')
        axes.set_xticks([*start, *SEVERITIES])
        axes.set_ylim(-2, 102)
        axes.grid(color='0.9')
        axes.legend(fontsize='x-small', loc='lower left')
    panels[0].set_ylabel(f'accuracy on {section["n"]} images (%)')
    figure.suptitle(f'Common corruptions: {section["accuracy"]:.1%}'
                    f'{", on generated images" if section["generated"] else ""}')
    _save(figure, path, source)


def plot_evidence(
        clean: Tensor, adversarial: Tensor, said: Sequence[str], fooled: Sequence[str], threat: str, path: str | Path,
) -> None:
    """Saves a picture of test images, of their adversarial twins, and of ten times the difference, as PNG.

    Args:
        clean: (k, channels, height, width) float32 in [0, 1], with 1 or 3 channels.
        adversarial: like ``clean``.
        said: what the network says of each clean image.
        fooled: what it says of each adversarial one.
        threat: norm and eps in words.
        path: of the picture.

    Raises:
        ModuleNotFoundError: without matplotlib (``pip install 'timm-paf[train]'``).
    """
    from matplotlib.figure import Figure

    k = len(clean)
    figure = Figure(figsize=(1.15 * k + 1, 4.4), dpi=120, layout='constrained')
    rows = figure.subplots(3, k, squeeze=False)
    difference = (0.5 + 10 * (adversarial - clean)).clamp(0, 1)
    for images, axes, words, name in (
            (clean, rows[0], said, 'test image'), (adversarial, rows[1], fooled, 'adversarial'),
            (difference, rows[2], [''] * k, 'difference x 10')):
        for image, axis, word in zip(images, axes, words, strict=True):
            axis.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation='nearest')
            axis.set_title(word, fontsize=9)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, fontsize=9)
    figure.suptitle(f'What the network says of each ({threat})', fontsize=10)
    _save(figure, path)
