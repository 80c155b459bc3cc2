"""The state of a training run: one optimizer step, its checkpoints, its metrics, and how it goes on exactly.

Every random number of a step comes from (seed, step, process), so weights, optimizer, step and the sums of the epoch so
far are the whole state of a run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .activations import paf_parameters
from .attacks import ThreatModel, frozen_view, pgd
from .data import Batches, ImageSet, cutmix, derive_seed, to_float
from .folders import FolderBatches
from .objectives import OBJECTIVES, awp, has_overfitted, paf_penalty
from .optimization import SCHEDULES, create_optimizer
from .run_directory import read_checkpoint, write_checkpoint
from .sharding import gather, refresh, scatter_like, shard

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['NonFiniteLoss', 'Recipe', 'Trainer']

LOOK_EVERY = {'cpu': 1}
"""Steps between two looks of the host at numbers of the device, by device; 10 where it would have to wait for them."""

VALIDATION_STEPS = 20
"""Of the attack on held-out images: the margin loss, without a random start, with steps of eps / 8."""

CHECKED_IMAGES = 256
"""Training images on which a one-step training is looked at with PGD after every epoch."""

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
    act: str | None = None
    act_share: str | None = None
    objective: str = 'pgd-at'
    robust_weight: float = 6.0
    awp: float = 0.0
    label_smoothing: float = 0.0
    cutmix: float = 0.0
    attack_bn: str = 'eval'
    synthetic: dict[str, Any] | None = None
    image_size: int = 224
    optimizer: str = 'sgd'
    paf_lr: float | None = None
    paf_weight_decay: float | None = None
    warmup_epochs: float = 0.0
    eps_warmup_epochs: float = 0.0
    clean_ratio: float = 0.0
    accumulate: int = 1
    clip_grad: float = 0.0
    ema: float = 0.0
    val: int = 0
    patience: int = 0
    mixed_precision: str = 'no'
    compile: bool = False
    grad_checkpointing: bool = False
    channels_last: bool = True
    fsdp: bool = False
    sync_bn: bool = False
    seed: int = 0
    max_steps: int | None = None

    def record(self) -> dict[str, Any]:
        """For JSON; equal records give equal weights."""
        return {**vars(self), 'threat': self.threat.record()}


class Trainer:
    """A model, its optimizer, its average, and how far they are.

    Args:
        recipe: what to do.
        model: the network, not yet prepared.
        batches: the training batches of this process.
        accelerator: prepares model and optimizer, and reduces over processes.
        validation: held-out images that the best weights are chosen by.
        keep: number of checkpoints that stay.
    """

    def __init__(
            self, recipe: Recipe, model: nn.Module, batches: Batches | FolderBatches, accelerator: Accelerator,
            validation: ImageSet | None = None, keep: int = 2):
        self.recipe, self.batches, self.accelerator = recipe, batches, accelerator
        self.validation, self.keep = validation, keep
        if recipe.batch_size // accelerator.num_processes % recipe.accumulate:
            raise ValueError(f'accumulate is {recipe.accumulate}; expected a divisor of the '
                             f'{recipe.batch_size // accelerator.num_processes} images of a process')
        steps = recipe.epochs * batches.steps_per_epoch
        self.total_steps = min(steps, recipe.max_steps or steps)
        if recipe.sync_bn:
            model = convert_sync_batchnorm(model)
        if recipe.channels_last and not recipe.fsdp:  # which takes contiguous weights alone; the images still are
            model = model.to(memory_format=torch.channels_last)
        self.unwrapped = model.to(accelerator.device)
        self.frozen = frozen_view(self.unwrapped)
        self.ema = ModelEmaV3(self.unwrapped, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        # It is on its device: placed again, its parameters would leave the memory that the frozen view shares, because
        # accelerate calls the CPU of several processes cpu:0, to which torch copies what is on cpu. FSDP wants no DDP.
        self.model = accelerator.prepare_model(self.unwrapped, device_placement=False, evaluation_mode=recipe.fsdp)
        if recipe.fsdp:
            self.parameters = shard(self.unwrapped, accelerator.device)
        else:
            self.parameters = dict(self.unwrapped.named_parameters())
        optimizer = create_optimizer(recipe, self.unwrapped)
        self._holds = bool(optimizer.defaults.get('fused'))
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        if recipe.fsdp:
            refresh(self.unwrapped)
            whole = dict(self.unwrapped.named_parameters())
            for name, p in self.frozen.named_parameters():
                p.data = whole[name].data
        # Two programs, each for one mode, so that none is made again when the mode changes.
        self._attacked, self._trained = self.frozen, self.model
        self._averaged = None if self.ema is None else frozen_view(self.ema.module)
        if recipe.compile:
            self._attacked, self._trained = cast(nn.Module, torch.compile(self.frozen)), torch.compile(self.model)
            if self._averaged is not None:
                self._averaged = cast(nn.Module, torch.compile(self._averaged))
        self.pafs = paf_parameters(self.unwrapped)
        self.generator = torch.Generator(accelerator.device)
        self.step, self.seconds = 0, 0.0
        self.sums = self._zero_sums()
        self.best = {'accuracy': -1.0, 'epoch': -1.0}
        self.best_weights: dict[str, Tensor] = {}
        self.history: list[tuple[float, float]] = []  # of one-step training: accuracy under its attack, and under PGD
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
        warmup = round(recipe.warmup_epochs * self.batches.steps_per_epoch)
        if self.step < warmup:
            return recipe.lr * (self.step + 1) / warmup
        share = SCHEDULES[recipe.schedule]((self.step - warmup) / max(self.total_steps - warmup, 1))
        return recipe.min_lr + (recipe.lr - recipe.min_lr) * share

    def threat(self) -> ThreatModel:
        """Of the step to come: eps and step grow in proportion during the warm-up of eps."""
        threat = self.recipe.threat
        warmup = round(self.recipe.eps_warmup_epochs * self.batches.steps_per_epoch)
        if self.step >= warmup:
            return threat
        assert threat.step is not None
        share = Fraction(self.step + 1, warmup)
        return replace(threat, eps=threat.eps * share, step=threat.step * share)

    @property
    def looks(self) -> bool:
        """Whether the host looks at the device's numbers after the step that was just done."""
        return self.step % LOOK_EVERY.get(self.accelerator.device.type, 10) == 0 or self.step == self.total_steps

    def _batch(self) -> tuple[Tensor, Tensor]:
        x0, y = self.batches[self.step]
        if self.recipe.synthetic:  # which come after the real ones, and no part of a batch should be of one kind
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(
                derive_seed(self.recipe.seed, 7, self.step)))
            order = (order.pin_memory() if x0.is_cuda else order).to(x0.device, non_blocking=True)
            x0, y = x0[order], y[order]
        if self.recipe.cutmix:
            generator = torch.Generator().manual_seed(
                derive_seed(self.recipe.seed, 6, self.step, self.accelerator.process_index))
            x0, y = cutmix(x0, y, self.batches.data.num_classes, self.recipe.cutmix, generator)
        return (x0 if self.recipe.channels_last else x0.contiguous()), y

    def _attack(self, x0: Tensor, y: Tensor, loss: str = 'ce') -> Tensor:
        # the bare network: a DDP wrapper would all-reduce in every attack step
        with self.accelerator.autocast():
            x = pgd(self._attacked, x0, y, self.threat(), self.generator, loss=loss, bn=self.recipe.attack_bn,
                    check=False)
        clean = round(self.recipe.clean_ratio * len(x0))
        return torch.cat([x0[:clean], x[clean:]]) if clean else x

    def train_step(self) -> None:
        """One optimizer step; adds to ``sums``. On a GPU the host does not wait for it.

        Raises:
            NonFiniteLoss: on every process, in this step or where the host looks next; no weight has changed since. (In
                fp16 GradScaler leaves out the steps whose gradient is not finite, and only a loss is an error.)
        """
        accelerator, recipe = self.accelerator, self.recipe
        seed = derive_seed(recipe.seed, 2, self.step, accelerator.process_index)
        torch.manual_seed(seed)  # dropout
        self.generator.manual_seed(seed)
        x0, y = self._batch()
        self.model.train()
        for group in self.optimizer.param_groups:
            group['lr'] = self.learning_rate() * group.get('lr_scale', 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=accelerator.device)
        parts = list(zip(x0.chunk(recipe.accumulate), y.chunk(recipe.accumulate)))
        for index, (x_part, y_part) in enumerate(parts):
            # the penalty does not depend on the images: once
            penalty = paf_penalty(self.pafs, recipe.paf_penalty) if index == 0 else 0.0
            with contextlib.ExitStack() as stack:
                if index + 1 < len(parts):
                    stack.enter_context(accelerator.no_sync(self.model))
                attack = self._perturb_weights(stack, x_part, y_part) if recipe.awp else self._attack
                loss, counts = self._objective(self._trained, x_part, y_part, attack)
                loss = loss * (len(y_part) / len(y))
                accelerator.backward(loss + penalty)
            total += loss.detach()
            self.sums['adv_correct'] += counts['adv_correct']
            if 'clean_correct' in counts:
                self.sums['clean_correct'] += counts['clean_correct']
                self.sums['clean_images'] += len(y_part)
        if 'clean_correct' not in counts and self.step % self.batches.steps_per_epoch % CLEAN_EVERY == 0:
            self._count_clean(x0, y)
        accelerator.unscale_gradients()
        betas = [self.parameters[name] for name in self.pafs if name.endswith('beta')]
        if betas and recipe.paf_clip > 0:
            nn.utils.clip_grad_norm_(betas, recipe.paf_clip)
        if recipe.clip_grad > 0:
            nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip_grad)
        self._hold_if_not_finite(total)
        self.optimizer.step()
        if recipe.fsdp:
            refresh(self.unwrapped)
        if accelerator.num_processes > 1:
            # DDP does so at its next forward, which comes after the attack and the average: without it each process
            # would have BatchNorm statistics of its own there, which no checkpoint holds
            for buffer in self.unwrapped.buffers():
                torch.distributed.broadcast(buffer, 0)
        self.sums['loss'] += total * len(y)
        self.sums['images'] += len(y)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.frozen, step=self.step)
        if self.looks:
            self.check_finite()

    def _objective(
            self, model: nn.Module, x0: Tensor, y: Tensor, attack: Callable[..., Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        recipe = self.recipe
        return OBJECTIVES[recipe.objective](
            model, x0, y, attack, beta=recipe.robust_weight, label_smoothing=recipe.label_smoothing)

    def _perturb_weights(self, stack: contextlib.ExitStack, x0: Tensor, y: Tensor) -> Callable[..., Tensor]:
        """Enter AWP for these images; returns the attack that was made on the weights before."""
        made: list[Tensor] = []

        def attack(x0: Tensor, y: Tensor, loss: str = 'ce') -> Tensor:
            if not made:
                made.append(self._attack(x0, y, loss))
            return made[0]

        bare = self._trained if self.accelerator.num_processes == 1 else self.unwrapped
        stack.enter_context(awp(self.unwrapped, lambda: self._objective(bare, x0, y, attack)[0], self.recipe.awp))
        return attack

    def _hold_if_not_finite(self, loss: Tensor) -> None:
        """Make this optimizer step and all later ones leave the weights alone if the loss or a gradient is not finite.

        On the device, by the flag that GradScaler uses to tell a fused optimizer to skip a step; with an optimizer
        that does not know it, the host looks and raises.
        """
        wrong = [~torch.isfinite(loss)]
        if self.accelerator.scaler is None:  # which lowers its scale and leaves out a step with such a gradient
            grads = [p.grad for p in self.parameters.values() if p.grad is not None]
            wrong.append(~torch.isfinite(gather(torch.nn.utils.get_total_norm(grads))))
        found = torch.stack(wrong).float()
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, 'sum')
        kind = torch.where(found[0] > 0, 1, torch.where(found[-1] > 0, 2, 0))
        now = torch.where(kind > 0, 4 * self.step + kind, 0)
        self._trouble = torch.where(self._trouble > 0, self._trouble, now)
        if not self._holds or self.accelerator.scaler is not None:  # which has a flag of its own, for this step alone
            self.check_finite()
        elif self.accelerator.scaler is None:
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
            labels = y.argmax(1) if y.ndim == 2 else y  # of mixed images that of the larger part
            self.sums['clean_correct'] += (self.frozen(x0).argmax(1) == labels).sum()
        self.sums['clean_images'] += len(y)

    def time_attack_step(self) -> dict[str, float]:
        """Seconds of one forward and backward to the input, eager and compiled, and of the compilation."""
        x0, y = (part.chunk(self.recipe.accumulate)[0] for part in self._batch())
        threat = replace(self.recipe.threat, steps=1, random_start=False)

        def seconds(model: nn.Module) -> float:
            started = time.perf_counter()
            with self.accelerator.autocast():
                x = pgd(model, x0, y, threat, bn=self.recipe.attack_bn, check=False)
            x[0, 0, 0, 0].item()  # which waits for the device
            return time.perf_counter() - started

        kept = [(b, b.clone()) for b in self.frozen.buffers()]  # which --attack-bn train changes
        first = {name: seconds(model) for name, model in (('eager', self.frozen), ('compiled', self._attacked))}
        again = {name: seconds(model) for name, model in (('eager', self.frozen), ('compiled', self._attacked))}
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        return {**again, 'compilation': first['compiled'] - again['compiled']}

    def progress(self) -> dict[str, float]:
        """Of this process, since the epoch began: loss, clean and adversarial accuracy."""
        return _means(self.sums)

    def end_epoch(self) -> dict[str, Any]:
        """Means over all processes of the epoch that just ended, the PAF parameters, and accuracies on the held-out
        images; starts new sums."""
        self.check_finite()
        sums = self._all_sums()
        self.sums = self._zero_sums()
        epoch = (self.step - 1) // self.batches.steps_per_epoch
        row = {'epoch': epoch, 'step': self.step, **_means(sums), 'lr': self.optimizer.param_groups[0]['lr'],
               **{name: p.mean().item() for name, p in self.pafs.items()}}
        if self.validation is not None:
            row |= self._validate('val', self._attacked, self.validation)
            if self._averaged is not None:
                row |= self._validate('ema_val', self._averaged, self.validation)
            accuracy = row['val_adv_accuracy' if self.ema is None else 'ema_val_adv_accuracy']
            if accuracy > self.best['accuracy']:
                self.best = {'accuracy': accuracy, 'epoch': float(epoch)}
                self.best_weights = self.weights()
            row['best_epoch'] = int(self.best['epoch'])
        if self.recipe.objective == 'fgsm-rs':
            data = self.batches.data
            assert isinstance(data, ImageSet), 'the program refuses folders with it'
            some = replace(data, images=data.images[:CHECKED_IMAGES], labels=data.labels[:CHECKED_IMAGES])
            row |= self._validate('pgd', self._attacked, some)
            self.history.append((row['adv_accuracy'], row['pgd_adv_accuracy']))
            row['catastrophic_overfitting'] = has_overfitted(self.history)
        return row

    def _validate(self, name: str, model: nn.Module, data: ImageSet) -> dict[str, float]:
        """Clean and adversarial accuracy, on images that the processes share out.

        The attack is another than that of training: the margin loss, more and smaller steps.
        """
        accelerator = self.accelerator
        threat = self.recipe.threat
        threat = replace(threat, step=threat.eps / 8, steps=VALIDATION_STEPS, random_start=False)
        # of the size that the programs are compiled for, the last one filled up with images that do not count
        size = self.recipe.batch_size // accelerator.num_processes // self.recipe.accumulate
        counts = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        mine = torch.arange(accelerator.process_index, len(data), accelerator.num_processes)
        for chosen in torch.split(mine, size):
            if not len(chosen):  # fewer images than processes
                continue
            filled = torch.cat([chosen, chosen[:1].expand(size - len(chosen))])
            x0 = to_float(data.images[filled].to(accelerator.device))
            x0 = x0 if self.recipe.channels_last else x0.contiguous()
            y = data.labels[filled].to(accelerator.device)
            with accelerator.autocast():
                x = pgd(model, x0, y, threat, loss='cw', check=False)
                for index, images in enumerate((x0, x)):
                    right = model(images.requires_grad_()).argmax(1) == y  # with a gradient: the program of the attack
                    counts[index] += right[:len(chosen)].sum()
        clean, adversarial = (accelerator.reduce(counts, 'sum') / len(data)).tolist()
        return {f'{name}_clean_accuracy': clean, f'{name}_adv_accuracy': adversarial}

    @property
    def out_of_patience(self) -> bool:
        """Whether that many epochs ended without a better one."""
        ended = self.step // self.batches.steps_per_epoch
        return bool(self.recipe.patience) and ended - 1 - self.best['epoch'] >= self.recipe.patience

    def weights(self) -> dict[str, Tensor]:
        """Those of the average if there is one, else of the model; contiguous and on the CPU."""
        model = self.frozen if self.ema is None else self.ema.module
        return {name: value.to('cpu', copy=True, memory_format=torch.contiguous_format)
                for name, value in model.state_dict().items()}

    def result(self) -> dict[str, Tensor]:
        """The weights of the best epoch on the held-out images; without those, of the last."""
        return self.best_weights or self.weights()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers alone: ``torch.load(weights_only=True)`` reads it back. Every process must ask for it."""
        scaler = self.accelerator.scaler
        return {
            'model': {k: v.contiguous() for k, v in self.frozen.state_dict().items()},
            'optimizer': torch.utils._pytree.tree_map(
                lambda v: gather(v) if isinstance(v, Tensor) else v, self.optimizer.state_dict()),
            'scaler': scaler.state_dict() if scaler is not None else {},
            'ema': {k: v.contiguous() for k, v in self.ema.module.state_dict().items()} if self.ema else {},
            'sums': self._all_sums(), 'step': self.step, 'seconds': self.seconds, 'best': self.best,
            'history': self.history, 'best_weights': self.best_weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.frozen.load_state_dict(state['model'])  # the same memory
        if self.recipe.fsdp:
            with torch.no_grad():
                for name, p in self.frozen.named_parameters():
                    self.parameters[name].copy_(scatter_like(p, self.parameters[name]))
        if self.ema is not None:
            self.ema.module.load_state_dict(state['ema'] or state['model'])  # the run went on with an average anyway
        self.optimizer.load_state_dict(state['optimizer'])
        for p, values in self.optimizer.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == p.shape:  # the fused step wants the layout of p
                    values[name] = scatter_like(value, p)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        # those of all processes, counted once
        share = 1.0 if self.accelerator.is_main_process else 0.0
        self.sums = {k: v.to(self.accelerator.device) * share for k, v in state['sums'].items()}
        self.step, self.seconds, self.best = state['step'], state['seconds'], state['best']
        self.history, self.best_weights = list(state['history']), state['best_weights']

    def save(self, output: Path) -> Path:
        """Write ``checkpoints/step-<n>`` on the main process, whole, and only then drop all but the newest.

        Raises:
            NonFiniteLoss: instead of writing what a bad step left.
        """
        self.check_finite()
        path = output / 'checkpoints' / f'step-{self.step:08d}'
        state = self.state_dict()
        if self.accelerator.is_main_process:
            write_checkpoint(output, self.step, state, self.recipe.record(), self.accelerator.num_processes, self.keep)
        self.accelerator.wait_for_everyone()
        return path

    def resume(self, path: Path, anyway: Callable[[str], None] | None = None) -> None:
        """Go on from a checkpoint, exactly; see `run_directory.read_checkpoint`.

        Raises:
            FileNotFoundError, ValueError: if it is no checkpoint, damaged, or of another recipe or number of processes.
        """
        state = read_checkpoint(path, self.recipe.record(), self.accelerator.num_processes, anyway)
        try:
            self.load_state_dict(state)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = ' '.join(str(error).split())[:200]
            raise ValueError(f'{path}/state.pt is not of this network: {reason}') from error


def _means(sums: dict[str, Tensor]) -> dict[str, float]:
    value = {name: total.item() for name, total in sums.items()}
    images, clean = max(value['images'], 1), max(value['clean_images'], 1)
    return {'loss': value['loss'] / images, 'clean_accuracy': value['clean_correct'] / clean,
            'adv_accuracy': value['adv_correct'] / images}
