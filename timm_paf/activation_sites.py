"""Finds where a network has activations: modules and function calls, features and gates.

A walk over the modules finds the activations that are modules of a known class, also inside of ``BatchNormAct2d`` and
its kin. One forward pass finds the modules of other classes that are activations by what they do, the activations that
are function calls, the gates of classes that are not known, and the channels of the modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .activations import PAF, list_pafs
from .elementwise import could_be_elementwise, recognise
from .files import is_of_machine
from .gate_flow import GateFlow
from .modes import eval_mode
from .sharing import SharedActivation
from .wording import reason_of

__all__ = ['ACTIVATIONS', 'Probe', 'Site', 'find_sites', 'functional_activations', 'weights_like']

_CLASSES = {
    'relu': ('ReLU',), 'relu6': ('ReLU6',), 'leaky_relu': ('LeakyReLU',), 'elu': ('ELU',), 'celu': ('CELU',),
    'selu': ('SELU',), 'softplus': ('Softplus',), 'gelu': ('GELU', 'GELUTanh', 'QuickGELU'),
    'silu': ('SiLU', 'Swish', 'SwishJit', 'SwishMe'), 'mish': ('Mish', 'MishJit', 'MishMe'),
    'hard_swish': ('Hardswish', 'HardSwish', 'HardSwishJit', 'HardSwishMe'),
    'hard_mish': ('HardMish', 'HardMishJit', 'HardMishMe'), 'prelu': ('PReLU',),
    'squared_relu': ('SquaredReLU',), 'star_relu': ('StarReLU',),  # MetaFormer's
}


_NAMES = {cls: name for name, classes in _CLASSES.items() for cls in classes}


ACTIVATIONS = tuple(dict.fromkeys([*_CLASSES, *list_pafs()]))
"""The names of activations. Sigmoids and tanhs, which timm uses as gates alone, are not among them."""


# Modules whose output is multiplied with the features, or added to an attention map: their activations shape a gate.
_GATES = {
    'BilinearAttnTransform', 'BlockESE', 'CbamModule', 'CecaModule', 'ChannelAttn', 'CoordAttn', 'EcaModule',
    'EffectiveSEModule', 'EfficientLocalAttn', 'EseModule', 'GatherExcite', 'GlobalContext', 'LightCbamModule',
    'LightChannelAttn', 'LightSpatialAttn', 'RelPosMlp', 'SEModule', 'SelectiveKernelAttn', 'SimpleCoordAttn',
    'SpatialAttn', 'SplitAttn.act1', 'SqueezeExcite', 'SqueezeExciteCl', 'StripAttn'}


_GATE_NAMES = {'cpb_mlp', 'gate', 'kernel_func', 'meta_mlp'}  # Swin v2's position MLPs, attention kernels


# These norms are activations by themselves.
_NORMS = {'EvoNorm2dB0', 'EvoNorm2dB1', 'EvoNorm2dB2', 'EvoNorm2dS0', 'EvoNorm2dS0a', 'FilterResponseNormTlu2d',
          'InplaceAbn'}


_FUNCTIONS = {
    'relu', 'relu_', 'relu6', 'leaky_relu', 'leaky_relu_', 'elu', 'elu_', 'celu', 'celu_', 'selu', 'selu_', 'gelu',
    'silu', 'mish', 'hardswish', 'softplus', 'prelu', 'rrelu', 'threshold', 'hardtanh'}


class Site(NamedTuple):
    path: str
    parent: nn.Module
    key: str
    module: nn.Module
    act: str
    gate: str  # '', or a note on where it is, such as 'in a gate'


def functional_activations(model: nn.Module, input_size: tuple[int, ...] | None = None) -> dict[str, int]:
    """Returns the activations that are function calls, and so out of reach, without a conversion.

    Args:
        model: a model of timm, or any other that runs on one tensor of images; on any device, torch's meta too.
        input_size: (channels, height, width) of the forward pass, see `convert_activations`.

    Returns:
        'module (its class: function)' -> calls in one forward pass, as `Conversion.out_of_reach`; calls in gates are
        left out.

    Raises:
        ValueError: if the model does not run.
    """
    probe = Probe(model)
    probe.run(input_size, weights_like(model))
    return dict(probe.functions)


def weights_like(model: nn.Module) -> Tensor:
    """Returns a tensor with the device and the dtype of the weights."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _name(module: nn.Module) -> str | None:
    return module.kernel if isinstance(module, PAF) else _NAMES.get(type(module).__name__)


def find_sites(
        model: nn.Module, recognised: Mapping[nn.Module, str] = MappingProxyType({}),
) -> tuple[list[Site], list[tuple[nn.Module, str]]]:
    """Finds the activations that are modules of a known class.

    Args:
        model: the network.
        recognised: modules of other classes that are activations -> the name of each.

    Returns:
        The sites, and each (parent, key) where one that a `SharedActivation` runs is besides.
    """
    shared = {id(module.act) for module in model.modules() if isinstance(module, SharedActivation)}
    sites, aliases, seen = [], [], set()

    def walk(parent: nn.Module, path: str, gate: bool) -> None:
        seen.add(parent)
        for key, module in parent._modules.items():
            if module is None:
                continue
            inner = module.act if isinstance(module, SharedActivation) else module
            inside = (gate or key in _GATE_NAMES or type(module).__name__ in _GATES
                      or f'{type(parent).__name__}.{key}' in _GATES)
            act = recognised.get(module) or _name(inner)
            if id(module) in shared:
                aliases.append((parent, key))
            elif act is not None:
                sites.append(Site(path + key, parent, key, module, act, 'in a gate' if inside else ''))
            elif module not in seen:
                walk(module, f'{path}{key}.', inside)

    walk(model, '', type(model).__name__ in _GATES)
    return sites, aliases


class Probe(TorchFunctionMode):
    """A forward pass that finds what a walk over the modules does not see.

    Args:
        model: the network.
        wanted: names of classes whose modules count as activations if they act on each element for itself, also where
            they are sigmoids, or have function calls and activations inside.

    Attributes:
        sites, aliases: as `find_sites`, with the modules and gates that the pass has recognised.
        functions, in_gates: the activations that are function calls outside and inside of gates, and their number.
    """

    def __init__(self, model: nn.Module, wanted: Collection[str] = ()) -> None:
        super().__init__()
        self.model, self.wanted = model, wanted
        self.sites, self.aliases = find_sites(model)
        self.functions: Counter[str] = Counter()
        self.in_gates: Counter[str] = Counter()
        self._known = {site.module for site in self.sites}
        self._candidates = {module for module in model.modules() if module is not model and module not in self._known
                            and type(module).__name__ not in _NORMS and could_be_elementwise(module)}
        self._recognised: dict[nn.Module, str] = {}
        self._squashing: set[nn.Module] = set()  # sigmoids and tanhs, and what is inside of them
        self._flow = GateFlow()
        self._marks: dict[nn.Module, list[int]] = {}  # of each call of a module
        self._calls: list[tuple[str, bool, list[nn.Module]]] = []  # place, whether in a gate, modules around; by mark
        self._looks = False
        self._inputs: dict[nn.Module, set[tuple[int, int, tuple[int, ...]]]] = {}
        self._stack: list[tuple[str, nn.Module]] = []
        self._width: tuple[int, int] | None = None  # channels and axis of the layer that ran last

    def run(self, input_size: tuple[int, ...] | None, like: Tensor) -> None:
        """Runs the forward pass.

        Args:
            input_size: (channels, height, width), or None for that of ``model.pretrained_cfg``.
            like: a tensor with the device and dtype of the images.

        Raises:
            ValueError: if the model does not run.
        """
        size = input_size or getattr(self.model, 'pretrained_cfg', {}).get('input_size')
        if size is None:
            raise ValueError(f'{type(self.model).__name__} has no pretrained_cfg; expected input_size=(3, H, W)')
        hooks = []
        for name, module in self.model.named_modules():
            hooks += [module.register_forward_pre_hook(self._enter(name)),
                      module.register_forward_hook(self._leave, always_call=True)]
        try:
            images = torch.zeros((1, *size), device=like.device, dtype=like.dtype)
            self._flow.start(images)
            with eval_mode(self.model), torch.no_grad(), self:
                self.model(images)
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            if is_of_machine(error):
                raise
            raise ValueError(f'{type(self.model).__name__} does not run on {tuple(size)}: '
                             f'{reason_of(error)}; expected input_size=(C, H, W)') from error
        finally:
            for hook in hooks:
                hook.remove()
        self._finish()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._looks:
            function = getattr(func, '__name__', '')
            self._flow.follow(function, (args, kwargs), out)
            if function in _FUNCTIONS and not self._inside_known():
                self._flow.mark(out, self._count(function))
        return out

    def _inside_known(self) -> bool:
        return any(module in self._known for _, module in self._stack)

    def _count(self, function: str) -> int:
        """Takes note of a call where the pass is; returns its mark."""
        path, module = self._stack[-1]
        gate = any(type(m).__name__ in _GATES or set(p.split('.')) & _GATE_NAMES for p, m in self._stack)
        where = f'{path or "the model itself"} ({type(module).__name__}: {function})'
        self._calls.append((where, gate, [module for _, module in self._stack]))
        return len(self._calls) - 1

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._looks:
                return
            if module in self._known or module in self._candidates:
                # BatchNormAct2d runs its activation itself; elsewhere the layer before has made the channels.
                width = (_width(self._stack[-1][1]) if self._stack else None) or self._width
                if width is not None and args and isinstance(args[0], Tensor):
                    self._inputs.setdefault(module, set()).add((*width, tuple(args[0].shape)))
            self._stack.append((path, module))
            if type(module).__name__ in _NORMS and getattr(module, 'apply_act', True):
                self._count('norm and activation in one')
        return enter

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if self._looks:
            return
        self._stack.pop()
        self._width = _width(module) or self._width
        self._flow.follow_module(args, out)
        if module in self._candidates and module not in self._recognised and not self._inside_known():
            self._look(module, args, out)
        if module in self._known or module in self._recognised:
            self._calls.append(('', False, []))
            self._marks.setdefault(module, []).append(len(self._calls) - 1)
            self._flow.mark(out, len(self._calls) - 1)

    def _look(self, module: nn.Module, args: Any, out: Any) -> None:
        self._looks = True
        found, name = recognise(module, args, out), type(module).__name__
        self._looks = False
        if found is None:
            return
        inner = [self._recognised.get(part) or _name(part) for part in module.modules() if part is not module]
        if name in self.wanted:
            self._recognised[module] = name
        elif found.name is not None:
            if found.name not in inner:  # else it passes on to the activation in it
                self._recognised[module] = found.name
        elif found.squashes:
            self._squashing.update(module.modules())
        elif not any(module in around for _, _, around in self._calls):  # else it is counted as a function call
            self._recognised[module] = name

    def _finish(self) -> None:
        self.sites, self.aliases = find_sites(self.model, self._recognised)
        gates = self._flow.gates
        for index, site in enumerate(self.sites):
            marks = self._marks.get(site.module, [])
            if not site.gate and (gates.intersection(marks) or site.module in self._squashing):
                both = not gates.issuperset(marks) and site.module not in self._squashing
                self.sites[index] = site._replace(gate='in a gate and outside of one' if both else 'in a gate')
        for mark, (where, gate, around) in enumerate(self._calls):
            if where and not any(module in self._recognised for module in around):
                gate = gate or mark in gates or not self._squashing.isdisjoint(around)
                (self.in_gates if gate else self.functions)[where] += 1

    def channels(self, site: Site) -> tuple[int, int]:
        """Returns the number of channels of a site, and their axis.

        The layer before knows the number. Where both axes have that size, the channels are on the first after a
        convolution or BatchNorm, and on the last after a linear layer.

        Raises:
            ValueError: if neither axis has that size, or the calls differ.
        """
        found = set()
        for width, axis, shape in self._inputs.get(site.module, ()):
            axes = [a for a in (axis, -1 if axis == 1 else 1) if len(shape) > 1 and shape[a] == width]
            found.add((width, axes[0]) if axes else None)
        if len(found) != 1 or None in found:
            shapes = sorted({str(shape) for *_, shape in self._inputs.get(site.module, ())})
            raise ValueError(f'{site.path}: its inputs {", ".join(shapes) or "(none seen)"} have no one channel axis; '
                             "expected share='layer', or other names in replace")
        return found.pop()  # type: ignore[return-value]


def _width(module: nn.Module) -> tuple[int, int] | None:
    """Returns how many channels a layer makes, and on which axis; None for a module that makes none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels, 1
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features, 1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, 1
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    shape = getattr(module, 'normalized_shape', None)  # LayerNorm, RmsNorm
    return None if shape is None else (shape[-1], 1 if '2d' in type(module).__name__ else -1)
