"""Whether what a Trainer is given is what its recipe says, which is what is recorded and published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..data import Batches, ImageSet
from ..data.steps import check_sizes
from ..objectives import ONE_STEP
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['check_agreement']


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
    wrong = []
    given = {'mixed_precision': ('the Accelerator', accelerator.mixed_precision),
             **{name: ('the batches', getattr(batches, name)) for name in ('batch_size', 'seed', 'pad_mode')
                if hasattr(batches, name)}}
    for name, (where, value) in given.items():
        if value != (said := getattr(recipe, name)):
            wrong.append(f'{name} is {said} in the recipe and {value} in {where}')
    augments = bool(recipe.aa or recipe.color_jitter or recipe.reprob)
    if isinstance(batches, Batches) and augments != (batches.augmentation is not None):
        wrong.append(f'the recipe has {"an" if augments else "no"} augmentation (aa, color_jitter, reprob) and the '
                     f'batches {"none" if augments else "one"}')
    if bool(recipe.val) != (validation is not None):
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
    if recipe.mixup and isinstance(batches, Batches) and batches.made:
        for size in (recipe.batch_size, batches.last_size):
            shares = (size - batches.made, batches.made)
            if any(each % (2 * accelerator.num_processes) for each in shares):
                raise ValueError(
                    f'mixup pairs images of a kind, and {accelerator.num_processes} processes share {shares[0]} real '
                    f'and {shares[1]} generated ones; expected multiples of {2 * accelerator.num_processes}')
    if recipe.objective in ONE_STEP and not isinstance(batches.data, ImageSet):
        raise ValueError(f'{recipe.objective} is looked at with training images from memory and data is a '
                         f'{type(batches.data).__name__}; expected an ImageSet')
    classes, wanted = getattr(model, 'num_classes', None), getattr(batches.data, 'num_classes', None)
    if isinstance(classes, int) and isinstance(wanted, int) and classes < wanted:
        raise ValueError(f'the network has {classes} classes and the data {wanted}; expected as many')
    part = recipe.batch_size // accelerator.num_processes // recipe.accumulate
    if recipe.clean_ratio and not 0 < round(recipe.clean_ratio * part) < part:
        raise ValueError(f'clean_ratio {recipe.clean_ratio} of {part} images, which are worked on at once, is '
                         f'{round(recipe.clean_ratio * part)}; expected clean and attacked ones in each part: a larger '
                         'batch, or fewer processes or parts')
