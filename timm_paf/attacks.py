"""Threat models and projected gradient descent.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", https://arxiv.org/abs/1706.06083.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cycles import move_until_repeated
from .losses import LOSSES, TARGETED_LOSSES, image_gradient
from .modes import eval_mode
from .norms import NORMS, per_sample

__all__ = [
    'BN_MODES', 'STARTS', 'ThreatModel', 'as_threat', 'attack_mode', 'batch_norms', 'check_box', 'check_gradients',
    'frozen_view', 'n_fgsm', 'parse_fraction', 'pgd',
]


def parse_fraction(value: str | int | float | Fraction) -> Fraction:
    """Returns an exact number: '8/255' is eight 255ths and '0.031' is 31 thousandths, and so are the floats 8 / 255 and
    0.031.

    Raises:
        ValueError: if ``value`` is no number.
    """
    if isinstance(value, str) and (len(value) > 100 or re.search(r'[eE][+-]?0*[\d_]{4}', value)):
        raise ValueError(f'{value[:100]!r} is too long a number; expected one such as 8/255 or 0.5')
    try:
        number = Fraction(value)
        if isinstance(value, float):
            near = number.limit_denominator(1_000_000)
            number = near if float(near) == value else Fraction(str(value))
        float(number)
        return number
    except (ValueError, ZeroDivisionError, TypeError, OverflowError):
        shown = ' '.join(repr(value).split())[:100]
        raise ValueError(f'{shown} is not a number; expected one such as 8/255 or 0.5') from None


@dataclass(frozen=True)
class ThreatModel:
    """A threat model: the ball around an image in [0, 1] that the attacker may use, and how PGD searches it.

    Args:
        norm: 'Linf', 'L2' or 'L1', as RobustBench names them.
        eps: radius of the ball, kept as an exact fraction: '8/255' for Linf, '0.5' for L2, '12' for L1.
        step: size of a PGD step in the same norm; None is a quarter of eps, as 2/255 is of 8/255.
        steps: number of PGD steps; 0 leaves the images as they are.
        random_start: whether PGD begins at a point drawn uniformly from the ball, clipped to [0, 1].

    Raises:
        ValueError: for an unknown norm, a negative ``steps``, or a size that can't be meant, such as eps 8 in place of
            8/255.
    """

    norm: str = 'Linf'
    eps: Fraction = Fraction(8, 255)
    step: Fraction | None = None
    steps: int = 10
    random_start: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.norm, str) or self.norm not in NORMS:
            raise ValueError(f'unknown norm {self.norm!r}; expected one of {", ".join(NORMS)}')
        for name in ('eps', 'step'):
            given = getattr(self, name)
            value = self.eps / 4 if given is None and name == 'step' else parse_fraction(given)
            if value < 0 or (self.norm == 'Linf' and value > 1):
                hint = f'; images are in [0, 1], write {value}/255' if value > 1 else ''
                raise ValueError(f'{name} is {value}; expected between 0 and 1 for {self.norm}{hint}'
                                 if self.norm == 'Linf' else f'{name} is {value}; expected at least 0')
            object.__setattr__(self, name, value)
        if not isinstance(self.steps, Integral) or self.steps < 0:
            raise ValueError(f'steps is {self.steps!r}; expected a whole number, at least 0')

    def record(self) -> dict[str, str | int | bool]:
        """Returns the fields for JSON, with eps and step as exact fractions."""
        return {'norm': self.norm, 'eps': str(self.eps), 'step': str(self.step), 'steps': self.steps,
                'random_start': self.random_start}


def as_threat(threat: ThreatModel | Fraction | str | float) -> ThreatModel:
    """Returns a threat model: the given one, or that of an eps in Linf, such as '8/255'.

    Raises:
        ValueError: if it is neither.
    """
    return threat if isinstance(threat, ThreatModel) else ThreatModel(eps=parse_fraction(threat))


BN_MODES = ('eval', 'train-frozen', 'train')
"""Modes of BatchNorm in `pgd`: running statistics; batch statistics; batch statistics that update the running ones."""

STARTS = ('uniform', 'unclipped', 'normal')
"""Random starts of `pgd`: uniform in the ball and clipped to [0, 1]; the same without the clipping, which the first
step does; normal noise of standard deviation 0.001, as the code of TRADES begins, clipped by the first step too."""


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Returns every BatchNorm of a network, each once."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextlib.contextmanager
def attack_mode(model: nn.Module, bn: str = 'eval') -> Iterator[None]:
    """Puts a network in eval mode, BatchNorm as ``bn`` says; afterwards every module has its mode of before.

    Args:
        model: the network.
        bn: one of `BN_MODES`; 'train-frozen' puts BatchNorm's buffers back afterwards too.
    """
    norms = batch_norms(model)
    # The buffers are put back afterwards, because switching their update off by an attribute of BatchNorm would make
    # torch.compile compile another program.
    kept = [(b, b.clone()) for norm in norms for b in norm.buffers(False)] if bn == 'train-frozen' else []
    try:
        with eval_mode(model):
            for norm in norms:
                norm.train(bn != 'eval')
            yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


def frozen_view(model: nn.Module) -> nn.Module:
    """Returns the same network for attacks alone: in eval mode, without gradients of parameters, always up to date.

    Its parameters and buffers are those of ``model`` in memory, so it follows every update in place (an optimizer's
    step, BatchNorm's statistics, ``load_state_dict``), and a change of mode of either does not reach the other. That
    lets ``torch.compile`` make one program for the attack, which computes no gradient that nobody asks for. Call it
    inside of `eval_mode`, as attacks do, where a network may keep what it computed of its weights.

    Args:
        model: the network, on its device and in its memory format already; moving it later parts the two.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    with eval_mode(model):
        return copy.deepcopy(model, memo).requires_grad_(False)


def _check(
        threat: ThreatModel, x0: Tensor, y: Tensor, loss: str, targeted: bool, restarts: int, bn: str, start: str,
        stop_cycles: bool) -> None:
    for name, value, known in (('loss', loss, LOSSES), ('bn', bn, BN_MODES), ('start', start, STARTS)):
        if value not in known:
            raise ValueError(f'unknown {name} {value!r}; expected one of {", ".join(known)}')
    if stop_cycles and bn != 'eval':
        raise ValueError(f"stop_cycles wants images independent of their batch and bn is {bn!r}; expected 'eval'")
    if restarts < 1:
        raise ValueError(f'restarts is {restarts}; expected at least 1')
    if not threat.random_start and restarts > 1:
        raise ValueError(f'restarts is {restarts} and all would be the same; expected 1, or random_start=True')
    if targeted and loss not in TARGETED_LOSSES:
        raise ValueError(f'loss {loss!r} leads away from the clean output, to no target; expected one of '
                         f'{", ".join(TARGETED_LOSSES)}')
    if loss == 'kl' and not threat.random_start:
        raise ValueError("loss 'kl' has no gradient at the clean images; expected random_start=True")
    if not x0.is_floating_point():
        raise ValueError(f'images are {x0.dtype}; expected float in [0, 1]')
    if (y.dtype != torch.long and not y.is_floating_point()) or y.ndim != 1 + y.is_floating_point() or (
            len(y) != len(x0)):
        raise ValueError(f'labels are {y.dtype} of shape {tuple(y.shape)} for {len(x0)} images; expected int64 '
                         '(batch,), or probabilities, float (batch, classes)')
    check_gradients()


def check_gradients() -> None:
    """Raises ValueError under ``torch.inference_mode()``, whose tensors no gradient reaches."""
    if torch.is_inference_mode_enabled():
        raise ValueError('torch.inference_mode() keeps no gradients, which an attack needs; expected torch.no_grad()')


def check_box(x0: Tensor) -> None:
    """Checks that images are in [0, 1], for which the host waits for the device.

    Raises:
        ValueError: if one is not.
    """
    low, high = (bound.item() for bound in torch.aminmax(x0)) if x0.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(f'images span [{low:.4g}, {high:.4g}]; expected [0, 1]: divide by 255, without mean and std')


def _check_labels(y: Tensor, classes: int) -> None:
    """Raises ValueError for labels of no class, which on a GPU would end all work of the process."""
    low, high = (int(y.min()), int(y.max())) if y.ndim == 1 and len(y) else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(f'labels span [{low}, {high}]; the network has {classes} classes: expected [0, {classes - 1}]')


def pgd(
        model: nn.Module,
        x0: Tensor,
        y: Tensor,
        threat: ThreatModel | str,
        generator: torch.Generator | None = None,
        *,
        loss: str = 'ce',
        targeted: bool = False,
        restarts: int = 1,
        bn: str = 'eval',
        start: str = 'uniform',
        check: bool = True,
        stop_cycles: bool = False,
) -> Tensor:
    """Returns adversarial images that maximise a loss, by projected gradient ascent.

    The model keeps its parameters, their gradients, its buffers and the mode of every module, also if it raises.

    Args:
        model: maps images to logits (batch, classes); the bare network, not a DDP wrapper.
        x0: clean images (batch, channels, height, width), float, in [0, 1].
        y: (batch,) int64 labels, or (batch, classes) float probabilities, of which all but 'ce' take the largest.
        threat: norm, eps, step size, number of steps and random start; or an eps in Linf, such as '8/255', for ten
            steps of a quarter of it.
        generator: source of the random start, on the device of ``x0``; None is torch's global one.
        loss: one of `LOSSES`: 'ce' cross-entropy; 'cw' margin between the logits of the best wrong class and ``y``;
            'dlr' that margin over the spread of the three largest logits; 'kl' divergence from the model's own output
            for ``x0``, which needs no labels but a random start.
        targeted: whether ``y`` is the class to reach; the loss is then minimised, and 'dlr' is the targeted DLR.
        restarts: number of attacks, each from a random start of its own. For each sample a result that is misclassified
            (targeted: classified as ``y``) is preferred, and among equals the one with the highest loss (targeted:
            lowest).
        bn: one of `BN_MODES`, for BatchNorm alone; all other modules are in eval mode. 'eval' takes the running
            statistics, 'train-frozen' those of the batch; 'train' takes those of the batch too and updates the running
            ones in every forward pass of the attack, the one change of the model that stays.
        start: one of `STARTS`, where the threat model has a random start.
        check: whether to check images, to be in [0, 1], and labels, once there are logits; the host waits for both.
        stop_cycles: whether an image leaves the batch once its iterates repeat, when all that come are known; for this
            too the host waits. The images that come out are the same (Doldo et al., https://arxiv.org/abs/2503.19347),
            unless rounding in the network depends on how many there are. Nothing is left out where the network is
            found to answer an image otherwise in another batch or another time.

    Returns:
        Images like ``x0``, detached, in [0, 1] and within ``threat.eps`` of it, sample by sample.

    Raises:
        ValueError: if an image or a label is outside its range, or for arguments that do not fit together.
    """
    threat = as_threat(threat)
    _check(threat, x0, y, loss, targeted, restarts, bn, start, stop_cycles)
    if check:
        check_box(x0)
    assert threat.step is not None
    to_check = check and loss != 'kl'  # which needs no labels
    norm, eps, step = NORMS[threat.norm], float(threat.eps), float(threat.step)
    x = x0 = x0.detach()
    if not threat.steps or not eps:
        return x.clone()
    measure = TARGETED_LOSSES[loss] if targeted else LOSSES[loss]
    labels = y.argmax(1) if y.ndim == 2 else y
    target = y.float() if loss == 'ce' and y.ndim == 2 else labels

    def forward(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal to_check
        # The forward pass always has a graph: to torch.compile one without a graph is another program.
        logits = model(x).float()
        if to_check:
            _check_labels(y, logits.shape[1])
            to_check = False
        losses = measure(logits, target)
        return logits, -losses if targeted else losses

    def move(x: Tensor, x0: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits, losses = forward(x, target)
            grad = image_gradient(losses, logits, x)
        with torch.no_grad():
            return norm.project(x + norm.step(grad, x, step), x0, eps).clamp(0, 1), losses.detach()

    best: tuple[Tensor, Tensor, Tensor] | None = None
    with attack_mode(model, bn):
        if loss == 'kl':
            with torch.enable_grad():
                target = model(x0.clone().requires_grad_()).float().detach()
        for _ in range(restarts):
            x = x0
            if threat.random_start and start == 'normal':
                x = x0 + 0.001 * torch.empty_like(x0).normal_(generator=generator)
            elif threat.random_start:
                x = norm.start(x, eps, generator)
                x = norm.project(x, x0, eps).clamp(0, 1) if start == 'uniform' else x
            if stop_cycles:
                x = move_until_repeated(move, x, x0, target, threat.steps)
            else:
                for _ in range(threat.steps):
                    x = move(x, x0, target)[0]
            if restarts > 1:
                with torch.enable_grad():
                    logits, losses = forward(x.requires_grad_(), target)
                found = x.detach(), losses.detach(), (logits.argmax(1) == labels) == targeted
                best = found if best is None else _better(best, found)
    return x.detach() if best is None else best[0]


def n_fgsm(
        model: nn.Module, x0: Tensor, y: Tensor, threat: ThreatModel | str, generator: torch.Generator | None = None, *,
        bn: str = 'eval', label_smoothing: float = 0.0, check: bool = True) -> Tensor:
    """Returns the training images of N-FGSM: noise, then one signed step of the cross-entropy, clipped to [0, 1] alone.

    De Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training",
    https://arxiv.org/abs/2202.01181: the noise is uniform in [-2 eps, 2 eps], and nothing brings the images back into
    the ball, so they may be 2 eps + step away from the clean ones. Arguments and the state that the model is left in
    are those of `pgd`; of ``threat`` it takes eps and step, the paper's alpha, which is eps where an eps alone is
    given. With ``label_smoothing`` the cross-entropy is that of the training, as in the FastAT benchmark
    (https://arxiv.org/abs/2604.22853).
    """
    if not isinstance(threat, ThreatModel):
        threat = ThreatModel(eps=parse_fraction(threat), step=parse_fraction(threat))
    if threat.norm != 'Linf':
        raise ValueError(f'the norm is {threat.norm}; expected Linf for n_fgsm')
    _check(threat, x0, y, 'ce', False, 1, bn, 'uniform', False)
    if check:
        check_box(x0)
    noise = torch.empty_like(x0).uniform_(-2 * float(threat.eps), 2 * float(threat.eps), generator=generator)
    x = (x0.detach() + noise).clamp(0, 1).requires_grad_()
    with attack_mode(model, bn), torch.enable_grad():
        logits = model(x).float()
        if check:
            _check_labels(y, logits.shape[1])
        losses = F.cross_entropy(logits, y.float() if y.ndim == 2 else y, reduction='none',
                                 label_smoothing=label_smoothing)
        grad = image_gradient(losses, logits, x)
    assert threat.step is not None
    with torch.no_grad():
        return (x + float(threat.step) * grad.sign()).clamp(0, 1)


def _better(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the better of two (images, losses, fooled) sample by sample: first what fools, then the higher loss."""
    (x_a, losses_a, fooled_a), (x_b, losses_b, fooled_b) = a, b
    wins = (fooled_b & ~fooled_a) | ((fooled_b == fooled_a) & (losses_b > losses_a))
    return (torch.where(per_sample(wins, x_a), x_b, x_a), torch.where(wins, losses_b, losses_a), fooled_a | fooled_b)
