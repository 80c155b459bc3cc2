"""Reads the records of a study's networks, and what they say of activations and shapes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from timm_paf.activations import create_paf, list_pafs
from timm_paf.attacks import ThreatModel
from timm_paf.files import read_record
from timm_paf.second_derivative import curvature
from timm_paf.wording import split_commas

from ..record_check import check_run, read_evaluation
from .cases import FILE, RECORDS, Case, open_study

RESULTS = Path('hub/results')
EVALUATED_ALIKE = (
    'threat_model', 'pgd_step', 'dataset', 'images', 'n', 'data_sha256', 'batch_size', 'seed', 'precision')
"""The keys of an evaluation.json that two have in common where only the networks differ."""


def attacked_with(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `EVALUATED_ALIKE` names; before pgd_step was recorded, it was that of the threat model."""
    found = {key: evaluation.get(key) for key in EVALUATED_ALIKE}
    found['pgd_step'] = found['pgd_step'] or str(ThreatModel(**evaluation['threat_model']).step)
    return found


def attacked_otherwise(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Returns the keys in which two evaluations differ whose verdicts may not be compared for it."""
    return [key for key, value in attacked_with(first).items() if attacked_with(second)[key] != value]


class Record:
    """The records of one network of a study.

    Attributes:
        act: its activation.
        fixed: the parameters of it that do not learn, {} if they do.
        learned: the parameters of it at the end, as the formula has them; {} for one without.

    Raises:
        ValueError, FileNotFoundError: if a record is missing, damaged, or of another network.
    """

    def __init__(self, directory: Path, case: Case) -> None:
        run, metrics, evaluation = (directory / name for name in RECORDS)
        self.case, self.run = case, check_run(read_record(run), run, for_card=True)
        self.evaluation = finished(evaluation)
        case.refuse_other_run(self.run, run)
        recipe, architecture = self.run['recipe'], self.run['architecture']
        trained, attacked = (self.run.get('files', {}).get('model.safetensors'), architecture), (
            self.evaluation['weights_sha256'], self.evaluation['architecture'])
        if trained[1] != attacked[1] or trained[0] not in (None, attacked[0]):
            raise ValueError(f'{evaluation} is of {attacked[1]} with sha256 {attacked[0]}; expected those of {run}, '
                             f'{trained[1]} with {trained[0]}')
        self.act: str = recipe.get('act') or max(
            (name for name in list_pafs(plain=True) if architecture.endswith(f'_{name}')), key=len, default='')
        given = recipe['act_kwargs']
        self.fixed = {key: value for key, value in given.items() if key != 'frozen'} if given.get('frozen') else {}
        last = last_line(metrics)
        self.learned = in_effect(self.act, {
            n: last[f'act.{n}'] for n in ('alpha', 'beta') if f'act.{n}' in last and not self.fixed})

    def verdicts(self, attack: str) -> torch.Tensor | None:
        """Returns (n,) 100 where the image stands, else 0, so that the mean is the accuracy in percent."""
        found = self.evaluation['attacks'].get(attack)
        return None if found is None else torch.tensor([100 * int(c) for c in found['verdicts']], dtype=torch.float64)

    def refuse_other_attack(self, other: Record) -> None:
        """Raises ValueError unless another network was attacked in the same way, so that verdicts may be compared."""
        if unlike := attacked_otherwise(self.evaluation, other.evaluation):
            raise ValueError(f'{self.case.name} and {other.case.name} were attacked with other {", ".join(unlike)}; '
                             'expected the same, to be compared')

    @property
    def attacked_on(self) -> tuple[str, str | None]:
        """What its attacks were made on, in words, and the sha256 of the images."""
        found, threat = self.evaluation, self.evaluation['threat_model']
        return (f'{found["dataset"]}, {found["images"]}, {threat["norm"]} {threat["eps"]}', found.get('data_sha256'))

    def accuracy(self, attack: str) -> float:
        """Returns the accuracy in percent under an attack."""
        return 100 * float(self.evaluation['attacks'][attack]['accuracy'])

    @property
    def minutes(self) -> float:
        """The minutes of its training."""
        return float(self.run['seconds']) / 60

    @property
    def curvature(self) -> float:
        """The largest second derivative of the activation at the end."""
        return shape(self.act, **self.fixed, **self.learned)[0]

    @property
    def at_minus_one(self) -> float:
        """The output at -1 of the activation at the end."""
        return shape(self.act, **self.fixed, **self.learned)[1]

    @property
    def shared(self) -> Any:
        """The settings that all networks of the study have in common."""
        recipe = {key: value for key, value in self.run['recipe'].items()
                  if key not in ('model', 'seed', 'act_kwargs', 'paf_penalty', 'paf_clip')}
        return recipe, self.run['data'], self.run['steps'], *attacked_with(self.evaluation).values()


def finished(path: Path) -> dict[str, Any]:
    """Reads an evaluation.json.

    Raises:
        ValueError: if the evaluation is not complete, damaged, or without the verdicts of each image.
    """
    found = read_evaluation(path)
    if not found.get('complete'):
        raise ValueError(f'{path} is not finished; run its command again, it resumes')
    for name, result in found['attacks'].items():
        if 'verdicts' not in result:
            raise ValueError(f'{path}: {name} has no verdicts; expected those of each image, as evaluate writes them')
    return found


def is_complete(case: Case, directory: Path) -> bool:
    """Returns whether all records of a network are there, of as many images and of at least these attacks.

    Raises:
        ValueError: if they are damaged, or of another network.
    """
    run, *others = (directory / name for name in RECORDS)
    whole = all(path.is_file() for path in others)
    if not run.is_file():
        return False
    try:
        found = check_run(read_record(run), run)
    except ValueError:
        if whole:
            raise
        return False  # train writes it anew from a checkpoint
    case.refuse_other_run(found, run)
    return whole and (evaluation := finished_evaluation(directory)) is not None and _is_of(evaluation, case)


def refuse_other_evaluation(case: Case, directory: Path) -> None:
    """Checks that no finished evaluation of other images or attacks is in the way, since none is overwritten.

    Raises:
        ValueError: if one is, or it is damaged.
    """
    found, path = finished_evaluation(directory), directory / RECORDS[-1]
    if found is not None and not _is_of(found, case) and not path.with_suffix('.state').exists():
        raise ValueError(f'{path} is of {found["images"]} images and {",".join(found["attacks"])}; expected '
                         f'{case.images} and {case.attacks}, as the study has for {case.name}: move it away, and '
                         'the same command evaluates anew, or give the study what it has')


def refuse_other_kept_run(directory: Path, kept: Path) -> None:
    """Checks that no record of another training of a network stands where its records are to be kept.

    Raises:
        ValueError: if one does: of other weights, or of a training that is not in ``directory``.
    """
    ours, there = directory / RECORDS[0], kept / RECORDS[0]
    if kept == directory or not there.is_file() or not (found := read_record(there).get('files')):
        return
    other = 'a training that {} has not' if not ours.is_file() else (
        'another training than {}' if read_record(ours).get('files') != found else '')
    if other:
        raise ValueError(f'{there} is of {other.format(directory)}; nothing kept is overwritten: move it away')


def _is_of(evaluation: Mapping[str, Any], case: Case) -> bool:
    return bool(evaluation['n'] == case.images and ':' not in evaluation['images']
                and set(split_commas(case.attacks)) <= evaluation['attacks'].keys())


def finished_evaluation(directory: Path) -> dict[str, Any] | None:
    """Returns the evaluation.json of a directory; None if there is none, or evaluate is to resume it.

    Raises:
        ValueError: if it is damaged, or not of evaluate.
    """
    found = _evaluation_in(directory) if (directory / RECORDS[-1]).is_file() else None
    return found if found and found.get('complete') else None


def _evaluation_in(directory: Path) -> dict[str, Any] | None:
    """Reads the evaluation.json of a directory; None if it is damaged, and evaluate is to write it anew."""
    path = directory / RECORDS[-1]
    try:
        return read_evaluation(path)
    except ValueError:
        if path.with_suffix('.state').exists():
            return None
        raise


def last_line(metrics: Path) -> dict[str, Any]:
    """Reads the last line of a metrics.jsonl.

    Raises:
        ValueError: if it is none of train.
    """
    last = metrics.read_text(encoding='utf-8', errors='replace').splitlines()[-1:]
    try:
        found: dict[str, Any] = json.loads(''.join(last))
        float(found['epoch'])
        [float(value) for name, value in found.items() if name.startswith('act.')]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f'{metrics} does not end with the line of an epoch; it may have been cut short: restore it '
                         'from a copy') from None
    return found


def in_effect(act: str, values: dict[str, float]) -> dict[str, float]:
    """Returns the parameters as the formula has them: for PSiLU and PSSiLU their absolute values."""
    return {name: abs(value) for name, value in values.items()} if act in ('psilu', 'pssilu') else values


def state_of(directory: Path) -> str:
    """Returns how far a network is whose records are not complete."""
    file = directory / RECORDS[0]
    if (directory / RECORDS[-1]).is_file():
        found = _evaluation_in(directory)
        return 'trained, its evaluation is written anew' if found is None else (
            f'trained, attacked by {", ".join(found["attacks"])} on {found["images"]} images')
    if not file.is_file():
        return 'to do'
    try:
        run = check_run(read_record(file), file)
    except ValueError:  # train writes it anew from a checkpoint
        return 'in training, its run.json is written anew'
    if run['status'] == 'complete':
        return 'trained'
    begun = (directory / 'metrics.jsonl').is_file()
    return f'in training, {last_line(directory / "metrics.jsonl")["epoch"] + 1 if begun else 0} of ' \
           f'{run["recipe"]["epochs"]} epochs done'


def records_of(directory: Path) -> list[Record]:
    """Returns the record of every network of the study in a directory that is complete.

    What stands in a directory named ``images_...`` is of other images than the study's, and left out.

    Raises:
        ValueError: if there is a record of no network of the study, or of another one.
    """
    study = {case.name: case for case in open_study(directory / FILE)}
    found = []
    for path in sorted(directory.rglob(RECORDS[-1])):
        name = path.parent.relative_to(directory).as_posix()
        if name.startswith('images_'):
            continue
        if name not in study:
            raise ValueError(f'{path} is of no network of {directory / FILE}; expected a name such as '
                             f'{next(iter(study))}')
        refuse_other_evaluation(study[name], path.parent)
        found.append(Record(path.parent, study[name]))
    return found


def grouped(found: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns records by network, seed after seed."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(found, key=lambda record: record.case.seed):
        groups[record.case.network].append(record)
    return dict(groups)


def attacks_of(found: Sequence[Record]) -> list[str]:
    """Returns the attacks that any of them was attacked with, in their order."""
    return list(dict.fromkeys(name for record in found for name in record.evaluation['attacks']))


def by_seed(found: Sequence[Record], attack: str) -> dict[int, torch.Tensor]:
    """Returns by seed the verdicts of the networks that the attack was run on."""
    return {r.case.seed: v for r in found if (v := r.verdicts(attack)) is not None}


def parameters(act: str) -> int:
    """Returns the number of parameters that an activation learns."""
    return sum(p.numel() for p in create_paf(act).parameters())


def shape(act: str, **values: float) -> tuple[float, float]:
    """Returns an activation's largest second derivative (infinite at a kink), and its output at -1."""
    paf = create_paf(act, **values).double()
    return curvature(paf), paf(torch.tensor([-1.0], dtype=torch.float64)).item()
