"""What an evaluation takes and what a network answers: both are checked before a number is made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attacks import check_box, check_gradients
from ..files import is_of_machine
from ..wording import reason_of

__all__ = ['NetworkFacts', 'check_inputs', 'check_network', 'classified_right', 'same_again']

_IMAGES = 4
"""The number of images on which a network is looked at before any attack."""
_REPEATS = 5
"""Answers to the same images that are compared, as AutoAttack compares five."""


class NetworkFacts(NamedTuple):
    """What `check_network` found."""

    classes: int
    random: bool
    """Whether the network answers the same images otherwise another time."""


def check_inputs(images: Tensor, labels: Tensor) -> None:
    """Checks images and labels before any work.

    Raises:
        ValueError: unless there is at least one image, the images are (n, channels, height, width), float32, in
            [0, 1], and the labels (n,) int64 from 0 on.
    """
    if wrong := [type(each).__name__ for each in (images, labels) if not isinstance(each, Tensor)]:
        raise ValueError(f'images or labels are of type {wrong[0]}; expected tensors of torch (torch.from_numpy)')
    if images.dtype != torch.float32 or images.ndim != 4 or not len(images):
        raise ValueError(f'images are {images.dtype} {tuple(images.shape)}; expected float32 (n, channels, height, '
                         'width) in [0, 1] with n at least 1')
    check_box(images)
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(f'labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(images)},)')
    if int(labels.min()) < 0:
        raise ValueError(f'the smallest label is {int(labels.min())}; expected at least 0')


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError unless there is at least one image in a batch."""
    if batch_size < 1:
        raise ValueError(f'the batch size is {batch_size}; expected at least 1')


def check_network(
        model: nn.Module, images: Tensor, labels: Tensor, batch_size: int, gradient: bool) -> NetworkFacts:
    """Looks at what a network answers to a few images, before hours are spent on attacks.

    Args:
        model: maps images to logits (batch, classes), in eval mode.
        images: all images of the evaluation, as `check_inputs` wants them.
        labels: their labels.
        batch_size: images attacked together. Where one is attacked alone, nothing depends on its batch.
        gradient: whether there are attacks that need the gradient of the images.

    Raises:
        ValueError: if the network takes no such images, gives no finite logits, has one class alone, or none for a
            label, if its answer for an image depends on the others in the batch, or if no gradient reaches the images,
            as under ``torch.inference_mode()``.
    """
    check_batch_size(batch_size)
    if gradient:
        check_gradients()
    x = images[:min(_IMAGES, batch_size)]
    try:
        with torch.no_grad():
            logits = _logits(model, x)
        differentiable = not gradient or _differentiable(model, x)
    except (RuntimeError, AssertionError) as error:  # what torch and timm say where shapes, types, devices do not fit
        if is_of_machine(error):
            raise
        raise ValueError(f'the network does not take images {tuple(x.shape)} {x.dtype} on {x.device}: '
                         f'{reason_of(error)}') from error
    _check_finite(logits)
    classes, largest = logits.shape[1], int(labels.max())
    if classes < 2:
        raise ValueError('the network has one class; expected at least two: a logit for each of them')
    if largest >= classes:
        raise ValueError(f'the largest label is {largest} and the network has {classes} classes; expected labels below '
                         'that')
    if not differentiable:
        raise ValueError('no gradient of the logits reaches the images: the network has a detach, a no_grad or a cast '
                         'to integers; expected one with gradients (bpda-pgd-N attacks such modules by the identity)')
    random = not same_again(model, x)
    if not random and len(x) > 1:
        with torch.no_grad():
            among_itself = _logits(model, x[:1].expand_as(x).contiguous())
        if not _near(logits[:1], among_itself[:1]):
            raise ValueError('the network answers an image otherwise in another batch; expected one that looks at each '
                             'image alone (BatchNorm with the statistics of the training), or a batch size of 1')
    return NetworkFacts(classes, random)


@torch.no_grad()
def same_again(model: nn.Module, images: Tensor) -> bool:
    """Returns whether the network answers the same images five times with the same logits, to a ten-thousandth."""
    first = model(images)
    return all(_near(first, model(images)) for _ in range(_REPEATS - 1))


def _differentiable(model: nn.Module, images: Tensor) -> bool:
    """Returns whether a gradient of the logits reaches the images; that of parameters alone is none."""
    with torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        total = _logits(model, x).sum()
        return total.requires_grad and torch.autograd.grad(total, x, allow_unused=True)[0] is not None


def _near(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= 1e-4 * first.abs().max())


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """Returns what a network gives for images, if that may be logits (batch, classes)."""
    logits: Any = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
        found = f'{logits.dtype} {tuple(logits.shape)}' if isinstance(logits, Tensor) else f'a {type(logits).__name__}'
        raise ValueError(f'the network gives {found} for {len(x)} images; expected logits, floats ({len(x)}, classes)')
    return logits


def _check_finite(logits: Tensor) -> None:
    finite = logits.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f'the logits of {int((~finite).sum())} of {len(logits)} clean images are not finite; expected '
                         'a network that classifies: look at its weights')


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
        ValueError: if the network gives no such logits.
    """
    logits = _logits(model, x)
    if clean:
        _check_finite(logits)
    return (logits.argmax(1) == y) & logits.isfinite().all(1)
