"""The average of the weights over a run, which is then its result."""

from __future__ import annotations

import math

from timm.utils import ModelEmaV3
from torch import nn

from .optimization import rising_steps
from .recipe import Recipe

__all__ = ['WeightAverage']


class WeightAverage(ModelEmaV3):  # type: ignore[misc]
    """An exponential moving average of a network, or an equal one of the ends of its epochs; ``module`` holds it.

    The decay is a function of the step, so the weights are all that a checkpoint needs:

    - 'power': timm's warm-up, min(ema, 1 - step^(-2/3));
    - 'ratio': 0 while the learning rate rises, then min(ema, (1 + d) / (10 + d)) at d steps after that (Gowal et al.,
      https://arxiv.org/abs/2010.03593, in the code of Wang et al. 2023);
    - 'none': ema from the second step on; the first step's weights begin the average;
    - stochastic weight averaging (Izmailov et al., https://arxiv.org/abs/1803.05407) counts the end of each epoch from
      the ``swa``-th on alike; before that the module has the weights of the last end.

    Args:
        recipe: says the decay, and whether BatchNorm's statistics are averaged or copied.
        model: the network.
        steps_per_epoch, total_steps: numbers of optimizer steps.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, steps_per_epoch: int, total_steps: int):
        super().__init__(model, decay=recipe.ema, use_warmup=recipe.ema_warmup == 'power',
                         exclude_buffers=recipe.ema_bn == 'copy')
        self.recipe, self.steps_per_epoch, self.total_steps = recipe, steps_per_epoch, total_steps
        self.rising = rising_steps(recipe, steps_per_epoch, total_steps)

    def get_decay(self, step: int) -> float:
        """Returns the weight of the average so far after a number of optimizer steps."""
        if self.recipe.swa:
            before = max(math.ceil(step / self.steps_per_epoch) - self.recipe.swa, 0)
            return before / (before + 1)
        if self.recipe.ema_warmup == 'ratio':
            since = step - self.rising
            return min(self.recipe.ema, (1 + since) / (10 + since)) if since >= 0 else 0.0
        return float(super().get_decay(step))

    def update(self, model: nn.Module, step: int) -> None:
        """Adds the weights after a number of optimizer steps."""
        if not (self.recipe.swa and step % self.steps_per_epoch and step != self.total_steps):
            super().update(model, step)
