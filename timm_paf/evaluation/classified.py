"""What an evaluation takes and what a network answers: both are checked before a number is made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['check_inputs', 'classified_right']


def check_inputs(images: Tensor, labels: Tensor) -> None:
    """Checks images and labels before any work.

    Raises:
        ValueError: unless there is at least one image, the images are (n, channels, height, width), floating, in
            [0, 1], and the labels (n,) int64 from 0 on.
    """
    if not images.is_floating_point() or images.ndim != 4 or not len(images):
        raise ValueError(f'images are {images.dtype} {tuple(images.shape)}; expected float32 (n, channels, height, '
                         'width) in [0, 1] with n at least 1')
    low, high = (bound.item() for bound in torch.aminmax(images))
    if not (low >= 0 and high <= 1):
        raise ValueError(f'images span [{low:.4g}, {high:.4g}]; expected [0, 1]: divide by 255, without mean and std')
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(f'labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(images)},)')
    if int(labels.min()) < 0:
        raise ValueError(f'the smallest label is {int(labels.min())}; expected at least 0')


@torch.no_grad()
def classified_right(model: nn.Module, x: Tensor, y: Tensor, clean: bool = False) -> Tensor:
    """Returns which images a network classifies right, (batch,) bool.

    Args:
        model: maps images to logits (batch, classes).
        x: images (batch, channels, height, width).
        y: labels (batch,).
        clean: whether the images are as the user gave them. Logits that are not finite are an error there; of an
            attacked image they are no class, so it counts as fooled.

    Raises:
        ValueError: if the network gives no such logits, or has no class for a label.
    """
    logits: Any = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f'a {type(logits).__name__}'
        raise ValueError(f'the network gives {found} for {len(x)} images; expected logits ({len(x)}, classes)')
    if int(y.max()) >= logits.shape[1]:
        raise ValueError(f'the largest label is {int(y.max())} and the network has {logits.shape[1]} classes; expected '
                         'labels below that')
    finite = logits.isfinite().all(1)
    if clean and not bool(finite.all()):
        raise ValueError(f'the logits of {int((~finite).sum())} of {len(x)} clean images are not finite; expected a '
                         'network that classifies: look at its weights')
    return (logits.argmax(1) == y) & finite
