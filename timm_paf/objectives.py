"""Training objectives: (model, x0, y, attack) -> loss, and the counts that metrics are made of.

The module also has the other parts of a training step that know neither optimizer nor processes: the penalty on PAFs,
adversarial weight perturbation, and a check for catastrophic overfitting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import kl_divergence

__all__ = [
    'OBJECTIVES', 'ONE_STEP', 'Attack', 'Loss', 'Objective', 'awp', 'correct', 'has_overfitted', 'ikl', 'mart',
    'paf_penalty', 'pgd_at', 'trades']

Attack = Callable[..., Tensor]
"""An attack: (x0, y, loss='ce') -> adversarial images like x0, with ``loss`` one of `losses.LOSSES`."""

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""What is minimised: (model, x0, y, attack, *, beta, label_smoothing, separate) -> loss and counts, as `pgd_at` and
`trades` describe them; `ikl` takes more."""


@dataclass(frozen=True)
class Objective:
    """A training objective.

    Args:
        loss: what is minimised.
        attack_loss: the loss that its attack maximises, one of `losses.LOSSES`.
        sees_clean: whether the loss takes clean images beside the adversarial ones.
        one_step: the step of an attack that has one step alone, in eps; None for PGD. Such training may collapse.
    """

    loss: Loss
    attack_loss: str = 'ce'
    sees_clean: bool = False
    one_step: Fraction | None = None


def correct(logits: Tensor, y: Tensor) -> Tensor:
    """Returns which labels are met, (batch,) bool; where they are probabilities, the largest one's class is meant."""
    return (logits.argmax(1) == (y.argmax(1) if y.ndim == 2 else y)).detach()


def _cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, y.float() if y.ndim == 2 else y, label_smoothing=label_smoothing)


def _clean_and_adv(model: nn.Module, x0: Tensor, x_adv: Tensor, separate: bool) -> tuple[Tensor, Tensor]:
    if separate:
        return model(x0).float(), model(x_adv).float()
    # DDP broadcasts BatchNorm's buffers in place before each forward pass, so that with two the backward pass of the
    # first fails (pytorch/pytorch issues 22095 and 175024), unless it is told not to.
    clean, adv = model(torch.cat([x0, x_adv])).float().chunk(2)
    return clean, adv


def pgd_at(
        model: nn.Module, x0: Tensor, y: Tensor, attack: Attack, *, beta: float = 6.0, label_smoothing: float = 0.0,
        separate: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the cross-entropy on adversarial images (Madry et al., https://arxiv.org/abs/1706.06083).

    Args:
        model: the network that is trained, in train mode; it runs forward once.
        x0: clean images (batch, channels, height, width) in [0, 1].
        y: (batch,) int64 labels, or (batch, classes) float probabilities.
        attack: makes the adversarial images.
        beta: weight of the robust term, at least 0; not used here.
        label_smoothing: share of the label's weight that is spread over all classes, in [0, 1]; not in the attack.
        separate: whether clean and adversarial images go in two forward passes; there is one here.

    Returns:
        The mean loss, a scalar with a graph, and which images were classified right, detached (batch,) bool:
        ``adv_correct``, and ``clean_correct`` where the objective sees the clean images anyway.
    """
    logits = model(attack(x0, y)).float()
    return _cross_entropy(logits, y, label_smoothing), {'adv_correct': correct(logits, y)}


def trades(
        model: nn.Module, x0: Tensor, y: Tensor, attack: Attack, *, beta: float = 6.0, label_smoothing: float = 0.0,
        separate: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns clean cross-entropy + beta KL(clean || adversarial) (Zhang et al., https://arxiv.org/abs/1901.08573).

    The attack maximises that divergence. Arguments and results are those of `pgd_at`; label smoothing is in the
    cross-entropy alone. BatchNorm sees clean and adversarial images as one batch, or as two where ``separate`` is true:
    first the clean ones, then the adversarial ones, as the authors' code does before a third pass of the clean ones,
    which has the same gradient.
    """
    clean, adv = _clean_and_adv(model, x0, attack(x0, y, loss='kl'), separate)
    loss = _cross_entropy(clean, y, label_smoothing) + beta * kl_divergence(adv, clean).mean()
    return loss, {'adv_correct': correct(adv, y), 'clean_correct': correct(clean, y)}


def mart(
        model: nn.Module, x0: Tensor, y: Tensor, attack: Attack, *, beta: float = 6.0, label_smoothing: float = 0.0,
        separate: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns boosted cross-entropy on adversarial images + beta KL(clean || adversarial) weighted by the clean doubt.

    Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
    https://openreview.net/forum?id=rklOg6EFwS: with p the probabilities of the adversarial and q of the clean images,
    BCE = -log p_y - log(1 - max of p_k, k not y), weight = 1 - q_y. As in the authors' code, with which the published
    numbers were made, the second logarithm is of 1.0001 - p and that of the divergence of p + 1e-12, so neither grows
    without bound where an image is hopeless. Arguments and results are those of `trades`. Where ``y`` are
    probabilities, y in BCE's second term is the class with the largest, and q_y is the mean of q under ``y``.
    """
    clean, adv = _clean_and_adv(model, x0, attack(x0, y), separate)
    label = (y.argmax(1) if y.ndim == 2 else y)[:, None]
    wrong = adv.detach().scatter(1, label, -torch.inf).argmax(1, keepdim=True)
    p, q = adv.softmax(1), clean.softmax(1)
    boost = -(1.0001 - p.gather(1, wrong).squeeze(1)).log()
    doubt = 1 - ((q * y).sum(1) if y.ndim == 2 else q.gather(1, label).squeeze(1))
    divergence = F.kl_div((p + 1e-12).log(), q, reduction='none').sum(1)
    loss = _cross_entropy(adv, y, label_smoothing) + (boost + beta * divergence * doubt).mean()
    return loss, {'adv_correct': correct(adv, y), 'clean_correct': correct(clean, y)}


def ikl(
        model: nn.Module, x0: Tensor, y: Tensor, attack: Attack, *, beta: float = 4.0, label_smoothing: float = 0.0,
        separate: bool = False, class_weights: Tensor | None = None, mse_weight: float = 20.0, temperature: float = 4.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns clean cross-entropy + the Improved Kullback-Leibler loss between clean and adversarial logits.

    Cui et al., "Decoupled Kullback-Leibler Divergence Loss", https://arxiv.org/abs/2305.13948, and the first version of
    their code: a KL divergence is a cross-entropy with soft labels and a squared error of the differences between
    logits, weighted by class probabilities. Here the error has a gradient through both logits, and its weights are
    those of the image's class in the epoch before. The attack maximises the divergence. Arguments and results are those
    of `trades`, and:

    Args:
        beta: weight of the cross-entropy with soft labels, the authors' alpha.
        class_weights: (classes, classes), row k the mean probabilities of class k; None for equal ones.
        mse_weight: weight of the squared error, the authors' beta.
        temperature: divides the logits whose probabilities are counted.

    Returns:
        Loss and counts, as `trades`; of the counts ``class_sums`` has in row k the summed probabilities of the clean
        images of class k.
    """
    clean, adv = _clean_and_adv(model, x0, attack(x0, y, loss='kl'), separate)
    classes = clean.shape[1]
    labels = (y if y.ndim == 2 else F.one_hot(y, classes)).to(clean.dtype)
    weights = torch.full_like(labels, 1 / classes) if class_weights is None else labels @ class_weights.to(clean.dtype)
    # The sum over pairs of classes, w_i w_j (d_i - d_j)^2 / 4, is half of a weighted variance of d.
    change, total = clean - adv, weights.sum(1, keepdim=True)
    mean = (weights * change).sum(1, keepdim=True) / total.clamp_min(1e-12)  # 0 of a class that no image was of
    error = 0.5 * total.squeeze(1) * (weights * (change - mean) ** 2).sum(1)
    soft = -(clean.detach().softmax(1) * adv.log_softmax(1)).sum(1)
    loss = _cross_entropy(clean, y, label_smoothing) + (mse_weight * error + beta * soft).mean()
    return loss, {'adv_correct': correct(adv, y), 'clean_correct': correct(clean, y),
                  'class_sums': labels.T @ (clean.detach() / temperature).softmax(1)}


OBJECTIVES = {
    'pgd-at': Objective(pgd_at),
    'trades': Objective(trades, 'kl', sees_clean=True),
    'mart': Objective(mart, sees_clean=True),
    'ikl': Objective(ikl, 'kl', sees_clean=True),
    # Wong et al., https://arxiv.org/abs/2001.03994
    'fgsm-rs': Objective(pgd_at, one_step=Fraction(5, 4)),
    # De Jorge et al., https://arxiv.org/abs/2202.01181, on the images of attacks.n_fgsm
    'n-fgsm': Objective(pgd_at, one_step=Fraction(1)),
}

ONE_STEP = {name: objective.one_step for name, objective in OBJECTIVES.items() if objective.one_step}
"""The objectives whose attack has one step, and its size in eps as their papers have it."""


@contextlib.contextmanager
def awp(model: nn.Module, loss_fn: Callable[[], Tensor], gamma: float = 0.005) -> Iterator[None]:
    """Perturbs the weights so that ``loss_fn`` is worse inside the block; afterwards they are the old, bit for bit.

    In this adversarial weight perturbation (Wu et al., https://arxiv.org/abs/2004.05884) every parameter with more than
    one dimension moves by gamma times its own norm along its gradient. Forward and backward of the training step belong
    inside, the optimizer's step after::

        with awp(network, lambda: F.cross_entropy(network(x_adv), y)):
            loss, counts = objective(model, x0, y, lambda *_, **__: x_adv)
            loss.backward()

    Gradients in ``.grad`` stay as they are, and so do the buffers of ``model`` under ``loss_fn``. With several
    processes the gradient is that of all of them, so that all hold the same weights.

    Args:
        model: the bare network, not a DDP wrapper, whose reducer expects a backward pass for each forward.
        loss_fn: the loss at the present weights, a scalar with a graph; its scale is of no importance, so scale it
            where half precision would lose small gradients.
        gamma: size of the move relative to each weight's norm, at least 0; the authors' code takes 0.005 for TRADES
            and 0.01 for PGD-AT.

    Raises:
        ValueError: if gamma is negative.
    """
    if not gamma >= 0:
        raise ValueError(f'gamma is {gamma}; expected at least 0')
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    buffers = [(b, b.clone()) for b in model.buffers()]
    try:
        with torch.enable_grad():
            grads = _summed_over_processes(torch.autograd.grad(loss_fn(), weights, materialize_grads=True))
    finally:
        _copy_back(buffers)
    kept = [(w, w.detach().clone()) for w in weights]
    try:
        with torch.no_grad():
            for w, grad in zip(weights, grads):
                w.add_(grad / grad.norm().clamp_min(torch.finfo(grad.dtype).tiny) * (gamma * w.norm()))
        yield
    finally:
        _copy_back(kept)


@torch.no_grad()
def _copy_back(kept: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in kept:
        tensor.copy_(before)


def _summed_over_processes(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the gradients summed over processes, in one message; for a direction the sum is as good as the mean."""
    distributed = torch.distributed
    alone = not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1
    if alone or not grads:
        return grads
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    return [part.view(grad.shape) for part, grad in zip(torch.split(flat, [grad.numel() for grad in grads]), grads)]


def has_overfitted(history: Sequence[tuple[float, float]]) -> bool:
    """Returns whether training with a one-step attack has collapsed: it withstands that attack, and hardly any other.

    Catastrophic overfitting (Wong et al., https://arxiv.org/abs/2001.03994, section 5.4) takes accuracy under
    multi-step PGD to about 0 within an epoch, while accuracy under the one-step attack stays or rises. The result is
    True if the last PGD accuracy is below half of the best so far and below half of the last one-step accuracy. Half is
    far from either state, also on noisy counts: a sound model keeps most of its one-step accuracy under PGD, slow
    ("robust") overfitting costs some percent of the best, and a collapsed model keeps next to nothing. The first
    condition leaves out models that never were robust, the second those that lost both, such as a run that diverged.

    Args:
        history: (accuracy under the one-step training attack, accuracy under multi-step PGD) on the same images after
            each epoch, oldest first; shares or percents.
    """
    if not history:
        return False
    one_step, multi_step = history[-1]
    return multi_step < max(accuracy for _, accuracy in history) / 2 and multi_step < one_step / 2


def paf_penalty(parameters: dict[str, nn.Parameter], weight: float) -> Tensor | float:
    """Returns ``weight`` times abs(beta), the paper's penalty (arXiv 2110.05626, section 4); 0 if no beta is learnable.

    Args:
        parameters: the result of `timm_paf.paf_parameters`.
        weight: factor of the penalty, at least 0.
    """
    return weight * sum(p.abs().sum() for name, p in parameters.items() if name.endswith('beta'))
