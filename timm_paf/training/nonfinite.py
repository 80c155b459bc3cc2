"""Stops a training run before a loss or gradient that is not finite reaches a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sharding import gather

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

__all__ = ['NonFiniteGuard', 'NonFiniteLoss']


class NonFiniteLoss(ArithmeticError):
    """The error of a loss or gradient that is nan or inf; the weights are still those before that step."""


class NonFiniteGuard:
    """A guard that looks at loss and gradients on the device, so that the host need not wait for each step.

    From the first bad step on the optimizer leaves the weights alone, by the flag that GradScaler uses to tell a fused
    optimizer to skip a step; with an optimizer that does not know the flag, the host looks at every step.

    Args:
        accelerator: reduces over processes, and has the scaler of fp16.
        optimizer: the optimizer that skips steps.
        parameters: the parameters, by name, that have the gradients to look at.
    """

    def __init__(
            self, accelerator: Accelerator, optimizer: AcceleratedOptimizer, parameters: Mapping[str, Tensor]) -> None:
        self.accelerator, self.optimizer, self.parameters = accelerator, optimizer, parameters
        self._skip_flag = bool(optimizer.optimizer.defaults.get('fused'))
        # 4 times the first step that was not finite, plus 1 for its loss or 2 for its gradient; 0 while there is none.
        self._nonfinite_step = torch.zeros((), dtype=torch.int64, device=accelerator.device)

    def skip_if_nonfinite(self, loss: Tensor, step: int, steps_per_epoch: int) -> None:
        """Makes the coming optimizer step, and all later ones, leave the weights alone if this step is not finite.

        Args:
            loss: the loss of the step, a scalar.
            step: number of the step, from 0.
            steps_per_epoch: number of steps in an epoch, for the message.

        Raises:
            NonFiniteLoss: if the step is not finite and the optimizer knows no flag.
        """
        scaler = self.accelerator.scaler
        wrong = [~torch.isfinite(loss)]
        if scaler is None:  # the scaler of fp16 lowers its scale and skips a step with such a gradient
            grads = [p.grad for p in self.parameters.values() if p.grad is not None]
            wrong.append(~torch.isfinite(gather(torch.nn.utils.get_total_norm(grads))))
        found = torch.stack(wrong).float()
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, 'sum')
        kind = torch.where(found[0] > 0, 1, torch.where(found[-1] > 0, 2, 0))
        now = torch.where(kind > 0, 4 * step + kind, 0)
        self._nonfinite_step = torch.where(self._nonfinite_step > 0, self._nonfinite_step, now)
        if not self._skip_flag or scaler is not None:  # the scaler's flag is for one step alone
            self.check(steps_per_epoch)
        else:
            self.optimizer.optimizer.found_inf = (self._nonfinite_step > 0).float()

    def check(self, steps_per_epoch: int) -> None:
        """Raises `NonFiniteLoss` if a step so far was not finite; the host waits for the device."""
        step, kind = divmod(int(self._nonfinite_step.item()), 4)
        if kind:
            what = 'loss' if kind == 1 else 'gradient'
            raise NonFiniteLoss(f'step {step} (epoch {step // steps_per_epoch}): the {what} is not finite')
