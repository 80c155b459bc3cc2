"""Weights that a training starts from: a name, a checkpoint file, a bundle or a run; strict but for a new head.

A PAF whose values the weights lack, because they are of a network with a plain activation, gets the values with which
it is that activation: the network keeps its function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from ..activations import PAF, create_paf, list_pafs, values_given
from ..convert import NETWORK_FAULTS, fixed_logits, is_own
from ..files import is_of_machine, read_record, sha256
from ..normalize import statistics_of
from ..starts import start_values
from ..wording import causes
from .bundle import read_bundle
from .bundle_config import check_model_args
from .bundle_files import WEIGHTS
from .checkpoint import fit, read_checkpoint
from .server_fault import is_of_server, server_fault
from .zoo import find_weights

__all__ = ['InitialWeights', 'Loaded', 'create_pretrained', 'open_weights']


@dataclass(frozen=True)
class Loaded:
    """What `InitialWeights.load` did; ``str()`` says it in a line."""

    source: str
    sha256: str
    new_head: tuple[str, ...]
    """The classifiers that stay as they were, because the weights have none of their shape."""
    act: str | None
    """The plain activation that the PAFs start as, where the weights have no values for them."""
    logits_change: float | None
    """The largest change of a logit against that activation, on four images of noise."""
    logits_size: float | None
    """The largest absolute logit with that activation."""

    def __str__(self) -> str:
        text = f'weights of {self.source} (sha256 {self.sha256[:12]}...)'
        text += f', new head {", ".join(self.new_head)}' if self.new_head else ', head too'
        if self.act:
            text += (f'; the activation starts as {self.act}, logits change by at most {self.logits_change:.2g}, the '
                     f'largest is {self.logits_size:.3g}')
        return text


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a network can start from: see `open_weights`."""

    source: str
    """The name of the weights, or the last part of the path."""
    kind: str
    """'name', 'file', 'bundle' or 'run'."""
    sha256: str
    """Digest of the file, or of the safetensors file that the weights of a name would make."""
    architecture: str | None
    """The name of their network in timm, where the weights say it."""
    act: str | None
    """The activation of their network, where its name or record says it."""
    model_args: dict[str, Any]
    """Arguments that a network needs to compute what the weights were trained for, such as ``normalize``."""
    path: Path | None = field(default=None, repr=False)
    state: dict[str, Tensor] | None = field(default=None, repr=False)

    def record(self) -> dict[str, Any]:
        """Returns source, kind and sha256 for run.json, without a path."""
        return {'source': self.source, 'kind': self.kind, 'sha256': self.sha256}

    def load(
            self, model: nn.Module, act_start: str | None = None, given: Collection[str] = (),
            input_size: Sequence[int] | None = None) -> Loaded:
        """Loads the weights into a network, all of them: only a classifier of another size stays as it was.

        Args:
            model: the network, which is changed in place.
            act_start: the plain activation that PAFs without values in the weights start as; None or 'same' for that of
                the weights' network.
            given: names of arguments of the PAFs, such as 'alpha', whose values stay as they are.
            input_size: (channels, height, width) of the images that changes are measured on; default: that of
                ``model.pretrained_cfg``.

        Returns:
            What was loaded and what is new.

        Raises:
            FileNotFoundError, ValueError: if the weights are damaged or not of this network, or do not say their
                activation where that is needed; the network is unchanged then.
        """
        ours = model.state_dict()
        cfg: Any = getattr(model, 'pretrained_cfg', {})
        named = cfg.get('classifier') or ()
        heads = (named,) if isinstance(named, str) else tuple(named)
        pafs = {name: module for name, module in model.named_modules() if isinstance(module, PAF)}
        values = [key for key in ours if key.rpartition('.')[0] in pafs]
        self._check_activation(model, bool(pafs), act_start)
        adapt = (*heads, *pafs, 'normalize')
        convert: Callable[..., dict[str, Tensor]] | None = getattr(model, 'weights_from_timm', None)
        if self.path is not None:
            state = read_checkpoint(self.path, model, adapt, convert).state_dict
        else:
            assert self.state is not None
            state = fit(convert(self.state, model) if convert else self.state, model, Path(self.source), adapt)
        new_head = tuple(head for head in heads if any(
            key.startswith(f'{head}.') and (key not in state or state[key].shape != value.shape)
            for key, value in ours.items()))
        kept = {key: value for key, value in ours.items() if key.startswith(tuple(f'{head}.' for head in new_head))}
        state = {key: value for key, value in state.items()
                 if not key.startswith(tuple(f'{head}.' for head in new_head))} | kept
        for key in [key for key in ours if key.startswith('normalize.')]:  # these are given as an argument, too
            if key in state and not torch.allclose(state[key].to(ours[key]), ours[key]):
                raise ValueError(f'{self.source} has {key} {state[key].flatten().tolist()[:3]} and the network '
                                 f'{ours[key].flatten().tolist()[:3]}; expected the same normalisation')
            state[key] = ours[key]
        act = None
        lacking = [key for key in values if key not in state]
        if lacking:
            if len(lacking) < len(values):
                raise ValueError(f'{self.source} lacks {", ".join(lacking[:3])}, and has other values of the '
                                 'activation; expected weights of the same activation, or of one without values')
            act, started = self._start(pafs, act_start, given)
            state |= {key: ours[key].new_full(ours[key].shape, started[key]) if key in started else ours[key]
                      for key in values}
        wrong = [f'unexpected {key}' for key in state if key not in ours] + [
            f'{key} is {tuple(state[key].shape)} and not {tuple(value.shape)}' for key, value in ours.items()
            if state[key].shape != value.shape]
        if wrong:
            raise ValueError(f'{self.source} does not fit {type(model).__name__}: {"; ".join(wrong[:4])}')
        model.load_state_dict(state)
        size, change = _change(model, list(pafs.values()), act, input_size) if act else (None, None)
        return Loaded(self.source, self.sha256, new_head, act, change, size)

    def _check_activation(self, model: nn.Module, has_pafs: bool, act_start: str | None) -> None:
        """Raises ValueError if the weights are known to be of another activation than the network can start as."""
        found: Any = getattr(model, 'act_layer', None)
        if self.act is None or found == self.act:
            return
        if isinstance(found, str) and has_pafs and self.act not in list_pafs():
            if act_start in (None, 'same', self.act):
                return
            raise ValueError(f'{self.source} is of a network with {self.act}; expected no other --act-start than that, '
                             f'not {act_start}')
        kind = found if isinstance(found, str) else 'its own activations'
        raise ValueError(f'{self.source} is of a network with {self.act}, and {type(model).__name__} here has {kind}; '
                         f'expected a network with {self.act}, or a PAF in its place')

    def _start(
            self, pafs: dict[str, PAF], act_start: str | None, given: Collection[str],
    ) -> tuple[str | None, dict[str, float]]:
        """Returns the plain activation that the PAFs start as, and the value of each key; given ones are left out."""
        plain = self.act if act_start in (None, 'same') else act_start
        if all(set(paf.init) <= values_given(paf.kernel, given) for paf in pafs.values()):
            return plain if plain not in list_pafs() else None, {}
        if plain is None:
            raise ValueError(f'{self.source} does not say which activation its network has; expected --act-start relu, '
                             'silu, gelu or the like, or all values of the activation')
        return plain, {f'{name}.{key}': value for name, paf in pafs.items()
                       for key, value in start_values(paf.kernel, plain, given).items()}


def _change(
        model: nn.Module, pafs: list[PAF], act: str, input_size: Sequence[int] | None) -> tuple[float, float]:
    """Returns the largest logit with a plain activation in place of the PAFs, and the largest change to them."""
    plain, size = create_paf(act), None if input_size is None else tuple(input_size)
    hooks = [paf.register_forward_hook(lambda module, args, out: plain(args[0])) for paf in pafs]
    try:
        before = fixed_logits(model, size)
    finally:
        for hook in hooks:
            hook.remove()
    return before.abs().max().item(), (fixed_logits(model, size) - before).abs().max().item()


def open_weights(
        source: str, model: str | None = None, model_kwargs: Mapping[str, Any] | None = None) -> InitialWeights:
    """Opens weights to start from; ``print(open_weights('wrn10_1_relu').load(network))`` says what was loaded.

    A file or record of somebody else is checked, and nothing in it is run.

    Args:
        source: a name of ``timm.list_pretrained()``, a file in a layout that `read_checkpoint` knows, the directory of
            a bundle or of a finished run, or 'pretrained' for the weights of ``model``.
        model: name of the network that is to start.
        model_kwargs: arguments of that network. timm makes its own weights of a name fit ``img_size``, ``patch_size``
            and ``window_size``, in networks that have them; others are not looked at.

    Raises:
        ConnectionError, FileNotFoundError, ModuleNotFoundError, ValueError: if there are no such weights, they are
            damaged, or their run has not finished.
    """
    path = Path(source)
    if source == 'pretrained' and model is not None:
        return _of_name(model, model_kwargs or {})
    if (path / 'config.json').is_file():
        return _of_bundle(path, path.resolve().name)
    if (path / 'run.json').is_file():
        return _of_run(path)
    if path.is_file():
        return InitialWeights(path.name, 'file', sha256(path), None, None, {}, path)
    if timm.is_model(source):
        return _of_name(source, model_kwargs or {})
    raise FileNotFoundError(f'{source} is no file, no bundle (config.json), no run (run.json) and no name of '
                            'timm.list_pretrained(); expected weights to start from')


def _of_name(name: str, model_kwargs: Mapping[str, Any]) -> InitialWeights:
    if not timm.models.is_model_pretrained(name):
        raise ValueError(f'{name} has no weights of its own; expected a name of timm.list_pretrained(), a file, a '
                         'bundle or a run')
    named = find_weights(name)
    if named is not None and named.bundle:
        return _of_bundle(named.bundle, named.name)
    sizes = {key: value for key, value in model_kwargs.items() if key in ('img_size', 'patch_size', 'window_size')}
    network: Any
    try:
        network = create_pretrained(name, 'give their file', **sizes)
    except NETWORK_FAULTS as error:  # told of the network that starts, or by its loading
        if is_of_machine(error):
            raise
        network = create_pretrained(name, 'give their file')
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    digest = hashlib.sha256(safetensors.torch.save(state)).hexdigest()
    if named is not None:
        return InitialWeights(named.name, 'name', digest, named.model, _act_of(named.model),
                              dict(named.model_args), state=state)
    cfg = network.pretrained_cfg
    statistics = statistics_of(cfg)
    tag = f'.{cfg["tag"]}' if cfg.get('tag') and '.' not in name else ''
    return InitialWeights(f'{name}{tag}', 'name', digest, name.partition('.')[0], _act_of(name),
                          {'normalize': statistics} if statistics else {}, state=state)


def create_pretrained(name: str, instead: str, **kwargs: Any) -> nn.Module:
    """Returns ``timm.create_model(name, pretrained=True, **kwargs)``.

    Raises:
        ConnectionError: if its weights can't be had, with what to do instead.
    """
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **kwargs)
        return model
    except Exception as error:  # HTTP libraries have exceptions of their own
        if not any(map(is_of_server, causes(error))):
            raise
        raise ConnectionError(f'the weights of {name} could not be had: {server_fault(error)}; try again later, or '
                              f'{instead}') from None


def _of_bundle(path: Path, name: str) -> InitialWeights:
    config = read_bundle(path)
    about, args = config['timm_paf'], dict(config['model_args'])
    architecture = config['architecture']
    return InitialWeights(name, 'bundle', sha256(path / WEIGHTS), architecture,
                          about.get('act') or _act_of(architecture), _of_weights(args), path / WEIGHTS)


def _of_run(path: Path) -> InitialWeights:
    run, weights = read_record(path / 'run.json'), path / WEIGHTS
    recipe = run.get('recipe')
    if not isinstance(recipe, dict) or not isinstance(run.get('architecture'), str):
        raise ValueError(f'{path}/run.json is not of train_robust.py; expected architecture and recipe')
    if run.get('status') != 'complete' or not weights.is_file():
        raise ValueError(f'{path} has no result to start from; run its training command again, it resumes where it '
                         'stopped')
    args = check_model_args(recipe.get('model_kwargs') or {}, f'{path}/run.json: recipe.model_kwargs')
    files, found = run.get('files'), sha256(weights)
    expected = files.get(WEIGHTS, found) if isinstance(files, dict) else found
    if expected != found:
        raise ValueError(f'{weights} is damaged: sha256 {found}, expected {expected}; its training command writes them '
                         'anew while it has a checkpoint')
    act = recipe.get('act') if isinstance(recipe.get('act'), str) else _act_of(run['architecture'])
    return InitialWeights(path.resolve().name, 'run', found, run['architecture'], act, _of_weights(args), weights)


def _of_weights(args: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a network without those that say how it is trained, and of which classes."""
    others = ('act_kwargs', 'num_classes', 'in_chans', 'drop_rate', 'drop_path_rate')
    return {key: value for key, value in args.items() if key not in others}


def _act_of(model: str) -> str | None:
    """Returns the activation in the name of one of our networks, None for another network."""
    arch, own = model.partition('.')[0], is_own(model)
    return next((act for act in list_pafs(plain=True) if own and arch.endswith(f'_{act}')), None)
