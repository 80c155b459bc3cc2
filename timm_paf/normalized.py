"""A normalisation of the input inside of any network, so that images stay in [0, 1] and eps means the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .activation_sites import weights_like

__all__ = ['normalize_input']


class _Normalize(nn.Module):
    """(x - mean) / std by channel; both are saved with the weights, which are of another network without them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], like: Tensor) -> None:
        super().__init__()
        for name, values in (('mean', mean), ('std', std)):
            value = torch.tensor(values, dtype=torch.float32, device='cpu').view(-1, 1, 1).to(like)
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _normalize(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return model.normalize(args[0]), *args[1:]  # type: ignore[operator]


def normalize_input(model: nn.Module, normalize: Sequence[Sequence[float]]) -> None:
    """Makes a network normalise its input itself, in place: timm's networks expect images that are normalised.

    The network gets a module ``normalize``, and a hook that runs it before ``forward``.

    Args:
        model: the network.
        normalize: mean and std, each with a number for each channel.

    Raises:
        ValueError: for anything else, or a network that has something else of that name.
    """
    if isinstance(normalize, str) or len(normalize) != 2 or len({len(values) for values in normalize}) != 1 \
            or not all(std > 0 for std in normalize[1]):
        raise ValueError(f'normalize is {normalize!r}; expected (mean, std) with as many numbers each, the second '
                         'positive')
    if hasattr(model, 'normalize'):
        raise ValueError(f'{type(model).__name__} has a normalize of its own; expected a network without')
    model.normalize = _Normalize(normalize[0], normalize[1], weights_like(model))
    model.register_forward_pre_hook(_normalize)
