"""Reads a study: networks in a YAML, each with the options, seeds and attacks that it is trained and attacked with."""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_paf.evaluation import check_attacks
from timm_paf.files import read_json
from timm_paf.training.config import check, parse
from timm_paf.training.option import flag_of
from timm_paf.training.recipe_file import check_recipe_file

RECORDS = ('run.json', 'metrics.jsonl', 'evaluation.json')
FILE = 'study.yaml'
"""The name that `hub.report` finds a study by, beside its records."""
PART = {'recipe': str, 'options': dict, 'networks': dict, 'seeds': list, 'images': int, 'attacks': str}
"""The keys of a part of a study with their types; what a part leaves out is as in the whole study."""
EACH = 'each'
"""The key of a network that stands for several: names with lists of values, which $name stands for in all else."""


@dataclass(frozen=True)
class Case:
    """One network of a study.

    Args:
        network: its name, the same for all seeds.
        seed: of its weights, its data and the attack.
        recipe: a YAML or the name of a shipped one.
        options: options of train_robust.py beside the recipe, by name.
        images: number of test images, the first.
        attacks: of hub.evaluate.
    """

    network: str
    seed: int
    recipe: str
    options: dict[str, Any]
    images: int
    attacks: str

    @property
    def name(self) -> str:
        """The name of the directory of its records."""
        return f'{self.network}_s{self.seed}'

    def train(self) -> list[str]:
        """Returns the options for train_robust.py."""
        found = ['--config', self.recipe, '--seed', str(self.seed)]
        for name, value in self.options.items():
            if isinstance(value, bool):
                found.append(flag_of(name) if value else f'--no-{flag_of(name)[2:]}')
            else:
                found += [flag_of(name), value if isinstance(value, str) else json.dumps(value)]
        return found

    def check(self) -> None:
        """Checks what it is trained and attacked with, before any work.

        Raises:
            ValueError: for an option or an attack that can't be meant.
        """
        try:
            check_attacks(self.attacks.split(','))
            check(parse([*self.train(), '--data-dir', 'data', '--output', self.name]))
        except ValueError as error:
            raise ValueError(f'{self.name}: {error}') from None

    def check_run(self, run: Mapping[str, Any], where: Path) -> None:
        """Checks that a run.json is of this network; what the study does not name may be of another version.

        Raises:
            ValueError: if it is of another one.
        """
        recipe = {**run['recipe'], **{key: value for key, value in run['recipe'].get('threat', {}).items()
                                      if key in ('eps', 'norm')}}
        for name, value in {**self.options, 'seed': self.seed}.items():
            if name in recipe and recipe[name] != value:
                raise ValueError(f'{where} has {name} {recipe[name]}; expected {value}, which the study has for '
                                 f'{self.name}')

    def complete(self, directory: Path) -> bool:
        """Returns whether all its records are there, of as many images and of at least these attacks.

        Raises:
            ValueError: if they are of another network.
        """
        if not all((directory / name).is_file() for name in RECORDS):
            return False
        self.check_run(read_json(directory / RECORDS[0]), directory / RECORDS[0])
        found = read_json(directory / RECORDS[-1])
        return bool(found.get('complete', False) and found['n'] == self.images and ':' not in found['images']
                    and set(self.attacks.split(',')) <= found['attacks'].keys())


def open_study(path: Path) -> list[Case]:
    """Returns the networks of a study in its order: part after part, in each seed after seed.

    Raises:
        ValueError: for a key or a type that a study does not have, and a network that is there twice.
        OSError: if the file can't be read.
    """
    import yaml

    check_recipe_file(path, 'a study, with recipe, networks, seeds, images and attacks')
    content = yaml.safe_load(path.read_text(encoding='utf-8'))
    whole = {key: value for key, value in content.items() if key != 'parts'}
    parts = content.get('parts', [{}])
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f'{path}: parts is {_shown(parts)}; expected a list of parts, each with {", ".join(PART)}')
    found: dict[str, Case] = {}
    for part in parts:
        for case in _cases({**whole, **part}, path):
            if case.name in found:
                raise ValueError(f'{path}: {case.name} is there twice; expected another name or seed')
            found[case.name] = case
    return list(found.values())


def _cases(part: dict[str, Any], path: Path) -> Iterator[Case]:
    for key in part.keys() - PART.keys():
        raise ValueError(f'{path}: unknown key {_shown(key)}; expected {", ".join(PART)}, parts')
    for key, kind in PART.items():
        value = part.get(key, {} if key == 'options' else None)
        if not isinstance(value, kind) or isinstance(value, bool) or (not value and key != 'options'):
            raise ValueError(f'{path}: {key} is {_shown(value)}; expected {_WORDS[kind]}')
    if not all(isinstance(seed, int) and seed >= 0 for seed in part['seeds']):
        raise ValueError(f'{path}: seeds is {_shown(part["seeds"])}; expected whole numbers such as [0, 1, 2]')
    recipe = part['recipe']
    beside = path.parent / recipe
    networks = {name: options for written, given in part['networks'].items()
                for name, options in _each(str(written), given, path)}
    for seed in part['seeds']:
        for name, options in networks.items():
            yield Case(name, seed, str(beside) if beside.is_file() else recipe,
                       {**part.get('options', {}), **options}, part['images'], part['attacks'])


def _each(name: str, options: Any, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the networks that one entry stands for, by name, with their options."""
    if not isinstance(options, dict) or not isinstance(options.get(EACH, {}), dict) or not all(
            isinstance(values, list) for values in options.get(EACH, {}).values()):
        raise ValueError(f'{path}: {name} is {_shown(options)}; expected options of train, and beside them {EACH} with '
                         'lists of values by name')
    rest = {key: value for key, value in options.items() if key != EACH}
    axes = options.get(EACH, {})
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        try:
            found = _filled(name, chosen), {key: _filled(value, chosen) for key, value in rest.items()}
        except (KeyError, ValueError) as error:
            raise ValueError(f'{path}: {name} has $ with {error}, of which {EACH} says no values') from None
        if not re.fullmatch(r'\w[\w.+-]*(/\w[\w.+-]*)*', str(found[0])) or 'seed' in found[1]:
            raise ValueError(f'{path}: {_shown(name)} is no name of a directory, or has a seed; expected letters, '
                             'digits and _.+-/, and seeds in the part')
        yield str(found[0]), found[1]


def _filled(value: Any, chosen: Mapping[str, Any]) -> Any:
    """Returns a value of a YAML with each $name as what was chosen for it; alone it keeps its type."""
    if isinstance(value, dict):
        return {key: _filled(inner, chosen) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, chosen) for inner in value]
    if not isinstance(value, str) or '$' not in value:
        return value
    return chosen[value[1:]] if value[1:] in chosen else string.Template(value).substitute(chosen)


_WORDS = {str: 'a text', dict: 'options by name', list: 'a list such as [0, 1, 2]', int: 'a whole number'}


def _shown(value: Any) -> str:
    return repr(value)[:100]
