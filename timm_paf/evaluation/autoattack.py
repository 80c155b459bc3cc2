"""AutoAttack part by part: the attacks of each of its versions, one on one batch.

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

__all__ = ['AUTOATTACK', 'autoattack_part', 'part_passes']

AUTOATTACK = {
    'autoattack': ('apgd-ce', 'apgd-t', 'fab-t', 'square'),
    'autoattack-plus': ('apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t'),
    'autoattack-rand': ('apgd-ce', 'apgd-dlr'),
    'apgd': ('apgd-ce', 'apgd-t')}
"""The versions of AutoAttack, standard, plus and rand, and the attacks of each in its order; and the first two of the
standard version alone, a quarter of its time: not AutoAttack, and no submission takes it for that."""

_PASSES = {'apgd-ce': 200, 'apgd-dlr': 200, 'apgd-t': 1800, 'fab': 1100, 'fab-t': 2000, 'square': 4000}
_TIMES = {'autoattack': 1, 'apgd': 1, 'autoattack-plus': 5, 'autoattack-rand': 20}  # restarts, or averages over noise
_STANDING = 0.4  # of the images, about: AutoAttack leaves those that fell alone


def part_passes(version: str, part: str) -> float:
    """Through the network, forward or back, about and per image of those that were right at first."""
    once = part in ('apgd-t', 'fab-t', 'square')  # in the plus version too
    return _STANDING * _PASSES[part] * (1 if once else _TIMES[version])


class _PlainGradients(nn.Module):
    """The model, with input gradients in NCHW memory: AutoAttack views them as (batch, -1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: grad.contiguous())  # type: ignore[no-untyped-call]
        return self.model(x.contiguous(memory_format=torch.channels_last))


def autoattack_part(
        model: nn.Module, x0: Tensor, y: Tensor, threat: ThreatModel, version: str, part: str, seed: int,
        flags: list[str]) -> Tensor:
    """What one part of a version makes of images that are right; its warnings are added to ``flags``.

    Args:
        model: images to logits, in eval mode.
        x0: (batch, channels, height, width) in [0, 1], float32; batch at least 1.
        y: (batch,) int64.
        threat: norm and eps.
        version: a key of `AUTOATTACK`.
        part: one of its attacks.
        seed: AutoAttack's own.
        flags: list to add to.

    Returns:
        Images like ``x0``; those that are not adversarial are as they were.
    """
    from autoattack import AutoAttack

    with _caught_warnings(flags) as log_path:
        attack = AutoAttack(_PlainGradients(model).eval(), norm=threat.norm, eps=float(threat.eps), seed=seed,
                            version=version.partition('-')[2] or 'standard', device=x0.device, log_path=log_path,
                            verbose=False)
        attack.attacks_to_run = [part]
        found: Tensor = attack.run_standard_evaluation(x0.contiguous(), y, bs=len(x0)).detach()
    return found


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
