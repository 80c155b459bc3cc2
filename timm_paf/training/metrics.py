"""The sums over an epoch that its line of metrics.jsonl is made of."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['means', 'zero_sums']


def zero_sums(device: torch.device) -> dict[str, Tensor]:
    """Returns new sums, float64 on the device: of the loss and of images, and how many were classified right."""
    names = ('loss', 'images', 'adv_correct', 'clean_correct', 'clean_images')
    return {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Returns the mean loss, and clean and adversarial accuracy in [0, 1]; of no images 0."""
    value = {name: total.item() for name, total in sums.items()}
    images, clean = max(value['images'], 1), max(value['clean_images'], 1)
    return {'loss': value['loss'] / images, 'clean_accuracy': value['clean_correct'] / clean,
            'adv_accuracy': value['adv_correct'] / images}
