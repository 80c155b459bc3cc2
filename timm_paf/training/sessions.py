"""Which machines and versions a run was done with, where not all of its steps had the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_record

__all__ = ['MADE_WITH', 'earlier_sessions']

MADE_WITH = ('device', 'processes', 'hardware', 'versions', 'git_commit')
"""The entries of run.json on what a run was done with; two sessions that have the same count as one."""


def earlier_sessions(checkpoint: Path, seconds: float, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the sessions of a run before a checkpoint that were done with something else than the next one.

    Args:
        checkpoint: the directory of the checkpoint that the run resumes from.
        seconds: seconds that all sessions until there took.
        now: the entries `MADE_WITH` of the session that begins.

    Returns:
        For each session its last step, the seconds that it took, and its `MADE_WITH`. The last session is left out if
        it had what the next one has, and one whose checkpoint does not say what it had, of an older version.
    """
    about = read_record(checkpoint / 'checkpoint.json')
    found: list[dict[str, Any]] = list(about.get('earlier') or ())
    had = {name: about[name] for name in MADE_WITH if name in about}
    if len(had) == len(MADE_WITH) and had != {name: now[name] for name in MADE_WITH}:
        took = round(seconds - sum(each['seconds'] for each in found), 2)
        found.append({'last_step': about['step'], 'seconds': took, **had})
    return found
