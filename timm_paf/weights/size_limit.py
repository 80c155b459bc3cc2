"""Bounds the network that a record describes by the file of weights that it is to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ['SizeLimit']

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
_ELEMENTWISE = ('add', 'sub', 'mul', 'div', 'truediv', 'radd', 'rsub', 'rmul', 'eq', 'ne')
_COMPUTED = 1 << 29  # elements; BEiT with 3,136 patches in 12 blocks has 354 million


class SizeLimit(TorchFunctionMode):
    """Makes no network of more than twice the parameters that a file has, and 67 million, before they take memory.

    A record of some hundred bytes can ask for terabytes, by sizes of which each is a usual one. Indices and masks of
    attention, which timm computes and no file has, may be 537 million elements in all, of up to 8 bytes. Counted is
    what timm's networks make their weights and these of (`_FACTORIES`, `_ELEMENTWISE`), not every operation of torch.

    Args:
        file: a safetensors file.

    Raises:
        ValueError: if the file is damaged, or where a larger network is made inside.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        try:
            with safe_open(file, framework='pt') as weights:
                keys = weights.keys()
                self.elements = sum(math.prod(weights.get_slice(key).get_shape()) for key in keys)
        except SafetensorError as error:
            raise ValueError(f'{file} is damaged ({error}); it may have been cut short') from None

    def __enter__(self) -> SizeLimit:
        self.left, self.computed = 2 * self.elements + (1 << 26), _COMPUTED
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            size = kwargs.get('size', args)
            count = math.prod(size[0] if size and isinstance(size[0], Sequence) else size)
            dtype = kwargs.get('dtype')
            if dtype is None or dtype.is_floating_point:
                self.left -= count
            else:
                self.computed -= count
        elif getattr(func, '__name__', '').strip('_') in _ELEMENTWISE:
            operands = [each.shape for each in args if isinstance(each, Tensor)]
            size = torch.broadcast_shapes(*operands)  # type: ignore[no-untyped-call]
            if size not in operands:  # as of all pairs of places
                self.computed -= math.prod(size)
        if self.left < 0:
            raise ValueError(f'{self.file} has {self.elements:,} parameters and buffers, and the network that is to '
                             'take them more than twice as many; expected the weights of that network')
        if self.computed < 0:
            raise ValueError(f'the network for {self.file} computes indices or masks of more than {_COMPUTED:,} '
                             'elements; expected smaller images or windows')
        return func(*args, **kwargs)
