"""How an option is described and checked: its type, meaning, group, bounds and choices, and what it needs."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from ..wording import split_commas

__all__ = ['GROUPS', 'Option', 'as_typed', 'flag_of', 'is_flag', 'kind_fault', 'negated', 'options_of']

GROUPS = {
    'model': 'network and activation', 'data': 'images', 'objective': 'what is minimised',
    'attack': 'the attack that makes the training images', 'optimisation': 'optimizer and schedule',
    'run': 'the run and its files'}
"""The groups of ``--help``, in their order."""


@dataclass(frozen=True)
class Option:
    """The description of an option, and the values that it takes.

    Args:
        group: one of `GROUPS`.
        help: what the option is, for ``--help``.
        least, above, below: bounds: at least, more than, less than; None for no bound.
        choices: names that the option takes, or a function that lists them; () for any. One that ends in capitals,
            such as NAME, stands for all that begin as it does.
        many: whether a value is several of the choices, with commas.
        needs: other options, without one of which this one has no effect, each with the values that will do, () for
            any that is not off.
    """

    group: str
    help: str
    least: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Sequence[str] | Callable[[], Sequence[str]] = ()
    many: bool = False
    needs: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def has_effect(self, options: object) -> bool:
        """Returns whether one of the options is set that this one needs; True for an option that needs none."""
        values = {name: getattr(options, name) for name in self.needs}
        return not values or any(value in self.needs[name] if self.needs[name] else value
                                 for name, value in values.items())

    def names(self) -> list[str]:
        """Returns the choices."""
        return list(self.choices() if callable(self.choices) else self.choices)

    def fault(self, name: str, value: Any) -> str | None:
        """Returns what is wrong with a value, in words of the command line; None if nothing is."""
        flag = flag_of(name)
        if value is None:
            return None
        for each in split_commas(str(value)) if self.many else [value]:
            if self.choices and not any(_stands_for(name, each) for name in self.names()):
                return (f'unknown {flag} {each!r}; expected {"some" if self.many else "one"} of '
                        f'{", ".join(self.names())}')
        outside = ((self.least is not None and not value >= self.least)
                   or (self.above is not None and not value > self.above)
                   or (self.below is not None and not value < self.below))
        if outside:
            return f'{flag} is {value}; expected {self.range()}'
        if isinstance(value, int | float) and not abs(value) < 2 ** 63:
            return f'{flag} is not finite, or 2 ** 63 or more; expected a smaller number'
        return None

    def range(self) -> str:
        """Returns the bounds in words, '' without bounds."""
        if self.below is not None:
            return (f'above {self.above:g} and' if self.least is None else f'from {self.least:g} to') + (
                f' below {self.below:g}')
        low = f'at least {self.least:g}' if self.least is not None else ''
        return low or (f'above {self.above:g}' if self.above is not None else '')


def flag_of(name: str) -> str:
    """Returns the flag of an option on the command line, '--batch-size' of 'batch_size'."""
    return f'--{name.replace("_", "-")}'


def negated(flag: str) -> str:
    """Returns the flag that turns another one off, '--no-compile' of '--compile'."""
    return f'--no-{flag[2:]}'


def _stands_for(name: str, value: Any) -> bool:
    begin = name.rstrip(string.ascii_uppercase)
    return bool(value == name) if begin == name else str(value).startswith(begin) and value != begin


def _types(kind: Any) -> tuple[type, ...]:
    """Returns the classes of an annotation: of ``str | None`` str and NoneType."""
    if get_origin(kind) in (UnionType, Union):
        return tuple(cls for each in get_args(kind) for cls in _types(each))
    return (get_origin(kind) or kind,)


def is_flag(kind: Any) -> bool:
    """Returns whether an option of an annotation is a flag, ``--name`` and ``--no-name`` on the command line."""
    return bool in _types(kind)


def as_typed(kind: Any, value: Any) -> Any:
    """Returns a value of a notebook as the command line has it, where that is clear; any other as it is."""
    classes, value = _types(kind), value.tolist() if hasattr(value, 'tolist') else value
    if isinstance(value, Fraction):
        value = float(value)
    if isinstance(value, float) and value.is_integer() and float not in classes:
        value = int(value)
    if str not in classes or isinstance(value, bool):
        return value
    if isinstance(value, list | tuple) and list not in classes:
        return ','.join(map(str, value))
    return str(value) if isinstance(value, int | float) and not {int, float} & {*classes} else value


_WORDS: dict[type, str] = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'True or False',
                           dict: 'a dict', list: 'a list', type(None): 'None'}


def kind_fault(name: str, kind: Any, value: Any) -> str | None:
    """Returns what is wrong with the class of a value; None if nothing is. A whole number is a number too."""
    classes = _types(kind)
    right = bool in classes if isinstance(value, bool) else isinstance(value, (
        *classes, int) if float in classes else classes)
    return None if right else (f'{flag_of(name)} is {" ".join(repr(value).split())[:80]}; expected '
                               f'{" or ".join(_WORDS[cls] for cls in classes)}')


def options_of(cls: type) -> Mapping[str, tuple[Any, Option]]:
    """Returns the type and the `Option` of each annotated field of a class, by name."""
    return _options_of(cls)  # apart, because mypy takes no class of dataclasses for hashable


@functools.cache
def _options_of(cls: type) -> Mapping[str, tuple[Any, Option]]:
    found = {}
    hints = get_type_hints(cls, include_extras=True)
    for each in fields(cls):
        if get_origin(hints[each.name]) is Annotated:
            kind, option = get_args(hints[each.name])
            found[each.name] = kind, option
    return MappingProxyType(found)
