"""Eval mode for a while, and the memory format of a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ['eval_mode', 'to_channels_last']


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a network in eval mode; afterwards every module has its mode of before.

    What a network computes of its weights once in eval mode, as timm's LeViT, TinyViT and EfficientFormer do with their
    attention biases, is computed anew inside and not kept: such networks forget it in a ``train()`` of their own.
    """
    modes = [(module, module.training) for module in model.modules()]
    forgetful = [module for module, _ in modes if type(module).train is not nn.Module.train]
    try:
        for module in forgetful:
            module.train()
        model.eval()
        yield
    finally:
        for module in forgetful:
            module.train()
        for module, training in modes:
            module.training = training


def to_channels_last(model: nn.Module) -> nn.Module:
    """Returns a network with its weights and buffers of four dimensions in channels_last; it is changed in place.

    ``model.to(memory_format=torch.channels_last)`` fails where there is a weight of five, of a ``Conv3d``.
    """
    for value in (*model.parameters(), *model.buffers()):
        if value.ndim == 4:
            value.data = value.data.to(memory_format=torch.channels_last)
    return model
