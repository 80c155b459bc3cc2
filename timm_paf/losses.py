"""The losses of attacks, by sample, and their gradient by the images."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['LOSSES', 'TARGETED_LOSSES', 'image_gradient', 'kl_divergence', 'margin']


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Returns by how much the best wrong class wins (Carlini & Wagner, https://arxiv.org/abs/1608.04644), unbounded."""
    right = y[:, None]
    return logits.scatter(1, right, -torch.inf).amax(1) - logits.gather(1, right).squeeze(1)


def _dlr(logits: Tensor, y: Tensor, ranks: int = 3) -> Tensor:
    """Returns the margin in units of the logits' spread: Croce & Hein, https://arxiv.org/abs/2003.01690.

    The targeted loss has ``ranks`` 4. The margin of the paper is then between the target and the true class, which is
    the best class while the model is right.
    """
    if logits.shape[1] < ranks:
        raise ValueError(f"loss 'dlr' compares {ranks} classes and the model has {logits.shape[1]}; use 'cw'")
    top = logits.topk(ranks).values
    return margin(logits, y) / (top[:, 0] - top[:, 2:].mean(1) + 1e-12)


def kl_divergence(logits: Tensor, clean: Tensor) -> Tensor:
    """Returns KL(clean || attacked) by sample: Zhang et al. (TRADES), https://arxiv.org/abs/1901.08573.

    Args:
        logits: logits of the attacked images, (batch, classes).
        clean: logits of the clean images, (batch, classes).

    Returns:
        (batch,) divergences in nats.
    """
    return F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction='none', log_target=True).sum(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'ce': functools.partial(F.cross_entropy, reduction='none'), 'cw': margin, 'dlr': _dlr, 'kl': kl_divergence}
"""The losses that `pgd` maximises: (logits (batch, classes), labels, or for 'kl' the clean logits) -> (batch,)."""

TARGETED_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'ce': LOSSES['ce'], 'cw': margin, 'dlr': functools.partial(_dlr, ranks=4)}
"""The losses that `pgd` minimises if the labels are targets."""


def image_gradient(losses: Tensor, logits: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of the sum of the losses by the images; in float16 each image's has a scale of its own.

    With a sum a sample's gradient does not depend on its batch, and a step ignores the scale. What a confident network
    gives, as small as the probability of a wrong class, would be 0 in float16 (below 6e-8): there each sample begins
    with a gradient between 1/2 and 1 at the logits, by a power of two, which rounds nothing.
    """
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if (torch.get_autocast_dtype(kind) if autocast else x.dtype) != torch.float16:
        return torch.autograd.grad(losses.sum(), x)[0]
    at_logits, = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    exponent = torch.frexp(at_logits.abs().amax(1, keepdim=True)).exponent.clamp(-126, 126)
    return torch.autograd.grad(logits, x, torch.ldexp(at_logits, -exponent))[0]
