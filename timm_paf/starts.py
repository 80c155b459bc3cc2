"""The values with which a PAF starts as the activation that it replaces: equal to it, or close."""

from __future__ import annotations

from collections.abc import Collection

from .activations import list_pafs, values_given

__all__ = ['STARTS', 'start_values']

# PSiLU and PSoftplus become ReLU as alpha grows, but then only inputs of size 1 / alpha move it.
_SHARP = 100.0
# Too small to change a sigmoid above 1e-22 in float32, but a beta that learns: abs(beta) has no gradient at 0.
_NO_SHIFT = 1e-30

STARTS: dict[str, dict[str, dict[str, float]]] = {
    'relu': {
        'prelu': {'alpha': 0.0}, 'prelu_plus': {'alpha': 1.0}, 'pelu': {'alpha': 0.0}, 'reblu': {'alpha': 0.0},
        'psoftplus': {'alpha': _SHARP}, 'psilu': {'alpha': _SHARP}, 'pssilu': {'alpha': _SHARP, 'beta': _NO_SHIFT}},
    'elu': {'pelu': {'alpha': 1.0}},
    'softplus': {'psoftplus': {'alpha': 1.0}},
    'silu': {'psilu': {'alpha': 1.0}, 'pssilu': {'alpha': 1.0, 'beta': _NO_SHIFT}},
    # x sigmoid(1.702 x) is within 0.021 of GELU: Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415.
    'gelu': {'psilu': {'alpha': 1.702}, 'pssilu': {'alpha': 1.702, 'beta': _NO_SHIFT}}}
"""Activation -> PAF -> the values with which the PAF is that activation. ReLU and GELU are approximated by those that
have an alpha of 100 or 1.702; the others are equal. SSiLU is no start: its beta is its definition."""


def start_values(act: str, plain: str, given: Collection[str] = ()) -> dict[str, float]:
    """Returns the values with which an activation is another one, exactly or nearly; {} for the same one.

    Args:
        act: the activation that takes the place, one of ``list_pafs(plain=True)``.
        plain: the activation that it replaces.
        given: names of arguments of the activation; the values that these decide are left out.

    Raises:
        ValueError: if no values bring the two close.
    """
    if act == plain and act not in list_pafs():
        return {}
    found = STARTS.get(plain, {}).get(act)
    if found is None:
        near = [name for name, pafs in STARTS.items() if act in pafs]
        raise ValueError(f'{act} has no values with which it is {plain}; expected '
                         + (f'it in place of {", ".join(near)}' if near else 'another activation')
                         + (f', or one of {", ".join(STARTS[plain])}' if plain in STARTS else ''))
    return {name: value for name, value in found.items() if name not in values_given(act, given)}
