"""Checks a recipe file before anything is made of it: plain options, each once, of a size that a person writes."""

from __future__ import annotations

import re
from pathlib import Path

from ..wording import reason_of

__all__ = ['check_recipe_file']

MAX_BYTES, MAX_DEPTH, MAX_DIGITS = 1 << 20, 8, 20


def check_recipe_file(path: str | Path, kind: str = 'a recipe, lines such as "lr: 0.1"') -> None:
    """Refuses a YAML that is no list of options.

    It goes through YAML's events, so that a file costs no more memory and time than its length: tags (which may name
    Python functions), anchors and aliases (which may multiply without end), keys given twice (of which YAML takes the
    last), another recipe, deep nesting and endless numbers are not taken.

    Raises:
        ValueError: with the line of the file.
        OSError: if the file can't be read.
    """
    import yaml

    with open(path, 'rb') as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f'{path} has more than {MAX_BYTES:,} bytes; expected {kind}')
    keys: list[dict[str, int] | None] = []  # of the open mappings, with the line of each; None for a list
    expects_key, documents = [False], 0
    try:
        for event in yaml.parse(content.decode(), Loader=yaml.SafeLoader):
            line, where = event.start_mark.line + 1, f'{path}, line {event.start_mark.line + 1}'
            if isinstance(event, yaml.AliasEvent) or getattr(event, 'anchor', None):
                raise ValueError(f'{where}: an anchor or alias (& or *); expected the value itself')
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
            if isinstance(event, yaml.CollectionEndEvent):
                keys.pop()
                expects_key.pop()
            if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
                continue
            if event.tag is not None:
                raise ValueError(f'{where}: the tag {event.tag[:100]!r}; expected a plain value')
            if documents > 1 or (not keys and not isinstance(event, yaml.MappingStartEvent)):
                raise ValueError(f'{where}: no option; expected {kind}')
            if expects_key[-1]:
                mapping = keys[-1]
                if mapping is None or not isinstance(event, yaml.ScalarEvent) or event.value in ('<<', ''):
                    raise ValueError(f'{where}: a key that is no name; expected one such as lr')
                if event.value in mapping:
                    raise ValueError(f'{where}: {event.value[:100]!r} is given twice, first in line '
                                     f'{mapping[event.value]}; keep one')
                if len(keys) == 1 and event.value == 'config':
                    raise ValueError(f'{where}: a recipe names no other recipe; give --config twice')
                mapping[event.value] = line
                expects_key[-1] = False
                continue
            expects_key[-1] = keys != [] and keys[-1] is not None  # the value of this key is here
            if isinstance(event, yaml.CollectionStartEvent):
                keys.append({} if isinstance(event, yaml.MappingStartEvent) else None)
                expects_key.append(isinstance(event, yaml.MappingStartEvent))
                if len(keys) > MAX_DEPTH:
                    raise ValueError(f'{where}: more than {MAX_DEPTH} brackets or levels in one another')
            elif re.search(rf'[\d_]{{{MAX_DIGITS + 1}}}', event.value) and re.fullmatch(r'[-+\w.:]*', event.value):
                raise ValueError(f'{where}: a number of more than {MAX_DIGITS} digits')
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f'{path} is no YAML: {reason_of(error)}') from None
    if not documents:
        raise ValueError(f'{path} is empty; expected {kind}')
