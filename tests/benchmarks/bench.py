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
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peers
import torch
from saved_memory import large_memory, memory
from steps import (
    activation,
    attack,
    attack_step,
    best_convolution_rate,
    cuda_graphs,
    pair,
    paper_step,
    trainer,
    training_step,
)
from timing import Bench, Case, table
from torch import nn

from timm_paf.attacks import ThreatModel, frozen_view
from timm_paf.data import load_dataset, to_float
from timm_paf.evaluation import evaluate
from timm_paf.files import environment, write_json
from timm_paf.robustbench import load_bundle
from timm_paf.speed import AnyBatch, has_bfloat16_units, keep_memory

ROOT = Path(__file__).resolve().parents[2]


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
