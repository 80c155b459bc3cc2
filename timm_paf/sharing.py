"""One activation that a whole network shares: its places, and its values once in the state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .activations import PAF

__all__ = ['SharedActivation', 'merge_aliases', 'share_pafs']


class SharedActivation(nn.Module):
    """One place in a network where the shared activation acts.

    Every site has a module of its own, because ``children()``, FX and TorchScript treat one instance that is
    registered at many places as one place.
    """

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def share_pafs(root: nn.Module) -> None:
    """Makes the root's state dict hold every PAF value once, and its loading accept each value once or at every site.

    A PAF that several sites share stands in ``state_dict()`` under the first of its names alone: safetensors refuses
    aliased tensors, and an average over keys would count it once per site. On load a value may stand under any of its
    names, also the published ones (``block1.layer.0.activation.alpha``); names that disagree are an error. A second
    call changes nothing.

    Args:
        root: the whole network, whose state dict is saved.
    """
    if _keep_first_name in root._state_dict_hooks.values():
        return
    root.register_state_dict_post_hook(_keep_first_name)  # type: ignore[no-untyped-call]
    root.register_load_state_dict_pre_hook(_fill_every_name)  # type: ignore[no-untyped-call]


def merge_aliases(root: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict with every PAF value once, under the key that `share_pafs` saves it as.

    Args:
        root: the network that the keys are of; it is not changed.
        state_dict: weights with every value of a PAF, of shape (1,) or (channels,), under at least one of its names,
            the published ones too. It is not changed; keys that are no PAF's are kept.

    Raises:
        ValueError: if two names of one value disagree.
    """
    merged = dict(state_dict)
    errors: list[str] = []
    _fill_every_name(root, merged, '', {}, True, [], [], errors)
    _keep_first_name(root, merged, '', {})
    if errors:
        raise ValueError(errors[0])
    return merged


def _paf_keys(root: nn.Module, prefix: str) -> Iterator[list[str]]:
    """Yields for each value of each PAF its keys, of which the first is the one that is saved."""
    names: dict[PAF, list[str]] = {}

    def walk(module: nn.Module, path: str) -> None:  # `named_modules` has one name of each PAF
        if isinstance(module, PAF):
            names.setdefault(module, []).append(path)
        for key, child in module._modules.items():
            if child is not None:
                walk(child, f'{path}{key}.')

    walk(root, prefix)
    for paf, paths in names.items():
        for value in paf.init:
            yield [path + value for path in paths]


def _keep_first_name(root: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for _, *aliases in _paf_keys(root, prefix):
        for key in aliases:
            state_dict.pop(key, None)


def _fill_every_name(
        root: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
    for keys in _paf_keys(root, prefix):
        # 'block1.layer.0.activation.act.alpha' is published as 'block1.layer.0.activation.alpha'
        # (only below the root: the root's own 'act.alpha' has no published name, nor has 'model.act.alpha' of a nested
        # root).
        published = [f'{site}.{value}' for site, act, value in (
            key.rsplit('.', 2) for key in keys if key.count('.', len(prefix)) > 1) if act == 'act']
        found = {key: state_dict.pop(key) for key in dict.fromkeys(keys + published) if key in state_dict}
        if not found:
            continue
        name, value = next(iter(found.items()))
        differs = [key for key, other in found.items()
                   if not value.is_meta and not torch.equal(other.double().cpu(), value.double().cpu())]
        if differs:
            error_msgs.append(
                f'one activation is shared by the network, but {name} is {value.tolist()} and {differs[0]} is '
                f'{found[differs[0]].tolist()} ({len(differs)} of {len(found)} differ); expected equal values')
        state_dict.update(dict.fromkeys(keys, value))
