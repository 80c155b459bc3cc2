"""Takes paths of a user's machine out of what is published, and finds those that a file names."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from timm_paf.files import read_record, write_record

# A path begins a text or follows a space, quote, bracket, comma, colon or equals sign; 8/255 and addresses have none.
_BEGIN = r'(?:file://)?(?:[A-Za-z]:[\\/]|\\\\(?=[\w?.])|~[\w.-]*[\\/]|/(?=[\w.~-]))'
_PATH = re.compile(rf'''(?<![^\s'"`=,:;(\[{{|]){_BEGIN}(?:(?<=')[^'\n]*|[^\s'"`<>|;,()\[\]{{}}])*''')
_QUOTED = re.compile(rf'''(?<=(['"])){_BEGIN}(?:(?!\1)[^\n])*''')
# Bytes of weights and pictures look like a short path by chance, so in those only the homes count.
_HOME = re.compile(rb'(?:/home/|/Users/|/root/|/var/folders/|:[\\/]{1,2}Users[\\/])[\w.@ -]{2,}')
_PUBLIC = r'~[\\/]|/(?:dev|usr|etc|bin|opt)/'  # these say nothing of whose machine it is
_PLACES = {
    '--data-dir': 'DATA_DIR', '--output': 'RUN', '--out': 'BUNDLE', '--resume': 'CHECKPOINT', '--init': 'WEIGHTS'}


def without_paths(value: Any) -> Any:
    """Returns a record, or a text, with each absolute path and each below a home cut down to its last part.

    In a command line a path after one of `_PLACES` becomes the word for it. A path of one or two parts, which may be a
    home, becomes PATH.
    """
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str) or not (_QUOTED.search(value) or _PATH.search(value)):
        return value
    if re.match(_BEGIN, value) and not re.search(r'\s--?\w', value):
        return _last(value)  # the whole text is a path, which may have spaces
    try:
        words = shlex.split(value)
    except ValueError:
        words = []
    if '\\' not in value and any(word in _PLACES or word.partition('=')[0] in _PLACES for word in words):
        options = [_PLACES.get(word.partition('=')[0] if '=' in word else before)
                   for before, word in zip(['', *words], words, strict=False)]
        value = shlex.join([_placed(word, place) for word, place in zip(words, options, strict=True)])
    return _PATH.sub(lambda match: _last(match[0]), _QUOTED.sub(lambda match: _last(match[0]), value))


def paths_in(path: Path) -> str | None:
    """Returns a path of somebody's machine that a file of a bundle names, None where it names none."""
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        found = _HOME.search(content)
        return None if found is None else found[0].decode(errors='replace')
    texts: Iterable[str] = [text]
    if path.suffix in ('.json', '.jsonl'):
        try:
            texts = _texts([json.loads(line) for line in (text.splitlines() if path.suffix == '.jsonl' else [text])])
        except (ValueError, RecursionError):
            texts = [text]
    return next((match[0] for text in texts for pattern in (_QUOTED, _PATH) for match in pattern.finditer(text)
                 if not re.match(_PUBLIC, match[0])), None)


def publish_record(path: Path) -> dict[str, Any] | None:
    """Writes a record anew without paths, where it has any; returns its content, None if there is no such file."""
    if not path.is_file():
        return None
    record = read_record(path)
    published: dict[str, Any] = without_paths(record)
    if published != record:
        write_record(path, published)
    return published


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, str):
        yield value
    for item in value if isinstance(value, list) else ():
        yield from _texts(item)


def _placed(word: str, place: str | None) -> str:
    flag, equals, path = word.rpartition('=') if word.startswith('-') else ('', '', word)
    return f'{flag}{equals}{place}' if place and re.match(_BEGIN, path) else word


def _last(path: str) -> str:
    """Returns the last part of a path that has three or more, or begins with ~ as a home; else PATH."""
    parts = [part for part in re.split(r'[\\/]+', path.strip()) if part]
    kept = len(parts) > (1 if parts[:1] == ['~'] else 2) and parts[-1] not in ('.', '..', '~')
    return parts[-1] if kept else 'PATH'
