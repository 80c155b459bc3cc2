"""The network of a training run, and whether it is worth compiling."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ..convert import create_converted
from ..speed import forward_flops, pays_to_compile
from .recipe import Recipe
from .run_directory import recorded_choice

__all__ = ['chooses_to_compile', 'create_network']


def create_network(recipe: Recipe, num_classes: int, sample: Tensor, images: str) -> nn.Module:
    """Returns the network of a recipe with random weights of its seed, after it took an image.

    Args:
        recipe: names model and activation.
        num_classes: of the data set.
        sample: (1, channels, height, width), an image of it.
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
    except TypeError as error:  # the activation names the arguments that it does not have
        raise ValueError(f'--act-kwargs {recipe.act_kwargs}: {error}') from error
    except (RuntimeError, AssertionError) as error:  # timm's words for a wrong tag or image size
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
    return model


def chooses_to_compile(
        recipe: Recipe, model: nn.Module, sample: Tensor, steps_per_epoch: int, device: torch.device,
        output: Path) -> bool:
    """Returns the recipe's choice; without one, that of the run in ``output``, else whether the run is long enough."""
    if recipe.compile is not None:
        return recipe.compile
    chosen = recorded_choice(output, 'compile')  # a run is resumed as it began
    if chosen is not None:
        return bool(chosen)
    steps = min(recipe.epochs * steps_per_epoch, recipe.max_steps or sys.maxsize)
    passes = 2 * recipe.threat.steps + 3  # to the logits and back to the image; in training to the weights too
    return pays_to_compile(forward_flops(model, sample) * passes * recipe.batch_size * steps, device)
