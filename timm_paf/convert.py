"""Makes any timm model a PAF network: its activation modules are replaced after construction.

timm's own ``act_layer`` argument reaches some activations of some families; here every activation that is a module is
replaced in the finished model, and those that are function calls or not known are counted and reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from .activation_sites import ACTIVATIONS, Probe, Site, weights_like
from .activations import PAF, ChannelPAF, create_paf, list_pafs
from .modes import eval_mode
from .normalize import normalize_input
from .sharing import SharedActivation, share_pafs
from .starts import STARTS, start_values

__all__ = ['NETWORK_FAULTS', 'SHARES', 'START_NAMES', 'Conversion', 'convert_activations', 'create_converted',
           'create_outline', 'fixed_logits', 'is_own', 'normalizes_by_hook']

Share = Literal['network', 'stage', 'layer', 'channel']
SHARES: tuple[str, ...] = get_args(Share)
START_NAMES = ('same', *STARTS)
"""The activations that a PAF may start as: 'same' is the one that it replaces."""


NETWORK_FAULTS = (RuntimeError, AssertionError, LookupError, AttributeError, TypeError, ArithmeticError)
"""What timm raises where arguments do not make a network, beside ValueError."""

_HOOKS = ('_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called', '_forward_pre_hooks',
          '_forward_pre_hooks_with_kwargs', '_backward_hooks', '_backward_pre_hooks', '_is_full_backward_hook')


@dataclass(frozen=True)
class Conversion:
    """The result of `convert_activations`, by the names of modules in the order of their registration."""

    act: str
    replaced: dict[str, str]
    """The replaced sites: site -> the activation that it was."""
    left: dict[str, str]
    """The modules that stay: name -> its activation, which is in a gate or is not named in ``replace``."""
    unknown: dict[str, str]
    """The modules that stay because they compute no known activation: name -> class, which ``replace`` can name."""
    out_of_reach: dict[str, int]
    """The function calls that stay: 'module (its class: function)' -> calls in one forward pass."""
    pafs: int
    """The number of activations that the sites share."""
    logits_change: float | None = None
    """The largest change of a logit on four images of noise, where the activations start as others; else None."""
    logits_size: float | None = None
    """The largest absolute logit before, beside which to see the change."""

    def __str__(self) -> str:
        text = f'{len(self.replaced)} activations replaced by {self.pafs} {self.act}, {len(self.left)} left'
        if self.unknown:
            text += (f'; {len(self.unknown)} of unknown classes, which replace can name: '
                     + _first([f'{place} ({cls})' for place, cls in self.unknown.items()]))
        if self.out_of_reach:
            text += (f'; {sum(self.out_of_reach.values())} out of reach, being function calls: '
                     + _first(list(self.out_of_reach)))
        if self.logits_change is not None:
            text += f'; logits change by at most {self.logits_change:.2g}, the largest is {self.logits_size:.3g}'
        return text


def _first(places: list[str]) -> str:
    return ', '.join(places[:3]) + (f' and {len(places) - 3} more places' if len(places) > 3 else '')


def convert_activations(
        model: nn.Module,
        act: str,
        share: Share = 'network',
        replace: Sequence[str] = ACTIVATIONS,
        *,
        gates: bool = False,
        input_size: tuple[int, ...] | None = None,
        start: str | None = None,
        **act_kwargs: Any,
) -> Conversion:
    """Replaces the activation modules of a model, in place.

    The state dict then holds every value once, under the first site that uses it, and loads as `share_pafs` says.
    A module of a class that is not known is an activation if it computes one of `ACTIVATIONS`, element by element. One
    that computes another nonlinear function of each element stays, as do function calls; a warning says how many and
    where.

    Args:
        model: a model of timm, or any other that runs on one tensor of images.
        act: one of ``timm_paf.list_pafs(plain=True)``.
        share: how many activations the model gets. 'network' is the paper's one activation; 'stage' has one per group
            of parameters of timm's ``group_matcher(coarse=True)``, where an activation belongs to the parameter
            registered before it; 'layer' has one per module, also where a module is called twice; 'channel' has a value
            per channel of each module.
        replace: names of `ACTIVATIONS` to replace, and of classes of the model that act on each element for itself;
            default: all of `ACTIVATIONS`, PAFs too.
        gates: whether to replace also the activations inside of squeeze-and-excite and other gates, attention kernels
            and position MLPs. A gate is what multiplies features and was pooled more often than they, or a class of
            timm's that is known as one.
        input_size: (channels, height, width) of the forward pass that looks for function calls, gates and channels;
            default: that of ``model.pretrained_cfg``.
        start: 'same' for the values with which the activation is the one that it replaces, or is close to it, as
            `starts.STARTS` has them; the name of a plain activation for the values with which it is that one; None for
            its own initial values.
        **act_kwargs: arguments of `create_paf`, such as ``alpha`` or ``curvature``; they go before those of
            ``start``.

    Returns:
        What was replaced, what was left and what was out of reach, and with ``start`` how much the logits change;
        ``print`` shows it in a line.

    Raises:
        TypeError: if the activation does not have an argument.
        ValueError: for an unknown name, a model without such an activation or one that does not run, and for a start
            that the activation does not have or that differs between activations that become one; the model is then as
            it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'the model is a {type(model).__name__}; expected a network, such as timm.create_model gives')
    for name, value, known in (('share', share, SHARES), ('start', start or 'same', START_NAMES)):
        if value not in known:
            raise ValueError(f'unknown {name} {value!r}; expected one of {", ".join(known)}')
    names = {replace} if isinstance(replace, str) else set(replace)
    like = weights_like(model)

    def create(**values: float) -> nn.Module:
        return create_paf(act, **{**values, **act_kwargs}, device=like.device, dtype=like.dtype)

    by_channel = isinstance(create(), PAF) and share == 'channel'  # a wrong argument is named before the model runs
    if share == 'channel' and not by_channel:
        raise ValueError(f'{act} has no values to keep per channel; expected one of {", ".join(list_pafs())}')
    probe = Probe(model, names)
    probe.run(input_size, like)
    if wrong := names - set(ACTIVATIONS) - {site.act for site in probe.sites}:
        raise ValueError(f'replace has {", ".join(sorted(wrong))}; expected some of {", ".join(ACTIVATIONS)}, or '
                         f'classes of {type(model).__name__} that act on each element for itself')
    chosen = [site for site in probe.sites if site.act in names and (gates or not site.gate)]
    rest = {site.path: site for site in probe.sites if site not in chosen}
    unknown = {path: site.act for path, site in rest.items() if site.act not in ACTIVATIONS and not site.gate}
    left = {path: f'{site.act} {site.gate}'.rstrip() for path, site in rest.items() if path not in unknown}
    if not chosen:
        kept = sorted({*left.values(), *unknown.values()})
        raise ValueError(f'{type(model).__name__} has no activation module to replace: {len(rest)} are left '
                         f'({", ".join(kept) or "none"}), {sum(probe.functions.values())} are '
                         f'function calls ({", ".join(list(probe.functions)[:3]) or "none"}); expected another model, '
                         'or other names in replace')
    stages = _stages(model, chosen) if share == 'stage' else {}
    keys = {site.path: '' if share == 'network' else stages.get(site.path, site.path) for site in chosen}
    values = _start(act, start, chosen, keys, type(model).__name__, act_kwargs)
    before = fixed_logits(model, input_size) if start else None
    groups: dict[Any, nn.Module] = {}
    for site in chosen:
        if (key := keys[site.path]) not in groups:
            paf = create(**values[key])
            groups[key] = ChannelPAF(paf, *probe.channels(site)) if by_channel else paf  # type: ignore[arg-type]
    for site in chosen:
        act_module = SharedActivation(groups[keys[site.path]]).train(site.module.training)
        for name in _HOOKS:  # such as those by which timm takes features; who registered them may still remove them
            if found := getattr(site.module, name):
                setattr(act_module, name, found)
        site.parent._modules[site.key] = act_module
    for parent, key in probe.aliases:  # where our own networks register their activation first
        if share == 'network':
            parent._modules[key] = groups['']
        else:
            del parent._modules[key]
    share_pafs(model)
    if 'act_layer' not in model._modules:
        model.act_layer = act  # type: ignore[assignment]  # for weights, which are of this activation
    left |= dict.fromkeys(probe.in_gates, 'function call in a gate')
    change = size = None
    if before is not None:
        size, change = (value.abs().max().item() for value in (before, fixed_logits(model, input_size) - before))
    done = Conversion(
        act, {site.path: site.act for site in chosen}, left, unknown, dict(probe.functions), len(groups), change, size)
    if done.out_of_reach or done.unknown:
        warnings.warn(f'{type(model).__name__}: {done}', stacklevel=2)
    return done


def _start(
        act: str, start: str | None, sites: list[Site], keys: dict[str, Any], model: str, given: Collection[str],
) -> dict[Any, dict[str, float]]:
    """Returns the values that each activation starts with but for given ones, by the key of its sites."""
    found: dict[Any, set[str]] = {}
    for site in sites:
        found.setdefault(keys[site.path], set()).add(site.act if start == 'same' else start or '')
    for names in found.values():
        if len(names) > 1:
            raise ValueError(f"{model} has {', '.join(sorted(names))}, which one {act} can't all start as; expected "
                             "share='layer', some of them in replace, or the name of one as start")
    return {key: start_values(act, next(iter(names)), given) if start else {} for key, names in found.items()}


@torch.no_grad()
def fixed_logits(model: nn.Module, input_size: tuple[int, ...] | None = None) -> Tensor:
    """Returns the logits of a network in eval mode, for four images of noise in [0, 1] that are always the same.

    Of one that returns several tensors, such as features, it is all their values, (4, values).

    Args:
        model: the network; it gets its modes back.
        input_size: (channels, height, width), or None for that of ``model.pretrained_cfg``.
    """
    size, like = input_size or model.pretrained_cfg['input_size'], weights_like(model)  # type: ignore[index]
    images = torch.rand(4, *size, generator=torch.Generator().manual_seed(0))
    with eval_mode(model):
        out = model(images.to(like))
    return _joined(out).float()


def _joined(out: Any) -> Tensor:
    """Returns what a network returns, with features or several heads too, as one tensor (batch, values)."""
    if isinstance(out, Tensor):
        return out.flatten(1)
    return torch.cat([_joined(each) for each in (out.values() if isinstance(out, Mapping) else out)], 1)


def create_converted(
        name: str, act: str | None = None, share: str | None = None, act_kwargs: dict[str, Any] | None = None,
        start: str | None = None, within: AbstractContextManager[Any] | None = None, **kwargs: Any) -> nn.Module:
    """Returns ``timm.create_model(name, **kwargs)``, converted to ``act`` where it is given.

    Args:
        name: name of a timm model.
        act, share, act_kwargs, start: see `convert_activations`; without ``act``, ``act_kwargs`` go to the model.
        within: a context in which timm creates the network, and nothing else happens.
        **kwargs: arguments of ``timm.create_model``, and ``normalize`` for any network: see `normalize_input`.

    Raises:
        TypeError, ValueError: as `convert_activations`.
    """
    normalize = kwargs.pop('normalize') if normalizes_by_hook(name, kwargs) else None
    if act is None and act_kwargs:
        kwargs['act_kwargs'] = act_kwargs
    with within or nullcontext():
        model: nn.Module = timm.create_model(name, **kwargs)
    if normalize is not None:
        normalize_input(model, normalize)
    if act is None:
        return model
    convert_activations(model, act, share or 'network', start=start,  # type: ignore[arg-type]
                        input_size=_input_size(model, kwargs), **(act_kwargs or {}))
    return model


def create_outline(name: str, act: str | None = None, **kwargs: Any) -> nn.Module:
    """Returns `create_converted` of these arguments to look at, without memory where that is possible, and without a
    change of torch's random numbers."""
    with torch.random.fork_rng(()), warnings.catch_warnings(action='ignore'):
        if act is None:  # to convert is to look at values
            with suppress(RuntimeError), torch.device('meta'):
                return create_converted(name, **kwargs)
        return create_converted(name, act, **kwargs)


def _input_size(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns (channels, height, width) by the arguments that a timm model was made with, which its cfg leaves out."""
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    if not (size := cfg.get('input_size')):
        return None
    channels, *sides = size
    side = kwargs.get('img_size') or sides
    return (kwargs.get('in_chans') or channels, *((side, side) if isinstance(side, int) else side))


def normalizes_by_hook(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Returns whether a network that is not of this package is to normalise its input, which it has no argument for."""
    return kwargs.get('normalize') is not None and not is_own(name)


def is_own(name: str) -> bool:
    """Returns whether a name, also one with a tag, is of a network of this package."""
    return timm.is_model(name) and timm.models.model_entrypoint(name.partition('.')[0]).__module__.startswith(
        'timm_paf')


def _stages(model: nn.Module, sites: list[Site]) -> dict[str, Any]:
    """Returns for each site the group of the parameter registered before it."""
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
    """Yields the names of modules and parameters in the order of their registration."""
    yield from (path + name for name in module._parameters)
    for key, child in module._modules.items():
        if child is not None:
            yield path + key
            yield from _in_order(child, f'{path}{key}.')
