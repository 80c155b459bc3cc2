"""The checks for masked gradients beside an evaluation, and the networks that their transfer attacks are made on."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from timm_paf.data import ImageSet
from timm_paf.evaluation import AUTOATTACK, Evaluation
from timm_paf.evaluation.masking import masking_report
from timm_paf.plots import plot_masking
from timm_paf.weights import list_weights

from .sources import load, to_device

PICTURE = 'masking.png'
MASKING_IMAGES = 256
"""Number of images, the first of those attacked, for the masking checks; masking shows on few."""


class Source(NamedTuple):
    """A network that transfer attacks are made on, on its device, and its facts for the record."""

    network: nn.Module
    about: dict[str, str]


def transfer_sources(args: argparse.Namespace, data: ImageSet, sha256: str) -> dict[str, Source]:
    """Returns the networks for transfer attacks by name: the one that the user gives, whose name is '', and every other
    one in the package that was trained on the same data set.

    Args:
        args: the options of the program.
        data: the images that are attacked.
        sha256: that of the weights that are evaluated, which are not among those of the package.

    Raises:
        ValueError, FileNotFoundError: if the network that the user gives can't be had or does not fit.
    """
    names = {'': args.transfer_from} if args.transfer_from else {}
    names |= {re.sub(r'[^\w.]', '_', weights.bundle.name): str(weights.bundle) for weights in list_weights()
              if weights.bundle and weights.dataset == data.name}
    found: dict[str, Source] = {}
    for name, source in names.items():
        model, about = load(source)
        known = [sha256, *(other.about['weights_sha256'] for other in found.values())]
        if not name or about['sha256'] not in known:
            found[name] = Source(to_device(source, model, data, args.device), {
                'architecture': about['architecture'], 'weights_sha256': about['sha256']})
    return found


class Masking(NamedTuple):
    """The checks for masked gradients beside an evaluation."""

    evaluation: Evaluation
    sources: dict[str, Source]
    flat: list[str]
    """The operations of the network that BPDA gives another gradient."""

    def report(self, results: dict[str, Any], picture: Path) -> dict[str, Any]:
        """Returns what the checks found, and draws it.

        Args:
            results: results of the evaluation that the checks stand beside.
            picture: path of the PNG to write.
        """
        checks = self.evaluation
        flags = [flag for name in AUTOATTACK.keys() & results.keys() for flag in results[name]['flags']]
        found = masking_report(checks.results(), checks.threat, not checks.facts.random, flags)
        plot_masking(found, checks.threat.norm, picture)
        found |= {'flat': self.flat, 'sources': {name: source.about for name, source in self.sources.items()}}
        if '' in self.sources:
            found['transfer_from'] = self.sources[''].about
        return found
