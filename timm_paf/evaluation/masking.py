"""Checks whether gradient attacks tell the truth about a network, or its gradients are masked.

The signs are those of Athalye, Carlini, Wagner, https://arxiv.org/abs/1802.00420, and Carlini et al., "On Evaluating
Adversarial Robustness", https://arxiv.org/abs/1902.06705. The absence of a sign proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from ..attacks import ThreatModel

__all__ = ['masking_attacks', 'masking_report']

STEPS = (1, 5, 10, 20, 50)
EPS_TIMES = (2, 4, 8, 16, 32)
RESTARTS = 10

NOISE = 0.02
"""The share of the images by which an attack that should be at least as strong may be weaker."""
RESTARTS_ADD = 0.04
"""The share of the images that ten random starts may fool beyond one, where the loss surface is smooth."""
LEFT = 0.01
"""The accuracy that may be left at the largest eps."""


def masking_attacks(threat: ThreatModel, sources: Iterable[str] = (), flat: bool = False) -> list[str]:
    """Returns names for `Evaluation`: PGD with growing steps, with growing eps, from ten starts, by BPDA, by transfer.

    Args:
        threat: the threat model of the evaluation.
        sources: the names of other networks to make transfer attacks on; '' is one without a name.
        flat: whether the network has operations for BPDA, see `bpda.flat_operations`.

    Raises:
        ValueError: if eps is 0.
    """
    if not threat.eps:
        raise ValueError('eps is 0, which leaves nothing to check; expected more than 0')
    largest = Fraction(1) if threat.norm == 'Linf' else threat.eps * max(EPS_TIMES)
    sizes = dict.fromkeys(min(threat.eps * times, largest) for times in EPS_TIMES)
    return ['clean', *(f'pgd-{steps}' for steps in STEPS), f'pgd-20@{threat.eps / 2}',
            *(f'pgd-20@{eps}' for eps in sizes if eps > threat.eps), f'pgd-20x{RESTARTS}',
            *(['bpda-pgd-20'] if flat else []),
            *(f'transfer-{name}{"-" if name else ""}pgd-20' for name in sources)]


def masking_report(
        results: dict[str, Any], threat: ThreatModel, deterministic: bool, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what the results of `masking_attacks` say.

    Args:
        results: results by attack, as `Evaluation.results` has them.
        threat: the threat model that the attacks were made for.
        deterministic: whether the network answers the same images alike another time.
        flags: the warnings of AutoAttack, where it was run.

    Returns:
        ``passed``, a ``verdict`` of one line, its ``reasons`` (empty if passed), accuracy by ``eps`` and by ``steps``
        as lists of pairs, by ``restarts``, under ``bpda`` (None without), under each of the ``transfers`` by the name
        of the other network, the lowest of these as ``transfer`` (None without), and the ``attacks`` with all verdicts.
    """
    accuracy = {name: result['accuracy'] for name, result in results.items()}
    tolerance = max(NOISE, 2 / results['clean']['n'])
    steps = [(count, accuracy[f'pgd-{count}']) for count in STEPS]
    growing = [('0', accuracy['clean']), (str(threat.eps / 2), accuracy[f'pgd-20@{threat.eps / 2}']),
               (str(threat.eps), accuracy['pgd-20']),
               *((name.partition('@')[2], value) for name, value in accuracy.items()
                 if '@' in name and name != f'pgd-20@{threat.eps / 2}')]
    many, bpda = accuracy[f'pgd-20x{RESTARTS}'], accuracy.get('bpda-pgd-20')
    transfers = {name.removeprefix('transfer-').removesuffix('pgd-20').rstrip('-'): value
                 for name, value in accuracy.items() if name.startswith('transfer-')}
    reasons = [f'AutoAttack warned: {flag}' for flag in flags]
    if not deterministic:
        reasons.append('the same images get other logits the second time')
    if growing[-1][1] > LEFT:
        reasons.append(f'{growing[-1][1]:.1%} are right even at eps {growing[-1][0]}')
    curves: tuple[tuple[str, list[tuple[Any, float]]], ...] = ('eps', growing), ('steps', steps)
    for what, pairs in curves:
        for (less, before), (more, after) in pairwise(pairs):
            if after > before + tolerance:
                reasons.append(f'{what} {more} leaves {after:.1%} right where {what} {less} leaves {before:.1%}')
    if accuracy['pgd-20'] - many > max(RESTARTS_ADD, 2 / results['clean']['n']):
        reasons.append(f'{RESTARTS} starts leave {many:.1%} right where one leaves {accuracy["pgd-20"]:.1%}')
    if bpda is not None and bpda < accuracy['pgd-20'] - tolerance:
        reasons.append(f'the identity in place of flat operations leaves {bpda:.1%} right, their own gradient '
                       f'{accuracy["pgd-20"]:.1%}')
    reasons += [f'images made on {name or "another network"} leave {value:.1%} right, those made on this one '
                f'{accuracy["pgd-20"]:.1%}' for name, value in transfers.items()
                if value < accuracy['pgd-20'] - tolerance]
    n, judged = results['clean']['n'], accuracy['clean'] > 0
    verdict = f'not judged: 0 of {n} images are right' if not judged else (
        f'signs of gradient masking: {"; ".join(reasons)}' if reasons else 'no sign of gradient masking')
    return {
        'n': n, 'passed': judged and not reasons, 'reasons': reasons, 'verdict': verdict,
        'eps': growing, 'steps': steps, 'restarts': [(1, accuracy['pgd-20']), (RESTARTS, many)], 'bpda': bpda,
        'transfer': min(transfers.values(), default=None), 'transfers': transfers, 'attacks': results}
