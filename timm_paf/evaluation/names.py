"""The names of attacks, as users, evaluations and their records have them, and what a name says."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Sequence
from fractions import Fraction

from ..attacks import ThreatModel, parse_fraction
from ..wording import did_you_mean
from .autoattack import AUTOATTACK, part_passes, too_few_classes

__all__ = ['PGD', 'RECHECK', 'check_attacks', 'keeps_to', 'parts_of', 'passes', 'pgd_threat']

RECHECK = 'recheck'
"""The last part of every attack: its images, read back from the disk, are classified anew."""
PGD = re.compile(r'((?P<bpda>bpda-)|(?P<transfer>transfer-)((?P<source>[\w.]+)-)?)?pgd-(?P<steps>[1-9]\d*)'
                 r'(x(?P<restarts>[1-9]\d*))?(@(?P<eps>[^@]+))?')
"""The names of PGD, with their parts as groups."""


def check_attacks(
        attacks: Sequence[str], threat: ThreatModel | None = None, sources: Collection[str] | None = None) -> None:
    """Checks names of attacks as `Evaluation` takes them, before any work, and that 'autoattack' is installed for them.

    Args:
        attacks: the names.
        threat: the threat model, where it is known, for which an '@EPS' must have a meaning.
        sources: the names of the networks that 'transfer-' attacks can be made on, '' of one without a name.

    Raises:
        ValueError: for an unknown name, one given twice, an eps that can't be meant, or a network that is not there.
        ModuleNotFoundError: for 'autoattack' without the package; the message says what to install.
    """
    for name in attacks:
        match = PGD.fullmatch(name)
        if name != 'clean' and name not in AUTOATTACK and match is None:
            steps = re.search(r'[1-9]\d*', name)
            near = did_you_mean(name.lower(), ('clean', f'pgd-{steps[0] if steps else 50}', *AUTOATTACK))
            raise ValueError(f'unknown attack {name!r}; expected clean, pgd-N such as pgd-50 (pgd-50x5 has '
                             f'five starts, pgd-50@4/255 another eps, bpda-pgd-50), {", ".join(AUTOATTACK)}{near}')
        if match is not None:
            try:
                if threat is not None:
                    pgd_threat(name, threat)
                elif match['eps']:
                    parse_fraction(match['eps'])
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from None
        if match is not None and match['transfer'] and sources is not None and (match['source'] or '') not in sources:
            raise ValueError(f'{name} needs the network that it is made on; expected source in Python, and in the '
                             'programs evaluate --masking, which makes it on --transfer-from')
        if attacks.count(name) > 1:
            raise ValueError(f'attack {name!r} is given twice; expected each once')
    if AUTOATTACK.keys() & set(attacks):
        importlib.import_module('autoattack')


def pgd_threat(attack: str, threat: ThreatModel) -> tuple[ThreatModel, int]:
    """Returns the threat model of a PGD attack, with the eps that its name may have, and its random starts.

    Raises:
        ValueError: if the norm can't have the eps.
    """
    match = PGD.fullmatch(attack)
    assert match is not None
    eps, step = (parse_fraction(match['eps']), None) if match['eps'] else (threat.eps, threat.step)
    return ThreatModel(threat.norm, eps, step, int(match['steps'])), int(match['restarts'] or 1)


def parts_of(attack: str, classes: int = 1000) -> tuple[str, ...]:
    """Returns the parts of an attack on so many classes in order, last the check of the images that they left."""
    return *(part for part in AUTOATTACK.get(attack, ('attack',)) if not too_few_classes(part, classes)), RECHECK


def passes(attack: str, part: str) -> float:
    """Returns about how many passes through the network, forward or back, a part takes per image; its time is
    proportional to them."""
    if attack in AUTOATTACK and part != RECHECK:
        return part_passes(attack, part)
    found = PGD.fullmatch(attack)
    return 1 if found is None or part == RECHECK else 2.0 * int(found['steps']) * int(found['restarts'] or 1)


def keeps_to(attack: str, eps: Fraction) -> bool:
    """Returns whether an attack keeps to the eps of a threat model; 'pgd-N@EPS' may have a larger one."""
    found = PGD.fullmatch(attack)
    return found is None or not found['eps'] or parse_fraction(found['eps']) <= eps
