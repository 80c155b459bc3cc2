"""The record of an evaluation: what it depends on, and what it found."""

from __future__ import annotations

from typing import Any

from ..attacks import ThreatModel
from .engine import Evaluation, worst_case

__all__ = ['evaluation_record', 'state_record']

_VERSIONS = ('timm-paf', 'torch', 'autoattack', 'pyautoattack')


def state_record(setting: dict[str, Any], threat: ThreatModel, versions: dict[str, str]) -> dict[str, Any]:
    """Returns all that verdicts depend on, so that results of another evaluation are told apart.

    Args:
        setting: the evaluation's network, weights, images, threat model, batch size, seed and precision.
        threat: the threat model, for the step of PGD.
        versions: versions of packages, by name.
    """
    return {**setting, 'pgd_step': str(threat.step),  # also where a setting of one's own does not say it
            'versions': {name: versions[name] for name in _VERSIONS if name in versions}}


def evaluation_record(
        setting: dict[str, Any], evaluation: Evaluation, made_by: dict[str, Any], processes: int,
        complete: bool = False, **more: Any) -> dict[str, Any]:
    """Returns what evaluation.json holds.

    Args:
        setting: what the verdicts depend on.
        evaluation: the evaluation that gives its results so far.
        made_by: the result of `files.environment`.
        processes: number of processes.
        complete: whether the evaluation is at its end.
        **more: further findings, such as those of the masking checks.
    """
    results, bounds = evaluation.results(), evaluation.bounds()
    rechecks = [result['recheck'] for result in results.values()]
    return {
        **setting, 'order': 'as in the files of the data', 'complete': complete, 'attacks': results,
        **({'worst_case': worst_case(results)} if results else {}), **({'bounds': bounds} if bounds else {}),
        'recheck': {'kept': sum(recheck['kept'] for recheck in rechecks),
                    'different': sum(len(recheck['different']) for recheck in rechecks)},
        **more, 'processes': processes, 'seconds': round(sum(r['seconds'] for r in results.values()), 2), **made_by}
