"""Shows the progress of a training run: a bar with rate and accuracies, and what compiling was worth."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..attacks import pgd
from .trainer import Trainer

__all__ = ['Progress', 'compilation_report', 'time_attack_step']


class Progress:
    """The progress bar of a run, on the main process, from the current step on. It keeps the seconds of the run.

    These are all the time since the first step: validations and checkpoints count, loading and compiling do not.

    Args:
        trainer: the run; its compilation is timed here, before the first step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.log = trainer, trainer.accelerator.print
        # Seconds between two updates of the bar; a log file wants fewer updates than a terminal.
        self.interval = 1 if sys.stderr.isatty() else 30
        main = trainer.accelerator.is_main_process
        self.bar = tqdm(total=trainer.total_steps, initial=trainer.step, disable=not main, unit='step',
                        mininterval=self.interval, dynamic_ncols=True)
        self.timing: dict[str, float] | None = None
        if trainer.recipe.compile and trainer.recipe.threat.eps and main and trainer.step < trainer.total_steps:
            self.log('compiling; a minute the first time')
            self.timing = time_attack_step(trainer)
        self.first_step, self.seconds_before = trainer.step, trainer.seconds
        self.started = self.shown = time.monotonic()
        self.durations: list[float] = []

    def update(self) -> None:
        """Counts the step that was just done."""
        trainer, elapsed = self.trainer, self._keep_time()
        now = self.started + elapsed
        if self.timing and len(self.durations) < 2:
            self.durations.append(elapsed - sum(self.durations))
            if len(self.durations) == 2:
                self.log(compilation_report(self.timing, self.durations, trainer.recipe.threat.steps))
        if now - self.shown > self.interval:
            self.shown = now
            means = trainer.progress()
            batches, size = trainer.batches, trainer.recipe.batch_size
            ends = trainer.step // batches.steps_per_epoch - self.first_step // batches.steps_per_epoch
            images = (trainer.step - self.first_step) * size - ends * (size - batches.last_size)
            adversarial = f'adv {means["adv_accuracy"]:.1%} ' if trainer.recipe.threat.eps else ''
            self.bar.set_postfix_str(
                f'epoch {trainer.epoch} loss {means["loss"]:.3f} clean {means["clean_accuracy"]:.1%} '
                f'{adversarial}{images / elapsed:.0f} images/s', refresh=False)
        self.bar.update()

    def validates(self, name: str, done: int, of: int) -> None:
        """Shows how far a measurement at the end of an epoch is, while the bar stands still."""
        now = time.monotonic()
        if now - self.shown > self.interval:
            self.shown = now
            self.bar.set_postfix_str(f'validation ({name}): {done} of {of} images')

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Shows the accuracies under attack, clean ones of plain training, of a line of metrics.jsonl, and counts the
        seconds that they took.
        """
        self._keep_time()
        kind = 'adv_accuracy' if self.trainer.recipe.threat.eps else 'clean_accuracy'
        accuracies = (f'{key.removesuffix("_accuracy").replace("_", " ")} {value:.1%}' for key, value in row.items()
                      if key.endswith(kind))
        self.bar.set_postfix_str(f'epoch {row["epoch"]} loss {row["loss"]:.3f} {" ".join(accuracies)}')

    def _keep_time(self) -> float:
        """Adds the seconds so far to those of the run; returns those since the first step of this process."""
        elapsed = time.monotonic() - self.started
        self.trainer.seconds = self.seconds_before + elapsed
        return elapsed

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def compilation_report(timing: dict[str, float], durations: list[float], attack_steps: int) -> str:
    """Returns a line on what compiling took, and after how many steps it is paid back.

    Args:
        timing: the result of `time_attack_step`.
        durations: durations of the first two steps, in seconds.
        attack_steps: number of steps of PGD.
    """
    took = timing['compilation'] + durations[0] - durations[1]
    saved = (timing['eager'] - timing['compiled']) * (attack_steps + 1)
    speed = f'an attack step takes {timing["compiled"]:.3f} s in place of {timing["eager"]:.3f} s'
    return f'compiled in {took:.0f} s (less from its cache, the next time); {speed}, ' + (
        f'paid back after {took / saved:.0f} steps' if saved > 0 else 'not faster: use --no-compile')


def time_attack_step(trainer: Trainer) -> dict[str, float]:
    """Returns the seconds of one forward and backward to the input, eager and compiled, and of the compilation."""
    recipe = trainer.recipe
    x0, y = (part.chunk(recipe.accumulate)[0] for part in trainer.batch())
    threat = replace(recipe.threat, steps=1, random_start=False)

    def seconds(model: nn.Module) -> float:
        started = time.perf_counter()
        with trainer.accelerator.autocast():
            x = pgd(model, x0, y, threat, bn=recipe.attack_bn, check=False)
        x[0, 0, 0, 0].item()  # waits for the device
        return time.perf_counter() - started

    kept = [(b, b.clone()) for b in trainer.frozen.buffers()]  # --attack-bn train changes the buffers
    first = {name: seconds(model) for name, model in (('eager', trainer.frozen), ('compiled', trainer.attacked))}
    again = {name: seconds(model) for name, model in (('eager', trainer.frozen), ('compiled', trainer.attacked))}
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
    return {**again, 'compilation': first['compiled'] - again['compiled']}
