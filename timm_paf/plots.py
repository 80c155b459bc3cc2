"""Pictures of what a network learned."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .files import whole_file

__all__ = ['plot_activations']


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
