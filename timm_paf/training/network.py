"""Creates the network of a training run, and decides whether it is worth compiling."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..convert import create_converted
from ..speed import forward_flops, pays_to_compile
from .recipe import Recipe
from .run_directory import recorded_choice

__all__ = ['chooses_to_compile', 'create_network']


def create_network(recipe: Recipe, num_classes: int, sample: Tensor, images: str) -> nn.Module:
    """Returns the network of a recipe with random weights of its seed, after a try with an image.

    Args:
        recipe: the recipe, which names model and activation.
        num_classes: number of classes of the data set.
        sample: an image of the data set, (1, channels, height, width) float32 in [0, 1].
        images: name of the data set, for messages.

    Raises:
        ValueError: if the activation lacks an argument, or the model does not take such images or lacks gradient
            checkpointing where the recipe wants it.
    """
    torch.manual_seed(recipe.seed)
    try:
        model = create_converted(recipe.model, recipe.act, recipe.act_share if recipe.act else None, recipe.act_kwargs,
                                 num_classes=num_classes)
        with torch.no_grad():
            shape = model.eval()(sample).shape
    except TypeError as error:  # its message names the arguments that the activation does not have
        raise ValueError(f'--act-kwargs {recipe.act_kwargs}: {error}') from error
    except (RuntimeError, AssertionError) as error:  # timm raises these for a wrong tag or image size
        reason = ' '.join(str(error).split())
        raise ValueError(f'{recipe.model} does not take images of {images}: {reason}') from error
    if shape != (1, num_classes):
        raise ValueError(f'{recipe.model} gives {tuple(shape)} for an image; expected (1, {num_classes})')
    if recipe.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ValueError(f'{recipe.model} has no gradient checkpointing; expected another model, or '
                             '--no-grad-checkpointing') from error
        _checkpoint_without_reentry()
    return model


def _checkpoint_without_reentry() -> None:
    """Makes timm's networks checkpoint as newer timm's do by default; the older call torch's function without a choice.

    A reentrant checkpoint gives no gradient of the images alone, which an attack asks for.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith('timm.') and getattr(module, 'checkpoint', None) is checkpoint:
            module.checkpoint = functools.partial(checkpoint, use_reentrant=False)  # type: ignore[attr-defined]


def chooses_to_compile(
        recipe: Recipe, model: nn.Module, sample: Tensor, steps_per_epoch: int, device: torch.device,
        output: Path) -> bool:
    """Returns whether to compile: the recipe's choice, else that of the run in ``output``, else whether it pays."""
    if recipe.compile is not None:
        return recipe.compile
    chosen = recorded_choice(output, 'compile')  # a run is resumed as it began
    if chosen is not None:
        return bool(chosen)
    steps = min(recipe.epochs * steps_per_epoch, recipe.max_steps or sys.maxsize)
    passes = 2 * recipe.threat.steps + 3  # an attack step is a forward and a backward pass, training counts as three
    return pays_to_compile(forward_flops(model, sample) * passes * recipe.batch_size * steps, device)
