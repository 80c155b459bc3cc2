"""Measures accuracy under attack after an epoch, and chooses the epoch that is kept by it, and by patience."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..data import ImageSet, derive_seed, to_float
from ..modes import eval_mode
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['Between', 'Selection', 'accuracies', 'attacked_accuracy', 'checked_images']

Between = Callable[[str, int, int], None]
"""A function that is called before each batch of a measurement, as often in every process: (name of the measurement,
images done, images of all). What it raises ends the measurement."""

VALIDATION_STEPS = 20
"""Steps of the attack on held-out images, each eps / 8, on the margin loss and without a random start."""

CHECKED_IMAGES = 256
"""Number of training images on which a one-step training is checked with PGD after every epoch."""


@dataclass
class Selection:
    """The best epoch so far by accuracy under attack on held-out images, and its weights on the CPU."""

    best: dict[str, float] = field(default_factory=lambda: {'accuracy': -1.0, 'epoch': -1.0})
    weights: dict[str, Tensor] = field(default_factory=dict)

    def consider(self, accuracy: float, epoch: int, weights: Callable[[], dict[str, Tensor]]) -> None:
        """Keeps the weights of an epoch that is better than all before it."""
        if accuracy > self.best['accuracy']:
            self.best = {'accuracy': accuracy, 'epoch': float(epoch)}
            self.weights = weights()

    def out_of_patience(self, patience: int, ended: int) -> bool:
        """Returns whether ``patience`` epochs (0 for no end) of the ``ended`` ones came after the best."""
        return bool(patience) and ended - 1 - self.best['epoch'] >= patience


def attacked_accuracy(
        model: nn.Module, data: ImageSet, recipe: Recipe, accelerator: Accelerator, attack: str | None = None,
        before: Callable[[int], None] | None = None) -> tuple[float, float]:
    """Measures clean and adversarial accuracy on images that the processes share out.

    By default the attack differs from that of the training: it takes the margin loss, and more and smaller steps.

    Args:
        model: the network for attacks, in eval mode.
        data: the images; every process has all of them.
        recipe: the recipe of the training, for the attack, the size of a batch and the memory format.
        accelerator: reduces over processes; every process must call the function.
        attack: another attack, 'ce' or 'cw' and a number of steps of eps / 4 from a random start, such as 'ce-10'.
        before: function that is called before each batch with the number of images done, as often in every process.

    Returns:
        Clean and adversarial accuracy, in [0, 1].
    """
    loss, _, steps = (attack or 'cw').partition('-')
    threat = replace(recipe.threat, step=recipe.threat.eps / 8, steps=VALIDATION_STEPS, random_start=False)
    if attack is not None:
        threat = replace(recipe.threat, step=recipe.threat.eps / 4, steps=int(steps), random_start=True)
    generator = torch.Generator(accelerator.device).manual_seed(derive_seed(recipe.seed, 11, accelerator.process_index))
    # Batches have the size that the programs are compiled for; the last is filled up with images that do not count.
    world = accelerator.num_processes
    size = recipe.batch_size // world // recipe.accumulate
    counts = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    mine = torch.arange(accelerator.process_index, len(data), world)
    for start in range(0, -(-len(data) // world), size):
        if before is not None:
            before(start * world)
        chosen = mine[start:start + size]
        if not len(chosen):  # another process has one image more
            continue
        filled = torch.cat([chosen, chosen[:1].expand(size - len(chosen))])
        x0 = to_float(data.images[filled].to(accelerator.device))
        x0 = x0 if recipe.channels_last else x0.contiguous()
        y = data.labels[filled].to(accelerator.device)
        with eval_mode(model), accelerator.autocast():
            x = pgd(model, x0, y, threat, generator, loss=loss, check=False)
            for index, images in enumerate((x0, x)):
                right = model(images.requires_grad_()).argmax(1) == y  # with a gradient it is the attack's program
                counts[index] += right[:len(chosen)].sum()
    clean, adversarial = (accelerator.reduce(counts, 'sum') / len(data)).tolist()
    return clean, adversarial


def accuracies(
        name: str, model: nn.Module, data: ImageSet, recipe: Recipe, accelerator: Accelerator,
        attack: str | None = None, between: Between | None = None) -> dict[str, float]:
    """Returns the result of `attacked_accuracy` as the entries of metrics.jsonl that begin with ``name``."""
    before = None if between is None else (lambda done: between(name, done, len(data)))
    clean, adversarial = attacked_accuracy(model, data, recipe, accelerator, attack, before)
    return {f'{name}_clean_accuracy': clean, f'{name}_adv_accuracy': adversarial}


def checked_images(data: object) -> ImageSet:
    """Returns the training images on which a one-step training is checked; they are in memory, by `config.check`."""
    assert isinstance(data, ImageSet), 'the program refuses other data sets with one-step training'
    return replace(data, images=data.images[:CHECKED_IMAGES], labels=data.labels[:CHECKED_IMAGES])
