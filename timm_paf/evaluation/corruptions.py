"""Measures accuracy on images under common corruptions, as RobustBench's `corruptions` boards do."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import derive_seed, to_float
from ..data.corrupted import CORRUPTIONS, SEVERITIES, CorruptedImages
from .classified import classified_right
from .state import PartResult, State, WorkItem

__all__ = ['CorruptionEvaluation']

CHUNK = 250
"""Images of an item of work, whatever the batch size, on which the SHA-256 of generated images then does not depend."""


@dataclass
class CorruptionEvaluation:
    """An evaluation on corrupted images, `CHUNK` by `CHUNK`, each result kept before the next is begun.

    Args:
        model: maps images to logits, in eval mode, on ``device``.
        images: the corrupted images and their labels.
        state: where results are kept.
        device: where the network is.
        batch_size: images classified together.
    """

    model: nn.Module
    images: CorruptedImages
    state: State
    device: torch.device
    batch_size: int = 250

    def work(self) -> list[WorkItem]:
        """Returns all items of work: a corruption, its severity, and the first image of a chunk."""
        return [(name, str(severity), start) for name in CORRUPTIONS
                for severity in SEVERITIES for start in range(0, len(self.images), CHUNK)]

    def run(self) -> Iterator[None]:
        """Does the work that nobody has done or is doing, and waits for the rest; yields whenever there may be news."""
        return self.state.share(self.work(), self._do)

    def _do(self, work: WorkItem) -> PartResult:
        started = time.monotonic()
        corruption, severity, start = work
        images = self.images.read(corruption, int(severity), start, min(start + CHUNK, len(self.images)))
        torch.manual_seed(derive_seed(start, int(severity)))  # for a network that is random itself
        labels = self.images.labels[start:start + len(images)]
        right = torch.cat([
            classified_right(self.model, to_float(x.to(self.device)), y.to(self.device))
            for x, y in zip(torch.split(images, self.batch_size), torch.split(labels, self.batch_size))])
        digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
        return PartResult(right.cpu(), torch.empty(0, dtype=torch.long), torch.empty(0),
                          time.monotonic() - started, [digest])

    def result(self) -> dict[str, Any]:
        """Returns the section of the record, once all work is done.

        Returns:
            ``accuracy``, the mean over corruptions and severities in [0, 1]; ``n``, images of each; ``by`` corruption
            the accuracies of severities 1 to 5; ``seconds`` of all processes together; and what the images depend on:
            ``generated``, ``data_sha256``, and of generated ones, whose ``data_sha256`` is that of the SHA-256 of each
            chunk, ``seed`` and ``versions``.
        """
        found = {work: self.state.load(work) for work in self.work()}
        by = {name: [torch.cat([result.right for work, result in found.items() if work[:2] == (name, str(severity))])
                     .double().mean().item() for severity in SEVERITIES] for name in CORRUPTIONS}
        means = torch.tensor(list(by.values()), dtype=torch.float64)
        made = hashlib.sha256(''.join(flag for result in found.values() for flag in result.flags).encode()).hexdigest()
        return {'accuracy': means.mean().item(), 'n': len(self.images), 'data_sha256': made, **self.images.about,
                'by': by, 'seconds': round(sum(result.seconds for result in found.values()), 2)}
