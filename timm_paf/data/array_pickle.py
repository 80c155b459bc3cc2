"""Reads integer arrays from a pickle, which is never run as code."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..wording import shown

__all__ = ['arrays_of_pickle']

Shape = tuple[int, ...]


def arrays_of_pickle(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Returns the arrays of these names in a pickled dict, which is read whole; a list of int counts as an array.

    Raises:
        ValueError: for a missing name, a damaged file, or one with anything but integer arrays and plain values.
    """
    try:
        with open(path, 'rb') as file:
            content = _ArrayUnpickler(file, encoding='latin1').load()  # arrays from Python 2 have this encoding
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError,
            OverflowError, MemoryError, RecursionError, AssertionError, struct.error) as error:
        raise ValueError(f'{path}: {_line(error) or "cut short"}; expected a pickled dict of plain values and integer '
                         f'arrays, with {" and ".join(names)}') from error
    if not isinstance(content, dict) or not set(names) <= content.keys():
        found = ', '.join(str(key) for key in content if isinstance(key, (str, bytes))) if (
            isinstance(content, dict)) else f'a {type(content).__name__}'
        raise ValueError(f'{path} holds {_line(found) or "no names"}; expected {" and ".join(names)}')
    arrays = []
    for name in names:
        value = content[name]
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            value = _int64(path, name, value)
        value = value.array if isinstance(value, _Array) else value
        if not isinstance(value, np.ndarray):
            raise ValueError(f'{path}: {name} is a {type(value).__name__}; expected an array of integers')
        arrays.append(value)
    return arrays


def _line(text: object) -> str:
    """Returns a text in one line of 200 characters at most."""
    return shown(' '.join(str(text)[:1000].split()), 200)  # a name may be as long as a file


def _int64(path: Path, name: str, values: list[int]) -> np.ndarray:
    try:
        return np.array(values, np.int64)
    except OverflowError as error:
        raise ValueError(f'{path}: {name} has a number beyond 64 bits; expected labels from 0') from error


class _Type:
    """A stand-in for numpy.dtype, of integers and booleans alone; numpy's own takes a state that can crash it."""

    def __init__(self, code: str, *_: object):
        if not re.fullmatch(r'[iu][1248]|b1', code):
            raise pickle.UnpicklingError(f'an array of type {code!r}')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder('>' if state[1] == '>' else '=')


class _Array:
    """A stand-in for numpy.ndarray. It keeps the bytes that were read, and views them as the array they are."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.array = _array_of(data, kind, shape, 'F' if fortran else 'C').array

    def __init__(self, *_: object) -> None: ...


def _array_of(data: bytes | str, kind: _Type, shape: Shape, order: str) -> _Array:
    data = data.encode('latin1') if isinstance(data, str) else data
    array = _Array()
    array.array = np.frombuffer(data, kind.dtype).reshape(shape, order='F' if order == 'F' else 'C')
    return array


def _bytes_of(text: str, encoding: str) -> bytes:
    if encoding != 'latin1':
        raise pickle.UnpicklingError('bytes in another encoding than latin1')
    return text.encode('latin1')


def _checked(code: bytes, where: slice, kinds: tuple[type, ...], role: str) -> Any:
    """Returns the step of an opcode which refuses other kinds of values at these places of the stack."""
    step: Any = pickle._Unpickler.dispatch[code[0]]

    def checked(unpickler: Any) -> None:
        for value in unpickler.stack[where]:
            if not isinstance(value, kinds):
                raise pickle.UnpicklingError(f'a {type(value).__name__} as {role}')
        step(unpickler)
    return checked


_PLAIN = (str, bytes, int, float, type(None))
_HASHED = {pickle.SETITEM: slice(-2, -1), pickle.SETITEMS: slice(None, None, 2), pickle.DICT: slice(None, None, 2),
           pickle.ADDITEMS: slice(None), pickle.FROZENSET: slice(None)}
"""Where on the stack an opcode finds what it hashes. A tuple's hash may take for ever, or end the process: pairs of one
pair are worked through again at each mention, and each level of nesting takes room of C's stack."""


class _ArrayUnpickler(pickle._Unpickler):
    """An unpickler of dicts, lists, text, numbers and integer arrays. It refuses anything else, by its name.

    The names that numpy pickles an array by are mapped to functions of this module, so nothing that a file can name is
    called. The unpickler is the one in Python, whose memo is a dict: that in C takes 4 GB for six bytes that name entry
    2^28. Most of these files is a few arrays, so it costs no time. A bytearray is read as bytes: Python fills one with
    zeros, as long as the file claims that it is.
    """

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],
                # a state would change what functions of this module do
                pickle.BUILD[0]: _checked(pickle.BUILD, slice(-2, -1), (_Type, _Array), 'an array'),
                **{code[0]: _checked(code, where, _PLAIN, 'a key') for code, where in _HASHED.items()}}

    NAMES: dict[tuple[str, str], object] = {
        ('numpy', 'ndarray'): _Array, ('numpy', 'dtype'): _Type, ('_codecs', 'encode'): _bytes_of,
        **{(f'numpy.{core}.multiarray', '_reconstruct'): _Array for core in ('core', '_core')},
        **{(f'numpy.{core}.numeric', '_frombuffer'): _array_of for core in ('core', '_core')}}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f'asks for {module}.{name}, which is code and was not run')
        return self.NAMES[module, name]
