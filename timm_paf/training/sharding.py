"""FSDP for a network that is attacked: gradients and the optimizer's state are shared out, the weights gathered once.

An attack runs the network ten times before the one pass that trains it. FSDP gathers the weights in each pass, so here
they are gathered once after the optimizer's step and stay whole until the next one: what a process saves is its
gradients and optimizer state (ZeRO's second stage, Rajbhandari et al., https://arxiv.org/abs/1910.02054).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ['gather', 'load_optimizer', 'load_shards', 'refresh', 'scatter_like', 'shard', 'view_whole']


def shard(model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Shards the network over all processes, in place; `refresh` then makes its weights whole.

    Args:
        model: the network, on its device, with every weight contiguous (FSDP takes no channels_last ones).
        device: the device of this process.

    Returns:
        The shards by name, for the optimizer. ``model.named_parameters()`` are the shards until `refresh`, and the
        whole weights after it.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    fully_shard(model, mesh=init_device_mesh(device.type, (get_world_size(),)), reshard_after_forward=False)
    # Weights stay whole after a backward pass, because the next part of an accumulated batch attacks with them.
    cast(FSDPModule, model).set_reshard_after_backward(False)
    return dict(model.named_parameters())


def refresh(model: nn.Module) -> None:
    """Gathers the weights of a sharded network from their shards; they keep their place in memory."""
    model.reshard()  # type: ignore[operator]
    model.unshard()  # type: ignore[operator]


def view_whole(view: nn.Module, model: nn.Module) -> None:
    """Lets a network of the same names share the whole weights of a sharded one, after `refresh`."""
    whole = dict(model.named_parameters())
    for name, p in view.named_parameters():
        p.data = whole[name].data


@torch.no_grad()
def load_shards(view: nn.Module, shards: dict[str, nn.Parameter]) -> None:
    """Copies the whole weights of a network into the shards of the same names."""
    for name, p in view.named_parameters():
        shards[name].copy_(scatter_like(p, shards[name]))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state of whole tensors; those of a parameter's shape get its layout or shards."""
    optimizer.load_state_dict(state)
    for p, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == p.shape:  # the fused step wants the layout of p
                values[name] = scatter_like(value, p)


def gather(tensor: Tensor) -> Tensor:
    """Returns the whole of a sharded tensor, and any other tensor as it is. Every process must call it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scatter_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor, the same in every process, laid out as ``like``: sharded if ``like`` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
