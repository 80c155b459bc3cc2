"""Runs AutoAttack part by part: the attacks of each of its versions, one on one batch.

Croce, Hein, https://arxiv.org/abs/2003.01690, as the `autoattack` package runs it (or `pyautoattack`, which
`timm_paf.robustbench` puts in its place).
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attacks import ThreatModel

__all__ = ['AUTOATTACK', 'autoattack_part', 'part_passes', 'targets_of', 'too_few_classes']

AUTOATTACK = {
    'autoattack': ('apgd-ce', 'apgd-t', 'fab-t', 'square'),
    'autoattack-plus': ('apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t'),
    'autoattack-rand': ('apgd-ce', 'apgd-dlr'),
    'apgd': ('apgd-ce', 'apgd-t')}
"""The attacks, in their order, of each version of AutoAttack: standard, plus and rand. 'apgd' is the first two of the
standard version alone, in a quarter of its time; it is not AutoAttack, and no submission takes it for that."""

_PASSES = {'apgd-ce': 200, 'apgd-dlr': 200, 'apgd-t': 1800, 'fab': 1100, 'fab-t': 2000, 'square': 4000}
_TIMES = {'autoattack': 1, 'apgd': 1, 'autoattack-plus': 5, 'autoattack-rand': 20}  # restarts, or averages over noise
_CLASSES = {'apgd-dlr': 3, 'apgd-t': 4}  # DLR compares three logits, its targeted form four
_STANDING = 0.4  # rough share of images that still stand: AutoAttack skips images that fell


def part_passes(version: str, part: str) -> float:
    """Returns about how many passes through the network, forward or back, a part takes per image right at first."""
    once = part in ('apgd-t', 'fab-t', 'square')  # these parts have one run in the plus version too
    return _STANDING * _PASSES[part] * (1 if once else _TIMES[version])


def too_few_classes(part: str, classes: int) -> str | None:
    """Returns why a part is not run on a network of so few classes, None where it is run."""
    compared = _CLASSES.get(part, 2)
    return f'its loss compares {compared} classes and the network has {classes}' if classes < compared else None


def targets_of(version: str, part: str, norm: str, classes: int) -> int | None:
    """Returns the number of target classes of a part: AutoAttack's own, at most all wrong ones; None if untargeted."""
    if part not in ('apgd-t', 'fab-t'):
        return None
    return min(5 if (part, norm) == ('apgd-t', 'L1') and version != 'autoattack-plus' else 9, classes - 1)


class _PlainGradients(nn.Module):
    """The model with input gradients in NCHW memory, because AutoAttack views them as (batch, -1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: grad.contiguous())  # type: ignore[no-untyped-call]
        return self.model(x.contiguous(memory_format=torch.channels_last))


def autoattack_part(
        model: nn.Module, x0: Tensor, y: Tensor, threat: ThreatModel, version: str, part: str, classes: int,
        seed: int, flags: list[str], random: bool = False) -> Tensor:
    """Attacks correctly classified images by one part of a version; its warnings are added to ``flags``.

    Args:
        model: maps images to logits, in eval mode.
        x0: images (batch, channels, height, width) in [0, 1], float32; batch at least 1.
        y: labels (batch,) int64.
        threat: norm and eps; its step and steps are not used.
        version: a key of `AUTOATTACK`.
        part: one of the attacks of the version, for which there are not `too_few_classes`.
        classes: the number of classes; a targeted attack has no more targets than wrong ones.
        seed: seed of AutoAttack.
        flags: list that warnings are added to.
        random: whether the network answers the same images otherwise another time, in the version rand. Every image is
            given to APGD then: AutoAttack looks once which images are right, before its first part, and a part that
            looked anew would leave out some of those.

    Returns:
        Images like ``x0``; those that are not adversarial are as they were, unless the network is random.
    """
    from autoattack import AutoAttack

    with _caught_warnings(flags) as log_path:
        attack = AutoAttack(_PlainGradients(model).eval(), norm=threat.norm, eps=float(threat.eps), seed=seed,
                            version=version.partition('-')[2] or 'standard', device=x0.device, log_path=log_path,
                            verbose=False)
        attack.attacks_to_run = [part]
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        if random:
            attack.attacks_to_run = []  # its checks alone
        found: Tensor = attack.run_standard_evaluation(x0.contiguous(), y, bs=len(x0)).detach()
        if random:
            attack.apgd.loss, attack.apgd.seed = part.removeprefix('apgd-'), attack.get_seed()
            found = attack.apgd.perturb(x0.contiguous(), y).detach()
    return found


@contextlib.contextmanager
def _caught_warnings(flags: list[str]) -> Iterator[str]:
    """Yields a log file for AutoAttack and adds the warnings in it to ``flags``; what AutoAttack prints is dropped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'log'
        with contextlib.redirect_stdout(io.StringIO()):
            yield str(path)
        for line in path.read_text().splitlines() if path.exists() else ():
            flag = line.partition('Warning: ')[2]
            # AutoAttack warns of the targeted loss where the other one is run, on three classes; parts that are not
            # defined do not come here.
            if flag and not flag.startswith('with only') and flag not in flags:
                flags.append(flag)
