"""Speed and memory against the peers, each comparison interleaved in one run.

    make bench                                                              (CPU, two cores, ten minutes)
    python tests/benchmarks/bench.py --device cuda --output tests/benchmarks/results/H200.json
    python tests/benchmarks/bench.py --cpu-time --only wrn16_4 --output tests/benchmarks/results/cpu_bf16.json
    python tests/benchmarks/bench.py --cpu-time --bf16 --rounds 2 --only "attack step wrn16_4" --output cpu_avx2.json
    python tests/benchmarks/bench.py --programs --output tests/benchmarks/results/cpu_programs.json
    python tests/benchmarks/bench.py --table tests/benchmarks/results/cpu.json

The cases of a comparison run A B C, A B C, ...; times are medians over the rounds, ratios those of the first case (the
peer) to each other one, with their spread over the rounds. Compiling is timed on its own. AutoAttack and the loader use
CIFAR-10 from --data-dir and are left out without it; torchattacks where it is not installed. bfloat16 that a CPU only
emulates takes 20 times as long as float32 (results/cpu_avx2.json), so it is compared there with --bf16 alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._dynamo.utils import counters

import timm_paf
from timm_paf.attacks import ThreatModel, frozen_view, pgd
from timm_paf.data import Batches, ImageSet, load_dataset, to_float
from timm_paf.evaluation import evaluate
from timm_paf.files import environment, write_json
from timm_paf.robustbench import load_bundle
from timm_paf.speed import AnyBatch, forward_flops, has_bfloat16_units, keep_memory
from timm_paf.training import Recipe, Trainer

ROOT = Path(__file__).resolve().parents[2]
Case = Callable[[], object]


class Bench:
    """The rows so far, on one device, in seconds of a clock."""

    def __init__(self, device: str, rounds: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.rounds, self.clock = torch.device(device), rounds, clock
        self.rows: list[dict[str, Any]] = []
        self.best_rate: float | None = None

    def wait(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def seconds(self, case: Case) -> float:
        torch.compiler.cudagraph_mark_step_begin()  # nothing of the case before is in use, should it be a CUDA graph's
        self.wait()
        started = self.clock()
        case()
        self.wait()
        return self.clock() - started

    def compare(
            self, what: str, cases: dict[str, Case], images: int | None = None, flops: float | None = None,
            rounds: int | None = None) -> None:
        """Time the cases in turns, once more than counts; the first is the one that ratios are to.

        Args:
            images: worked on by each case.
            flops: of each case.
        """
        first = {name: self.seconds(case) for name, case in cases.items()}
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds or self.rounds):
            for name, case in cases.items():
                times[name].append(self.seconds(case))
        base = next(iter(times.values()))
        for name, seconds in times.items():
            ratios = sorted(b / s for b, s in zip(base, seconds))
            median = statistics.median(seconds)
            self.add(what, name, seconds=median, first_call=first[name], ratio=statistics.median(ratios),
                     ratio_min=ratios[0], ratio_max=ratios[-1], rounds=len(seconds),
                     **{'images_per_second': images / median} if images else {},
                     **{'share_of_best_rate': flops / median / self.best_rate} if flops and self.best_rate else {})

    def grow(self, what: str, unit: str, counts: tuple[int, ...], case: Callable[[int], object]) -> None:
        """The median of three for each count, and seconds per unit."""
        for count in counts:
            case(count)
            median = statistics.median(self.seconds(functools.partial(case, count)) for _ in range(3))
            self.add(what, f'{count} {unit}', seconds=median, milliseconds_per_unit=1e3 * median / count)

    def add(self, what: str, case: str, **values: Any) -> None:
        row = {'what': what, 'case': case, **{k: float(f'{v:.4g}') if isinstance(v, float) else v
                                              for k, v in values.items()}}
        self.rows.append(row)
        print(json.dumps(row), flush=True)


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


def one_program(bench: Bench, which: str, name: str, batch: int) -> float:
    """Seconds of a training step in a process of its own, as it is run: ours with the memory that it keeps."""
    if which == 'ours':
        keep_memory()
        step: Case = trainer(bench, name, batch, 'no', True).train_step
    else:
        step = paper_step(bench, pair(bench, name)[0], batch)
    step()
    return statistics.median(bench.seconds(step) for _ in range(3))


def programs(bench: Bench, name: str, batch: int) -> None:
    """Training step against training step, each in its own process, in turns."""
    times: dict[str, list[float]] = {'paper': [], 'ours': []}
    for _ in range(3):
        for which, found in times.items():
            done = subprocess.run(
                [sys.executable, '-W', 'ignore', __file__, '--program', which, name, str(batch)],
                check=True, capture_output=True, text=True)
            found.append(float(done.stdout.split()[-1]))
    ratios = sorted(a / b for a, b in zip(times['paper'], times['ours']))
    for which, case in (('paper', "paper's loop"), ('ours', 'train_robust.py, compiled')):
        median = statistics.median(times[which])
        bench.add(f'program against program, training step PGD-10, {name}, batch {batch}', case, seconds=median,
                  images_per_second=batch / median, ratio=1.0 if which == 'paper' else statistics.median(ratios),
                  ratio_min=1.0 if which == 'paper' else ratios[0], ratio_max=1.0 if which == 'paper' else ratios[-1])


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def autoattack(bench: Bench, data_dir: str, bundle: str, n: int) -> None:
    from robustbench.eval import benchmark

    data = load_dataset('cifar10', data_dir, train=False)
    x, y = to_float(data.images[:n]).to(bench.device), data.labels[:n].to(bench.device)
    model = load_bundle(ROOT / 'hub' / 'models' / bundle).to(bench.device)
    peer = peers.same_weights(bundle, model)
    view = frozen_view(model.to(memory_format=torch.channels_last))
    fast = AnyBatch(view)
    with tempfile.TemporaryDirectory() as folder:
        def theirs() -> Any:
            with quiet():
                return benchmark(peer, n_examples=n, dataset='cifar10', threat_model='Linf', eps=8 / 255, batch_size=n,
                                 data_dir=data_dir, device=bench.device, to_disk=False,
                                 log_path=Path(folder) / 'log')

        def ours(model: nn.Module) -> dict[str, Any]:
            return evaluate(model, x, y, ThreatModel(), ['clean', 'autoattack'], batch_size=n)

        counts: dict[str, Any] = {}
        bench.compare(f'AutoAttack, {bundle}, {n} images', {
            "RobustBench's benchmark()": lambda: counts.update(robustbench=round(theirs()[1] * n)),
            'evaluate compiled': lambda: counts.update(compiled=ours(fast)['autoattack'])}, n)
        eager, compiled = ours(view)['autoattack'], counts['compiled']
        bench.add(f'AutoAttack, {bundle}, {n} images', 'robust images', robustbench=counts['robustbench'],
                  evaluate=eager['correct'], compiled=compiled['correct'],
                  flipped_by_compiling=sum(a != b for a, b in zip(eager['verdicts'], compiled['verdicts'])))


def processes(bench: Bench) -> None:
    """Images/s of a whole train_robust.py with one process and two, each with one thread."""
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--nproc_per_node', str(count),
                 'train_robust.py', '--model', 'wrn10_2_pssilu', '--dataset', 'digits', '--batch-size', '128',
                 '--max-steps', '11', '--no-compile', '--output', f'{folder}/run'],
                cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}, check=True,
                capture_output=True)
            took = json.loads(Path(folder, 'run', 'run.json').read_text())['seconds']
        bench.add('growth with processes, training PGD-10, wrn10_2, batch 128 in all', f'{count} processes',
                  images_per_second=11 * 128 / took)


def table(path: Path) -> str:
    """The comparisons of a result file as Markdown: the first case of each against the compiled ones, else the last."""
    comparisons: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text())['rows']:
        if 'ratio_min' in row:
            comparisons.setdefault(row['what'], []).append(row)
    lines = ['| | compared with | ours | ratio (least to most) |', '|---|---|---|---|']
    for what, (first, *others) in comparisons.items():
        for ours in [row for row in others if 'compiled' in row['case']] or others[-1:]:
            lines.append(f'| {what} | {first["case"]}: {_rate(first)} | {ours["case"]}: {_rate(ours)} | '
                         f'{ours["ratio"]:.2f} ({ours["ratio_min"]:.2f} to {ours["ratio_max"]:.2f}) |')
    return '\n'.join(lines)


def _rate(row: dict[str, Any]) -> str:
    rate = row.get('images_per_second')
    return f'{1e3 * row["seconds"]:.1f} ms' if rate is None else f'{rate:,.{2 if rate < 10 else 0}f} images/s'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--data-dir', default=os.environ.get('CIFAR10_ROOT'), help='with cifar-10-batches-py')
    parser.add_argument('--output', type=Path, help='a JSON file')
    parser.add_argument('--only', default='', help='comparisons whose name has one of these words in it, with commas')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--peers', help='directory of packages to compare with, searched last')
    parser.add_argument('--images', type=int, help='number of them for AutoAttack')
    parser.add_argument('--keep-memory', action='store_true', help='with the allocator as train_robust.py sets it')
    parser.add_argument('--cpu-time', action='store_true',
                        help='CPU seconds of all threads, which other work on the machine changes least')
    parser.add_argument('--bf16', action='store_true', help='in bfloat16 too where the device has no units for it')
    parser.add_argument('--tiny', action='store_true', help='see that all of it runs; the numbers mean nothing')
    parser.add_argument('--programs', action='store_true', help='only training steps, in processes of their own')
    parser.add_argument('--program', nargs=3, help=argparse.SUPPRESS)
    parser.add_argument('--table', type=Path, help='print the table of a result file and do nothing else')
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    if args.keep_memory:
        keep_memory()
    if args.peers:
        sys.path.append(args.peers)
    bench = Bench(args.device, args.rounds, time.process_time if args.cpu_time else time.perf_counter)
    if args.program:
        which, name, batch = args.program
        print(one_program(bench, which, name, int(batch)))
        return
    gpu, tiny, half = bench.device.type == 'cuda', args.tiny, args.bf16 or has_bfloat16_units(bench.device)
    if gpu:
        torch.backends.cudnn.benchmark = True
    nets = [('wrn10_1', 8)] if tiny else [('resnet18', 1024), ('wrn28_10', 512)] if gpu else [
        ('wrn16_4', 128), ('resnet18', 128), ('wrn28_10', 32)]
    trained = nets if gpu or tiny else [('wrn16_4', 128), ('resnet18', 64)]
    elements = 1_000_000 if tiny else 10_500_000 * (8 if gpu else 1)
    n = 2 if tiny else 512 if gpu else 8
    started = time.monotonic()
    about = {'device': args.device, 'rounds': args.rounds, 'keep_memory': args.keep_memory, 'cpu_time': args.cpu_time,
             **environment()}
    about['command'] = about['command'].replace(str(args.peers), 'PEERS')  # no path of a machine
    parts: list[tuple[str, Case]] = [
        ('convolution', lambda: best_convolution_rate(bench, torch.bfloat16 if gpu else torch.float32)),
        ('activation', lambda: activation(bench, elements, torch.float32)),
        *([('activation', lambda: activation(bench, elements, torch.bfloat16))] if gpu or tiny else []),
        *[(f'attack step {net[0]}', functools.partial(attack_step, bench, *net, half)) for net in nets],
        ('pgd', lambda: attack(bench, nets[0][0], 8 if tiny else 512 if gpu else 32)),
        *[(f'training step {net[0]}', functools.partial(training_step, bench, *net, half)) for net in trained],
        *[('memory', functools.partial(memory, bench, name, 128 if gpu else 8)) for name, _ in trained],
        *([] if tiny else [('memory', lambda: large_memory(bench))]),
        *([('autoattack', lambda: autoattack(bench, args.data_dir, 'wrn10_1_pssilu', args.images or n))]
          if args.data_dir else []),
        *([] if gpu else [('processes', lambda: processes(bench))]),
        # At the batch that recipes have, launching takes a larger share of a step than at those above.
        *[(f'cuda graphs {net[0]}', functools.partial(cuda_graphs, bench, *net, half))
          for net in ([('resnet18', 128), *nets] if gpu else nets if tiny else [])],
    ]
    if args.programs:
        parts = [('programs', functools.partial(programs, bench, *net)) for net in trained]
    for name, part in parts:
        if any(wanted in name for wanted in args.only.split(',')):
            part()
            torch._dynamo.reset()
            if args.output:  # part by part, for one that is ended before all are done
                write_json(args.output, {'seconds': round(time.monotonic() - started), **about, 'rows': bench.rows})


if __name__ == '__main__':
    main()
