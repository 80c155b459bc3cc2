"""AutoAttack through RobustBench's benchmark() and through ours, image by image, with the seconds of each.

    python tests/benchmarks/parity.py --data-dir data --n 1000 --output tests/benchmarks/results/parity.json

Batch by batch, theirs and then ours, so that both meet the same load of the machine. Theirs is RobustBench's own
network class and function, eager, as its users run it; ours is the compiled network. Both get the same seed, which
benchmark() would take from the clock. CPU seconds (of all threads) are what a busy machine changes least. What is
finished is in the output, and the same command resumes from there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import time
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn

from timm_paf.attacks import ThreatModel, frozen_view, pgd
from timm_paf.data import derive_seed, load_dataset, to_float
from timm_paf.evaluation import evaluate
from timm_paf.files import environment, read_json, sha256, write_json
from timm_paf.robustbench import load_bundle
from timm_paf.speed import AnyBatch

ROOT = Path(__file__).resolve().parents[2]


def benchmark_verdicts(model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int, norm: str = 'Linf',
                       **kwargs: Any) -> str:
    """RobustBench's benchmark() on these images in one batch, with a seed; its verdict for each, as it counts them."""
    import robustbench.eval

    found: list[Tensor] = []

    class Recorded(robustbench.eval.AutoAttack):  # type: ignore[misc,name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, seed=seed)

        def run_standard_evaluation(self, *args: Any, **kwargs: Any) -> Any:
            found.append(super().run_standard_evaluation(*args, **kwargs))
            return found[-1]

    theirs = robustbench.eval.AutoAttack, robustbench.eval.load_clean_dataset
    robustbench.eval.AutoAttack = Recorded
    robustbench.eval.load_clean_dataset = lambda *_: (images, labels)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _, accuracy = robustbench.eval.benchmark(
                model, n_examples=len(images), dataset='cifar10', threat_model=norm, eps=eps,
                batch_size=len(images), device=images.device, **kwargs)
    finally:
        robustbench.eval.AutoAttack, robustbench.eval.load_clean_dataset = theirs
    with torch.no_grad():
        right = model(found[0]).argmax(1) == labels
    assert round(accuracy * len(images)) == int(right.sum())
    return ''.join(str(int(v)) for v in right)


def ratio(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Of theirs to ours, over all batches and from the least to the most of one."""
    sums, each = [round(sum(side), 1) for side in zip(*pairs)], [a / b for a, b in pairs]
    return {'': sums, '_ratio': round(sums[0] / sums[1], 3), '_ratio_min': round(min(each), 3),
            '_ratio_max': round(max(each), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--data-dir', default=os.environ.get('CIFAR10_ROOT'), help='with cifar-10-batches-py')
    parser.add_argument('--bundle', default='wrn10_1_pssilu', help='of hub/models')
    parser.add_argument('--n', type=int, default=1000)
    parser.add_argument('--batch-size', type=int, default=250)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--output', type=Path, required=True)
    args = parser.parse_args()
    data = load_dataset('cifar10', args.data_dir, train=False)
    images, labels = to_float(data.images[:args.n]).to(args.device), data.labels[:args.n].to(args.device)
    folder = ROOT / 'hub' / 'models' / args.bundle
    model = load_bundle(folder).to(args.device)
    peer = peers.same_weights(args.bundle, model)
    view = frozen_view(model.to(memory_format=torch.channels_last))
    fast = AnyBatch(view)
    about = {'bundle': args.bundle, 'weights_sha256': sha256(folder / 'model.safetensors'), 'n': args.n,
             'images': f'first {args.n} test images of cifar10', 'threat_model': {'norm': 'Linf', 'eps': '8/255'},
             'batch_size': args.batch_size}
    record: dict[str, Any] = {**about, 'robustbench': [], 'ours': [], **environment()}
    if args.output.exists():
        record = read_json(args.output)
        if any(record[key] != value for key, value in about.items()):
            raise SystemExit(f'{args.output} is of another comparison; give another --output')
    started = time.perf_counter()
    pgd(fast, images[:2], labels[:2], ThreatModel(steps=1))  # compiles
    with torch.no_grad():
        fast(images[:2])
    record['compile_seconds'] = round(time.perf_counter() - started, 1)

    for number, start in enumerate(range(0, args.n, args.batch_size)):
        x, y = images[start:start + args.batch_size], labels[start:start + args.batch_size]
        for side in ('robustbench', 'ours'):
            if len(record[side]) > number:
                continue
            started, cpu = time.perf_counter(), time.process_time()
            if side == 'ours':
                verdicts = evaluate(fast, x, y, ThreatModel(), ['autoattack'], args.batch_size, number,
                                    fresh=view)['autoattack']['verdicts']
            else:
                seed = derive_seed(number, 0) % 2**31  # what ours gives AutoAttack
                verdicts = benchmark_verdicts(peer, x, y, 8 / 255, seed, data_dir=args.data_dir)
            record[side].append({'verdicts': verdicts, 'seconds': round(time.perf_counter() - started, 1),
                                 'cpu_seconds': round(time.process_time() - cpu, 1)})
            pairs = list(zip(record['robustbench'], record['ours']))
            both = [''.join(part['verdicts'] for part in side) for side in zip(*pairs)]
            record['compared'] = {
                'n': len(both[0]), 'robust': [verdicts.count('1') for verdicts in both],
                'different': [i for i, (a, b) in enumerate(zip(*both)) if a != b],
                **{f'{what}{name}': value for what in ('seconds', 'cpu_seconds')
                   for name, value in ratio([(a[what], b[what]) for a, b in pairs]).items()}} if pairs else {}
            write_json(args.output, record)
            print(f'images {start} to {start + len(x)}, {side}: {verdicts.count("1")} robust, '
                  f'{record[side][-1]["seconds"]} s', flush=True)
    print(record['compared'])


if __name__ == '__main__':
    main()
