"""The files of a training run: writes and reads checkpoints, chooses the one to resume from, and loses no run.

A run directory holds run.json, metrics.jsonl, checkpoints/step-N and, at the end, model.safetensors.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import (
    atomic_directory,
    atomic_write,
    is_of_machine,
    read_record,
    save_torch,
    sha256,
    write_record,
)
from ..wording import reason_of

__all__ = [
    'RESULTS', 'Claim', 'append_metrics', 'claim_output', 'differences', 'is_complete', 'latest_checkpoint',
    'prepare_output', 'read_checkpoint', 'recorded_choice', 'recorded_images', 'write_checkpoint',
]

RESULTS = ('model.safetensors', 'metrics.jsonl')
"""The files of a finished run whose SHA-256 its run.json has."""

Log = Callable[[str], None]


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns where two recipes differ, as 'key found, now expected'; a missing entry counts as None."""
    found, expected = json.loads(json.dumps(found)), json.loads(json.dumps(expected))
    return [f'{key} {found.get(key)}, now {expected.get(key)}' for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key)]


def _checkpoints(output: Path) -> list[Path]:
    return sorted((output / 'checkpoints').glob('step-*'))


def _is_part(path: Path) -> bool:
    return path.name.startswith('.') and path.name.endswith(('.part', '.lock'))


def latest_checkpoint(output: Path) -> Path | None:
    """Returns the newest ``checkpoints/step-*`` of a run directory, damaged or not; None if there is none."""
    return max(_checkpoints(output), default=None)


def _damage(path: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, None if they are whole."""
    try:
        about = read_record(path / 'checkpoint.json')
        if not {'sha256', 'recipe', 'processes'} <= about.keys():
            return f'{path}/checkpoint.json is not of train_robust.py; expected sha256, recipe and processes'
        found = sha256(path / 'state.pt')
    except (OSError, ValueError) as error:
        if is_of_machine(error):  # an older checkpoint is no better
            raise
        return str(error)
    return None if found == about['sha256'] else (
        f'{path}/state.pt is damaged: sha256 {found}, expected {about["sha256"]}')


def _newest_whole(output: Path, log: Log | None = None) -> Path | None:
    for path in reversed(_checkpoints(output)):
        damage = _damage(path)
        if damage is None:
            return path
        if log is not None:
            log(f'skips a checkpoint: {damage}')
    return None


def write_checkpoint(
        output: Path, step: int, state: dict[str, Any], recipe: dict[str, Any], processes: int, keep: int,
        facts: dict[str, Any] | None = None) -> Path:
    """Writes ``checkpoints/step-<n>`` whole, and only then removes all but the newest ``keep``.

    Args:
        output: the run directory.
        step: number of optimizer steps done.
        state: tensors and plain values, for `read_checkpoint`.
        recipe: the record of the recipe.
        processes: number of processes of the run.
        keep: number of checkpoints that stay.
        facts: further entries of run.json, from which it can be made again.

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
        write_record(part / 'checkpoint.json', {
            **(facts or {}), 'step': step, 'sha256': sha256(part / 'state.pt'), 'recipe': recipe,
            'processes': processes})
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
        raise ValueError(f'{damage}; without --resume the newest whole one of a run is taken')
    about = read_record(path / 'checkpoint.json')
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
        raise ValueError(f'{path}/state.pt is not of train_robust.py: {reason_of(error)}') from error
    return state


def _read_run(output: Path) -> dict[str, Any] | None:
    """Returns the record of the run in a directory, or what a checkpoint has of a damaged one; None without a run."""
    try:
        return read_record(output / 'run.json')
    except FileNotFoundError:
        return None
    except ValueError:
        whole = _newest_whole(output)
        return None if whole is None else read_record(whole / 'checkpoint.json')


def recorded_choice(output: Path, name: str) -> Any:
    """Returns an entry of the recipe of the run in ``output``, None without a run or such an entry."""
    recipe = (_read_run(output) or {}).get('recipe')
    return recipe.get(name) if isinstance(recipe, dict) else None


def recorded_images(output: Path) -> dict[str, Any] | None:
    """Returns the record of the images of the run in ``output``, None without a run or such a record."""
    data = (_read_run(output) or {}).get('data')
    return data if isinstance(data, dict) else None


def prepare_output(
        output: Path, recipe: dict[str, Any], resume: str, log: Log = print, anyway: bool = False) -> Path | None:
    """Returns the checkpoint that a run resumes from, None to start; refuses a directory that holds anything else.

    Args:
        output: the run directory; need not exist.
        recipe: the record of the recipe to run.
        resume: 'auto' (the newest whole checkpoint in ``output`` if there is one), 'never', or a checkpoint. A run in
            ``output`` that began at the checkpoint goes on from its own newest.
        log: function that gets a line for each damaged file that was skipped.
        anyway: whether to take a run of another recipe too.

    Raises:
        FileExistsError: if ``output`` holds another run or other files, any run with 'never', or a later checkpoint.
        FileNotFoundError: if the checkpoint to resume from is not there.
        ValueError: if every checkpoint, or run.json without any checkpoint, is damaged.
    """
    given = None if resume in ('auto', 'never') else Path(resume)
    if given is not None and not given.is_dir():
        raise FileNotFoundError(f'--resume {given} is not there; expected auto, never or RUN/checkpoints/step-N')
    whole, run = _newest_whole(output, log), None
    # A run that was killed as it wrote its first file leaves a part of that file, which does not count.
    if output.exists() and (not output.is_dir() or any(not _is_part(path) for path in output.iterdir())):
        if not (output / 'run.json').is_file():
            raise FileExistsError(f'{output} holds files but no run.json; expected a new directory or that of a run')
        if resume == 'never':
            raise FileExistsError(f'{output} holds a run; expected a new --output with --resume never')
        try:
            run = read_record(output / 'run.json')
        except ValueError as error:
            if whole is None:
                raise ValueError(f'{error}; restore it, or choose another --output') from None
            log(f'{error}; it is written anew')
            run = read_record(whole / 'checkpoint.json')
        if not isinstance(run.get('recipe'), dict):
            raise FileExistsError(f'{output}/run.json is not of train_robust.py; choose another --output')
        differs = differences(run['recipe'], recipe)
        if differs and not anyway:
            raise FileExistsError(f'{output} holds another run: {"; ".join(differs)}; choose another --output, or '
                                  '--resume-anyway')
    newest = latest_checkpoint(output)
    if given is not None:
        if whole is None or whole.name <= given.name:
            return given
        origin = _origin(given)
        if run is None or origin is None or run.get('resumed_from') != origin:
            raise FileExistsError(f'{output} holds {whole.name}, later than --resume {given}; choose another --output')
    if newest is not None and whole is None:
        raise ValueError(f'every checkpoint in {output} is damaged; start anew with another --output')
    return whole


def _origin(checkpoint: Path) -> dict[str, Any] | None:
    """Returns step and SHA-256 of a checkpoint that a run begins at, None where it is damaged."""
    if _damage(checkpoint) is not None:
        return None
    about = read_record(checkpoint / 'checkpoint.json')
    return {'step': about.get('step'), 'sha256': about['sha256']}


class Claim(NamedTuple):
    """What a run finds in its directory."""

    checkpoint: Path | None
    """The checkpoint to resume from, None to start."""
    complete: bool
    resumed_from: dict[str, Any] | None
    """Step and SHA-256 of the checkpoint of another run that this one began at, for run.json."""


def claim_output(
        output: Path, recipe: dict[str, Any], data: dict[str, Any], resume: str, log: Log = print, anyway: bool = False,
) -> Claim:
    """Checks a run directory before anything is written there.

    Args:
        output, recipe, resume, log, anyway: see `prepare_output`.
        data: the record of the images.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as `prepare_output` and `check_same_run`, and for the images of
            the run whose checkpoint is to be resumed.
    """
    checkpoint = prepare_output(output, recipe, resume, log, anyway)
    check_same_run(output, recipe, data, anyway)
    given = None if resume in ('auto', 'never') else Path(resume).absolute()
    origin = (_read_run(output) or {}).get('resumed_from')
    if given is not None and given.parent != (output / 'checkpoints').absolute():
        _check_images(given.parent.parent, data, anyway)
        origin = _origin(given)
    return Claim(checkpoint, is_complete(output, log), origin)


def is_complete(output: Path, log: Log | None = None) -> bool:
    """Returns whether a run directory holds a finished run and its weights.

    Args:
        output: the run directory.
        log: function that gets a line if the run has finished and its weights are damaged since.

    Raises:
        ValueError: if the run has finished and a file that nothing can bring back is damaged since.
    """
    run = _read_run(output)
    if run is None or run.get('status') != 'complete':
        return False
    files: dict[str, Any] = {RESULTS[0]: None, **run.get('files', {})}
    for name, expected in files.items():
        path = output / name
        found = sha256(path) if path.is_file() else None
        if found is not None and expected in (None, found):
            continue
        damage = f'{path} is missing' if found is None else f'{path} is damaged: sha256 {found}, expected {expected}'
        if name != RESULTS[0] or _newest_whole(output) is None:
            raise ValueError(f'{damage}; nothing here can make it again, restore it from a copy')
        if log is not None:
            log(f'{damage}; it is written anew')
        return False
    return True


def _check_images(run: Path, data: dict[str, Any], anyway: bool) -> None:
    # The names of the classes say nothing of the images, and may be a thousand.
    found, now = ({key: value for key, value in each.items() if key != 'label_names'}
                  for each in ((_read_run(run) or {}).get('data', data), data))
    changed = differences(found, now)
    if changed and not anyway:
        raise ValueError(f'{run} was trained on other images: {"; ".join(changed)}; bring those back, choose '
                         'another --output, or --resume-anyway')


def check_same_run(output: Path, recipe: dict[str, Any], data: dict[str, Any], anyway: bool) -> None:
    """Refuses to resume with other images, and to pass a finished run of another recipe off as this one.

    Args:
        output: the run directory; need not exist.
        recipe, data: records of the recipe and the images of the coming run.
        anyway: whether other images are meant.

    Raises:
        ValueError: if the images, or the recipe of a finished run, differ.
    """
    _check_images(output, data, anyway)
    if is_complete(output) and differences((_read_run(output) or {}).get('recipe', {}), recipe):
        raise ValueError(f'{output} is complete and of another recipe; resume in another --output with --resume '
                         f'{latest_checkpoint(output)} --resume-anyway')


def _step(line: str) -> int:
    """Returns the step of a line of metrics.jsonl, -1 if it is damaged."""
    try:
        step = json.loads(line)['step']
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return step if isinstance(step, int) else -1


def append_metrics(path: Path, row: dict[str, Any], log: Log = print) -> None:
    """Adds a line to metrics.jsonl, after removing lines of this step or later (they will come again).

    Args:
        path: the file.
        row: the line to add.
        log: function that gets a line if the file has damaged ones, which are left out.
    """
    lines = path.read_text(errors='replace').splitlines() if path.exists() else []
    steps = [_step(line) for line in lines]
    if -1 in steps:
        log(f'{path}: {steps.count(-1)} of {len(lines)} lines cannot be read and are left out')
    kept = [line for line, step in zip(lines, steps) if 0 <= step < row['step']]
    with atomic_write(path) as part:
        part.write_text('\n'.join([*kept, json.dumps(row)]) + '\n')
