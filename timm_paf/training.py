"""The state of a training run: one optimizer step, its checkpoints, its metrics, and how it goes on exactly.

Every random number of a step comes from (seed, step, process), so weights, optimizer, step and the sums of the epoch so
far are the whole state of a run.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .activations import paf_parameters
from .attacks import ThreatModel, frozen_view, pgd
from .data import Batches, derive_seed
from .files import read_json, save_torch, sha256, whole_directory, whole_file, write_json
from .objectives import paf_penalty, pgd_at

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    'SCHEDULES', 'NonFiniteLoss', 'Recipe', 'Trainer', 'append_metrics', 'is_complete', 'latest_checkpoint',
    'prepare_output', 'recorded_choice',
]

SCHEDULES: dict[str, Callable[[float], float]] = {
    'cosine': lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    'linear': lambda t: 1 - t,
    'piecewise': lambda t: 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01,
    'constant': lambda t: 1.0,
}
"""Progress in [0, 1] -> share of the learning rate between ``min_lr`` (0) and ``lr`` (1)."""

LOOK_EVERY = {'cpu': 1}
"""Steps between two looks of the host at numbers of the device, by device; 10 where it would have to wait for them."""

CLEAN_EVERY = 10
"""Steps between two counts of clean accuracy, which costs a forward pass of its own."""


class NonFiniteLoss(ArithmeticError):
    """The loss of a step, or its gradient, is nan or inf; the weights are still those before that step."""


@dataclass(frozen=True)
class Recipe:
    """What determines the weights that come out, beside the number of processes."""

    model: str
    dataset: str
    epochs: int
    batch_size: int
    lr: float
    min_lr: float
    momentum: float
    weight_decay: float
    schedule: str
    threat: ThreatModel
    paf_penalty: float
    paf_clip: float
    act_kwargs: dict[str, Any] = field(default_factory=dict)
    mixed_precision: str = 'no'
    compile: bool = False
    channels_last: bool = True
    seed: int = 0
    max_steps: int | None = None

    def record(self) -> dict[str, Any]:
        """For JSON; equal records give equal weights."""
        return {**vars(self), 'threat': self.threat.record()}


class Trainer:
    """A model, its optimizer and how far they are.

    Args:
        recipe: what to do.
        model: the network, not yet prepared.
        batches: the training batches of this process.
        accelerator: prepares model and optimizer, and reduces over processes.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, batches: Batches, accelerator: Accelerator):
        self.recipe, self.batches, self.accelerator = recipe, batches, accelerator
        steps = recipe.epochs * batches.steps_per_epoch
        self.total_steps = min(steps, recipe.max_steps or steps)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.unwrapped = model.to(accelerator.device)
        self.frozen = frozen_view(self.unwrapped)
        # One group: the paper decays every parameter, alpha and beta too. The fused step can be told on the device to
        # leave the weights alone.
        optimizer = torch.optim.SGD(
            self.unwrapped.parameters(), recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay, fused=True)
        self.model, self.optimizer = accelerator.prepare(self.unwrapped, optimizer)
        # Two programs, each for one mode, so that none is made again when the mode changes.
        self._attacked, self._trained = self.frozen, self.model
        if recipe.compile:
            self._attacked, self._trained = cast(nn.Module, torch.compile(self.frozen)), torch.compile(self.model)
        self.pafs = paf_parameters(self.unwrapped)
        self.generator = torch.Generator(accelerator.device)
        self.step, self.seconds = 0, 0.0
        self.sums = self._zero_sums()
        self._trouble = torch.zeros((), dtype=torch.int64, device=accelerator.device)

    def _zero_sums(self) -> dict[str, Tensor]:
        names = ('loss', 'images', 'adv_correct', 'clean_correct', 'clean_images')
        return {name: torch.zeros((), dtype=torch.float64, device=self.accelerator.device) for name in names}

    def _all_sums(self) -> dict[str, Tensor]:
        return {name: self.accelerator.reduce(value.clone(), 'sum') for name, value in self.sums.items()}

    @property
    def epoch(self) -> int:
        """Of the step to come, from 0."""
        return self.step // self.batches.steps_per_epoch

    def learning_rate(self) -> float:
        """Of the step to come."""
        recipe = self.recipe
        share = SCHEDULES[recipe.schedule](self.step / self.total_steps)
        return recipe.min_lr + (recipe.lr - recipe.min_lr) * share

    @property
    def looks(self) -> bool:
        """Whether the host looks at the device's numbers after the step that was just done."""
        return self.step % LOOK_EVERY.get(self.accelerator.device.type, 10) == 0 or self.step == self.total_steps

    def _batch(self) -> tuple[Tensor, Tensor]:
        x0, y = self.batches[self.step]
        return (x0 if self.recipe.channels_last else x0.contiguous()), y

    def _attack(self, x0: Tensor, y: Tensor) -> Tensor:
        # the bare network: a DDP wrapper would all-reduce in every attack step
        with self.accelerator.autocast():
            return pgd(self._attacked, x0, y, self.recipe.threat, self.generator, check=False)

    def train_step(self) -> None:
        """One optimizer step; adds to ``sums``. On a GPU the host does not wait for it.

        Raises:
            NonFiniteLoss: on every process, in this step or where the host looks next; no weight has changed since.
        """
        accelerator = self.accelerator
        seed = derive_seed(self.recipe.seed, 2, self.step, accelerator.process_index)
        torch.manual_seed(seed)  # dropout
        self.generator.manual_seed(seed)
        if accelerator.num_processes > 1:
            # DDP does so at its forward, which comes after the attack: without it each process would attack with
            # BatchNorm statistics of its own, which no checkpoint holds
            for buffer in self.unwrapped.buffers():
                torch.distributed.broadcast(buffer, 0)
        x0, y = self._batch()
        self.model.train()
        loss, counts = pgd_at(self._trained, x0, y, self._attack)
        for group in self.optimizer.param_groups:
            group['lr'] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss + paf_penalty(self.pafs, self.recipe.paf_penalty))
        betas = [p for name, p in self.pafs.items() if name.endswith('beta')]
        if betas and self.recipe.paf_clip > 0:
            accelerator.clip_grad_norm_(betas, self.recipe.paf_clip)
        self._hold_if_not_finite(loss.detach())
        self.optimizer.step()
        self.sums['loss'] += loss.detach() * len(y)
        self.sums['images'] += len(y)
        self.sums['adv_correct'] += counts['adv_correct']
        if self.step % CLEAN_EVERY == 0:
            self._count_clean(x0, y)
        self.step += 1
        if self.looks:
            self.check_finite()

    def _hold_if_not_finite(self, loss: Tensor) -> None:
        """Make this optimizer step and all later ones leave the weights alone if the loss or a gradient is not finite.

        On the device, by the flag that GradScaler uses to tell a fused optimizer to skip a step.
        """
        wrong = [~torch.isfinite(loss)]
        if self.accelerator.scaler is None:  # which lowers its scale and leaves out a step with such a gradient
            grads = [p.grad for p in self.unwrapped.parameters() if p.grad is not None]
            wrong.append(~torch.isfinite(torch.nn.utils.get_total_norm(grads)))
        found = torch.stack(wrong).float()
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, 'sum')
        kind = torch.where(found[0] > 0, 1, torch.where(found[-1] > 0, 2, 0))
        now = torch.where(kind > 0, 4 * self.step + kind, 0)
        self._trouble = torch.where(self._trouble > 0, self._trouble, now)
        if self.accelerator.scaler is None:
            self.optimizer.optimizer.found_inf = (self._trouble > 0).float()

    def check_finite(self) -> None:
        """Raise `NonFiniteLoss` if a step so far was not finite; the host waits for the device."""
        step, kind = divmod(int(self._trouble.item()), 4)
        if kind:
            what = 'loss' if kind == 1 else 'gradient'
            raise NonFiniteLoss(f'step {step} (epoch {step // self.batches.steps_per_epoch}): the {what} is not finite')

    @torch.no_grad()
    def _count_clean(self, x0: Tensor, y: Tensor) -> None:
        with self.accelerator.autocast():
            self.sums['clean_correct'] += (self.frozen(x0).argmax(1) == y).sum()
        self.sums['clean_images'] += len(y)

    def time_attack_step(self) -> dict[str, float]:
        """Seconds of one forward and backward to the input, eager and compiled, and of the compilation."""
        x0, y = self._batch()
        threat = replace(self.recipe.threat, steps=1, random_start=False)

        def seconds(model: nn.Module) -> float:
            started = time.perf_counter()
            with self.accelerator.autocast():
                pgd(model, x0, y, threat)[0, 0, 0, 0].item()  # which waits for the device
            return time.perf_counter() - started

        first = {name: seconds(model) for name, model in (('eager', self.frozen), ('compiled', self._attacked))}
        again = {name: seconds(model) for name, model in (('eager', self.frozen), ('compiled', self._attacked))}
        return {**again, 'compilation': first['compiled'] - again['compiled']}

    def progress(self) -> dict[str, float]:
        """Of this process, since the epoch began: loss, clean and adversarial accuracy."""
        return _means(self.sums)

    def end_epoch(self) -> dict[str, Any]:
        """Means over all processes of the epoch that just ended, and the PAF parameters; starts new sums."""
        self.check_finite()
        sums = self._all_sums()
        self.sums = self._zero_sums()
        pafs = {name: p.item() for name, p in self.pafs.items()}
        return {'epoch': (self.step - 1) // self.batches.steps_per_epoch, 'step': self.step, **_means(sums),
                'lr': self.optimizer.param_groups[0]['lr'], **pafs}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers alone: ``torch.load(weights_only=True)`` reads it back. Every process must ask for it."""
        scaler = self.accelerator.scaler
        return {
            'model': {k: v.contiguous() for k, v in self.unwrapped.state_dict().items()},
            'optimizer': self.optimizer.state_dict(),
            'scaler': scaler.state_dict() if scaler is not None else {},
            'sums': self._all_sums(), 'step': self.step, 'seconds': self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unwrapped.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        # those of all processes, counted once
        share = 1.0 if self.accelerator.is_main_process else 0.0
        self.sums = {k: v.to(self.accelerator.device) * share for k, v in state['sums'].items()}
        self.step, self.seconds = state['step'], state['seconds']

    def save(self, output: Path) -> Path:
        """Write ``checkpoints/step-<n>`` on the main process, whole, and only then drop all but the newest two."""
        self.check_finite()
        path = output / 'checkpoints' / f'step-{self.step:08d}'
        state = self.state_dict()
        if self.accelerator.is_main_process and not path.exists():
            for left in path.parent.glob('.step-*.part'):  # by a run that was killed while it wrote
                shutil.rmtree(left)
            with whole_directory(path) as part:
                save_torch(state, part / 'state.pt')
                write_json(part / 'checkpoint.json', {
                    'step': self.step, 'sha256': sha256(part / 'state.pt'), 'recipe': self.recipe.record(),
                    'processes': self.accelerator.num_processes})
            for old in sorted(path.parent.glob('step-*'))[:-2]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return path

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, exactly.

        Raises:
            FileNotFoundError: if it is no checkpoint.
            ValueError: if it is truncated, tampered with, or of another recipe or number of processes.
        """
        if not path.is_dir():
            raise FileNotFoundError(f'{path} is no checkpoint; expected a directory RUN/checkpoints/step-N')
        about = read_json(path / 'checkpoint.json')
        if not isinstance(about, dict) or not {'sha256', 'recipe', 'processes'} <= about.keys():
            raise ValueError(f'{path}/checkpoint.json is not of train_robust.py; expected sha256, recipe and processes')
        differs = differences(about['recipe'], self.recipe.record())
        if about['processes'] != self.accelerator.num_processes:
            differs.append(f'processes {about["processes"]}, now {self.accelerator.num_processes}')
        if differs:
            raise ValueError(f'{path} is of another run: {"; ".join(differs)}. Use its values, or another --output')
        found = sha256(path / 'state.pt')
        if found != about['sha256']:
            raise ValueError(f'{path}/state.pt is damaged: sha256 {found}, expected {about["sha256"]}; delete {path} '
                             'to go on from the checkpoint before it')
        try:
            self.load_state_dict(torch.load(path / 'state.pt', map_location='cpu', weights_only=True))
        except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            reason = ' '.join(str(error).split())[:200]
            raise ValueError(f'{path}/state.pt is not of train_robust.py: {reason}') from error


def _means(sums: dict[str, Tensor]) -> dict[str, float]:
    value = {name: total.item() for name, total in sums.items()}
    images, clean = max(value['images'], 1), max(value['clean_images'], 1)
    return {'loss': value['loss'] / images, 'clean_accuracy': value['clean_correct'] / clean,
            'adv_accuracy': value['adv_correct'] / images}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Where two recipes differ, as 'key found, now expected'."""
    found, expected = json.loads(json.dumps(found)), json.loads(json.dumps(expected))
    return [f'{key} {found.get(key)}, now {expected.get(key)}' for key in sorted(found.keys() | expected.keys())
            if found.get(key) != expected.get(key)]


def latest_checkpoint(output: Path) -> Path | None:
    """The newest ``checkpoints/step-*`` of a run directory."""
    return max((output / 'checkpoints').glob('step-*'), default=None)


def recorded_choice(output: Path, name: str) -> Any:
    """What the run in ``output`` has for an entry of its recipe, None without a run or such an entry."""
    run = read_json(output / 'run.json') if (output / 'run.json').is_file() else None
    recipe = run.get('recipe') if isinstance(run, dict) else None
    return recipe.get(name) if isinstance(recipe, dict) else None


def prepare_output(output: Path, recipe: Recipe, resume: str) -> Path | None:
    """Which checkpoint a run goes on from, None to start; refuses a directory that holds anything else.

    Args:
        output: the run directory; need not exist.
        recipe: what will be run.
        resume: 'auto' (the newest checkpoint in ``output`` if there is one), 'never', or a checkpoint.

    Raises:
        FileExistsError: if ``output`` holds another run or other files, any run with 'never', or a later checkpoint.
        FileNotFoundError: if the checkpoint to resume from is not there.
    """
    given = None if resume in ('auto', 'never') else Path(resume)
    if given is not None and not given.is_dir():
        raise FileNotFoundError(f'--resume {given} is not there; expected auto, never or RUN/checkpoints/step-N')
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / 'run.json').is_file():
            raise FileExistsError(f'{output} holds files but no run.json; expected a new directory or that of a run')
        if resume == 'never':
            raise FileExistsError(f'{output} holds a run; expected a new --output with --resume never')
        run = read_json(output / 'run.json')
        if not isinstance(run, dict) or not isinstance(run.get('recipe'), dict):
            raise FileExistsError(f'{output}/run.json is not of train_robust.py; choose another --output')
        differs = differences(run['recipe'], recipe.record())
        if differs:
            raise FileExistsError(f'{output} holds another run: {"; ".join(differs)}; choose another --output')
    newest = latest_checkpoint(output)
    if given is not None and newest is not None and newest.name > given.name:
        raise FileExistsError(f'{output} holds {newest.name}, later than --resume {given}; choose another --output')
    return given or newest


def is_complete(output: Path) -> bool:
    """Whether a run directory holds a finished run and its weights."""
    return ((output / 'run.json').is_file() and (output / 'model.safetensors').is_file()
            and read_json(output / 'run.json')['status'] == 'complete')


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    """Add a line to metrics.jsonl, after dropping those of this step or later (they will come again)."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)['step'] < row['step']]
    with whole_file(path) as part:
        part.write_text('\n'.join([*kept, json.dumps(row)]) + '\n')
