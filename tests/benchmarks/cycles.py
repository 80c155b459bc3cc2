"""Where the iterates of PGD repeat, and what leaving such images out of the batch would save.

    python tests/benchmarks/cycles.py --data-dir data --output tests/benchmarks/results/cycles.json
    python tests/benchmarks/cycles.py --seconds --data-dir data --output tests/benchmarks/results/cycles_seconds.json

Signed steps of a network in eval mode are a function of the image alone, so from its first repetition on an image goes
round in a cycle and its last iterate is known: Doldo et al. 2025, https://arxiv.org/abs/2503.19347. The attack here is
that of the evaluation, `timm_paf.attacks.pgd` on its first batch with its random start; iterates are compared exactly.
With --seconds the attack that ends there is timed beside the one that does not, compiled as long evaluations are.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_paf.attacks import ThreatModel, frozen_view, pgd
from timm_paf.data import derive_seed, load_dataset, to_float
from timm_paf.files import environment, write_json
from timm_paf.robustbench import load_bundle
from timm_paf.speed import AnyBatch

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ('wrn10_1_relu', 'wrn10_1_pssilu', 'resnet18_w16_pssilu')
SETTINGS = (('8/255', '2/255'), ('8/255', '1/255'), ('2/255', '1/510'))
STEPS = (20, 50, 100, 1000)
TIMED = (('8/255', '2/255', 50), ('8/255', '2/255', 100), ('2/255', '1/510', 50))


class AllRepeated(Exception):
    """The iterate of every image has repeated."""


class Recorder(nn.Module):
    """A network that notes of each iterate whether it fools, and when it is one that it has seen."""

    def __init__(self, model: nn.Module, y: Tensor) -> None:
        super().__init__()
        self.model, self.y = model, y
        self.fooled: list[Tensor] = []
        self.seen: list[dict[bytes, int]] = [{} for _ in y]
        self.cycle: dict[int, tuple[int, int]] = {}
        """By image the step of the first repetition, and the step that it repeats."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        for i, image in enumerate(x.detach().contiguous().numpy()):
            first = self.seen[i].setdefault(hashlib.sha256(image.tobytes()).digest(), len(self.fooled))
            if first < len(self.fooled) and i not in self.cycle:
                self.cycle[i] = len(self.fooled), first
                self.seen[i] = {}
        self.fooled.append(logits.argmax(1) != self.y)
        if len(self.cycle) == len(self.y):
            raise AllRepeated
        return logits

    def fooled_after(self, steps: int) -> Tensor:
        """(images,) bool: whether the iterate after so many steps fools, also beyond the last one that was made."""
        last = [steps if steps < end else first + (steps - first) % (end - first)
                for end, first in (self.cycle.get(i, (steps + 1, 0)) for i in range(len(self.y)))]
        return torch.stack(self.fooled)[last, torch.arange(len(last))]


def measure(name: str, eps: str, step: str, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The passes of PGD that a network needs, as shares of those of an attack that makes every step on every image."""
    started = time.monotonic()
    model = frozen_view(load_bundle(ROOT / 'hub' / 'models' / name))
    right = model(x).argmax(1) == y
    record = Recorder(model, y)
    generator = torch.Generator().manual_seed(derive_seed(0, 0, 1))  # as Evaluation has it for its first batch
    with contextlib.suppress(AllRepeated):
        record(pgd(record, x, y, ThreatModel('Linf', eps, step, max(STEPS)), generator))
    repeats = torch.tensor([record.cycle.get(i, (max(STEPS) + 1, 0))[0] for i in range(len(y))])
    fooled = torch.stack(record.fooled)
    # The forward pass of a step shows whether the iterate before it fools.
    found = torch.where(fooled.any(0), fooled.int().argmax(0) + 1, max(STEPS) + 1)
    rows = []
    for steps in STEPS:
        full = torch.full_like(repeats, steps)
        cycles, until = repeats.clamp(max=steps), found.clamp(max=steps)
        at_end, ever = record.fooled_after(steps), fooled[:steps + 1].any(0)
        rows.append({'steps': steps, 'repeated': share(repeats <= steps), 'passes': {
            'until repeated': share(cycles / full), 'right images': share(right),
            'right images until repeated': share(right * cycles / full),
            'right images until fooled': share(right * until / full),
            'right images until fooled or repeated': share(right * torch.minimum(cycles, until) / full)},
            'right_after': {'last step': int((right & ~at_end).sum()), 'every step': int((right & ~ever).sum())}})
    lengths = collections.Counter(end - first for end, first in record.cycle.values())
    return {'network': name, 'eps': eps, 'step': step, 'right': int(right.sum()),
            'first_repetition': quantiles(repeats), 'cycle_lengths': {str(k): v for k, v in sorted(lengths.items())},
            'attacks': rows, 'seconds': round(time.monotonic() - started)}


def time_pairs(name: str, x: Tensor, y: Tensor, rounds: int) -> Iterator[dict[str, Any]]:
    """CPU seconds and passes of PGD that makes every step and of one that stops at cycles, in turns."""
    model = AnyBatch(frozen_view(load_bundle(ROOT / 'hub' / 'models' / name)))
    seen: list[int] = []  # the sizes of the batches
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))

    def attack(threat: ThreatModel, stops: bool) -> tuple[float, int, Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(0, 0, 1))
        seen.clear()
        started = time.process_time()
        found = pgd(model, x, y, threat, generator, stop_cycles=stops)
        return time.process_time() - started, sum(seen), found

    attack(ThreatModel(steps=2), True)  # compiles
    for eps, step, steps in TIMED:
        threat = ThreatModel('Linf', eps, step, steps)
        pairs = [(attack(threat, False), attack(threat, True)) for _ in range(rounds)]
        seconds = {key: [round(pair[i][0], 2) for pair in pairs] for i, key in enumerate(('every step', 'to cycles'))}
        ratios = [whole / stopped for whole, stopped in zip(*seconds.values())]
        (_, passes, whole), (_, fewer, stopped) = pairs[0]
        yield {'network': name, 'eps': eps, 'step': step, 'steps': steps, 'images': len(x),
               'passes': round(passes / fewer, 4), 'cpu_seconds': seconds, 'ratio': round(statistics.median(ratios), 4),
               'ratio_min': round(min(ratios), 4), 'ratio_max': round(max(ratios), 4),
               'same_images': int((whole == stopped).flatten(1).all(1).sum())}


def share(values: Tensor) -> float:
    return round(values.double().mean().item(), 4)


def quantiles(values: Tensor) -> dict[str, int]:
    return {name: int(values.double().quantile(q, interpolation='higher'))
            for name, q in (('least', 0.0), ('median', 0.5), ('90 %', 0.9), ('most', 1.0))}


def table(result: dict[str, Any]) -> str:
    """The rows of a result file as Markdown: how many times fewer passes are made."""
    long = [steps for steps in STEPS if steps >= 50]
    lines = ['| network | eps, step | repeated by step 50 | ' + ' | '.join(f'pgd-{steps}' for steps in long) + ' |',
             '|' + '---|' * (len(long) + 3)]
    for row in result['rows']:
        attacks = {attack['steps']: attack for attack in row['attacks']}
        gains = ' | '.join(f'{1 / attacks[steps]["passes"]["until repeated"]:.2f}' for steps in long)
        lines.append(f'| `{row["network"]}` | {row["eps"]}, {row["step"]} | {attacks[50]["repeated"]:.0%} | {gains} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--data-dir', default=os.environ.get('CIFAR10_ROOT'), help='with cifar-10-batches-py')
    parser.add_argument('--images', type=int, default=250, help='the first test images, in one batch (default: 250)')
    parser.add_argument('--seconds', action='store_true', help='time both ways on the network of the package instead')
    parser.add_argument('--rounds', type=int, default=3, help='of --seconds (default: 3)')
    parser.add_argument('--output', type=Path, help='a JSON file')
    args = parser.parse_args()
    data = load_dataset('cifar10', args.data_dir, train=False)
    x, y = to_float(data.images[:args.images]), data.labels[:args.images]
    result: dict[str, Any] = {**environment(), 'images': args.images, 'rows': []}
    rows = time_pairs(NETWORKS[-1], x, y, args.rounds) if args.seconds else (
        measure(name, eps, step, x, y) for name in NETWORKS for eps, step in SETTINGS)
    for row in rows:
        result['rows'].append(row)
        print(json.dumps(row), flush=True)
        if args.output:
            write_json(args.output, result)
    if not args.seconds:
        print(table(result))


if __name__ == '__main__':
    main()
