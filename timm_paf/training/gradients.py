"""The gradients of a batch: the images of its attack through the objective, part by part, and what is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..modes import eval_mode
from ..objectives import OBJECTIVES, Attack, awp, correct, paf_penalty
from .metrics import all_sums, resumed_sums
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['BatchGradients']


class BatchGradients:
    """Adds the gradients of a batch to a network, and counts into the sums of an epoch what it sees on the way.

    Args:
        recipe: says objective, parts and AWP.
        accelerator: runs backward passes, and reduces over processes.
        unwrapped: the bare network.
        model: the network as ``accelerator`` prepared it.
        trained: ``model`` as it is run, compiled or not.
        pafs: the PAFs' values, for the penalty.
        attack: makes the adversarial images.

    Attributes:
        class_weights: (classes, classes) float64, by which IKL weighs its error: row k has the mean probabilities of
            class k in the epoch before; None in the first, and for other objectives.
        class_sums: 'sums' has in row k the probabilities of class k, summed over this process and epoch; {} at first.
    """

    def __init__(
            self, recipe: Recipe, accelerator: Accelerator, unwrapped: nn.Module, model: nn.Module, trained: nn.Module,
            pafs: dict[str, nn.Parameter], attack: Attack):
        self.recipe, self.accelerator, self.attack, self.pafs = recipe, accelerator, attack, pafs
        self.unwrapped, self.model, self.trained = unwrapped, model, trained
        # A forward pass in train mode that has no backward pass takes a network without DDP, which would wait for it.
        self.bare = trained if accelerator.num_processes == 1 else unwrapped
        self.class_weights: Tensor | None = None
        self.class_sums: dict[str, Tensor] = {}

    def add(self, x0: Tensor, y: Tensor, sums: dict[str, Tensor], perturbs: bool) -> tuple[Tensor, bool]:
        """Adds the gradients of a batch, part by part, and its counts to ``sums``.

        Args:
            x0: clean images (batch, channels, height, width) in [0, 1].
            y: labels (batch,), or probabilities (batch, classes).
            sums: sums as `metrics.zero_sums` makes them.
            perturbs: whether the gradients are taken at weights that AWP perturbed.

        Returns:
            The loss without the penalty, and whether clean images are counted in this step.
        """
        accelerator, recipe = self.accelerator, self.recipe
        total = torch.zeros((), device=accelerator.device)
        parts = list(zip(x0.chunk(recipe.accumulate), y.chunk(recipe.accumulate)))
        for index, (x_part, y_part) in enumerate(parts):
            # The penalty does not depend on the images, so it is added once.
            penalty = paf_penalty(self.pafs, recipe.paf_penalty) if index == 0 else 0.0
            with contextlib.ExitStack() as stack:
                if index + 1 < len(parts):
                    stack.enter_context(accelerator.no_sync(self.model))
                attack = self._perturb_weights(stack, x_part, y_part) if perturbs else self.attack
                loss, counts = self._objective(self.trained, x_part, y_part, attack)
                loss = loss * (len(y_part) / len(y))
                accelerator.backward(loss + penalty)
            total += loss.detach()
            attacked = counts['adv_correct'][round(recipe.clean_ratio * len(y_part)):]  # the first ones stayed clean
            sums['adv_correct'] += attacked.sum()
            sums['adv_images'] += len(attacked)
            if 'class_sums' in counts:
                self.class_sums['sums'] = self.class_sums.get('sums', 0) + counts['class_sums'].double()
            if 'clean_correct' in counts and recipe.clean_pass == 'none':
                sums['clean_correct'] += counts['clean_correct'].sum()
                sums['clean_images'] += len(y_part)
        return total, 'clean_correct' in counts or recipe.clean_pass != 'none'

    def _objective(self, model: nn.Module, x0: Tensor, y: Tensor, attack: Attack) -> tuple[Tensor, dict[str, Tensor]]:
        recipe = self.recipe
        ikl_options = {'class_weights': self.class_weights, 'mse_weight': recipe.ikl_mse,
                       'temperature': recipe.ikl_temperature} if recipe.objective == 'ikl' else {}
        return OBJECTIVES[recipe.objective].loss(
            model, x0, y, attack, beta=recipe.robust_weight, label_smoothing=recipe.label_smoothing,
            separate=recipe.separate_forwards, **ikl_options)

    def _perturb_weights(self, stack: contextlib.ExitStack, x0: Tensor, y: Tensor) -> Callable[..., Tensor]:
        """Enters AWP for these images; returns an attack that gives the images made on the weights of before."""
        # They are made first, because AWP puts the statistics of BatchNorm back that an attack in train mode updates.
        made = self.attack(x0, y, OBJECTIVES[self.recipe.objective].attack_loss)

        def attack(x0: Tensor, y: Tensor, loss: str = 'ce') -> Tensor:
            return made

        stack.enter_context(awp(self.unwrapped, lambda: self._objective(self.bare, x0, y, attack)[0], self.recipe.awp))
        return attack

    def show_clean(self, x0: Tensor, y: Tensor, sums: dict[str, Tensor]) -> None:
        """Shows BatchNorm the clean images in train mode, and counts how many are classified right."""
        for images, labels in zip(x0.chunk(self.recipe.accumulate), y.chunk(self.recipe.accumulate)):
            with self.accelerator.autocast():  # with a graph it is the program of the training's forward pass
                sums['clean_correct'] += correct(self.bare(images), labels).sum()
        sums['clean_images'] += len(y)

    @torch.no_grad()
    def count_clean(self, network: nn.Module, x0: Tensor, y: Tensor, sums: dict[str, Tensor]) -> None:
        """Counts how many clean images a network in eval mode classifies right."""
        with eval_mode(network), self.accelerator.autocast():
            sums['clean_correct'] += correct(network(x0), y).sum()
        sums['clean_images'] += len(y)

    def end_epoch(self) -> None:
        """Makes of the class sums of all processes the weights of the next epoch. Every process must call it."""
        if self.class_sums:
            seen = all_sums(self.class_sums, self.accelerator)['sums']
            self.class_weights, self.class_sums = seen / seen.sum(1, keepdim=True).clamp_min(1e-12), {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs beside weights; {} where there is nothing. Every process must call it."""
        return {'class_weights': self.class_weights, 'class_sums': all_sums(self.class_sums, self.accelerator)} if (
            self.recipe.objective == 'ikl') else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the entries of `state_dict`."""
        weights = state.get('class_weights')
        self.class_weights = None if weights is None else weights.to(self.accelerator.device)
        self.class_sums = resumed_sums(state.get('class_sums', {}), self.accelerator)
