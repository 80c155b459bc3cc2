"""Keeps the evidence of an evaluation beside its evaluation.json, and draws the first of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_paf.evaluation import Evaluation
from timm_paf.evaluation.evidence import Evidence, adversarial, collect, save_evidence
from timm_paf.files import sha256
from timm_paf.plots import plot_evidence

EVIDENCE, PICTURE = 'evidence.npz', 'evidence.png'
SHOWN = 8
LARGEST = 100_000_000
"""Values in all images up to which evidence is kept unasked: 32,000 images of 3 x 32 x 32, or 600 of 3 x 224 x 224."""


def is_small(images: Tensor) -> bool:
    """Returns whether the evidence of images is kept without being asked for."""
    return math.prod(images.shape) <= LARGEST


def keep_evidence(folder: Path, evaluations: Sequence[Evaluation], label_names: Sequence[str] | None) -> dict[str, Any]:
    """Writes the evidence of complete evaluations of the same images and a picture of the first; returns its record.

    Args:
        folder: of the files.
        evaluations: one for each norm.
        label_names: words for the classes; None: their numbers.
    """
    found, record = dict[str, dict[str, Evidence]](), dict[str, dict[str, Any]]()
    for evaluation in evaluations:
        norm = evaluation.threat.norm
        found[norm], missing = collect(evaluation)
        record[norm] = {**{kind: len(rows.which) for kind, rows in found[norm].items()}, 'missing': missing}
    save_evidence(folder / EVIDENCE, found)
    (folder / PICTURE).unlink(missing_ok=True)  # of an evaluation before
    for rows in list(found[evaluations[0].threat.norm].values())[:1]:
        try:
            draw(folder / PICTURE, evaluations[0], rows, label_names)
        except ModuleNotFoundError as error:
            print(f"no {PICTURE}: {error}; pip install 'timm-paf[train]'")
    return {'sha256': sha256(folder / EVIDENCE), 'bytes': (folder / EVIDENCE).stat().st_size, 'norms': record}


@torch.no_grad()
def draw(path: Path, evaluation: Evaluation, rows: Evidence, label_names: Sequence[str] | None) -> None:
    """Draws the first of the evidence."""
    network, threat = evaluation.fresh or evaluation.model, evaluation.threat
    x0 = evaluation.images[rows.which[:SHOWN].to(evaluation.images.device)]
    x = adversarial(x0, rows.delta[:SHOWN].to(x0.device))
    before, after = ([str(answer) if label_names is None else label_names[answer]
                      for answer in network(images).argmax(1).tolist()] for images in (x0, x))
    plot_evidence(x0.cpu(), x.cpu(), before, after, f'{threat.norm} eps {threat.eps}', path)
