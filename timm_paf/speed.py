"""What makes a whole program faster: when to compile, for batches of any size, and memory that is used again."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['AnyBatch', 'HalfPrecision', 'forward_flops', 'keep_memory', 'pays_to_compile']

WORTH = 900
"""Seconds of work, not compiled, from which on compiling is the default: it takes up to a minute and saves 7 to 16 % of
an attack step (tests/benchmarks/results/cpu.json: PSSiLU against PSSiLU compiled)."""


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


class HalfPrecision(nn.Module):
    """A network under bfloat16 autocast: images and logits are float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.model(x).float()


def keep_memory() -> None:
    """Let this process keep on the CPU what it frees, for its next tensors; it ends up with no more than its peak.

    glibc gives large blocks back at once and gets them again page by page (what that costs: cpu.json against
    cpu_keep_memory.json in tests/benchmarks/results). Does nothing with another C library.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: give back only from 2 GiB of free memory on
