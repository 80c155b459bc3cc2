"""Any timm model as a PAF network: its activation modules replaced after construction.

timm's own ``act_layer`` argument reaches some activations of some families; a walk over the finished model reaches
every one that is a module, also those inside of ``BatchNormAct2d`` and its kin. What is no module is counted in one
forward pass and reported.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import kernels
from .activations import PAF, SharedActivation, create_paf, list_pafs, share_pafs

__all__ = ['ACTIVATIONS', 'SHARES', 'Conversion', 'convert_activations', 'create_converted', 'functional_activations']

Share = Literal['network', 'stage', 'layer', 'channel']
SHARES: tuple[str, ...] = get_args(Share)

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
"""What ``replace`` can name. Sigmoids and tanhs, which timm uses as gates alone, are none of them."""

# Modules whose output is multiplied with the features, or added to an attention map: their activations shape a gate.
_GATES = {
    'BilinearAttnTransform', 'BlockESE', 'CbamModule', 'CecaModule', 'ChannelAttn', 'CoordAttn', 'EcaModule',
    'EffectiveSEModule', 'EfficientLocalAttn', 'EseModule', 'GatherExcite', 'GlobalContext', 'LightCbamModule',
    'LightChannelAttn', 'LightSpatialAttn', 'RelPosMlp', 'SEModule', 'SelectiveKernelAttn', 'SimpleCoordAttn',
    'SpatialAttn', 'SplitAttn.act1', 'SqueezeExcite', 'SqueezeExciteCl', 'StripAttn'}
_GATE_NAMES = {'cpb_mlp', 'gate', 'kernel_func', 'meta_mlp'}  # Swin v2's position MLPs, attention kernels

# Norms that are activations by themselves
_NORMS = {'EvoNorm2dB0', 'EvoNorm2dB1', 'EvoNorm2dB2', 'EvoNorm2dS0', 'EvoNorm2dS0a', 'FilterResponseNormTlu2d',
          'InplaceAbn'}
_FUNCTIONS = {
    'relu', 'relu_', 'relu6', 'leaky_relu', 'leaky_relu_', 'elu', 'elu_', 'celu', 'celu_', 'selu', 'selu_', 'gelu',
    'silu', 'mish', 'hardswish', 'softplus', 'prelu', 'rrelu', 'threshold', 'hardtanh'}


@dataclass(frozen=True)
class Conversion:
    """What `convert_activations` did, by the names of modules in the order of their registration."""

    act: str
    replaced: dict[str, str]
    """Site -> the activation that it was."""
    left: dict[str, str]
    """Activation that stays -> what it is: in a gate (`convert_activations`), or not named in ``replace``."""
    out_of_reach: dict[str, int]
    """'module (its class: function)' -> calls in one forward pass: activations that are no modules, and stay."""
    pafs: int
    """Activations that the sites share."""

    def __str__(self) -> str:
        text = f'{len(self.replaced)} activations replaced by {self.pafs} {self.act}, {len(self.left)} left'
        if self.out_of_reach:
            where = list(self.out_of_reach)
            text += (f'; {sum(self.out_of_reach.values())} out of reach, being function calls: {", ".join(where[:3])}'
                     + (f' and {len(where) - 3} more places' if len(where) > 3 else ''))
        return text


class ChannelPAF(PAF):
    """A PAF with a value per channel: parameters of shape (channels,), and no fused kernel.

    Args:
        paf: whose formula, initial and frozen values it takes.
        channels: size of the channel axis.
        axis: where it is, 1 or -1.
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
        half = x.dtype in (torch.bfloat16, torch.float16)
        return kernels.KERNELS[self.kernel].value(x.float() if half else x, *values).to(x.dtype)

    def extra_repr(self) -> str:
        return f'{self.kernel}, {getattr(self, next(iter(self.init))).numel()} channels, axis={self.axis}'


class _Site(NamedTuple):
    path: str
    parent: nn.Module
    key: str
    module: nn.Module
    act: str
    gate: bool


def convert_activations(
        model: nn.Module,
        act: str,
        share: Share = 'network',
        replace: Sequence[str] = ACTIVATIONS,
        *,
        gates: bool = False,
        input_size: tuple[int, ...] | None = None,
        **act_kwargs: Any,
) -> Conversion:
    """Replace the activation modules of a model, in place.

    The state dict then holds every value once, under the first site that uses it, and loads as `share_pafs` says.
    Activations that are function calls stay; a warning says how many and where.

    Args:
        model: of timm, or any other that runs on one tensor of images.
        act: one of ``timm_paf.list_pafs(plain=True)``.
        share: 'network' is the paper's one activation; 'stage' has one per group of parameters of timm's
            ``group_matcher(coarse=True)``, where an activation belongs to the parameter registered before it; 'layer'
            has one per module, also where a module is called twice; 'channel' a value per channel of each.
        replace: names of `ACTIVATIONS` to replace; default: all of them, PAFs too.
        gates: also those inside of squeeze-and-excite and other gates, attention kernels and position MLPs.
        input_size: (channels, height, width) of the forward pass that looks for function calls and channels; default:
            that of ``model.pretrained_cfg``.
        **act_kwargs: see `create_paf`.

    Returns:
        What was replaced, what was left and what was out of reach. ``print`` it.

    Raises:
        TypeError: if the activation does not have an argument.
        ValueError: for an unknown name, a model without such an activation, or one that does not run. The model is as
            it was then.
    """
    if share not in SHARES:
        raise ValueError(f'unknown share {share!r}; expected one of {", ".join(SHARES)}')
    names = {replace} if isinstance(replace, str) else set(replace)
    if names - set(ACTIVATIONS):
        raise ValueError(f'replace has {", ".join(sorted(names - set(ACTIVATIONS)))}; expected some of '
                         f'{", ".join(ACTIVATIONS)}')
    like = _like(model)

    def create() -> nn.Module:
        return create_paf(act, **act_kwargs, device=like.device, dtype=like.dtype)

    prototype = create()
    if share == 'channel' and not isinstance(prototype, PAF):
        raise ValueError(f'{act} has no values to keep per channel; expected one of {", ".join(list_pafs())}')
    sites, aliases = _find(model)
    chosen = [site for site in sites if site.act in names and (gates or not site.gate)]
    left = {site.path: f'{site.act} in a gate' if site.gate else site.act for site in sites if site not in chosen}
    probe = _Probe(model, sites)
    probe.run(input_size, like)
    if not chosen:
        raise ValueError(f'{type(model).__name__} has no activation module to replace: {len(left)} are left '
                         f'({", ".join(sorted(set(left.values()))) or "none"}), {sum(probe.functions.values())} are '
                         f'function calls ({", ".join(list(probe.functions)[:3]) or "none"}); expected another model, '
                         'or other names in replace')
    stages = _stages(model, chosen) if share == 'stage' else {}
    keys = {site.path: '' if share == 'network' else stages.get(site.path, site.path) for site in chosen}
    groups: dict[Any, nn.Module] = {}
    for site in chosen:
        if keys[site.path] not in groups:
            groups[keys[site.path]] = ChannelPAF(prototype, *probe.channels(site)) if isinstance(
                prototype, PAF) and share == 'channel' else create() if groups else prototype
    for site in chosen:
        site.parent._modules[site.key] = SharedActivation(groups[keys[site.path]]).train(site.module.training)
    for parent, key in aliases:  # where our own networks register theirs first
        if share == 'network':
            parent._modules[key] = prototype
        else:
            del parent._modules[key]
    share_pafs(model)
    left |= dict.fromkeys(probe.in_gates, 'function call in a gate')
    done = Conversion(act, {site.path: site.act for site in chosen}, left, dict(probe.functions), len(groups))
    if done.out_of_reach:
        warnings.warn(f'{type(model).__name__}: {done}', stacklevel=2)
    return done


def create_converted(
        name: str, act: str | None = None, share: str | None = None, act_kwargs: dict[str, Any] | None = None,
        **kwargs: Any) -> nn.Module:
    """``timm.create_model(name, **kwargs)``, converted to ``act`` where there is one.

    Args:
        name: of a timm model.
        act, share, act_kwargs: as `convert_activations`; without ``act``, ``act_kwargs`` go to the model.
        **kwargs: of ``timm.create_model``.
    """
    if act is None:
        return timm.create_model(name, **kwargs, **({'act_kwargs': act_kwargs} if act_kwargs else {}))
    model: nn.Module = timm.create_model(name, **kwargs)
    convert_activations(model, act, share or 'network', **(act_kwargs or {}))  # type: ignore[arg-type]
    return model


def functional_activations(model: nn.Module, input_size: tuple[int, ...] | None = None) -> dict[str, int]:
    """The activations that are function calls, and so out of reach: `Conversion.out_of_reach` without a conversion.

    Args:
        model: of timm, or any other that runs on one tensor of images; on any device, torch's meta too.
        input_size: see `convert_activations`.

    Returns:
        'module (its class: function)' -> calls in one forward pass; those in gates are none of them.

    Raises:
        ValueError: if the model does not run.
    """
    probe = _Probe(model, _find(model)[0])
    probe.run(input_size, _like(model))
    return dict(probe.functions)


def _like(model: nn.Module) -> Tensor:
    """A tensor with the device and the dtype of the weights."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _name(module: nn.Module) -> str | None:
    return module.kernel if isinstance(module, PAF) else _NAMES.get(type(module).__name__)


def _find(model: nn.Module) -> tuple[list[_Site], list[tuple[nn.Module, str]]]:
    """Where activations act, and where one that a `SharedActivation` runs is registered besides."""
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
            act = _name(inner)
            if id(module) in shared:
                aliases.append((parent, key))
            elif act is not None:
                sites.append(_Site(path + key, parent, key, module, act, inside))
            elif module not in seen:
                walk(module, f'{path}{key}.', inside)

    walk(model, '', type(model).__name__ in _GATES)
    return sites, aliases


class _Probe(TorchFunctionMode):
    """One forward pass that counts the activations that are function calls, and sees the channels of those that are
    modules."""

    def __init__(self, model: nn.Module, sites: list[_Site]) -> None:
        super().__init__()
        self.model = model
        self.sites = {site.module: site for site in sites}
        self.functions: Counter[str] = Counter()
        self.in_gates: Counter[str] = Counter()
        self._inputs: dict[nn.Module, set[tuple[int, int, bool, bool, tuple[int, ...]]]] = {}
        self._stack: list[tuple[str, nn.Module]] = []
        self._width: tuple[int, int] | None = None  # of the layer that ran last

    def run(self, input_size: tuple[int, ...] | None, like: Tensor) -> None:
        """Raises ValueError if the model does not run."""
        size = input_size or getattr(self.model, 'pretrained_cfg', {}).get('input_size')
        if size is None:
            raise ValueError(f'{type(self.model).__name__} has no pretrained_cfg; expected input_size=(3, H, W)')
        modes = [(module, module.training) for module in self.model.modules()]
        hooks = []
        for name, module in self.model.named_modules():
            hooks += [module.register_forward_pre_hook(self._enter(name)),
                      module.register_forward_hook(self._leave, always_call=True)]
        try:
            self.model.eval()
            with torch.no_grad(), self:
                self.model(torch.zeros((1, *size), device=like.device, dtype=like.dtype))
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise ValueError(f'{type(self.model).__name__} does not run on {tuple(size)}: '
                             f'{" ".join(str(error).split())}; expected input_size=(C, H, W)') from error
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes:
                module.training = training

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, '__name__', '') in _FUNCTIONS:
            self._count(func.__name__)
        return func(*args, **(kwargs or {}))

    def _count(self, function: str) -> None:
        if any(module in self.sites for _, module in self._stack):
            return
        path, module = self._stack[-1]
        gate = any(type(m).__name__ in _GATES or set(p.split('.')) & _GATE_NAMES for p, m in self._stack)
        where = f'{path or "the model itself"} ({type(module).__name__}: {function})'
        (self.in_gates if gate else self.functions)[where] += 1

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module in self.sites:
                # BatchNormAct2d runs its activation itself; else the layer before has made the channels
                width = (_width(self._stack[-1][1]) if self._stack else None) or self._width
                if width is not None and args:
                    self._inputs.setdefault(module, set()).add((*width, tuple(args[0].shape)))  # type: ignore[arg-type]
            self._stack.append((path, module))
            if type(module).__name__ in _NORMS and getattr(module, 'apply_act', True):
                self.functions[f'{path} ({type(module).__name__}: norm and activation in one)'] += 1
        return enter

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._stack.pop()
        self._width = _width(module) or self._width

    def channels(self, site: _Site) -> tuple[int, int]:
        """Number of channels of a site, and their axis.

        The layer before knows the number. Where both axes have that size, a convolution or BatchNorm means the first
        and a linear layer the last.

        Raises:
            ValueError: if neither axis has that size, or the calls differ.
        """
        found = set()
        for width, axis, shape in self._inputs.get(site.module, ()):  # type: ignore[misc]
            axes = [a for a in (axis, -1 if axis == 1 else 1) if len(shape) > 1 and shape[a] == width]
            found.add((width, axes[0]) if axes else None)
        if len(found) != 1 or None in found:
            shapes = sorted({str(shape) for *_, shape in self._inputs.get(site.module, ())})
            raise ValueError(f'{site.path}: its inputs {", ".join(shapes) or "(none seen)"} have no one channel axis; '
                             "expected share='layer', or other names in replace")
        return found.pop()  # type: ignore[return-value]


def _width(module: nn.Module) -> tuple[int, int] | None:
    """How many channels a layer makes, and on which axis."""
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


def _stages(model: nn.Module, sites: list[_Site]) -> dict[str, Any]:
    """Site -> the group of the parameter registered before it."""
    if not hasattr(model, 'group_matcher'):
        raise ValueError(f'{type(model).__name__} has no group_matcher, so no stages; expected another share')
    matcher: Any = model.group_matcher
    groups = group_parameters(model, matcher(coarse=True), reverse=True)
    wanted, current = {site.path for site in sites}, None
    found: dict[str, Any] = {}
    before: list[str] = []
    for name in _in_order(model, ''):
        if name in wanted:
            found[name] = current
            if current is None:
                before.append(name)
        elif name in groups:
            if current is None:
                found |= dict.fromkeys(before, groups[name])
            current = groups[name]
    return found


def _in_order(module: nn.Module, path: str) -> Iterator[str]:
    """Names of modules and parameters, as they are registered."""
    yield from (path + name for name in module._parameters)
    for key, child in module._modules.items():
        if child is not None:
            yield path + key
            yield from _in_order(child, f'{path}{key}.')
