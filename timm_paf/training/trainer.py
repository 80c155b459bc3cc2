"""The trainer of a run: its optimizer step, its checkpoints, its metrics, and its exact resume.

Every random number of a step comes from (seed, step, process), so weights, optimizer, step and the sums of the epoch so
far are the whole state of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..activations import paf_parameters
from ..attacks import ThreatModel, check_box, frozen_view, n_fgsm, pgd
from ..data import ImageSet, RandomAccess, derive_seed, training_batch
from ..objectives import ONE_STEP, has_overfitted
from ..wording import reason_of
from .agreement import check_agreement
from .averaging import WeightAverage
from .gradients import BatchGradients
from .metrics import all_sums, curvatures, means, resumed_sums, zero_sums
from .network import adapt_network, runner
from .nonfinite import NonFiniteGuard
from .optimization import clip_gradients, create_optimizer, learning_rate, momentum, warmed_up_threat
from .recipe import Recipe
from .run_directory import read_checkpoint, write_checkpoint
from .sharding import gather, load_optimizer, load_shards, refresh, shard, view_whole
from .validation import Between, Selection, accuracies, checked_images

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['Trainer']

SYNC_EVERY = {'cpu': 1}
"""Steps between two looks of the host at numbers of the device, by device; 10 where the host would wait for them."""

CLEAN_EVERY = 10
"""Steps between two counts of clean accuracy, which costs a forward pass of its own."""


class Trainer:
    """A training run in progress: a model, its optimizer, its average, and the number of steps done.

    hub/recipes/README.md shows a loop of one's own; `hub.evaluate` and `hub.bundle` take the run that it writes.

    Args:
        recipe: the recipe of the run.
        model: the network, not yet prepared by ``accelerator``: images in [0, 1] to logits.
        batches: the training batches of this process, a `Batches` or `IndexedBatches`.
        accelerator: prepares model and optimizer, and reduces over processes.
        validation: held-out images that the best weights are chosen by; None keeps the last weights.
        keep: number of checkpoints that stay on the disk.

    Attributes:
        step: number of optimizer steps done.
        in_epoch: whether there were steps since the last `end_epoch`.
        total_steps: number of optimizer steps of the whole run.
        frozen: the network for attacks, in eval mode, always up to date.
        attacked, trained, averaged: the frozen network, the network and its average as they are run: compiled or not.
        gradients: adds the gradients of a batch.
        metric_sums: sums of this process over the epoch so far.
        facts: entries of run.json beside the recipe, which each checkpoint keeps.

    Raises:
        ValueError: if a batch can't be divided into its parts or pairs, if one of the arguments is not what the recipe
            says, for an optimizer that is unknown, for CUDA graphs of several processes, or if clean and adversarial
            images go in forward passes of their own and DDP would broadcast buffers between these.
    """

    def __init__(
            self, recipe: Recipe, model: nn.Module, batches: RandomAccess, accelerator: Accelerator,
            validation: ImageSet | None = None, keep: int = 2):
        self.recipe, self.batches, self.accelerator = recipe, batches, accelerator
        self.validation, self.keep = validation, keep
        model = getattr(model, '_orig_mod', model)  # of torch.compile, which the recipe asks for
        check_agreement(recipe, model, batches, accelerator, validation)
        self.total_steps = recipe.total_steps(batches.steps_per_epoch)
        model, norms = adapt_network(recipe, model)
        self.frozen_norms = nn.ModuleList(norms)
        self.unwrapped = model.to(accelerator.device)
        self.frozen = frozen_view(self.unwrapped)
        self.ema = WeightAverage(recipe, self.unwrapped, batches.steps_per_epoch, self.total_steps) if (
            recipe.ema or recipe.swa) else None
        # The model is on its device already. Placed again, its parameters would leave the memory that the frozen view
        # shares: accelerate calls the CPU of several processes cpu:0, and torch copies what is on cpu to cpu:0. FSDP
        # wants no DDP.
        self.model = accelerator.prepare_model(self.unwrapped, device_placement=False, evaluation_mode=recipe.fsdp)
        if recipe.separate_forwards and getattr(self.model, 'broadcast_buffers', False):
            raise ValueError('separate_forwards with several processes needs an Accelerator with kwargs_handlers='
                             '[DistributedDataParallelKwargs(broadcast_buffers=False)]')
        self.parameters = shard(self.unwrapped, accelerator.device) if recipe.fsdp else dict(
            self.unwrapped.named_parameters())
        self.optimizer = accelerator.prepare_optimizer(create_optimizer(recipe, self.unwrapped))
        if recipe.fsdp:
            refresh(self.unwrapped)
            view_whole(self.frozen, self.unwrapped)
        as_run = runner(recipe, batches.last_size == recipe.batch_size, accelerator.num_processes)
        self.attacked, self.trained = as_run(self.frozen), as_run(self.model)
        self.averaged = None if self.ema is None else as_run(frozen_view(self.ema.module))
        self.pafs = paf_parameters(self.unwrapped)
        self.generator = torch.Generator(accelerator.device)
        self.guard = NonFiniteGuard(accelerator, self.optimizer, self.parameters)
        self.step, self.in_epoch, self.seconds, self.facts = 0, False, 0.0, dict[str, Any]()
        self.metric_sums = zero_sums(accelerator.device)
        self.gradients = BatchGradients(
            recipe, accelerator, self.unwrapped, self.model, self.trained, self.pafs,
            lambda *args, **kwargs: self.attack(*args, **kwargs))
        self.selection, self.has_begun = Selection(), False
        self.history: list[tuple[float, float]] = []  # one-step training's accuracy under its attack, and under PGD

    @property
    def epoch(self) -> int:
        """The epoch of the coming step, from 0."""
        return self.step // self.batches.steps_per_epoch

    def learning_rate(self) -> float:
        """Returns the learning rate of the coming step."""
        return learning_rate(self.recipe, self.step, self.batches.steps_per_epoch, self.total_steps)

    def threat(self) -> ThreatModel:
        """Returns the threat model of the coming step, during the warm-up of eps a smaller one."""
        return warmed_up_threat(self.recipe, self.step, self.batches.steps_per_epoch)

    @property
    def should_sync(self) -> bool:
        """Returns whether the host looks at the device's numbers after the step that was just done."""
        return self.step % SYNC_EVERY.get(self.accelerator.device.type, 10) == 0 or self.step == self.total_steps

    @property
    def out_of_patience(self) -> bool:
        """Returns whether as many epochs as the recipe's patience ended without a better one."""
        return self.epoch >= self.recipe.swa and self.selection.out_of_patience(self.recipe.patience, self.epoch)

    @property
    def at_epoch_end(self) -> bool:
        """Returns whether an epoch has ended and `end_epoch` is to come, also after `resume`."""
        return self.in_epoch and (self.step % self.batches.steps_per_epoch == 0 or self.step == self.total_steps)

    @property
    def done(self) -> bool:
        """Returns whether the run is at its end: its steps or its patience, and the last `end_epoch`."""
        return not self.at_epoch_end and (self.step >= self.total_steps or self.out_of_patience)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Returns images and labels of the coming step, as `data.training_batch` describes them."""
        x0, y = training_batch(
            self.batches, self.step, self.recipe.seed, self.accelerator.process_index,
            shuffle=bool(self.recipe.synthetic), alpha=self.recipe.cutmix, mixup_alpha=self.recipe.mixup)
        return (x0 if self.recipe.channels_last else x0.contiguous()), y

    def attack(self, x0: Tensor, y: Tensor, loss: str = 'ce') -> Tensor:
        """Returns adversarial images of the coming step, the first of them clean where the recipe says so."""
        # The attack takes the bare network, because a DDP wrapper would all-reduce in every attack step.
        with self.accelerator.autocast():
            if self.recipe.objective == 'n-fgsm':
                x = n_fgsm(self.attacked, x0, y, self.threat(), self.generator, bn=self.recipe.attack_bn,
                           label_smoothing=self.recipe.label_smoothing, check=False)
            else:
                x = pgd(self.attacked, x0, y, self.threat(), self.generator, loss=loss, bn=self.recipe.attack_bn,
                        start=self.recipe.attack_start, check=False)
        clean = round(self.recipe.clean_ratio * len(x0))
        return torch.cat([x0[:clean], x[clean:]]) if clean else x

    def train_step(self) -> None:
        """Does one optimizer step and adds to ``metric_sums``. On a GPU the host does not wait for it.

        Raises:
            ValueError: after the last step.
            NonFiniteLoss: on every process, here or where the host looks next; no weight has changed since. (In fp16
                GradScaler skips steps with a gradient that is not finite, and only a loss is an error.)
        """
        accelerator, recipe = self.accelerator, self.recipe
        if self.step >= self.total_steps:
            raise ValueError(f'the run ended after {self.total_steps} steps; expected no more, or a longer recipe')
        if recipe.cuda_graphs:  # nothing of the step before is in use
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        seed = derive_seed(recipe.seed, 2, self.step, accelerator.process_index)
        torch.manual_seed(seed)  # for dropout
        self.generator.manual_seed(seed)
        x0, y = self.batch()
        if not self.has_begun:
            check_box(x0)
            self.has_begun = True
        self.model.train()
        self.frozen_norms.eval()
        for group in self.optimizer.param_groups:
            group['lr'] = self.learning_rate() * group.get('lr_scale', 1.0)
            if recipe.momentum_cycle is not None:
                group['momentum'] = momentum(recipe, self.step, self.batches.steps_per_epoch, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        if recipe.clean_pass == 'before':
            self.gradients.show_clean(x0, y, self.metric_sums)
        perturbs = recipe.awp > 0 and self.step >= round(recipe.awp_warmup_epochs * self.batches.steps_per_epoch)
        loss, counted = self.gradients.add(x0, y, self.metric_sums, perturbs)
        if not counted and self.step % self.batches.steps_per_epoch % CLEAN_EVERY == 0:
            self.gradients.count_clean(self.frozen, x0, y, self.metric_sums)
        accelerator.unscale_gradients()
        clip_gradients(recipe, self.parameters, self.pafs)
        self.guard.skip_if_nonfinite(loss, self.step, self.batches.steps_per_epoch)
        self.optimizer.step()
        if recipe.fsdp:
            refresh(self.unwrapped)
        if recipe.clean_pass == 'after':
            self.gradients.show_clean(x0, y, self.metric_sums)
        if accelerator.num_processes > 1:
            # DDP broadcasts buffers at its next forward pass, which comes after the attack and the average. Without
            # this broadcast each process would have BatchNorm statistics of its own there, which no checkpoint holds.
            for buffer in self.unwrapped.buffers():
                torch.distributed.broadcast(buffer, 0)
        self.metric_sums['loss'] += loss * len(y)
        self.metric_sums['images'] += len(y)
        self.step, self.in_epoch = self.step + 1, True
        if self.ema is not None:
            self.ema.update(self.frozen, step=self.step)
        if self.should_sync:
            self.check_finite()

    def check_finite(self) -> None:
        """Raises `NonFiniteLoss` if a step so far was not finite; the host waits for the device."""
        self.guard.check(self.batches.steps_per_epoch)

    def progress(self) -> dict[str, float]:
        """Returns loss, clean and adversarial accuracy of this process since the epoch began."""
        return means(self.metric_sums)

    def end_epoch(self, between: Between | None = None) -> dict[str, Any]:
        """Closes the epoch that just ended and starts new sums.

        Args:
            between: function that is called before each batch of the measurements under attack. If it raises, the epoch
                stays as it was, to be ended later or by a resumed run.

        Returns:
            A line of metrics.jsonl: means over all processes, the PAF parameters and curvatures, and accuracies on the
            held-out images.
        """
        self.check_finite()
        held_out, checked = self._measure(between)
        sums = all_sums(self.metric_sums, self.accelerator)
        self.metric_sums, self.in_epoch = zero_sums(self.accelerator.device), False
        self.gradients.end_epoch()
        epoch = (self.step - 1) // self.batches.steps_per_epoch
        row = {'epoch': epoch, 'step': self.step, **means(sums), 'lr': learning_rate(
            self.recipe, self.step - 1, self.batches.steps_per_epoch, self.total_steps),
               **{name: p.mean().item() for name, p in self.pafs.items()}, **curvatures(self.frozen), **held_out}
        if held_out:
            accuracy = row['val_adv_accuracy' if self.ema is None else 'ema_val_adv_accuracy']
            if epoch + 1 >= self.recipe.swa:  # before, there is no average
                self.selection.consider(accuracy, epoch, self.weights)
            row['best_epoch'] = int(self.selection.best['epoch'])
        if checked:
            row |= checked
            self.history.append((row['adv_accuracy'], row['pgd_adv_accuracy']))
            row['catastrophic_overfitting'] = has_overfitted(self.history)
        return row

    def _measure(self, between: Between | None) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the accuracies on held-out images, and those of a one-step training under PGD; {} without such."""
        held_out: dict[str, float] = {}
        checked: dict[str, float] = {}
        if self.validation is not None:
            for name, network in (('val', self.attacked), ('ema_val', self.averaged)):
                if network is not None:
                    held_out |= accuracies(name, network, self.validation, self.recipe, self.accelerator,
                                           self.recipe.val_attack, between)
        if self.recipe.objective in ONE_STEP:
            checked = accuracies('pgd', self.attacked, checked_images(self.batches.data), self.recipe,
                                 self.accelerator, between=between)
        return held_out, checked

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights of the average if there is one, else of the model; contiguous and on the CPU."""
        model = self.frozen if self.ema is None else self.ema.module
        return {name: value.to('cpu', copy=True, memory_format=torch.contiguous_format)
                for name, value in model.state_dict().items()}

    def result(self) -> dict[str, Tensor]:
        """Returns the weights of the best epoch on the held-out images; without held-out images, of the last epoch."""
        return self.selection.weights or self.weights()

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors and numbers alone, for ``torch.load(weights_only=True)``. Every process must call it."""
        scaler = self.accelerator.scaler
        return {
            'model': {k: v.contiguous() for k, v in self.frozen.state_dict().items()},
            'optimizer': torch.utils._pytree.tree_map(
                lambda v: gather(v) if isinstance(v, Tensor) else v, self.optimizer.state_dict()),
            'scaler': scaler.state_dict() if scaler is not None else {},
            'ema': {k: v.contiguous() for k, v in self.ema.module.state_dict().items()} if self.ema else {},
            'sums': all_sums(self.metric_sums, self.accelerator), 'step': self.step, 'seconds': self.seconds,
            'best': self.selection.best, 'history': self.history, 'best_weights': self.selection.weights,
            **self.gradients.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state of `state_dict`."""
        self.frozen.load_state_dict(state['model'])  # the model shares this memory
        if self.recipe.fsdp:
            load_shards(self.frozen, self.parameters)
        if self.ema is not None:
            self.ema.module.load_state_dict(state['ema'] or state['model'])  # resumed with an average anyway
        load_optimizer(self.optimizer.optimizer, state['optimizer'])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        self.metric_sums = resumed_sums(state['sums'], self.accelerator)
        self.gradients.load_state_dict(state)
        self.step, self.seconds, self.in_epoch = state['step'], state['seconds'], bool(state['sums']['images'] > 0)
        self.selection = Selection(state['best'], state['best_weights'])
        self.history = list(state['history'])

    def save(self, output: Path | str) -> Path:
        """Writes ``checkpoints/step-<n>`` on the main process, whole, and only then removes all but the newest.

        Args:
            output: the run directory.

        Returns:
            The checkpoint's directory.

        Raises:
            NonFiniteLoss: if a step so far was not finite; nothing is written then.
        """
        self.check_finite()
        path = Path(output, 'checkpoints', f'step-{self.step:08d}')
        state = self.state_dict()
        if self.accelerator.is_main_process:
            write_checkpoint(Path(output), self.step, state, self.recipe.record(), self.accelerator.num_processes,
                             self.keep, self.facts)
        self.accelerator.wait_for_everyone()
        return path

    def resume(self, path: Path | str, anyway: Callable[[str], None] | None = None) -> None:
        """Resumes from a checkpoint, exactly.

        Args:
            path: the checkpoint's directory.
            anyway: function that gets a line on what differs in the checkpoint; without it a difference is an error.

        Raises:
            FileNotFoundError, ValueError: as `read_checkpoint`, or if the state is of another network.
        """
        state = read_checkpoint(Path(path), self.recipe.record(), self.accelerator.num_processes, anyway)
        try:
            self.load_state_dict(state)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path}/state.pt is not of this network: {reason_of(error)}') from error
