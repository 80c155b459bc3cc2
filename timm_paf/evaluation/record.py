"""The record of an evaluation: what it depends on, and what it found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..attacks import ThreatModel
from .engine import Evaluation, worst_case

__all__ = ['evaluation_record', 'state_record', 'threat_record']

_VERSIONS = ('timm-paf', 'torch', 'autoattack', 'pyautoattack')


def threat_record(threat: ThreatModel) -> dict[str, Any]:
    """Returns what a record says of a threat model: norm, eps, and the step of PGD."""
    return {'threat_model': {'norm': threat.norm, 'eps': str(threat.eps)}, 'pgd_step': str(threat.step)}


def state_record(setting: dict[str, Any], threat: ThreatModel, versions: dict[str, str]) -> dict[str, Any]:
    """Returns all that verdicts depend on, so that results of another evaluation are told apart.

    Args:
        setting: the evaluation's network, weights, images, batch size, seed and precision.
        threat: the threat model.
        versions: versions of packages, by name.
    """
    return {**setting, **threat_record(threat),
            'versions': {name: versions[name] for name in _VERSIONS if name in versions}}


def evaluation_record(
        setting: dict[str, Any], evaluation: Evaluation, made_by: dict[str, Any], processes: int,
        complete: bool = False, others: Sequence[Evaluation] = (), **more: Any) -> dict[str, Any]:
    """Returns what evaluation.json holds.

    Args:
        setting: what the verdicts depend on.
        evaluation: the evaluation that gives its results so far.
        made_by: the result of `files.environment`. Where some of the results were made on other hardware, ``earlier``
            says on which, and the seconds that they took.
        processes: number of processes.
        complete: whether the evaluation is at its end.
        others: evaluations of the same images in other norms.
        **more: further findings, such as those of the masking checks.
    """
    found = _findings(evaluation)
    results = [found['attacks']]
    if others:
        norms = {other.threat.norm: {**threat_record(other.threat), **_findings(other)} for other in others}
        more['norms'] = norms
        results += [part['attacks'] for part in norms.values()]
        worst = {norm: part['worst_case'] for norm, part in ((evaluation.threat.norm, found), *norms.items())
                 if 'worst_case' in part}
        if len(worst) > len(others):
            union = worst_case(worst)
            more['union'] = {**union, 'norms': union.pop('attacks')}
    elsewhere: Counter[str] = Counter()
    for each in (evaluation, *others):
        elsewhere.update(each.state.elsewhere(each.work()))
    if elsewhere:
        more['earlier'] = [{'hardware': json.loads(hardware), 'seconds': round(seconds, 2)}
                           for hardware, seconds in elsewhere.items()]
    rechecks = [result['recheck'] for part in results for result in part.values()]
    return {
        **setting, 'order': 'as in the files of the data', 'complete': complete, **found,
        'recheck': {'kept': sum(recheck['kept'] for recheck in rechecks),
                    'different': sum(len(recheck['different']) for recheck in rechecks)},
        **more, 'processes': processes,
        'seconds': round(sum(r['seconds'] for part in results for r in part.values()), 2), **made_by}


def _findings(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the results of an evaluation, their worst case within eps, and the bounds of what is not complete."""
    results, bounds = evaluation.results(), evaluation.bounds()
    inside = {attack: result for attack, result in results.items() if evaluation.in_budget(attack)}
    return {'attacks': results, **({'worst_case': worst_case(inside)} if inside else {}),
            **({'bounds': bounds} if bounds else {})}
