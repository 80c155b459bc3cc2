"""Follows a forward pass to see which activations shape a gate: a pooled tensor that multiplies the features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ['GateFlow']

_PRODUCTS = {
    'mul', 'mul_', 'multiply', 'multiply_', '__mul__', '__rmul__', '__imul__', 'addcmul', 'addcmul_', 'einsum'}
_REDUCTIONS = {'mean', 'sum', 'amax', 'amin', 'max', 'min', 'std', 'var', 'std_mean', 'var_mean', 'norm', 'logsumexp'}


class GateFlow:
    """Knows of each tensor that comes from the images how often it was pooled, and what acted since the last time.

    Where a tensor multiplies one that was pooled less often, as in squeeze-and-excite, what acted on it shaped a gate.
    The head of a network is pooled too, but its result multiplies no feature map.

    Attributes:
        gates: the marks of what shaped a gate.
    """

    def __init__(self) -> None:
        self.gates: set[int] = set()
        self._known = WeakTensorKeyDictionary()  # tensor -> (number of poolings, marks since the last)

    def start(self, images: Tensor) -> None:
        self._known[images] = (0, frozenset())

    def follow(self, function: str, given: Any, made: Any) -> None:
        """Takes note of a function's call: its name, its arguments and its result, of any structure."""
        known = [self._known[x] for x in _tensors(given) if x in self._known]
        if not known:
            return
        least = min(count for count, _ in known)
        marks = frozenset[int]().union(*(found for count, found in known if count == least))
        if function in _PRODUCTS:
            self.gates.update(*(found for count, found in known if count > least))
        for out in _tensors(made):
            pools = function in _REDUCTIONS and len(known) == 1 if 'pool' not in function else set(out.shape[2:]) == {1}
            self._known[out] = (least + 1, frozenset()) if pools else (least, marks)

    def follow_module(self, given: Any, made: Any) -> None:
        """Takes note of a module's call where the functions in it were not seen, as in TorchScript."""
        if not any(out in self._known for out in _tensors(made)):
            self.follow('', given, made)

    def mark(self, made: Any, mark: int) -> None:
        """Marks a result as that of an activation."""
        for out in _tensors(made):
            count, marks = self._known.get(out, (0, frozenset()))  # type: ignore[no-untyped-call]
            if count:  # what was never pooled is no gate
                self._known[out] = (count, marks | {mark})


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _tensors(item)
