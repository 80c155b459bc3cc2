"""Creates the optimizer of a recipe, and gives learning rate and threat model of each step."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from ..activations import paf_parameters
from ..attacks import ThreatModel
from .recipe import Recipe
from .schedules import SCHEDULES

__all__ = ['create_optimizer', 'learning_rate', 'warmed_up_threat']


def create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of a recipe: SGD or AdamW of torch, or any other optimizer of timm.

    Torch's are mostly in their fused form, which can be told on the device to leave the weights alone. There is one
    parameter group, because the paper decays every parameter, alpha and beta too; there are two where the recipe has
    values of its own for the PAF.

    Raises:
        ValueError: for a name that timm does not know, or an optimizer that needs second derivatives.
    """
    pafs = paf_parameters(model)
    groups: list[dict[str, Any]] = [{'params': list(model.parameters())}]
    if recipe.paf_lr is not None or recipe.paf_weight_decay is not None:
        owned = {id(p) for p in pafs.values()}
        decay = recipe.weight_decay if recipe.paf_weight_decay is None else recipe.paf_weight_decay
        scale = 1.0 if recipe.paf_lr is None else recipe.paf_lr / recipe.lr
        groups = [{'params': [p for p in model.parameters() if id(p) not in owned]},
                  {'params': list(pafs.values()), 'weight_decay': decay, 'lr_scale': scale}]
    fused = not recipe.fsdp  # the fused step does not know the shards of FSDP
    if recipe.optimizer == 'sgd':
        sgd = torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0,
                              weight_decay=recipe.weight_decay, fused=fused)
        if recipe.momentum:
            # The buffers start here: the fused first step leaves them as the memory was, if it is told to leave the
            # weights alone.
            for p in model.parameters():
                sgd.state[p]['momentum_buffer'] = torch.zeros_like(p)
        return sgd
    if recipe.optimizer == 'adamw':
        return torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    try:
        optimizer = create_optimizer_v2(groups, recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.momentum)
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(f'unknown optimizer {recipe.optimizer!r}; expected sgd, adamw or one of timm.optim') from error
    if getattr(optimizer, 'is_second_order', False):
        raise ValueError(f'{recipe.optimizer} needs second derivatives of the loss, which are not kept; expected sgd, '
                         'adamw or another of timm.optim')
    return optimizer


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Returns the learning rate of an optimizer step, counted from 0."""
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    share = SCHEDULES[recipe.schedule]((step - warmup) / max(total_steps - warmup, 1))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * share


def warmed_up_threat(recipe: Recipe, step: int, steps_per_epoch: int) -> ThreatModel:
    """Returns the threat model of an optimizer step: eps and step size grow in proportion during the warm-up of eps."""
    threat = recipe.threat
    warmup = round(recipe.eps_warmup_epochs * steps_per_epoch)
    if step >= warmup:
        return threat
    assert threat.step is not None
    share = Fraction(step + 1, warmup)
    return replace(threat, eps=threat.eps * share, step=threat.step * share)
