"""The optimizer of a recipe: what learns, at which rate and under which threat model, and how gradients are clipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ..activations import paf_parameters
from ..attacks import ThreatModel, batch_norms
from ..wording import split_commas
from .recipe import Recipe, numbers
from .schedules import RISE, SCHEDULES

try:
    from timm.optim import param_groups_layer_decay
except ImportError:  # an older timm
    from timm.optim.optim_factory import param_groups_layer_decay

__all__ = [
    'clip_gradients', 'create_optimizer', 'freeze_norms', 'learning_rate', 'momentum', 'parameter_groups',
    'rising_steps', 'set_bn_momentum', 'warmed_up_threat']


Group = dict[str, Any]


def parameter_groups(recipe: Recipe, model: nn.Module) -> list[Group]:
    """Returns the optimizer's groups of the parameters that learn; ``lr_scale`` in one scales its learning rate.

    There is one group, because the paper decays every parameter, alpha and beta too. With a layer decay there are
    timm's groups, in which biases, norms and what the network names are not decayed, and the PAFs apart. What has a
    learning rate or decay of its own, the classifier, the PAFs and what the recipe does not decay, is taken out of
    these into groups of its own.

    Raises:
        ValueError: if there is no classifier for a learning rate of its own, or the network says no layers.
    """
    groups: list[Group] = [{'params': [p for p in model.parameters() if p.requires_grad]}]
    if recipe.layer_decay is not None:
        if not hasattr(model, 'group_matcher'):
            raise ValueError(f'{type(model).__name__} has no group_matcher, so no layers; expected no --layer-decay')
        own: Any = getattr(model, 'no_weight_decay', set)
        groups = [{key: group[key] for key in ('params', 'weight_decay', 'lr_scale')} for group in
                  param_groups_layer_decay(model, recipe.weight_decay, own(), layer_decay=recipe.layer_decay)]
        # An activation of the whole network is of no layer, and would have the rate of its first place.
        groups = _apart(groups, list(paf_parameters(model).values()), lr_scale=1.0, weight_decay=recipe.weight_decay)
    if recipe.head_lr is not None:
        head = model.get_classifier() if hasattr(model, 'get_classifier') else ()  # type: ignore[operator]
        heads = head if isinstance(head, tuple | list) else (head,)
        of_head = [p for module in heads for p in module.parameters()]
        if not of_head:
            raise ValueError(f'{type(model).__name__} has no classifier; expected no --head-lr')
        groups = _apart(groups, of_head, lr_scale=recipe.head_lr / recipe.lr)
    if recipe.no_decay:
        groups = _apart(groups, _not_decayed(recipe.no_decay, model), weight_decay=0.0)
    changes: Group = {}
    if recipe.paf_lr is not None:
        changes['lr_scale'] = recipe.paf_lr / recipe.lr
    if recipe.paf_weight_decay is not None:
        changes['weight_decay'] = recipe.paf_weight_decay
    if changes:
        groups = _apart(groups, list(paf_parameters(model).values()), **changes)
    return groups


def _not_decayed(names: str, model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of BatchNorm ('bn'), the biases ('bias') or the PAFs ('paf'), of several with commas."""
    found: list[nn.Parameter] = []
    for name in split_commas(names):
        if name == 'bn':
            found += [p for module in _norms_for('--no-decay bn', model) for p in module.parameters(recurse=False)]
        elif name == 'bias':
            found += [p for key, p in model.named_parameters() if key.rpartition('.')[2] == 'bias']
        else:
            found += paf_parameters(model).values()
    return found


def _apart(groups: list[Group], parameters: list[nn.Parameter], **changes: Any) -> list[Group]:
    """Returns groups in which some parameters have groups of their own, after the others, with changed values."""
    owned = {id(p) for p in parameters}
    rest = [{**group, 'params': [p for p in group['params'] if id(p) not in owned]} for group in groups]
    apart = [{**group, **changes, 'params': [p for p in group['params'] if id(p) in owned]} for group in groups]
    return [group for group in (*rest, *apart) if group['params']]


def create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of a recipe: SGD or AdamW of torch, or any other optimizer of timm.

    Torch's are mostly in their fused form, which can be told on the device to leave the weights alone. Its groups are
    those of `parameter_groups`.

    Raises:
        ValueError: for a name that timm does not know, an optimizer that needs second derivatives, or as
            `parameter_groups`.
    """
    groups = parameter_groups(recipe, model)
    fused = not recipe.fsdp  # the fused step does not know the shards of FSDP
    if recipe.optimizer == 'sgd':
        first = momentum(recipe, 0, 1, 1)
        sgd = torch.optim.SGD(groups, recipe.lr, momentum=first, nesterov=recipe.nesterov and first > 0,
                              weight_decay=recipe.weight_decay, fused=fused)
        if first:
            # The buffers start here: the fused first step leaves them as the memory was, if it is told to leave the
            # weights alone.
            for p in (p for group in groups for p in group['params']):
                sgd.state[p]['momentum_buffer'] = torch.zeros_like(p)
        return sgd
    if recipe.optimizer == 'adamw':
        return torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    try:
        optimizer = create_optimizer_v2(groups, recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.momentum)
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(f'unknown optimizer {recipe.optimizer!r}; expected sgd, adamw or one of timm.optim, with the '
                         'package that it needs') from error
    if getattr(optimizer, 'is_second_order', False):
        raise ValueError(f'{recipe.optimizer} needs second derivatives of the loss, which are not kept; expected sgd, '
                         'adamw or another of timm.optim')
    return optimizer


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Returns the learning rate of an optimizer step, counted from 0."""
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.milestones is not None:
        share = 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in numbers(recipe.milestones))
    else:
        share = _share(recipe, (step - warmup) / max(total_steps - warmup, 1))
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * share


def _share(recipe: Recipe, progress: float) -> float:
    rise = () if recipe.pct_start is None else (recipe.pct_start,)
    return SCHEDULES[recipe.schedule](progress, *rise)


def momentum(recipe: Recipe, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Returns the momentum of an optimizer step: the recipe's, or the one of its cycle, as torch's schedulers have it.

    It is the cycle's most where the learning rate begins and ends, its least at the peak, and in between on the curve
    of the learning rate.
    """
    if recipe.momentum_cycle is None:
        return recipe.momentum
    least, most = numbers(recipe.momentum_cycle)
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    progress = max(step - warmup, 0) / max(total_steps - warmup, 1)
    share = _share(recipe, progress)
    if progress < (recipe.pct_start or RISE[recipe.schedule]):  # one-cycle rises from a 25th, the momentum falls whole
        start = _share(recipe, 0.0)
        share = (share - start) / (1 - start)
    return most - (most - least) * share


def rising_steps(recipe: Recipe, steps_per_epoch: int, total_steps: int) -> int:
    """Returns the number of optimizer steps in which the learning rate rises: the warm-up, and that of the schedule."""
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    share = RISE.get(recipe.schedule, 0.0) if recipe.pct_start is None else recipe.pct_start
    return warmup + round(share * max(total_steps - warmup, 0))


def warmed_up_threat(recipe: Recipe, step: int, steps_per_epoch: int) -> ThreatModel:
    """Returns the threat model of an optimizer step: eps and step size grow in proportion during the warm-up of eps."""
    threat = recipe.threat
    warmup = round(recipe.eps_warmup_epochs * steps_per_epoch)
    if step >= warmup:
        return threat
    assert threat.step is not None
    share = Fraction(step + 1, warmup)
    return replace(threat, eps=threat.eps * share, step=threat.step * share)


def clip_gradients(recipe: Recipe, parameters: Mapping[str, Tensor], pafs: Iterable[str]) -> None:
    """Clips the gradient of beta, and then that of all parameters, where the recipe says so.

    Args:
        recipe: the recipe, with the largest norms.
        parameters: the parameters that have the gradients, by name.
        pafs: the names of the PAFs' values among them.
    """
    betas = [parameters[name] for name in pafs if name.endswith('beta')]
    if betas and recipe.paf_clip > 0:
        nn.utils.clip_grad_norm_(betas, recipe.paf_clip)
    if recipe.clip_grad > 0:
        nn.utils.clip_grad_norm_(parameters.values(), recipe.clip_grad)


def freeze_norms(model: nn.Module) -> Sequence[nn.Module]:
    """Lets no BatchNorm of a network learn its weight and bias; returns them, to be kept in eval mode.

    Raises:
        ValueError: if there are none.
    """
    norms = _norms_for('--freeze-bn', model)
    for norm in norms:
        for parameter in norm.parameters(recurse=False):
            parameter.requires_grad_(False)
    return norms


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Sets the share that a batch has in the new running statistics of every BatchNorm.

    Raises:
        ValueError: if there are none.
    """
    for norm in _norms_for('--bn-momentum', model):
        norm.momentum = momentum


def _norms_for(option: str, model: nn.Module) -> Sequence[nn.modules.batchnorm._BatchNorm]:
    norms = batch_norms(model)
    if not norms:
        raise ValueError(f'{type(model).__name__} has no BatchNorm; expected no {option}')
    return norms
