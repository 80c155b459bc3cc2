"""What makes a whole program faster: compiling where it pays, for batches of any size, and memory that is reused."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    'AnyBatch', 'HalfPrecision', 'emulates_bfloat16', 'forward_flops', 'has_bfloat16_units', 'keep_memory',
    'pays_to_compile', 'to_channels_last']

WORTH = 900
"""Seconds of uncompiled work from which on compiling is the default: it takes up to a minute and saves 7 to 16 % of an
attack step (tests/benchmarks/results/cpu.json: PSSiLU against PSSiLU compiled)."""


def to_channels_last(model: nn.Module) -> nn.Module:
    """Returns a network with its weights and buffers of four dimensions in channels_last; it is changed in place.

    ``model.to(memory_format=torch.channels_last)`` gives the same, but fails where there is a weight of five, of a
    ``Conv3d``; torch's ``convert_conv2d_weight_memory_format`` leaves buffers and other weights out.
    """
    for value in (*model.parameters(), *model.buffers()):
        if value.ndim == 4:
            value.data = value.data.to(memory_format=torch.channels_last)
    return model


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Returns the floating-point operations of one forward pass, two for each multiplication with its addition."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def pays_to_compile(flops: float, device: torch.device) -> bool:
    """Returns whether work is worth compiling, by the rough rate at which a device runs it uncompiled.

    Args:
        flops: floating-point operations of the whole work.
        device: where the work runs.
    """
    rate = 5e10 * torch.get_num_threads() if device.type == 'cpu' else 2e13
    return flops / rate > WORTH


def has_bfloat16_units(device: torch.device, cpu_flags: Collection[str] | None = None) -> bool:
    """Returns whether a device multiplies bfloat16 in units of its own, where autocast is faster than float32.

    Args:
        device: where the work runs; another one than a GPU of CUDA or a CPU counts as having none.
        cpu_flags: the CPU's flags by Linux's names; default: those of /proc/cpuinfo, none where that does not exist.
    """
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if cpu_flags is None:
        with contextlib.suppress(OSError):
            cpu_flags = Path('/proc/cpuinfo').read_text().split()
    return device.type == 'cpu' and not {'avx512_bf16', 'amx_bf16'}.isdisjoint(cpu_flags or ())


def emulates_bfloat16(device: torch.device) -> bool:
    """Returns whether autocast to bfloat16 is slower than float32 on a device: 20 times on a CPU without AVX-512.

    Args:
        device: where the work runs; of another one than a GPU of CUDA or a CPU that is not known, so not said.
    """
    if device.type == 'cuda':
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)  # none in a torch without oneDNN
    return device.type == 'cpu' and supported is not None and not supported()


class AnyBatch(nn.Module):
    """A network in eval mode, compiled for every batch size: once with gradients of the images and once without.

    It takes images of any memory format. A batch of one is run as two images, because torch.compile would make a
    program of its own for it.
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
    """A network under bfloat16 autocast, with images and logits in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.model(x).float()


def keep_memory() -> None:
    """Lets this process keep the CPU memory that it frees for its next tensors; it never holds more than its peak.

    glibc otherwise gives large blocks back at once and gets them again page by page (for the cost compare cpu.json with
    cpu_keep_memory.json in tests/benchmarks/results). With another C library the function does nothing.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: give back only from 2 GiB of free memory on
