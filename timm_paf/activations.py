"""Parametric activation functions (PAFs).

Formulas: Dai, Mahloujifar, Mittal, "Parameterizing Activation Functions for Adversarial
Robustness", https://arxiv.org/abs/2110.05626, section 3 and appendix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import kernels

__all__ = [
    'PAF', 'PELU', 'ChannelPAF', 'PReLU', 'PReLUPlus', 'PSSiLU', 'PSiLU', 'PSoftplus', 'ReBLU', 'SSiLU',
    'create_paf', 'list_pafs', 'paf_parameters', 'values_given',
]


class PAF(nn.Module):
    """An activation with learnable parameters, each of shape (1,) as in the published checkpoints.

    The result has the input's shape and dtype. bfloat16 and float16 inputs are computed in float32.

    Args:
        frozen: names of parameters to hold at their value (the paper's fixed-alpha studies), or True for all. A frozen
            value is a buffer: it is saved and loaded under the same key and no optimizer can find it.
        curvature: in place of the value that decides it, the largest second derivative by size that the activation
            starts with, above 0: it sets alpha of PSoftplus, PSiLU and, at its beta, of PSSiLU, and beta of SSiLU.
        inplace: accepted because timm passes it to every activation, and not used: a PAF needs its input for the
            backward pass.
        device, dtype: where the parameters are created, and their type.
        **values: initial values other than the class's own, such as ``alpha=2.0``.

    Raises:
        TypeError: if a value or a frozen name is not a parameter of this activation.
        ValueError: for a value at which the activation is not finite, and for a curvature that it can't have.
    """

    kernel: ClassVar[str]
    init: ClassVar[dict[str, float]] = {'alpha': 1.0}
    frozen_by_default: ClassVar[tuple[str, ...]] = ()
    poles: ClassVar[dict[str, float]] = {}  # absolute values at which the formula divides by 0
    at_curvature: ClassVar[tuple[str, Callable[[float, float], float]] | None] = None
    """The parameter that a curvature decides, and its value at (curvature, beta); None where there is a kink."""
    if TYPE_CHECKING:  # the parameters of the PAFs that have them; TorchScript would take the annotations for its own
        alpha: Tensor
        beta: Tensor

    def __init__(
            self,
            *,
            frozen: bool | str | Iterable[str] | None = None,
            curvature: float | None = None,
            inplace: bool = False,
            device: torch.device | str | None = None,
            dtype: torch.dtype | None = None,
            **values: float,
    ) -> None:
        super().__init__()
        if frozen is None:
            names = set(self.frozen_by_default)
        elif isinstance(frozen, bool):
            names = set(self.init) if frozen else set()
        else:
            names = {frozen} if isinstance(frozen, str) else set(frozen)
        unknown = sorted((names | set(values)) - set(self.init))
        if unknown:
            raise TypeError(
                f'{type(self).__name__} has no parameter {", ".join(unknown)}; it has {", ".join(self.init)}')
        start = {name: float(values.get(name, default)) for name, default in self.init.items()}
        if curvature is not None:
            self._start_at(curvature, start, values, dtype)
        for name, initial in start.items():
            rounded = torch.tensor(initial, dtype=dtype, device='cpu').item()  # 1 - 1e-9 is 1 in float32
            if not math.isfinite(rounded) or abs(rounded) == self.poles.get(name):
                raise ValueError(f'{name} is {initial:g}, where {type(self).__name__} is not finite; expected another '
                                 'number')
            value = torch.full((1,), initial, device=device, dtype=dtype)
            if name in names:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))

    def _start_at(
            self, curvature: float, start: dict[str, float], given: Collection[str], dtype: torch.dtype | None) -> None:
        """Puts the value with which the activation has a curvature among its initial ones, which are rounded later."""
        if self.at_curvature is None:
            raise _no_curvature(self.kernel)
        if not isinstance(curvature, Real) or isinstance(curvature, bool) or not 0 < curvature < math.inf:
            raise ValueError(f'curvature is {curvature!r}; expected a number above 0')
        name, value_at = self.at_curvature
        if name in given:
            raise ValueError(f'{name} and curvature are both given, and each decides the other; expected one of them')

        def rounded(value: float) -> Tensor:
            return torch.tensor(value, dtype=dtype, device='cpu').double()

        start[name] = value_at(float(curvature), float(rounded(start.get('beta', 0.0))))
        found = kernels.KERNELS[self.kernel].curvature(*map(rounded, start.values())).item()
        if not math.isnan(found) and not math.isclose(found, curvature, rel_tol=0.01):
            raise ValueError(f'curvature is {curvature:g}, which {type(self).__name__} does not have for any {name} in '
                             f'its precision; expected another number')

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            half = x.dtype == torch.bfloat16 or x.dtype == torch.float16
            return self.formula(x.float() if half else x).to(x.dtype)
        return kernels.run(self.kernel, x, *[getattr(self, name) for name in self.init])

    def formula(self, x: Tensor) -> Tensor:
        """Returns the activation of float32 or float64 ``x``; TorchScript compiles this, as it can't read a table."""
        raise AssertionError('each PAF defines its formula')

    def named_modules(
            self, memo: set[nn.Module] | None = None, prefix: str = '', remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yields the PAF once in a walk, also where a network has it at many places and duplicates are asked for.

        Else torch.func.functional_call would leave the given values in the network: it swaps a value once per name and
        restores what the last swap found (https://github.com/pytorch/pytorch/pull/195593).
        """
        return super().named_modules(memo, prefix)

    def extra_repr(self) -> str:
        learnable = dict(self.named_parameters())
        return ', '.join(
            f'{name}={getattr(self, name).item():.4g}{"" if name in learnable else " frozen"}' for name in self.init
            if not getattr(self, name).is_meta)


class PReLU(PAF):
    """x if x > 0 else alpha x."""

    kernel = 'prelu'
    init = {'alpha': 0.0}

    def formula(self, x: Tensor) -> Tensor:
        return kernels.prelu(x, self.alpha)


class PReLUPlus(PAF):
    """alpha x if x > 0 else 0."""

    kernel = 'prelu_plus'

    def formula(self, x: Tensor) -> Tensor:
        return kernels.prelu_plus(x, self.alpha)


class PELU(PAF):
    """x if x > 0 else alpha (e^x - 1)."""

    kernel = 'pelu'

    def formula(self, x: Tensor) -> Tensor:
        return kernels.pelu(x, self.alpha)


class ReBLU(PAF):
    """alpha (sqrt(x^2 + 1) - 1) + x if x > 0 else 0."""

    kernel = 'reblu'
    init = {'alpha': 0.0}

    def formula(self, x: Tensor) -> Tensor:
        return kernels.reblu(x, self.alpha)


class PSoftplus(PAF):
    """log(1 + e^(alpha x)) / alpha."""

    kernel = 'psoftplus'
    poles = {'alpha': 0.0}
    at_curvature = 'alpha', lambda curvature, beta: 4 * curvature

    def formula(self, x: Tensor) -> Tensor:
        return kernels.psoftplus(x, self.alpha)


class PSiLU(PAF):
    """x sigmoid(abs(alpha) x)."""

    kernel = 'psilu'
    at_curvature = 'alpha', lambda curvature, beta: 2 * curvature

    def formula(self, x: Tensor) -> Tensor:
        return kernels.psilu(x, self.alpha)


class SSiLU(PAF):
    """x (sigmoid(x) - beta) / (1 - beta), with beta fixed."""

    kernel = 'ssilu'
    init = {'beta': 0.3}
    poles = {'beta': 1.0}
    frozen_by_default = ('beta',)
    at_curvature = 'beta', lambda curvature, beta: 1 - 0.5 / curvature

    def formula(self, x: Tensor) -> Tensor:
        return kernels.ssilu(x, self.beta)


class PSSiLU(PAF):
    """x (sigmoid(abs(alpha) x) - abs(beta)) / (1 - abs(beta))."""

    kernel = 'pssilu'
    init = {'alpha': 1.0, 'beta': 1e-8}
    poles = {'beta': 1.0}
    at_curvature = 'alpha', lambda curvature, beta: 2 * curvature * abs(1 - abs(beta))

    def formula(self, x: Tensor) -> Tensor:
        return kernels.pssilu(x, self.alpha, self.beta)


class ChannelPAF(PAF):
    """A PAF with a value per channel. Its parameters have shape (channels,), and it has no fused kernel.

    A network with it runs under ``torch.compile``, ``torch.export`` and ``torch.jit.trace``; FX's symbolic trace and
    TorchScript, which other PAFs have, do not take it.

    Args:
        paf: the PAF that gives the formula, the initial values and the frozen ones.
        channels: size of the channel axis.
        axis: the channel axis of the input, 1 or -1.
    """

    def __init__(self, paf: PAF, channels: int, axis: int) -> None:
        nn.Module.__init__(self)
        self.kernel, self.init, self.axis = paf.kernel, paf.init, axis  # type: ignore[misc]
        for name in paf.init:
            value = getattr(paf, name)
            whole = value.detach().expand(channels).clone()
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, nn.Parameter(whole))
            else:
                self.register_buffer(name, whole)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        values = [getattr(self, name).view(shape) for name in self.init]
        return kernels.KERNELS[self.kernel].value(kernels.upcast(x), *values).to(x.dtype)

    def extra_repr(self) -> str:
        return f'{self.kernel}, {getattr(self, next(iter(self.init))).numel()} channels, axis={self.axis}'


_PAFS: dict[str, type[PAF]] = {
    cls.kernel: cls for cls in (PReLU, PReLUPlus, PELU, ReBLU, PSoftplus, PSiLU, SSiLU, PSSiLU)}
_PLAIN: dict[str, type[nn.Module]] = {
    'relu': nn.ReLU, 'elu': nn.ELU, 'softplus': nn.Softplus, 'silu': nn.SiLU, 'gelu': nn.GELU}


def list_pafs(plain: bool = False) -> list[str]:
    """Returns the names that `create_paf` takes.

    Args:
        plain: whether to add the activations without parameters: those that the paper compares the PAFs with, such as
            'relu', and GELU in its exact form.
    """
    return [*(_PLAIN if plain else ()), *_PAFS]


def create_paf(name: str, **kwargs: Any) -> nn.Module:
    """Returns a new activation by its name, as in ``create_paf('pssilu', alpha=2.0, frozen=('alpha',))``.

    Args:
        name: one of ``list_pafs(plain=True)``.
        **kwargs: arguments of `PAF`, such as ``alpha``, ``curvature`` and ``frozen``; a plain activation takes those of
            its torch class.

    Returns:
        A `PAF`, or the torch module of a plain activation.

    Raises:
        TypeError: if the activation does not have an argument.
        ValueError: if there is no activation of that name, or it can't have the curvature.
    """
    table: Mapping[str, type[nn.Module]] = {**_PLAIN, **_PAFS}
    if name not in table:
        raise ValueError(f'unknown activation {name!r}; expected one of {", ".join(table)}')
    if name in _PLAIN:
        if kwargs.get('curvature') is not None:
            raise _no_curvature(name)
        kwargs = {k: v for k, v in kwargs.items() if k not in ('curvature', 'device', 'dtype')}
    return table[name](**kwargs)


def _no_curvature(name: str) -> ValueError:
    return ValueError(f'{name} has no value that sets its curvature; expected none, or one of '
                      + ', '.join(name for name, cls in _PAFS.items() if cls.at_curvature))


def values_given(name: str, kwargs: Collection[str]) -> set[str]:
    """Returns the parameters of a PAF whose initial values are not its own once arguments are given.

    Args:
        name: one of `list_pafs`; a plain activation has no parameters.
        kwargs: names of arguments of `create_paf`, of which 'curvature' stands for the parameter that it decides.
    """
    if name not in _PAFS:
        return set()
    at = _PAFS[name].at_curvature
    return {at[0] if at and key == 'curvature' else key for key in kwargs} & set(_PAFS[name].init)


def paf_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the learnable parameters of every PAF in a model.

    Args:
        model: any network; one without a PAF gives {}.

    Returns:
        The parameters by their name in ``model.named_parameters()``, each once; of shape (1,), or (channels,) where
        there is a value per channel.
    """
    owned = {id(p) for module in model.modules() if isinstance(module, PAF) for p in module.parameters(recurse=False)}
    return {name: p for name, p in model.named_parameters() if id(p) in owned}
