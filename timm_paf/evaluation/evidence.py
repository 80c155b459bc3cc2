"""The evidence of an evaluation: for every fooled image an adversarial one, which anybody can check without an attack.

It holds perturbations, not images, so that it gives away none of the data set; added to the test images they fool the
network. Most are in whole units of 1/255, as eps and the test images are, and are checked in integers.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import ThreatModel
from ..files import atomic_write, is_of_machine
from ..losses import margin
from ..norms import NORMS, perturbation_norm
from ..wording import reason_of
from .classified import check_network, classified_right
from .engine import Evaluation, worst_case

__all__ = ['KINDS', 'Checked', 'Evidence', 'adversarial', 'check_evidence', 'collect', 'inside', 'load_evidence',
           'save_evidence']

EIGHT_BIT, FLOAT = 'eight_bit', 'float32'
KINDS = {EIGHT_BIT: torch.int16, FLOAT: torch.float32}
"""How perturbations are kept, with the type of their numbers; the first that fools the network is taken."""
_DAMAGED = (OSError, ValueError, KeyError, EOFError, MemoryError, OverflowError, RuntimeError, SyntaxError,
            TypeError, AttributeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for a file that is damaged or made to harm."""


class Evidence(NamedTuple):
    """Perturbations of k test images, on the CPU."""

    which: Tensor
    """(k,) int64: the positions of the images among those attacked, ascending."""
    attack: list[str]
    """The attack that found each."""
    delta: Tensor
    """(k, channels, height, width): the perturbation, int16 in units of 1/255, or float32 of images in [0, 1]."""


def adversarial(x0: Tensor, delta: Tensor) -> Tensor:
    """Returns the adversarial images (k, channels, height, width) float32 of clean ones in [0, 1].

    Perturbations of int16 take clean images of 8 bits.
    """
    return ((x0 * 255).round() + delta).div(255) if delta.dtype == torch.int16 else x0 + delta


def inside(x0: Tensor, delta: Tensor, norm: str, eps: Fraction) -> Tensor:
    """Returns which perturbed images are in [0, 1] and at most eps away, (k,) bool, without a tolerance.

    Perturbations of int16 are measured in integers, as multiples of 1/255, and are outside where a clean image is not
    of 8 bits; others in float64, as the difference of the two float32 images that the network sees.
    """
    if delta.dtype == torch.int16:
        levels, moved, limit = (x0 * 255).round().long(), delta.long(), 255 * eps
        low, high = (levels + moved).flatten(1).aminmax(dim=1)
        bounds = (low >= 0) & (high <= 255) & (levels.float().div(255) == x0).flatten(1).all(1)
        size = {'Linf': moved.abs().flatten(1).amax(1), 'L1': moved.abs().flatten(1).sum(1),
                'L2': moved.square().flatten(1).sum(1)}[norm]
        return bounds & (size <= math.floor(limit ** 2 if norm == 'L2' else limit))
    x = adversarial(x0, delta)
    bounds = (x.flatten(1).amin(1) >= 0) & (x.flatten(1).amax(1) <= 1)
    return bounds & (perturbation_norm(x.double(), x0.double(), norm) <= float(eps))


def _forms(x0: Tensor, x: Tensor, norm: str, eps: Fraction) -> tuple[Tensor, ...]:
    """Returns the perturbation to the nearest image of 8 bits, to the one on the way back to ``x0``, and as it is."""
    moved = x * 255 - (x0 * 255).round()
    back = (moved + 1e-4 * moved.sign()).trunc()  # a whole number that rounding made smaller stays that number
    # A millionth inside, because another package's attack may pass eps by rounding, and x0 + delta rounds once more.
    exact = NORMS[norm].project(x, x0, float(eps) * (1 - 4e-6)).clamp(0, 1) - x0
    return moved.round().to(torch.int16), back.to(torch.int16), exact


@torch.no_grad()
def collect(evaluation: Evaluation) -> tuple[dict[str, Evidence], list[int]]:
    """Collects for every image that is right at first and fooled the perturbation that fools the network most.

    That is the one with the largest lead of another class, of 8 bits where one of these fools it.

    Args:
        evaluation: a complete evaluation whose state has the images.

    Returns:
        The evidence, by how it is kept, and the positions of fooled images for which none was found: their kept images
        fool a faster form of the network alone.
    """
    network, threat = evaluation.fresh or evaluation.model, evaluation.threat
    attacks = [attack for attack in evaluation.attacks if attack != 'clean' and evaluation.in_budget(attack)]
    results = evaluation.results()
    verdicts = worst_case({name: results[name] for name in attacks})['verdicts'] if attacks else ''
    fooled = torch.tensor([verdict == '0' for verdict in verdicts], dtype=torch.bool)
    right = {name: torch.tensor([verdict == '1' for verdict in results[name]['verdicts']]) for name in attacks}
    found: dict[str, list[tuple[int, str, Tensor]]] = {kind: [] for kind in KINDS}
    missing: list[int] = []
    for start in evaluation.starts() if attacks else ():
        x0, y = (t[start:start + evaluation.batch_size] for t in (evaluation.images, evaluation.labels))
        wanted = classified_right(network, x0, y).cpu() & fooled[start:start + len(y)]
        eight_bit = bool(((x0 * 255).round().div(255) == x0).all())
        best: dict[str, dict[int, tuple[float, str, Tensor]]] = {kind: {} for kind in KINDS}
        for attack in attacks:
            for part in evaluation.parts(attack)[:-1]:
                kept = evaluation.state.load((attack, part, start), images=True)
                chosen = (wanted & ~right[attack][start:start + len(y)])[kept.which]
                which = kept.which[chosen]
                if not len(which):
                    continue
                clean, labels = x0[which.to(x0.device)], y[which.to(x0.device)]
                for delta in _forms(clean, kept.images[chosen].to(x0.device), threat.norm, threat.eps):
                    kind = EIGHT_BIT if delta.dtype == torch.int16 else FLOAT
                    if kind == EIGHT_BIT and not eight_bit:
                        continue
                    logits = network(adversarial(clean, delta))
                    finite = logits.isfinite().all(1)
                    lead = torch.where(finite, margin(logits, labels), math.inf)
                    stands = finite & (logits.argmax(1) == labels)  # of two classes that tie the network says the first
                    lead[stands | ~inside(clean, delta, threat.norm, threat.eps)] = -math.inf
                    for i, ahead, one in zip(which.tolist(), lead.tolist(), delta.cpu(), strict=True):
                        if ahead > best[kind].get(i, (-math.inf,))[0]:
                            best[kind][i] = ahead, attack, one
        for i in wanted.nonzero().squeeze(1).tolist():
            for kind in found:
                if i in best[kind]:
                    found[kind].append((start + i, *best[kind][i][1:]))
                    break
            else:
                missing.append(start + i)
    return {kind: Evidence(torch.tensor([i for i, _, _ in rows]), [attack for _, attack, _ in rows],
                           torch.stack([delta for _, _, delta in rows]))
            for kind, rows in found.items() if rows}, missing


def save_evidence(path: str | Path, evidence: dict[str, dict[str, Evidence]]) -> None:
    """Writes evidence as a compressed npz with arrays ``NORM.KIND.index``, ``.attack`` and ``.delta``.

    Args:
        path: of the file.
        evidence: for each norm what `collect` returns.
    """
    arrays: dict[str, Any] = {}
    for norm, kinds in evidence.items():
        for kind, rows in kinds.items():
            arrays |= {f'{norm}.{kind}.index': rows.which.numpy(), f'{norm}.{kind}.attack': np.array(rows.attack),
                       f'{norm}.{kind}.delta': rows.delta.numpy()}
    with atomic_write(path) as part, open(part, 'wb') as file:
        np.savez_compressed(file, **arrays)


def load_evidence(path: str | Path, n: int, shape: tuple[int, ...]) -> dict[str, dict[str, Evidence]]:
    """Reads the evidence of n test images, which may be a stranger's: nothing in it is run.

    Args:
        path: of the file.
        n: the number of test images.
        shape: (channels, height, width).

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: for what is of this machine, such as a disk that fails.
        ValueError: if it is damaged, or is not of n such images.
    """
    path, found = Path(path), dict[str, dict[str, Evidence]]()
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; expected the evidence, as timm-paf evaluate writes it')
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        size = sum(member.file_size for member in members)
        if not {member.compress_type for member in members} <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise ValueError('compressed otherwise than by numpy')
        if size > (most := len(NORMS) * (n * (4 * math.prod(shape) + 1024) + 4096)):
            raise ValueError(f'{size:,} bytes unpacked, at most {most:,} are of {n} images')
        with np.load(path, allow_pickle=False) as arrays:
            for norm, kind in sorted({tuple(name.split('.')[:2]) for name in arrays.files}):
                index, attack, delta = (arrays[f'{norm}.{kind}.{field}'] for field in ('index', 'attack', 'delta'))
                rows = Evidence(torch.from_numpy(index), attack.tolist(), torch.from_numpy(delta))
                found.setdefault(norm, {})[kind] = rows
                k = len(index)
                if norm not in NORMS or (rows.which.dtype, rows.delta.dtype) != (torch.int64, KINDS[kind]):
                    raise ValueError(f'{norm} {kind} {rows.which.dtype} {rows.delta.dtype} is not a norm and a kind')
                if index.shape != (k,) or attack.shape != (k,) or attack.dtype.kind != 'U' \
                        or delta.shape != (k, *shape):
                    raise ValueError(f'{norm} {kind} is of {delta.shape}; expected ({k}, {", ".join(map(str, shape))})')
                if k and (index.min() < 0 or index.max() >= n or (np.diff(index) <= 0).any()):
                    raise ValueError(f'{norm} {kind} is not of images from 0 to {n - 1} in their order')
    except _DAMAGED as error:
        if isinstance(error, OSError) and is_of_machine(error):  # no memory may be a header's lie
            raise
        raise ValueError(f'{path} is no evidence of {n} images ({type(error).__name__}: '
                         f'{reason_of(error)}); get it again') from error
    return found


class Checked(NamedTuple):
    """What `check_evidence` found."""

    clean: Tensor
    """(n,) bool: which clean images the network classifies right."""
    fooled: dict[str, Tensor]
    """By norm, (n,) bool: which images have evidence that is inside eps and [0, 1], and that fools the network."""
    failed: dict[str, dict[int, str]]
    """By norm, for each image whose evidence fails, why."""


@torch.no_grad()
def check_evidence(
        model: nn.Module, images: Tensor, labels: Tensor, threats: dict[str, ThreatModel],
        evidence: dict[str, dict[str, Evidence]], batch_size: int = 250) -> Checked:
    """Classifies the clean images and the evidence once, and checks eps and box exactly; no attack is made.

    Args:
        model: maps images to logits, in eval mode, on the device of ``images``.
        images: (n, channels, height, width) float32 in [0, 1].
        labels: (n,) int64.
        threats: the threat model of each norm.
        evidence: as `load_evidence` returns it.
        batch_size: images classified together.

    Raises:
        ValueError: for evidence of a norm that has no threat model, or a network whose answers can't be told (see
            `classified.check_network`).
    """
    check_network(model, images, labels, batch_size, gradient=False)
    batches = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
    clean = torch.cat([classified_right(model, x, y, clean=True) for x, y in batches]).cpu()
    checked = Checked(clean, {}, {})
    for norm, kinds in evidence.items():
        if norm not in threats:
            raise ValueError(f'there is evidence of {norm} and no result; expected {", ".join(threats)}')
        fooled, failed = torch.zeros(len(labels), dtype=torch.bool), dict[int, str]()
        for rows in kinds.values():
            for which, some in zip(*(torch.split(t, batch_size) for t in (rows.which, rows.delta)), strict=True):
                there = which.to(images.device)
                x0, y, delta = images[there], labels[there], some.to(images.device)
                within = inside(x0, delta, norm, threats[norm].eps).cpu()
                right = classified_right(model, adversarial(x0, delta), y).cpu()
                fooled[which] |= within & ~right
                failed |= {int(i): 'outside of eps or [0, 1]' for i in which[~within]}
                failed |= {int(i): 'does not fool the network' for i in which[within & right]}
        checked.fooled[norm], checked.failed[norm] = fooled, failed
    return checked
