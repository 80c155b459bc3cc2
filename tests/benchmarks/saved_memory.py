"""The memory that autograd keeps between a forward and its backward."""

from __future__ import annotations

import peers
import timm
import torch
from steps import pair, random_batch
from timing import Bench
from torch import Tensor, nn

__all__ = ['large_memory', 'memory']


def saved_bytes(model: nn.Module, x: Tensor) -> float:
    """Bytes that autograd keeps between forward and backward, per image; each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen: dict[int, tuple[int, Tensor]] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(x)
    del out
    return sum(size for size, _ in seen.values()) / len(x)


def memory(bench: Bench, name: str, batch: int) -> None:
    peer, ours = pair(bench, name)
    ours = ours.to(memory_format=torch.channels_last)
    x, _ = random_batch(bench, batch)
    checkpointed = timm.create_model(f'{name}_pssilu').to(bench.device)
    checkpointed.set_grad_checkpointing(True)
    relu = peers.with_relu(peer)
    values = {"RobustBench's PSSiLU": saved_bytes(peer.train(), x.contiguous()),
              'ReLU': saved_bytes(relu.train(), x.contiguous()),
              'PSSiLU': saved_bytes(ours.train(), x),
              'PSSiLU with gradient checkpointing': saved_bytes(checkpointed.train(), x)}
    compiled = torch.compile(ours)
    values['PSSiLU compiled'] = saved_bytes(compiled, x)  # type: ignore[arg-type]
    if bench.device.type == 'cuda':
        for case, model in (("RobustBench's PSSiLU", peer), ('PSSiLU', ours), ('PSSiLU compiled', compiled)):
            model(x).sum().backward()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(x).sum().backward()
            bench.add(f'peak of forward and backward, {name}', case,
                      megabytes_per_image=(torch.cuda.max_memory_allocated() - before) / 1e6 / batch)
    for case, value in values.items():
        bench.add(f'saved for the backward, {name}', case, megabytes_per_image=value / 1e6,
                  ratio=values["RobustBench's PSSiLU"] / value)


def large_memory(bench: Bench) -> None:
    """Of WRN-70-16 in bf16: from one image and two, so that copies of the weights do not count."""
    model = timm.create_model('wrn70_16_pssilu').to(bench.device).to(memory_format=torch.channels_last).train()
    x, _ = random_batch(bench, 2)
    with torch.autocast(bench.device.type, torch.bfloat16):
        value = 2 * saved_bytes(model, x) - saved_bytes(model, x[:1])
    bench.add('saved for the backward, wrn70_16, bf16', 'PSSiLU', megabytes_per_image=value / 1e6,
              gigabytes_for_batch_512=512 * value / 1e9)
