"""Puts texts of files and exceptions into a message, names what is nearest to a mistyped name, and splits lists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ['causes', 'did_you_mean', 'first_line_of', 'reason_of', 'shown', 'split_commas']


def shown(text: Any, length: int | None = 120) -> str:
    """Returns a text of a file for a message: one printable line, not long; with ``length=None`` all of it."""
    line = ''.join(c if c.isprintable() else ' ' for c in str(text))
    return line if length is None or len(line) <= length else f'{line[:length]}...'


def reason_of(error: BaseException, length: int | None = 300) -> str:
    """Returns what an exception says, in one line; its type where it says nothing, as an assertion may.

    The C++ stack behind some of PyTorch's messages is left out.
    """
    text = ' '.join(shown(str(error).partition('\nException raised from ')[0], None).split())
    return shown(text or type(error).__name__, length)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and what led to it, the last one first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def first_line_of(error: BaseException) -> str:
    """Returns the first line of what an exception says, without the advice that PyTorch puts behind it."""
    return shown(str(error).strip().partition('\n')[0] or type(error).__name__, 300)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns '; did you mean A or B?' for the nearest known words, '' where none is near."""
    near = difflib.get_close_matches(word, list(known), 3)
    return f'; did you mean {" or ".join(near)}?' if near else ''


def split_commas(text: str) -> list[str]:
    """Returns the parts of a text with commas, without blanks around them."""
    return [part.strip() for part in text.split(',')]
