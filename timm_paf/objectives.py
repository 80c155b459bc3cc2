"""Training objectives: (model, x0, y, attack) -> loss, and the counts that metrics are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['Attack', 'paf_penalty', 'pgd_at']

Attack = Callable[[Tensor, Tensor], Tensor]
"""(x0, y) -> adversarial images like x0."""


def pgd_at(model: nn.Module, x0: Tensor, y: Tensor, attack: Attack) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy on adversarial images (Madry et al., https://arxiv.org/abs/1706.06083).

    Args:
        model: what is trained, in train mode; it runs forward once.
        x0: (batch, channels, height, width) in [0, 1].
        y: (batch,) int64 labels.
        attack: makes the adversarial images.

    Returns:
        The mean loss, a scalar with a graph, and detached counts: ``adv_correct``.
    """
    x_adv = attack(x0, y)
    logits = model(x_adv).float()
    return F.cross_entropy(logits, y), {'adv_correct': (logits.argmax(1) == y).sum().detach()}


def paf_penalty(parameters: dict[str, nn.Parameter], weight: float) -> Tensor | float:
    """``weight`` times abs(beta), the paper's penalty (arXiv 2110.05626, section 4); 0 without a learnable beta.

    Args:
        parameters: what `timm_paf.paf_parameters` gives.
    """
    return weight * sum(p.abs().sum() for name, p in parameters.items() if name.endswith('beta'))
