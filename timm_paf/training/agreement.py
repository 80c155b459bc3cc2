"""Whether what a Trainer is given is what its recipe says, which is what is recorded and published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from ..activations import PAF, create_paf, list_pafs
from ..convert import NETWORK_FAULTS, create_outline
from ..data import Augmentation, Batches, ImageSet, IndexedBatches
from ..data.steps import check_sizes, epoch_steps
from ..files import is_of_machine
from ..normalize import Normalize, create_normalize
from ..objectives import ONE_STEP
from ..weights import network_of
from ..wording import reason_of
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['check_agreement']

_SETTINGS = {'num_heads', 'heads', 'window_size', 'global_pool', 'img_size', 'drop_rate', 'eps'}
"""Attributes of modules that change what a network of the same weights computes."""


def check_agreement(
        recipe: Recipe, model: nn.Module, batches: Any, accelerator: Accelerator, validation: ImageSet | None) -> None:
    """Checks the arguments of a `Trainer` against its recipe and one another.

    Raises:
        ValueError: with all that differs, in one line.
    """
    if missing := [name for name in ('data', 'steps_per_epoch', 'last_size') if not hasattr(batches, name)]:
        raise ValueError(f'batches are a {type(batches).__name__} without {", ".join(missing)}; expected timm_paf.data.'
                         'Batches or IndexedBatches, or batches by the number of the step like these')
    check_sizes((recipe.batch_size, batches.last_size), accelerator.num_processes, recipe.accumulate,
                bool(recipe.mixup))
    classes, wanted = _classes_of(model), getattr(batches.data, 'num_classes', None)
    if classes is not None and isinstance(wanted, int) and classes < wanted:
        raise ValueError(f'the network has {classes} classes and the data {wanted}; expected at least as many')
    wrong = [*_model_fault(recipe, model, wanted or 10 if classes is None else classes)]
    if accelerator.mixed_precision != recipe.mixed_precision:
        wrong.append(f'mixed_precision is {recipe.mixed_precision} in the recipe and {accelerator.mixed_precision} in '
                     'the Accelerator')
    for name, said, where in (
            ('batch_size', recipe.batch_size, 'the recipe'), ('seed', recipe.seed, 'the recipe'),
            ('pad_mode', recipe.pad_mode, 'the recipe'), ('rank', accelerator.process_index, 'the Accelerator'),
            ('world', accelerator.num_processes, 'the Accelerator')):
        if (value := getattr(batches, name, said)) != said:
            wrong.append(f'{name} is {said} in {where} and {value} in the batches')
    if isinstance(batches, Batches | IndexedBatches):
        wrong += _batches_fault(recipe, batches, accelerator)
    if recipe.val != len(validation or ()):
        wrong.append(f'val is {recipe.val} in the recipe and there are {len(validation or ())} held-out images')
    if accelerator.gradient_accumulation_steps != 1:
        wrong.append(f'gradient_accumulation_steps is {accelerator.gradient_accumulation_steps} in the Accelerator, '
                     'which would divide the gradients, and the recipe has accumulate')
    if wrong:
        raise ValueError(f'{"; ".join(wrong)}; expected the same, because the record has the recipe')
    steps = recipe.total_steps(batches.steps_per_epoch)
    if recipe.swa and steps <= (recipe.swa - 1) * batches.steps_per_epoch:
        raise ValueError(f'swa is {recipe.swa} and the run ends after {steps} steps, before that epoch; expected an '
                         'earlier one, or more steps')
    if recipe.mixup and isinstance(batches, Batches) and (made := batches.synthetic_size):
        twice = 2 * accelerator.num_processes
        for real in (recipe.batch_size - made, batches.last_size - made):
            if real % twice or made % twice:
                raise ValueError(
                    f'mixup pairs images of a kind, and {accelerator.num_processes} processes share {real} real and '
                    f'{made} generated ones; expected multiples of {twice}: another batch size, or another share of '
                    'generated images')
    if recipe.objective in ONE_STEP and not isinstance(batches.data, ImageSet):
        raise ValueError(f'{recipe.objective} is looked at with training images from memory and data is a '
                         f'{type(batches.data).__name__}; expected an ImageSet')
    for size, where in ((recipe.batch_size, ''), (batches.last_size, ' of the last batch of an epoch')):
        part = size // accelerator.num_processes // recipe.accumulate
        if recipe.clean_ratio and not 0 < round(recipe.clean_ratio * part) < part:
            raise ValueError(f'clean_ratio {recipe.clean_ratio} of {part} images{where}, which are worked on at once, '
                             f'is {round(recipe.clean_ratio * part)}; expected clean and attacked ones in each part: a '
                             'larger batch, or fewer processes or parts')


def architecture_of(model: nn.Module) -> str | None:
    """Returns the name that timm gave a network, None for one that is not of timm."""
    cfg = getattr(model, 'pretrained_cfg', None)
    return cfg.get('architecture') if isinstance(cfg, Mapping) else None


def _classes_of(model: nn.Module) -> int | None:
    """Returns how many classes a network tells apart: its head says so, which may have been replaced, or it itself."""
    head = model.get_classifier() if hasattr(model, 'get_classifier') else None  # type: ignore[operator]
    for found in (getattr(head, 'out_features', None), getattr(head, 'out_channels', None),
                  getattr(model, 'num_classes', None)):
        if isinstance(found, int):
            return found
    return None


def _traits(model: nn.Module) -> dict[str, Any]:
    """Returns what a network is for one who loads its weights: their shapes, its activations, dropouts and convolutions
    in words, and `_SETTINGS`. Norms count by weights and eps alone, because a recipe changes the rest of them."""
    traits: dict[str, Any] = {name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                              for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        for key in _SETTINGS & vars(module).keys():
            traits[f'{name}.{key}'.lstrip('.')] = vars(module)[key] or 0
        if isinstance(module, PAF):
            traits[name] = f'{type(module).__name__}, learned: {[key for key, _ in module.named_parameters()]}'
        elif not any(True for _ in module.children()) and (
                isinstance(module, nn.modules.conv._ConvNd) or not module.state_dict()):
            traits[name] = re.sub(r'(, )?inplace(=\w+)?| at 0x\w+', '', str(module))
    return traits


def _model_fault(recipe: Recipe, model: nn.Module, classes: int) -> Iterator[str]:
    """Yields in what a network is another one than the recipe says, which no program would load; not its weights."""
    if not timm.is_model(network_of(recipe.model)[0]):  # of a loop's own, which no program loads
        return
    try:
        expected = create_outline(recipe.model, act=recipe.act, share=recipe.act_share, act_kwargs=recipe.act_kwargs,
                                  num_classes=classes, **recipe.model_kwargs)
    except (ValueError, *NETWORK_FAULTS) as error:
        if is_of_machine(error):
            raise
        yield f"the network of the recipe (model, act, model_kwargs) can't be made: {reason_of(error)}"
        return
    wanted, found = architecture_of(expected), architecture_of(model)
    if found is not None and found != wanted:
        yield f'model is {wanted} in the recipe and the network is {found}'
        return
    ours, theirs = _traits(model), _traits(expected)
    for name in (*theirs, *ours):
        if ours.get(name) != theirs.get(name):
            yield (f'{name} is {theirs.get(name, "not there")} in the network of the recipe (model, act, model_kwargs) '
                   f'and {ours.get(name, "not there")} in this one')
            return
    own = getattr(model, 'normalize', None)
    if isinstance(own, Normalize):
        said = create_normalize(recipe.model_kwargs.get('normalize'), own.mean.numel(), 'cpu', torch.float64)
        if isinstance(said, Normalize) and not all(
                torch.allclose(ours.cpu().double(), theirs, rtol=_rounding(ours), atol=0)
                for ours, theirs in zip(own.buffers(), said.buffers())):
            yield f'normalize is {recipe.model_kwargs["normalize"]} in the recipe and another one in the network'
    if recipe.act_kwargs and recipe.init is None and recipe.act_start is None:
        yield from _start_fault(recipe, model, str(wanted))


def _rounding(value: Tensor) -> float:
    """Returns by how much a value may differ, relatively, from the one that it was made of. A network is made in
    float32, also one that is in float64 now."""
    return max(torch.finfo(kind).eps for kind in (value.dtype, torch.float32))


def _start_fault(recipe: Recipe, model: nn.Module, architecture: str) -> Iterator[str]:
    """Yields whether the PAFs of a network start with other values than those of its recipe."""
    name = recipe.act or max((name for name in list_pafs() if architecture.endswith(f'_{name}')), key=len, default='')
    starts = {key: value.item() for key, value in create_paf(name, **recipe.act_kwargs).state_dict().items()
              } if name in list_pafs() else {}
    for key, value in model.state_dict().items():
        start = starts.get(key.rpartition('.')[2]) if isinstance(
            model.get_submodule(key.rpartition('.')[0]), PAF) else None
        if start is not None and abs(value.double().mean().item() - start) > _rounding(value) * max(1.0, abs(start)):
            yield (f'act_kwargs is {recipe.act_kwargs} in the recipe and the network does not start with it: {key} is '
                   f'{value.mean().item():.4g} in place of {start:.4g} (of given weights the recipe has init)')
            return


def _batches_fault(recipe: Recipe, batches: Batches | IndexedBatches, accelerator: Accelerator) -> Iterator[str]:
    """Yields what batches of this package do otherwise than the recipe and the accelerator say."""
    if isinstance(batches.data, ImageSet) and batches.data.name != recipe.dataset:  # a folder has a name of its own
        yield f'dataset is {recipe.dataset} in the recipe and the batches are of {batches.data.name}'
    if isinstance(batches.augmentation, Augmentation):
        for option, value in batches.augmentation.options.items():
            if value != (said := getattr(recipe, option)):
                yield f'{option} is {said} in the recipe and {value} in the augmentation of the batches'
    if isinstance(batches, IndexedBatches):
        if batches.size != recipe.image_size:
            yield f'image_size is {recipe.image_size} in the recipe and {batches.size} in the batches'
        if recipe.pad_mode != 'zeros':
            yield f'pad_mode is {recipe.pad_mode} in the recipe and nothing is padded in the batches'
    synthetic = getattr(batches, 'synthetic', None)
    for what, said, found in (
            ('augmentation (aa, color_jitter, reprob)', bool(recipe.aa or recipe.color_jitter or recipe.reprob),
             batches.augmentation is not None),
            ('generated images (synthetic)', recipe.synthetic is not None, synthetic is not None)):
        if said != found:
            yield f'the recipe has {"" if said else "no "}{what} and the batches have {"some" if found else "none"}'
    if recipe.synthetic and isinstance(batches, Batches) and synthetic is not None:
        made = round(recipe.batch_size * recipe.synthetic.get('fraction', batches.synthetic_size / recipe.batch_size))
        for name, said, value in (('generated images of a batch', made, batches.synthetic_size),
                                  ('synthetic_augment', recipe.synthetic_augment, batches.synthetic_augment)):
            if value != said:
                yield f'{name} is {said} in the recipe and {value} in the batches'
    if batches.batch_size == recipe.batch_size and batches.world == accelerator.num_processes:
        made = getattr(batches, 'synthetic_size', 0)
        steps, last = epoch_steps(len(batches.data), recipe.batch_size - made, batches.world, recipe.drop_last)
        if (steps, last + made) != (batches.steps_per_epoch, batches.last_size):
            yield f'drop_last is {recipe.drop_last} in the recipe and {not recipe.drop_last} in the batches'
