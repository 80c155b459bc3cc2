"""FSDP for a network that is attacked: gradients and the optimizer's state are shared out, the weights gathered once.

An attack runs the network ten times before the one pass that trains it. FSDP gathers the weights in each pass, so here
they are gathered once after the optimizer's step and stay whole until the next one: what a process saves is its
gradients and optimizer state (ZeRO's second stage, Rajbhandari et al., https://arxiv.org/abs/1910.02054).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

__all__ = ['gather', 'refresh', 'scatter_like', 'shard']


def shard(model: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Share the network out over all processes, in place; `refresh` then makes its weights whole.

    Args:
        model: on its device, every weight contiguous (FSDP takes no channels_last ones).

    Returns:
        The shards by name, for the optimizer. ``model.named_parameters()`` are these until `refresh`, and the whole
        weights after it.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    fully_shard(model, mesh=init_device_mesh(device.type, (get_world_size(),)), reshard_after_forward=False)
    # each part of an accumulated batch attacks after the backward pass of the one before
    cast(FSDPModule, model).set_reshard_after_backward(False)
    return dict(model.named_parameters())


def refresh(model: nn.Module) -> None:
    """Gather the weights of a sharded network from their shards; they keep their place in memory."""
    model.reshard()  # type: ignore[operator]
    model.unshard()  # type: ignore[operator]


def gather(tensor: Tensor) -> Tensor:
    """The whole of a shard, and any other tensor as it is. Every process must ask for it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scatter_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in every process, as ``like`` is laid out: sharded if that is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
