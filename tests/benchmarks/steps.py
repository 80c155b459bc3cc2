"""Activations, attack steps, whole attacks and training steps, with PSSiLU and those of the peers."""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import peers
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timing import Bench, Case
from torch import Tensor, nn
from torch._dynamo.utils import counters

import timm_paf
from timm_paf.attacks import ThreatModel, frozen_view, pgd
from timm_paf.data import Batches, ImageSet, to_float
from timm_paf.speed import AnyBatch, forward_flops
from timm_paf.training import Recipe, Trainer

__all__ = ['activation', 'attack', 'attack_step', 'best_convolution_rate', 'cuda_graphs', 'pair', 'paper_step',
           'random_batch', 'trainer', 'training_step']


def best_convolution_rate(bench: Bench, dtype: torch.dtype) -> None:
    """FLOP/s of the fastest of a WideResNet's 3 x 3 convolutions: what the rest is measured against."""
    rates = {}
    batch = 32 if bench.device.type == 'cpu' else 512
    for channels, size in ((64, 32), (160, 32), (320, 16), (640, 8)):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(bench.device, dtype).to(
            memory_format=torch.channels_last)
        x = torch.rand(batch, channels, size, size, device=bench.device, dtype=dtype).to(
            memory_format=torch.channels_last)
        with torch.no_grad():
            work = functools.partial(conv, x)
            work()
            fastest = min(bench.seconds(work) for _ in range(7))
        rates[f'{channels} channels, {size} x {size}'] = 2 * batch * size ** 2 * channels ** 2 * 9 / fastest
    bench.best_rate = max(rates.values())
    bench.add('best convolution', str(dtype).removeprefix('torch.'), gflops=bench.best_rate / 1e9,
              shape=max(rates, key=lambda k: rates[k]))


def activation(bench: Bench, elements: int, dtype: torch.dtype) -> None:
    x, g = (torch.randn(elements, device=bench.device).to(dtype) for _ in range(2))
    peer = peers.robustbench_pssilu().to(bench.device)
    ours = timm_paf.create_paf('pssilu', device=bench.device)
    frozen = timm_paf.create_paf('pssilu', frozen=True, device=bench.device)

    def work(act: Callable[[Tensor], Tensor], parameters: Any = (), fused: bool = False) -> None:
        timm_paf.set_fused_pafs(fused)
        leaf = x.detach().requires_grad_()
        torch.autograd.grad(act(leaf), [leaf, *parameters], g)
        timm_paf.set_fused_pafs(False)

    size = f'{elements * x.element_size() / 1e6:.0f} MB {str(dtype).removeprefix("torch.")}'
    bench.compare(f'activation, forward and input gradient, {size}', {
        'ReLU': lambda: work(F.relu), 'SiLU of torch': lambda: work(F.silu), "RobustBench's PSSiLU": lambda: work(peer),
        'PSSiLU': lambda: work(frozen), 'PSSiLU fused': lambda: work(frozen, fused=True)}, rounds=2 * bench.rounds + 1)
    bench.compare(f'activation, forward and all gradients, {size}', {
        "RobustBench's PSSiLU": lambda: work(peer, peer.parameters()), 'PSSiLU': lambda: work(ours, ours.parameters()),
        'PSSiLU fused': lambda: work(ours, ours.parameters(), fused=True)}, rounds=2 * bench.rounds + 1)


def pair(bench: Bench, name: str) -> tuple[nn.Module, nn.Module]:
    """The peer's network and ours with the same weights, in eval mode on the device."""
    torch.manual_seed(0)
    peer = peers.network(name).to(bench.device).eval()
    ours = timm.create_model(f'{name}_pssilu').to(bench.device).eval()
    if name.startswith('wrn'):
        ours.load_state_dict(peer.state_dict())
    return peer, ours


def random_batch(bench: Bench, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return (to_float(images).to(bench.device), torch.randint(10, (batch,), generator=generator).to(bench.device))


def attack_step(bench: Bench, name: str, batch: int, autocast: bool) -> None:
    peer, ours = pair(bench, name)
    view = frozen_view(ours.to(memory_format=torch.channels_last))
    compiled, relu = torch.compile(view), peers.with_relu(peer)
    x, y = random_batch(bench, batch)
    plain = x.contiguous()

    def step(model: nn.Module, x: Tensor, half: bool = False) -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
            peers.attack_step(model, x, y)

    cases: dict[str, Case] = {"RobustBench's PSSiLU": lambda: step(peer, plain), 'ReLU': lambda: step(relu, plain),
                              'PSSiLU': lambda: step(view, x), 'PSSiLU compiled': lambda: step(compiled, x)}
    if autocast:
        cases |= {"RobustBench's PSSiLU bf16": lambda: step(peer, plain, True),
                  'PSSiLU compiled bf16': lambda: step(compiled, x, True)}
    bench.compare(f'attack step, {name}, batch {batch}', cases, batch, 2 * batch * forward_flops(view, x[:1]))
    if bench.device.type == 'cpu':  # what no change of the rest can make faster
        with torch.profiler.profile() as profile:
            step(compiled, x)
        spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        bench.add(f'attack step, {name}, batch {batch}', 'share of PSSiLU compiled in convolutions',
                  share=sum(t for key, t in spent.items() if 'convolution' in key) / sum(spent.values()))


def attack(bench: Bench, name: str, batch: int) -> None:
    """A whole PGD-10, against torchattacks."""
    peer, ours = pair(bench, name)
    view = frozen_view(ours.to(memory_format=torch.channels_last))
    compiled = torch.compile(view)
    x, y = random_batch(bench, batch)
    plain = x.contiguous()
    cases: dict[str, Case] = {}
    if importlib.util.find_spec('torchattacks'):
        import torchattacks

        other = torchattacks.PGD(peer, eps=peers.EPS, alpha=peers.STEP, steps=peers.STEPS)
        cases["torchattacks' PGD"] = lambda: other(plain, y)
    cases |= {"paper's loop": lambda: peers.pgd(peer, plain, y),
              'pgd compiled': lambda: pgd(compiled, x, y, ThreatModel())}
    bench.compare(f'PGD-10, {name}, batch {batch}', cases, batch)
    bench.grow(f'growth with steps, pgd compiled, {name}, batch {batch}', 'steps', (5, 10, 20),
               lambda steps: pgd(compiled, x, y, ThreatModel(steps=steps)))
    many = AnyBatch(view)
    bench.grow(f'growth with images, pgd compiled, {name}, PGD-5', 'images', (batch // 4, batch // 2, batch),
               lambda images: pgd(many, x[:images], y[:images], ThreatModel(steps=5)))


def trainer(
        bench: Bench, name: str, batch: int, mixed_precision: str, compiled: bool, graphs: bool = False) -> Trainer:
    """A run on random images."""
    recipe = Recipe(
        model=f'{name}_pssilu', dataset='made', epochs=9999, batch_size=batch, lr=0.01, min_lr=0.001, momentum=0.9,
        weight_decay=5e-4, schedule='cosine', threat=ThreatModel(), paf_penalty=10.0, paf_clip=0.01,
        mixed_precision=mixed_precision, compile=compiled, cuda_graphs=graphs)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4 * batch, 32, 32, 3), dtype=torch.uint8, generator=generator)
    data = ImageSet('made', images, torch.randint(10, (4 * batch,), generator=generator), 10)
    AcceleratorState._reset_state()  # which holds one precision
    accelerator = Accelerator(cpu=bench.device.type == 'cpu', mixed_precision=mixed_precision)
    torch.manual_seed(0)
    return Trainer(recipe, timm.create_model(recipe.model), Batches(data, batch, 0, bench.device), accelerator)


def training_step(bench: Bench, name: str, batch: int, autocast: bool) -> None:
    peer = pair(bench, name)[0]
    cases: dict[str, Case] = {"paper's loop": paper_step(bench, peer, batch)}
    if autocast:
        cases["paper's loop bf16"] = paper_step(bench, pair(bench, name)[0], batch, True)
    if bench.device.type == 'cuda':  # on a CPU they take minutes
        cases |= {"paper's loop, ReLU": paper_step(bench, peers.with_relu(peer), batch),
                  'Trainer': trainer(bench, name, batch, 'bf16' if autocast else 'no', False).train_step}
    # Accelerate has one precision at a time, which a Trainer in float32 does not look at: the one in bf16 comes last.
    for precision in ('no', 'bf16') if autocast else ('no',):
        compiled = trainer(bench, name, batch, precision, True)
        cases['Trainer compiled bf16' if precision == 'bf16' else 'Trainer compiled'] = compiled.train_step
    # forward and back to the images in each attack step, then forward and back to weights and activations
    flops = (2 * peers.STEPS + 3) * batch * forward_flops(compiled.frozen, random_batch(bench, 1)[0])
    bench.compare(f'training step PGD-10, {name}, batch {batch}', cases, batch, flops)
    one = statistics.median(bench.seconds(lambda: compiled.batches[compiled.step]) for _ in range(21))
    bench.add(f'loader, batch {batch}, beside the training step of {name}', 'Batches', seconds=one,
              images_per_second=batch / one, share_of_step=one / bench.rows[-1]['seconds'])
    if bench.device.type == 'cuda':
        profile(bench, f'training step PGD-10, {name}, batch {batch}', compiled.train_step)


def cuda_graphs(bench: Bench, name: str, batch: int, autocast: bool) -> None:
    """Steps as CUDA graphs, each pass of which is launched at once, against the same compiled as Trainer does.

    A graph keeps its outputs in memory that its next run overwrites, and is slow where they are its input. Here neither
    happens: PGD makes new images of a gradient, whose last use that is, and a training step drops the gradients of
    weights before it begins. What came out both ways is compared, which would show it. A CPU has no graphs.
    """
    view = frozen_view(pair(bench, name)[1].to(memory_format=torch.channels_last))
    x, y = random_batch(bench, batch)
    modes = {'compiled': None, 'CUDA graphs': 'reduce-overhead'}
    networks = {case: torch.compile(view, mode=mode) for case, mode in modes.items()}
    runs = {case: trainer(bench, name, batch, 'bf16' if autocast else 'no', True, bool(mode))
            for case, mode in modes.items()}

    def step(case: str, attack: Callable[..., Tensor], *args: Any) -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=autocast):
            return attack(networks[case], x, y, *args)

    where, left_out = f'{name}, batch {batch}{", bf16" * autocast}', counters['inductor']['cudagraph_skips']
    bench.compare(f'CUDA graphs, attack step, {where}', {
        case: functools.partial(step, case, peers.attack_step) for case in modes}, batch)
    bench.compare(f'CUDA graphs, training step PGD-10, {where}', {
        case: run.train_step for case, run in runs.items()}, batch)
    plain, graphs = (step(case, pgd, ThreatModel(random_start=False)) for case in modes)
    losses = [run.metric_sums['loss'].item() for run in runs.values()]
    bench.add(f'CUDA graphs, {where}', 'both ways', same_pixels_after_pgd=(plain == graphs).double().mean().item(),
              losses_differ_by=abs(losses[1] / losses[0] - 1),
              programs_without_graph=counters['inductor']['cudagraph_skips'] - left_out)


def profile(bench: Bench, what: str, case: Case) -> None:
    """What the GPU does during a case: the share of the time that it works, and of its work by kind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        took = bench.seconds(case)
    kernels = {event.key: event.self_device_time_total / 1e6 for event in found.key_averages()}
    kinds = {'convolutions': ('conv', 'xmma', 'gemm', 'cutlass', 'cudnn'), 'copies': ('memcpy', 'memset')}
    busy = sum(kernels.values())
    shares = {kind: sum(t for key, t in kernels.items() if any(word in key.lower() for word in words)) / busy
              for kind, words in kinds.items()}
    bench.add(what, 'Trainer compiled, profiled', seconds=took, busy=busy / took,
              **{f'share_{kind}': share for kind, share in shares.items()}, longest={
                  key[:70]: round(kernels[key] / busy, 4) for key in sorted(kernels, key=lambda k: -kernels[k])[:8]})


def paper_step(bench: Bench, model: nn.Module, batch: int, half: bool = False) -> Case:
    """One training step of the paper's loop."""
    x, y = random_batch(bench, batch)
    plain = x.contiguous()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
            peers.training_step(model, optimizer, plain, y)
    return step
