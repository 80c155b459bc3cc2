"""The files of a training run: writes and reads checkpoints, chooses the one to resume from, and loses no run.

A run directory holds run.json, metrics.jsonl, checkpoints/step-N and, at the end, model.safetensors.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import atomic_directory, atomic_write, read_json, save_torch, sha256, write_json

__all__ = [
    'append_metrics', 'claim_output', 'differences', 'is_complete', 'latest_checkpoint', 'prepare_output',
    'read_checkpoint', 'recorded_choice', 'write_checkpoint',
]

Log = Callable[[str], None]


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns where two recipes differ, as 'key found, now expected'; a missing entry counts as None."""
    found, expected = json.loads(json.dumps(found)), json.loads(json.dumps(expected))
    return [f'{key} {found.get(key)}, now {expected.get(key)}' for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key)]


def _checkpoints(output: Path) -> list[Path]:
    return sorted((output / 'checkpoints').glob('step-*'))


def _is_part(path: Path) -> bool:
    return path.name.startswith('.') and path.name.endswith('.part')


def latest_checkpoint(output: Path) -> Path | None:
    """Returns the newest ``checkpoints/step-*`` of a run directory, damaged or not; None if there is none."""
    return max(_checkpoints(output), default=None)


def _damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, None if they are whole.

    Raises:
        ValueError: if the files are another program's.
    """
    try:
        about = read_json(path / 'checkpoint.json')
        found = sha256(path / 'state.pt')
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if not isinstance(about, dict) or not {'sha256', 'recipe', 'processes'} <= about.keys():
        raise ValueError(f'{path}/checkpoint.json is not of train_robust.py; expected sha256, recipe and processes')
    return None if found == about['sha256'] else (
        f'{path}/state.pt is damaged: sha256 {found}, expected {about["sha256"]}')


def write_checkpoint(
        output: Path, step: int, state: dict[str, Any], recipe: dict[str, Any], processes: int, keep: int) -> Path:
    """Writes ``checkpoints/step-<n>`` whole, and only then removes all but the newest ``keep``.

    Args:
        output: the run directory.
        step: number of optimizer steps done.
        state: tensors and plain values, for `read_checkpoint`.
        recipe: the record of the recipe.
        processes: number of processes of the run.
        keep: number of checkpoints that stay.

    Returns:
        The checkpoint's directory.
    """
    path = output / 'checkpoints' / f'step-{step:08d}'
    for left in path.parent.glob('.step-*.part'):  # left by a run that was killed while it wrote
        shutil.rmtree(left)
    if path.exists():
        if _damage(path) is None:
            return path
        shutil.rmtree(path)  # the run resumed from an earlier checkpoint and is here again
    with atomic_directory(path) as part:
        save_torch(state, part / 'state.pt')
        write_json(part / 'checkpoint.json', {
            'step': step, 'sha256': sha256(part / 'state.pt'), 'recipe': recipe, 'processes': processes})
    before = [other for other in _checkpoints(output) if other.name < path.name]
    after = [other for other in _checkpoints(output) if other.name > path.name]  # damaged: the run resumed before them
    for old in [*before[:max(len(before) + 1 - keep, 0)], *after]:
        shutil.rmtree(old)
    return path


def read_checkpoint(path: Path, recipe: dict[str, Any], processes: int, anyway: Log | None = None) -> dict[str, Any]:
    """Reads the state in a checkpoint.

    Args:
        path: the checkpoint's directory.
        recipe, processes: record of the recipe and number of processes of the run that resumes.
        anyway: function that gets a line on what differs in the checkpoint; without it a difference is an error.

    Raises:
        FileNotFoundError: if ``path`` is no checkpoint.
        ValueError: if the checkpoint is truncated, tampered with, or of another recipe or number of processes.
    """
    if not path.is_dir():
        raise FileNotFoundError(f'{path} is no checkpoint; expected a directory RUN/checkpoints/step-N')
    damage = _damage(path)
    if damage is not None:
        raise ValueError(f'{damage}; resume from another checkpoint with --resume')
    about = read_json(path / 'checkpoint.json')
    differs = differences(about['recipe'], recipe)
    if about['processes'] != processes:
        differs.append(f'processes {about["processes"]}, now {processes}')
    if differs and anyway is None:
        raise ValueError(f'{path} is of another run: {"; ".join(differs)}. Use its values, another --output, or '
                         '--resume-anyway')
    if differs and anyway is not None:
        anyway(f'resumes from another run: {"; ".join(differs)}')
    try:
        state: dict[str, Any] = torch.load(path / 'state.pt', map_location='cpu', weights_only=True)
    except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f'{path}/state.pt is not of train_robust.py: {" ".join(str(error).split())[:200]}') from error
    return state


def recorded_choice(output: Path, name: str) -> Any:
    """Returns an entry of the recipe of the run in ``output``, None without a run or such an entry."""
    run = read_json(output / 'run.json') if (output / 'run.json').is_file() else None
    recipe = run.get('recipe') if isinstance(run, dict) else None
    return recipe.get(name) if isinstance(recipe, dict) else None


def prepare_output(
        output: Path, recipe: dict[str, Any], resume: str, log: Log = print, anyway: bool = False) -> Path | None:
    """Returns the checkpoint that a run resumes from, None to start; refuses a directory that holds anything else.

    Args:
        output: the run directory; need not exist.
        recipe: the record of the recipe to run.
        resume: 'auto' (the newest whole checkpoint in ``output`` if there is one), 'never', or a checkpoint.
        log: function that gets a line for each damaged checkpoint that was skipped.
        anyway: whether to take a run of another recipe too.

    Raises:
        FileExistsError: if ``output`` holds another run or other files, any run with 'never', or a later checkpoint.
        FileNotFoundError: if the checkpoint to resume from is not there.
        ValueError: if every checkpoint is damaged.
    """
    given = None if resume in ('auto', 'never') else Path(resume)
    if given is not None and not given.is_dir():
        raise FileNotFoundError(f'--resume {given} is not there; expected auto, never or RUN/checkpoints/step-N')
    # A run that was killed as it wrote its first file leaves a part of that file, which does not count.
    if output.exists() and (not output.is_dir() or any(not _is_part(path) for path in output.iterdir())):
        if not (output / 'run.json').is_file():
            raise FileExistsError(f'{output} holds files but no run.json; expected a new directory or that of a run')
        if resume == 'never':
            raise FileExistsError(f'{output} holds a run; expected a new --output with --resume never')
        run = read_json(output / 'run.json')
        if not isinstance(run, dict) or not isinstance(run.get('recipe'), dict):
            raise FileExistsError(f'{output}/run.json is not of train_robust.py; choose another --output')
        differs = differences(run['recipe'], recipe)
        if differs and not anyway:
            raise FileExistsError(f'{output} holds another run: {"; ".join(differs)}; choose another --output, or '
                                  '--resume-anyway')
    newest = latest_checkpoint(output)
    if given is not None:
        if newest is not None and newest.name > given.name:
            raise FileExistsError(f'{output} holds {newest.name}, later than --resume {given}; choose another --output')
        return given
    for path in reversed(_checkpoints(output)):
        damage = _damage(path)
        if damage is None:
            return path
        log(f'skips a checkpoint: {damage}')
    if newest is not None:
        raise ValueError(f'every checkpoint in {output} is damaged; start anew with another --output')
    return None


def claim_output(
        output: Path, recipe: dict[str, Any], data: dict[str, Any], resume: str, log: Log = print, anyway: bool = False,
) -> tuple[Path | None, bool]:
    """Checks a run directory before anything is written there.

    Args:
        output, recipe, resume, log, anyway: see `prepare_output`.
        data: the record of the images.

    Returns:
        The checkpoint to resume from (None to start), and whether the run is complete.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as `prepare_output` and `check_same_run`.
    """
    checkpoint = prepare_output(output, recipe, resume, log, anyway)
    check_same_run(output, recipe, data, anyway)
    return checkpoint, is_complete(output)


def is_complete(output: Path) -> bool:
    """Returns whether a run directory holds a finished run and its weights."""
    return ((output / 'run.json').is_file() and (output / 'model.safetensors').is_file()
            and read_json(output / 'run.json')['status'] == 'complete')


def check_same_run(output: Path, recipe: dict[str, Any], data: dict[str, Any], anyway: bool) -> None:
    """Refuses to resume with other images, and to pass a finished run of another recipe off as this one.

    Args:
        output: the run directory; need not exist.
        recipe, data: records of the recipe and the images of the coming run.
        anyway: whether other images are meant.

    Raises:
        ValueError: if the images, or the recipe of a finished run, differ.
    """
    run = read_json(output / 'run.json') if (output / 'run.json').is_file() else {}
    changed = differences(run.get('data', data), data)
    if changed and not anyway:
        raise ValueError(f'{output} was trained on other images: {"; ".join(changed)}; bring those back, choose '
                         'another --output, or --resume-anyway')
    if is_complete(output) and differences(run['recipe'], recipe):
        raise ValueError(f'{output} is complete and of another recipe; resume in another --output with --resume '
                         f'{latest_checkpoint(output)} --resume-anyway')


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Adds a line to metrics.jsonl, after removing lines of this step or later (they will come again)."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)['step'] < row['step']]
    with atomic_write(path) as part:
        part.write_text('\n'.join([*kept, json.dumps(row)]) + '\n')
