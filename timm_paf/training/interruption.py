"""Stops a training run from outside: by signals or the time, with an exit status that says so."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from ..processes import RANK
from ..wording import causes

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['EXIT_CONTINUE', 'Interrupted', 'Interruption', 'finish', 'leave']

EXIT_CONTINUE = 75
"""Exit status after a signal (EX_TEMPFAIL in sysexits.h): the run is not finished, the same command resumes it."""


class Interrupted(Exception):
    """Ends a validation between two of its batches; the argument is the reason."""


class Interruption:
    """The interruption of a run. It remembers SIGINT, SIGTERM and SIGUSR1, which schedulers send before they preempt.

    The first one is answered with a line on what comes, by the first process. A second SIGINT is not caught.

    Args:
        max_minutes: minutes from now after which the run stops; None for no limit.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.deadline = None if max_minutes is None else time.monotonic() + max_minutes * 60
        self.signal: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        if self.signal is None and RANK == 0:
            # not print: the signal may have come within another print
            os.write(2, f'\n{signal.Signals(number).name}: stops with a checkpoint after the step or the batch of a '
                        'validation that is at work; Ctrl-C ends at once, without one\n'.encode())
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def ended_compiler(self, error: BaseException | None) -> bool:
        """Returns whether an error is of torch's compiler, whose processes a terminal sends the signal to as well."""
        return self.signal is not None and any(
            type(each).__module__.startswith(('torch._inductor', 'torch._dynamo')) for each in causes(error))

    def reason(self, accelerator: Accelerator, should_sync: bool) -> str | None:
        """Returns why all processes stop now, None to go on. Every process must call it.

        Args:
            accelerator: the accelerator of this process.
            should_sync: whether the host looks at the device now; several processes decide together, and only then.
        """
        late = self.deadline is not None and time.monotonic() > self.deadline
        signalled = self.signal is not None
        if accelerator.num_processes > 1:
            if not should_sync:
                return None
            # If one process has seen a signal or the time, all of them stop.
            votes = torch.tensor([float(signalled), float(late)], device=accelerator.device)
            signalled, late = (vote > 0 for vote in accelerator.reduce(votes, 'sum').tolist())
        return (self.signal or 'a signal') if signalled else '--max-minutes' if late else None


def finish(accelerator: Accelerator) -> None:
    """Ends the trackers; several processes meet here once more before `leave`."""
    if accelerator.num_processes == 1:
        accelerator.end_training()
        return
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()


def leave(status: int) -> None:
    """Exits with a status; one of several processes exits at once, since all files are written.

    When the interpreter takes gloo's threads down, they now and then abort the process.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
