"""Reads the records of `hub.study`, and what they say of activations and shapes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from timm_paf.activations import create_paf
from timm_paf.files import read_json

from .cases import ARCHITECTURE, RECORDS, RESULTS, Case, shape

ATTACK = 'pgd-50'
"""The attack on every network of the study."""


class Record:
    """The records of one network of the study.

    Raises:
        ValueError, FileNotFoundError: if a record is missing, damaged, or of no network of the study.
    """

    def __init__(self, directory: Path) -> None:
        run, metrics, evaluation = (directory / name for name in RECORDS)
        self.run, self.evaluation = read_json(run), finished(evaluation)
        if ATTACK not in self.evaluation['attacks']:
            raise ValueError(f'{evaluation} has {", ".join(self.evaluation["attacks"])}; expected {ATTACK} among them')
        recipe = self.run['recipe']
        act = self.run['architecture'].removeprefix(f'{ARCHITECTURE}_')
        fixed = {key: value for key, value in recipe['act_kwargs'].items() if key != 'frozen'}
        self.case = Case(act, recipe['seed'], fixed, act == 'pssilu' and not recipe['paf_penalty'])
        if self.case.name != directory.name:
            raise ValueError(f'{directory} holds the records of {self.case.name}')
        last = last_line(metrics)
        self.learned = in_effect(act, {n: last[f'act.{n}'] for n in ('alpha', 'beta') if f'act.{n}' in last})

    def verdicts(self, attack: str) -> torch.Tensor | None:
        """Returns (n,) 100 where the image stands, else 0, so that the mean is the accuracy in percent."""
        found = self.evaluation['attacks'].get(attack)
        return None if found is None else torch.tensor([100 * int(c) for c in found['verdicts']], dtype=torch.float64)

    @property
    def robust(self) -> float:
        """The accuracy in percent under the attack that all have."""
        return 100 * self.evaluation['attacks'][ATTACK]['accuracy']

    @property
    def curvature(self) -> float:
        """The largest second derivative of the activation at the end."""
        return shape(self.case.act, **self.case.fixed, **self.learned)[0]

    @property
    def shared(self) -> Any:
        """The settings that all networks of the study have in common."""
        recipe = {key: value for key, value in self.run['recipe'].items()
                  if key not in ('model', 'seed', 'act_kwargs', 'paf_penalty', 'paf_clip')}
        return recipe, self.run['data'], self.run['steps'], *(
            self.evaluation[key] for key in ('threat_model', 'images', 'n', 'batch_size', 'seed', 'precision'))


def finished(path: Path) -> dict[str, Any]:
    """Reads an evaluation.json.

    Raises:
        ValueError: if the evaluation is not complete.
    """
    found = read_json(path)
    if not found['complete']:
        raise ValueError(f'{path} is not finished; run its command again, it resumes')
    return found


def last_line(metrics: Path) -> dict[str, Any]:
    """Reads the last line of a metrics.jsonl."""
    return json.loads(metrics.read_text(encoding='utf-8').splitlines()[-1])


def in_effect(act: str, values: dict[str, float]) -> dict[str, float]:
    """Returns the parameters as the formula has them: for PSiLU and PSSiLU their absolute values."""
    return {name: abs(value) for name, value in values.items()} if act in ('psilu', 'pssilu') else values


def records() -> list[Record]:
    """Returns the record of every network of the study that is complete.

    Raises:
        ValueError: if there are no records, none with ReLU, or they were not all made in the same way.
    """
    found = [Record(path.parent) for path in sorted(RESULTS.glob('*/evaluation.json'))]
    if not any(record.case.name == 'relu_s0' for record in found):
        raise ValueError(f'{RESULTS} has no relu_s0; run python -m hub.study --keep {RESULTS}')
    unlike = [record.case.name for record in found if record.shared != found[0].shared]
    if unlike:
        raise ValueError(f'{", ".join(unlike)} in {RESULTS} were made in another way than {found[0].case.name}')
    return found


def activations() -> dict[str, list[Record]]:
    """Returns the records of networks with nothing fixed, by variant, seed after seed."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records():
        if not record.case.fixed:
            groups[record.case.variant].append(record)
    return dict(groups)


def by_seed(found: Sequence[Record], attack: str) -> dict[int, torch.Tensor]:
    """Returns by seed the verdicts of the networks that the attack was run on."""
    return {r.case.seed: v for r in found if (v := r.verdicts(attack)) is not None}


def parameters(act: str) -> int:
    """Returns the number of parameters that an activation learns."""
    return sum(p.numel() for p in create_paf(act).parameters())


def fixed_shapes() -> list[tuple[Record, float, float]]:
    """Returns the records with seed 0 and an activation that learned nothing, with its curvature and output at -1."""
    return [(r, *shape(r.case.act, **r.case.fixed)) for r in records()
            if r.case.seed == 0 and (r.case.fixed or not parameters(r.case.act))]
