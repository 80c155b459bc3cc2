"""When torch.compile is worth its time, and compiled networks for batches of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['AnyBatch', 'forward_flops', 'pays_to_compile']

WORTH = 300
"""Seconds of work, not compiled, from which on compiling is the default: it takes about a minute and saves about a
third (tests/benchmarks/results)."""


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Floating-point operations of one forward pass, two for each multiplication with its addition."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def pays_to_compile(flops: float, device: torch.device) -> bool:
    """Whether work of so many operations is worth compiling: by a rough rate of a device that runs it uncompiled."""
    rate = 5e10 * torch.get_num_threads() if device.type == 'cpu' else 2e13
    return flops / rate > WORTH


class AnyBatch(nn.Module):
    """A network in eval mode, compiled for every batch size: once with gradients of the images and once without.

    Images of any memory format; a batch of one goes as two, because torch.compile makes a program of its own for it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._program = torch.compile(model)

    def forward(self, x: Tensor) -> Tensor:
        count = len(x)
        x = (torch.cat([x, x]) if count == 1 else x).contiguous(memory_format=torch.channels_last)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return self._program(x)[:count]
