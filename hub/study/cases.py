"""Reads a study: networks in a YAML, each with the options, seeds and attacks that it is trained and attacked with."""

from __future__ import annotations

import functools
import itertools
import json
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import get_loader

from timm_paf.evaluation import check_attacks
from timm_paf.training.config import Config, check, parse
from timm_paf.training.option import flag_of, is_flag, negated, options_of
from timm_paf.training.recipe import Recipe
from timm_paf.training.recipe_file import check_recipe_file
from timm_paf.training.run_directory import differences
from timm_paf.wording import shown, split_commas

RECORDS = ('run.json', 'metrics.jsonl', 'evaluation.json')
FILE = 'study.yaml'
"""The name that `hub.report` finds a study by, beside its records."""
PART = {'recipe': str, 'options': dict, 'networks': dict, 'seeds': list, 'images': int, 'attacks': str}
"""The keys of a part of a study with their types; what a part leaves out is as in the whole study."""
GRID = 'grid'
"""The key of a network that stands for several: names with lists of values, which $name stands for in all else."""
OWN = ('--config', '--seed', '--output', '--data-dir')
"""Options of train that the study gives itself."""


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
        more: further options of train, as a command line has them.
    """

    network: str
    seed: int
    recipe: str
    options: dict[str, Any]
    images: int
    attacks: str
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the directory of its records."""
        return f'{self.network}_s{self.seed}'

    def train(self) -> list[str]:
        """Returns the options for train_robust.py."""
        found, kinds = ['--config', self.recipe, '--seed', str(self.seed)], options_of(Config)
        for name, value in self.options.items():
            kind = kinds[name][0] if name in kinds else bool
            if isinstance(value, bool) and is_flag(kind):
                found.append(flag_of(name) if value else negated(flag_of(name)))
            else:
                found += [flag_of(name), value if isinstance(value, str) else json.dumps(value, default=str)]
        return [*found, *self.more]

    def meant(self) -> tuple[Config, Recipe]:
        """Returns the configuration of its training, and the recipe that this means.

        Raises:
            ValueError: for an option that train does not have, or that can't be meant.
        """
        file = Path(self.recipe)
        return _meant(tuple(self.train()), file.read_bytes() if file.is_file() else b'')

    def check(self) -> None:
        """Checks what it is trained and attacked with, before any work.

        Raises:
            ValueError: for an option or an attack that can't be meant.
        """
        try:
            given = [*map(flag_of, self.options), *(word for word in self.more if word.startswith('--'))]
            if own := [word for word in given if word.partition('=')[0] in OWN]:
                raise ValueError(f'{own[0]} is given; expected seeds in the study, --output and --data-dir of study, '
                                 'and recipe in the study in place of --config')
            check_attacks(split_commas(self.attacks), self.meant()[1].threat, sources=())
        except ValueError as error:
            raise ValueError(f'{self.name}: {error}') from None

    def refuse_other_run(self, run: Mapping[str, Any], where: Path) -> None:
        """Checks that a run.json is of this network's recipe.

        Raises:
            ValueError: if it is of another one.
        """
        config, recipe = self.meant()
        found, expected = {**run['recipe']}, recipe.record()
        if config.compile is None:
            expected['compile'] = found.get('compile')  # the program has chosen
        for name in ('init', 'synthetic'):  # a record has these with the sha256 of files, which may be elsewhere now
            given = getattr(config, name)
            expected[name] = found.get(name) if (found.get(name) is None) == (given is None) else given
        if config.init or '.' in config.model:  # the weights, or timm's name of some, bring further arguments
            expected['model_kwargs'] = {**(found.get('model_kwargs') or {}), **config.model_kwargs} or None
        if differs := differences(found, expected):
            raise ValueError(f'{where} is not of {self.name} as the study has it: {"; ".join(differs)}; expected the '
                             'same, or another name of the network, or another --output')


@functools.lru_cache(maxsize=1024)
def _meant(args: tuple[str, ...], content: bytes) -> tuple[Config, Recipe]:  # content: the recipe's may have changed
    config = parse([*args, '--data-dir', 'data', '--output', 'run'])
    return config, check(config)


def open_study(path: Path) -> list[Case]:
    """Returns the networks of a study in its order: part after part, in each seed after seed.

    Raises:
        ValueError: for a key or a type that a study does not have, and a network that is there twice.
        OSError: if the file can't be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is no file; expected a study, a YAML with {", ".join(PART)}, such as '
                                'hub/results/study/study.yaml in a clone')
    check_recipe_file(path, 'a study, with recipe, networks, seeds, images and attacks')
    content = get_loader('yaml')(path.read_text(encoding='utf-8'))  # which reads numbers as in a recipe, 1e-3 too
    whole = {'options': {}, **{key: value for key, value in content.items() if key != 'parts'}}
    parts = content.get('parts', [{}])
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f'{path}: parts is {shown(repr(parts))}; expected a list of parts, each with '
                         f'{", ".join(PART)}')
    found: dict[str, Case] = {}
    images: dict[str, int] = {}
    for part in parts:
        for case in _cases({**whole, **part}, path):
            if case.name in found:
                raise ValueError(f'{path}: {case.name} is there twice; expected another name or seed, and the '
                                 f'$name of every list under {GRID} in the name')
            if images.setdefault(case.network, case.images) != case.images:
                raise ValueError(f'{path}: {case.network} has images {images[case.network]} and {case.images}; '
                                 'expected the same with each seed')
            found[case.name] = case
    return list(found.values())


def _cases(part: dict[str, Any], path: Path) -> Iterator[Case]:
    if unknown := [key for key in part if key not in PART]:
        raise ValueError(f'{path}: unknown key {shown(repr(unknown[0]))}; expected {", ".join(PART)}, parts')
    for key, kind in PART.items():
        value = part.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or (not value and key != 'options') or (
                isinstance(value, int) and value < 1):
            raise ValueError(f'{path}: {key} is {shown(repr(value))}; expected {_WORDS[kind]}')
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in part['seeds']):
        raise ValueError(f'{path}: seeds is {shown(repr(part["seeds"]))}; expected whole numbers such as [0, 1, 2]')
    recipe = part['recipe']
    beside = path.parent / recipe
    networks = [each for written, given in part['networks'].items() for each in _grid(str(written), given, path)]
    for seed in part['seeds']:
        for name, options in networks:
            yield Case(name, seed, str(beside) if beside.is_file() else recipe,
                       {**part['options'], **options}, part['images'], part['attacks'])


def _grid(name: str, options: Any, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the networks that one entry stands for, by name, with their options."""
    if not isinstance(options, dict) or not isinstance(options.get(GRID, {}), dict) or not all(
            isinstance(values, list) and values for values in options.get(GRID, {}).values()):
        raise ValueError(f'{path}: {name} is {shown(repr(options))}; expected options of train, and beside them '
                         f'{GRID} with lists of at least one value by name')
    rest = {key: value for key, value in options.items() if key != GRID}
    axes, before = options.get(GRID, {}), []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        try:
            found = _filled(name, chosen), {key: _filled(value, chosen) for key, value in rest.items()}
        except (KeyError, ValueError) as error:
            raise ValueError(f'{path}: {name} has $ with {error}, of which {GRID} says no values; expected one of its '
                             'names, as $name or ${name}') from None
        if not re.fullmatch(r'\w[\w.+-]*(/\w[\w.+-]*)*', str(found[0])):
            raise ValueError(f'{path}: {shown(repr(str(found[0])))} is no name of a directory; expected letters, '
                             'digits and _.+-/')
        if found[1] in before:
            raise ValueError(f'{path}: {name} stands twice for the same options; expected the $name of every list '
                             f'under {GRID} among them')
        before.append(found[1])
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


_WORDS = {str: 'a text', dict: 'options by name', list: 'a list such as [0, 1, 2]', int: 'a whole number above 0'}
