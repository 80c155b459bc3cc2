"""What a line of metrics.jsonl is made of: the sums over an epoch, and the curvatures after it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..activations import PAF
from ..second_derivative import curvature

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['all_sums', 'curvatures', 'means', 'resumed_sums', 'zero_sums']


def zero_sums(device: torch.device) -> dict[str, Tensor]:
    """Returns new sums, float64 on the device: of the loss and of images, and how many were classified right."""
    names = ('loss', 'images', 'adv_correct', 'adv_images', 'clean_correct', 'clean_images')
    return {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}


def all_sums(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Returns the sums of all processes; every process must call it."""
    return {name: accelerator.reduce(value.clone(), 'sum') for name, value in sums.items()}


def resumed_sums(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Returns this process's part of sums of `all_sums`: all of them in the main process, zeros in the others."""
    share = 1.0 if accelerator.is_main_process else 0.0
    if 'images' in sums and 'adv_images' not in sums:  # older checkpoints do not count attacked images apart
        sums = {**sums, 'adv_images': sums['images']}
    return {name: value.to(accelerator.device) * share for name, value in sums.items()}


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Returns the mean loss, and clean and adversarial accuracy in [0, 1]; of no images 0."""
    value = {name: total.item() for name, total in sums.items()}
    images, clean, adv = (max(value[name], 1) for name in ('images', 'clean_images', 'adv_images'))
    return {'loss': value['loss'] / images, 'clean_accuracy': value['clean_correct'] / clean,
            'adv_accuracy': value['adv_correct'] / adv}


def curvatures(model: nn.Module) -> dict[str, float]:
    """Returns the `curvature` of every PAF of a network as 'NAME.curvature', without those that are infinite."""
    found = {f'{name}.curvature': curvature(act) for name, act in model.named_modules() if isinstance(act, PAF)}
    return {name: value for name, value in found.items() if math.isfinite(value)}
