"""Accuracy on clean images, under PGD and under AutoAttack, with a verdict for every image.

AutoAttack: Croce, Hein, https://arxiv.org/abs/2003.01690, as the `autoattack` package runs it (or `pyautoattack`, which
`timm_paf.robustbench` puts in its place).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attacks import ThreatModel, budget_used, pgd
from .data import derive_seed

__all__ = ['AUTOATTACK', 'check_attacks', 'evaluate']

AUTOATTACK = ('apgd-ce', 'apgd-t', 'fab-t', 'square')
"""The attacks of AutoAttack's standard version, in its order."""

TOLERANCE = 1e-5
"""By which an attack of another package may pass eps or the box through rounding; ours are exact."""


def check_attacks(attacks: list[str]) -> None:
    """Check the names that `evaluate` takes, before any work.

    Raises:
        ValueError: for an unknown one.
        ModuleNotFoundError: for 'autoattack' without the package; the message says what to install.
    """
    for name in attacks:
        if name not in ('clean', 'autoattack') and not re.fullmatch(r'pgd-[1-9]\d*', name):
            raise ValueError(f'unknown attack {name!r}; expected clean, autoattack or pgd-N, such as pgd-50')
    if 'autoattack' in attacks:
        importlib.import_module('autoattack')


def evaluate(
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        attacks: list[str],
        batch_size: int = 250,
        seed: int = 0,
        progress: Callable[[str, int, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Attack every image and count those that stay right.

    Every adversarial image is classified anew and checked against eps and the [0, 1] box; one outside either is an
    error of the attack and raises. An image that is wrong without an attack counts as not robust.

    Args:
        model: images to logits, in eval mode, on the device of ``images``.
        images: (n, channels, height, width) float32 in [0, 1].
        labels: (n,) int64.
        threat: norm and eps; ``step`` is that of PGD.
        attacks: 'clean', 'pgd-N' (N steps, one random start), 'autoattack' (standard version).
        batch_size: images attacked together; part of what makes the numbers repeatable.
        seed: of every attack; batch by batch a function of it.
        progress: called with (attack, images done, robust so far, n).

    Returns:
        By attack: n, correct, accuracy, seconds, ``verdicts`` (a character per image, '1' right and '0' fooled), and
        for autoattack the accuracy after each of its parts and the warnings that it gave.

    Raises:
        ValueError: for an unknown attack, images outside [0, 1], or an attack that breaks its budget.
    """
    check_attacks(attacks)
    results = {}
    for attack in attacks:
        started = time.monotonic()
        verdicts: list[Tensor] = []
        extra: dict[str, Any] = {}
        before = 0
        for start in range(0, len(images), batch_size):
            x0, y = images[start:start + batch_size], labels[start:start + batch_size]
            if attack == 'clean':
                x = x0
            elif attack == 'autoattack':
                report = functools.partial(_report_part, progress, start, before, len(images))
                x = _autoattack(model, x0, y, threat, derive_seed(seed, start) % 2**31, extra, report)
            else:
                n_steps = int(attack.removeprefix('pgd-'))
                generator = torch.Generator(x0.device).manual_seed(derive_seed(seed, start, 1))
                x = pgd(model, x0, y, ThreatModel(threat.norm, threat.eps, threat.step, n_steps), generator)
            verdicts.append(_verdict(model, x0, x, y, threat, attack))
            before += int(verdicts[-1].sum())
            progress(attack, start + len(x0), before, len(images))
        right = torch.cat(verdicts)
        results[attack] = {
            'n': len(right), 'correct': int(right.sum()), 'accuracy': right.double().mean().item(),
            'seconds': round(time.monotonic() - started, 2),
            'verdicts': ''.join(str(int(v)) for v in right), **_summary(extra, len(right))}
    return results


def _report_part(
        progress: Callable[[str, int, int, int], None], done: int, before: int, total: int, part: str, robust: int,
) -> None:
    progress(part, done, before + robust, total)


@torch.no_grad()
def _verdict(model: nn.Module, x0: Tensor, x: Tensor, y: Tensor, threat: ThreatModel, attack: str) -> Tensor:
    """(batch,) bool on the CPU: right on the clean image and on the adversarial one, which is checked."""
    size = budget_used(x, x0, threat.norm).max().item()
    low, high = x.min().item(), x.max().item()
    if not (size <= float(threat.eps) + TOLERANCE and low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(f'{attack} gave images in [{low:.6f}, {high:.6f}] at {threat.norm} distance {size:.6f}; '
                         f'expected [0, 1] and at most {threat.eps}')
    return ((model(x).argmax(1) == y) & (model(x0).argmax(1) == y)).cpu()


class _PlainGradients(nn.Module):
    """The model, with input gradients in NCHW memory: AutoAttack views them as (batch, -1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: grad.contiguous())  # type: ignore[no-untyped-call]
        return self.model(x.contiguous(memory_format=torch.channels_last))


def _autoattack(
        model: nn.Module, x0: Tensor, y: Tensor, threat: ThreatModel, seed: int, extra: dict[str, Any],
        progress: Callable[[str, int], None]) -> Tensor:
    """The standard version on one batch, part after part on the images that the parts before left robust."""
    from autoattack import AutoAttack

    with torch.no_grad():
        robust = model(x0).argmax(1) == y
    x0 = x0.contiguous()
    x_adv = x0.clone()
    with _caught_warnings(extra.setdefault('flags', [])) as log_path:
        attack = AutoAttack(_PlainGradients(model).eval(), norm=threat.norm, eps=float(threat.eps), seed=seed,
                            version='standard', device=x0.device, log_path=log_path, verbose=False)
        for part in AUTOATTACK:
            progress(part, int(robust.sum()))
            if robust.any():
                left = robust.nonzero().squeeze(1)
                attack.attacks_to_run = [part]
                found = attack.run_standard_evaluation(x0[left], y[left], bs=len(left)).detach()
                with torch.no_grad():
                    fooled = model(found).argmax(1) != y[left]
                x_adv[left[fooled]] = found[fooled]
                robust[left[fooled]] = False
            extra.setdefault('after', {}).setdefault(part, 0)
            extra['after'][part] += int(robust.sum())
    return x_adv


@contextlib.contextmanager
def _caught_warnings(flags: list[str]) -> Iterator[str]:
    """A log file for AutoAttack, whose warnings are added to ``flags``; what it prints is dropped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'log'
        with contextlib.redirect_stdout(io.StringIO()):
            yield str(path)
        for line in path.read_text().splitlines() if path.exists() else ():
            flag = line.partition('Warning: ')[2]
            if flag and flag not in flags:
                flags.append(flag)


def _summary(extra: dict[str, Any], n: int) -> dict[str, Any]:
    if not extra:
        return {}
    after = {part: correct / n for part, correct in extra['after'].items()}
    flags = list(extra['flags'])
    # AutoAttack's own check of this compares its parts in one call; here each part has a call of its own
    gain = after['fab-t'] - after['square']
    if gain > 0.002:
        flags.append(f'Square, which sees no gradient, lowered the accuracy by {gain:.2%}: the gradients may be masked')
    return {'after': after, 'flags': flags}
