"""Puts texts of files and exceptions into a message: one line, printable, not long."""

from __future__ import annotations

from typing import Any

__all__ = ['first_line_of', 'reason_of', 'shown']


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


def first_line_of(error: BaseException) -> str:
    """Returns the first line of what an exception says, without the advice that PyTorch puts behind it."""
    return shown(str(error).strip().partition('\n')[0] or type(error).__name__, 300)
