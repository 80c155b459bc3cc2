"""Eval mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ['eval_mode']


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a network in eval mode; afterwards every module has its mode of before.

    A module with a ``train()`` of its own gets its mode by that; that of one that was in eval mode is not called,
    unless such a ``train()`` of a module around it does so. What timm's LeViT, TinyViT and EfficientFormer compute of
    their weights once in eval mode, their attention biases, is computed anew inside and not kept afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        _forget(model)
        model.eval()
        yield
    finally:
        try:
            for module, training in modes:  # the outer before the inner, which it changes too
                if module.training != training and type(module).train is not nn.Module.train:
                    module.train(training)
        finally:
            for module, training in modes:
                module.training = training
            _forget(model)


def _forget(model: nn.Module) -> None:
    """Empties timm's caches of attention biases, which timm does in ``train()`` alone."""
    for module in model.modules():
        if getattr(module, 'attention_bias_cache', None):
            module.attention_bias_cache = {}  # type: ignore[assignment]
