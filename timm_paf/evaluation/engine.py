"""Measures accuracy on clean images, under PGD and under AutoAttack, with a verdict for every image.

An `Evaluation` works through attacks batch by batch, in any number of processes; what each finds goes into a `State`.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import ThreatModel, as_threat, attack_mode, pgd
from ..data import derive_seed
from ..norms import perturbation_norm
from ..wording import split_commas
from .autoattack import AUTOATTACK, autoattack_part, targets_of, too_few_classes
from .bpda import BPDA
from .classified import NetworkFacts, check_inputs, check_network, classified_right
from .names import PGD, RECHECK, check_attacks, keeps_to, parts_of, passes, pgd_threat
from .state import PartResult, State, WorkItem

__all__ = ['Evaluation', 'evaluate', 'worst_case']

TOLERANCE = 1e-5
"""The excess by which rounding in another package's attack may pass eps (for eps above 1: times eps) or the box; our
attacks are exact."""


@dataclass
class Evaluation:
    """An evaluation: attacks on images, batch by batch and part by part, each result kept before the next is begun.

    Every batch is the same whichever process attacks it, and all that is random in it is a function of the seed and of
    where the batch begins in the data set, so the verdicts do not depend on how often the work was interrupted or how
    it was shared, and those of a batch are the same in an evaluation of more images.

    Args:
        model: maps images to logits, in eval mode, on the device of ``images``.
        images: (n, channels, height, width) float32 in [0, 1].
        labels: (n,) int64 in [0, classes).
        threat: norm and eps of all attacks, and the step size of PGD; its ``steps`` are not used.
        attacks: 'clean'; 'pgd-N', N steps from one random start, 'pgd-NxR' with R restarts, either with '@EPS' for
            another eps and a step of a quarter of it, with 'bpda-' before it through `bpda.BPDA`, with 'transfer-'
            made on ``source``, and with 'transfer-NAME-' on the one of that name; and the keys of `AUTOATTACK`, whose
            parts are those that are defined for the number of classes.
        state: where results are kept.
        batch_size: images attacked together; the numbers depend on it.
        seed: seed of every attack, from which each batch derives its own.
        fresh: the network that classifies the kept images anew, and that 'bpda-' attacks are made on; default:
            ``model``.
        source: the network that 'transfer-' attacks are made on, or several by name.
        first: the place of the first of ``images`` in the data set, from 0.

    Raises:
        ValueError: for an unknown attack, images outside [0, 1], a network whose accuracy could not be told (see
            `check_network`), one that is random under AutoAttack's other versions than rand, or an attack that breaks
            its budget.
        ModuleNotFoundError: for 'autoattack' without the package.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    attacks: Sequence[str]
    state: State
    batch_size: int = 250
    seed: int = 0
    fresh: nn.Module | None = None
    source: nn.Module | Mapping[str, nn.Module] | None = None
    first: int = 0
    facts: NetworkFacts = field(init=False)

    def __post_init__(self) -> None:
        check_attacks(self.attacks, self.threat, self._sources())
        matches = [match for name in self.attacks if (match := PGD.fullmatch(name))]
        check_inputs(self.images, self.labels)
        misled = [name for name in self.attacks if name in AUTOATTACK and name != 'autoattack-rand']
        self.facts = check_network(self.fresh or self.model, self.images, self.labels, self.batch_size, bool(
            AUTOATTACK.keys() & set(self.attacks)) or any(not (m['bpda'] or m['transfer']) for m in matches))
        if self.facts.random and misled:
            raise ValueError('the network is random: the same images get other logits another time, which misleads '
                             f'{" and ".join(misled)}; expected autoattack-rand, or dropout and noise switched off')

    def _sources(self) -> Mapping[str, nn.Module]:
        if isinstance(self.source, nn.Module):
            return {'': self.source}
        return self.source or {}

    def parts(self, attack: str) -> tuple[str, ...]:
        """Returns the parts of an attack that are defined for the number of classes, last the check of their images."""
        return parts_of(attack, self.facts.classes)

    def work(self, attacks: Sequence[str] | None = None) -> list[WorkItem]:
        """Returns all items of work: a part of an attack on every batch before the next part."""
        return [(attack, part, start) for attack in attacks or self.attacks for part in self.parts(attack)
                for start in range(0, len(self.images), self.batch_size)]

    def run(self) -> Iterator[None]:
        """Does the work that nobody has done or is doing, and waits for the rest; yields whenever there may be news."""
        yield from self.state.share(
            self.work(), self._do, lambda work: all(before in self.state for before in self._before(work)))

    def progress(self) -> tuple[float, str]:
        """Returns the work done, in passes, and the last part that was begun with the accuracy of its batches."""
        done = [work for work in self.work() if work in self.state]
        if not done:
            return 0.0, ''
        attack, part, _ = done[-1]
        right = torch.cat([self.state.load(work).right for work in done if work[:2] == (attack, part)])
        total = sum(passes(*work[:2]) * len(self.labels[work[2]:work[2] + self.batch_size]) for work in done)
        return total, f'{attack} {part}: {right.double().mean():.1%} of {len(right)} right'

    def _before(self, work: WorkItem) -> list[WorkItem]:
        """Returns the parts of the same attack on the same batch that come before, in order."""
        attack, part, start = work
        parts = self.parts(attack)
        return [(attack, name, start) for name in parts[:parts.index(part)]]

    def _do(self, work: WorkItem) -> PartResult:
        started = time.monotonic()
        attack, part, start = work
        x0, y = (t[start:start + self.batch_size] for t in (self.images, self.labels))
        place = self.first + start  # so that a second set of images has other noise than the first
        # The seed is for a network that is random itself: it answers the check with other noise than the attack.
        torch.manual_seed(derive_seed(self.seed, place, 2, len(self._before(work))))
        flags: list[str] = []
        none = torch.empty(0, dtype=torch.long, device=x0.device)
        if part == RECHECK:
            right, which = self._recheck(work, x0, y)
            found = x0[none]
        elif attack == 'clean':
            right, which, found = classified_right(self.model, x0, y, clean=True), none, x0[none]
        elif attack in AUTOATTACK:
            before = self._before(work)
            right = self.state.load(before[-1]).right.to(x0.device) if before else (
                classified_right(self.model, x0, y, clean=True))
            left = right.nonzero().squeeze(1)
            found = x0[left]
            if len(left):
                seed = derive_seed(self.seed, place) % 2**31
                found = autoattack_part(self.model, found, y[left], self.threat, attack, part, self.facts.classes,
                                        seed, flags, self.facts.random)
            self._check_budget(found, x0[left], attack, self.threat.eps)
            fooled = ~classified_right(self.model, found, y[left]) if len(left) else none.bool()
            which, found = left[fooled], found[fooled]
            right = right.clone()
            right[which] = False
        else:
            threat, restarts = pgd_threat(attack, self.threat)
            generator = torch.Generator(x0.device).manual_seed(derive_seed(self.seed, place, 1))
            found = pgd(self._attacked(attack), x0, y, threat, generator, restarts=restarts,
                        stop_cycles=threat.steps >= 50)
            self._check_budget(found, x0, attack, threat.eps)
            clean = classified_right(self.model, x0, y, clean=True)
            if self.facts.random:  # a clean image that is wrong in one answer may be right in the next
                clean = torch.ones_like(clean)
            which = clean.nonzero().squeeze(1)
            right, found = clean & classified_right(self.model, found, y), found[which]
        return PartResult(right.cpu(), which.cpu(), found.contiguous().cpu(), time.monotonic() - started, flags)

    def in_budget(self, attack: str) -> bool:
        """Returns whether an attack keeps to the eps of the threat model; 'pgd-N@EPS' may have a larger one."""
        return keeps_to(attack, self.threat.eps)

    def _attacked(self, attack: str) -> nn.Module:
        """Returns the network that the images of a PGD attack are made on."""
        match = PGD.fullmatch(attack)
        assert match is not None
        if match['bpda']:  # torch.compile's programs would not ask BPDA
            return BPDA(self.fresh or self.model)
        return self._sources()[match['source'] or ''] if match['transfer'] else self.model

    def _check_budget(self, x: Tensor, x0: Tensor, attack: str, eps: Fraction) -> None:
        if not len(x):
            return
        size = perturbation_norm(x, x0, self.threat.norm).max().item()
        low, high = x.min().item(), x.max().item()
        allowed = float(eps) + TOLERANCE * max(1.0, float(eps))
        if not (size <= allowed and low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise ValueError(f'{attack} gave images in [{low:.6f}, {high:.6f}] at {self.threat.norm} distance '
                             f'{size:.6f}; expected [0, 1] and at most {eps}')

    @torch.no_grad()
    def _recheck(self, work: WorkItem, x0: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Classifies the kept images, read back from the disk; returns which are right, and where the log disagrees."""
        x, attack = x0.clone(), work[0]
        for before in self._before(work):
            found = self.state.load(before, images=True)
            x[found.which.to(x.device)] = found.images.to(x.device)
        self._check_budget(x, x0, f'{attack} as kept', self.threat.eps if attack == 'clean' or attack in AUTOATTACK
                           else pgd_threat(attack, self.threat)[0].eps)
        right = classified_right(self.fresh or self.model, x, y)
        return right, (right != found.right.to(x.device)).nonzero().squeeze(1)

    def results(self) -> dict[str, Any]:
        """Returns the results of the attacks that are complete, by name.

        Returns:
            For each attack: ``n``, ``correct``, ``accuracy`` as a share in [0, 1], ``seconds`` (of all processes
            together), ``verdicts`` (a character per image, '1' right and '0' fooled, by the attack or in the check of
            its images), ``recheck`` with the number of images ``kept`` and the positions of those that are
            ``different`` in the check; for AutoAttack the accuracy ``after`` each of its parts, the verdicts of these
            with the number of their ``targets``, those that were ``not_run`` for want of classes, if any, and the
            warnings that it gave as ``flags``; for PGD its settings, and ``flags`` where the network is random.
        """
        return {attack: self._result(attack) for attack in self.attacks
                if all(work in self.state for work in self.work([attack]))}

    def bounds(self) -> dict[str, dict[str, Any]]:
        """Returns for each version of AutoAttack that is not complete an upper bound of the accuracy, by name.

        The bound is the accuracy after the last whole part.
        """
        found: dict[str, dict[str, Any]] = {}
        for attack in AUTOATTACK.keys() & set(self.attacks):
            parts = self.parts(attack)
            done = [part for part in parts if all((attack, part, start) in self.state for start in self.starts())]
            if done and len(done) < len(parts):
                found[attack] = {'after': done[-1], **_counts(self._column(attack, done[-1]))}
        return found

    def starts(self) -> range:
        """Returns the first image of each batch."""
        return range(0, len(self.images), self.batch_size)

    def _column(self, attack: str, part: str) -> Tensor:
        """Returns (n,) bool: whether an image is right after that part."""
        return torch.cat([self.state.load((attack, part, start)).right for start in self.starts()])

    def _result(self, attack: str) -> dict[str, Any]:
        *parts, recheck = self.parts(attack)
        logs = {part: self._column(attack, part) for part in parts}
        found = {part: [self.state.load((attack, part, start)) for start in self.starts()] for part in parts}
        different = [start + int(i) for start in self.starts()
                     for i in self.state.load((attack, recheck, start)).which]
        seconds = sum(self.state.load(work).seconds for work in self.work([attack]))
        pgd_record: dict[str, Any] = {}
        flags = []
        if self.facts.random and attack not in AUTOATTACK:
            flags.append('the network is random: a verdict is that of one answer')
        if PGD.fullmatch(attack):
            threat, restarts = pgd_threat(attack, self.threat)
            pgd_record = {**threat.record(), 'restarts': restarts}
            if self.facts.random:
                flags.append('PGD takes no mean over the answers of a random network: the accuracy may be too high; '
                             'autoattack-rand does')
        verdicts = logs[parts[-1]]
        if not self.facts.random:  # which would be asked twice, and right both times less often than once
            verdicts = verdicts & self._column(attack, recheck)
        result = {
            **_counts(verdicts, seconds), **pgd_record, **({'flags': flags} if flags else {}),
            'recheck': {'kept': sum(len(f.which) for part in parts for f in found[part]), 'different': different}}
        if attack in AUTOATTACK:
            after = {part: right.double().mean().item() for part, right in logs.items()}
            flags += list(dict.fromkeys(flag for part in parts for f in found[part] for flag in f.flags))
            if 'square' in parts:
                # AutoAttack's own check compares the parts of one call; here each part has a call of its own.
                gain = after[parts[parts.index('square') - 1]] - after['square']
                if gain > 0.002:
                    flags.append(f'Square, which sees no gradient, lowered the accuracy by {gain:.2%}: the gradients '
                                 'may be masked')
            result |= {'after': after, 'flags': flags, 'parts': {
                part: _counts(logs[part], sum(f.seconds for f in found[part])) for part in parts}}
            for part in parts:
                if targets := targets_of(attack, part, self.threat.norm, self.facts.classes):
                    result['parts'][part]['targets'] = targets
            if left_out := {part: why for part in AUTOATTACK[attack]
                            if (why := too_few_classes(part, self.facts.classes))}:
                result['not_run'] = left_out
        return result


def _counts(right: Tensor, seconds: float | None = None) -> dict[str, Any]:
    return {'n': len(right), 'correct': int(right.sum()), 'accuracy': right.double().mean().item(),
            **({} if seconds is None else {'seconds': round(seconds, 2)}),
            'verdicts': ''.join(map(str, right.int().tolist()))}


def worst_case(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the worst case over several results, where an image is right if no attack fooled it.

    Args:
        results: results by attack, as `Evaluation.results` has them, on the same images.

    Returns:
        ``n``, ``correct``, ``accuracy``, ``verdicts`` and the names of the ``attacks``.
    """
    columns = zip(*(result['verdicts'] for result in results.values()))
    right = torch.tensor([set(column) == {'1'} for column in columns])
    return {**_counts(right), 'attacks': list(results)}


def evaluate(
        model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel | str = '8/255',
        attacks: Sequence[str] | str = 'clean,pgd-50', batch_size: int = 250, seed: int = 0, *,
        fresh: nn.Module | None = None, source: nn.Module | Mapping[str, nn.Module] | None = None) -> dict[str, Any]:
    """Measures accuracy clean and under attack, in this process alone and without files that stay.

    Args:
        model: maps images to logits (n, classes), on the device of ``images``; it is attacked in eval mode, and every
            module is in its mode of before afterwards, as are torch's random number generators.
        images: (n, channels, height, width) float32 in [0, 1].
        labels: (n,) int64 in [0, classes).
        threat: a threat model, or an eps in Linf, such as '8/255'.
        attacks: names as `Evaluation` takes them, or one text with commas, such as 'clean,pgd-50,autoattack'.
        batch_size: images attacked together; the numbers depend on it.
        seed: seed of every attack.
        fresh: the network that classifies the attacked images anew; default: ``model``.
        source: the network that 'transfer-' attacks are made on, or several by name.

    Returns:
        By attack what `Evaluation.results` describes: ``accuracy`` in [0, 1], ``correct``, ``n``, ``verdicts`` and
        more.

    Raises:
        ValueError: for an unknown attack, an eps that is no number, images outside [0, 1], a network whose accuracy
            could not be told, or an attack that breaks its budget; see `Evaluation`.
        TypeError: for a model that is none.
        ModuleNotFoundError: for AutoAttack without its package.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'the model is a {type(model).__name__}; expected a network, such as timm.create_model gives')
    threat = as_threat(threat)
    images = images.detach() if isinstance(images, Tensor) else images
    names = split_commas(attacks) if isinstance(attacks, str) else attacks
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with (contextlib.ExitStack() as modes, tempfile.TemporaryDirectory() as folder,
          torch.random.fork_rng(devices)):  # a caller's next shuffle is not that of the last evaluation
        sources = [source] if isinstance(source, nn.Module) else (source or {}).values()
        for network in (model, *filter(None, (fresh,)), *sources):
            modes.enter_context(attack_mode(network))
        evaluation = Evaluation(
            model, images, labels, threat, names, State(Path(folder) / 'state', {}), batch_size, seed, fresh, source)
        for _ in evaluation.run():
            pass
        return evaluation.results()
