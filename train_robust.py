"""Adversarial training of a network with a parametric activation.

    python train_robust.py --model wrn10_1_pssilu --dataset digits --epochs 5 --output runs/digits
    accelerate launch train_robust.py --config RECIPE.yaml --data-dir data --output runs/mine
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train_robust.py ...      (two processes, no GPU)

Stop it with Ctrl-C, SIGTERM or --max-minutes; the same command resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list

import timm_paf  # noqa: F401  registers the models
from timm_paf.files import atomic_write, environment, is_of_machine, sha256, write_record
from timm_paf.processes import WORLD, end_with_launcher, exclusive_lock
from timm_paf.speed import keep_memory
from timm_paf.training import NonFiniteLoss, Trainer
from timm_paf.training.config import Config, check, parse
from timm_paf.training.inputs import open_inputs
from timm_paf.training.interruption import EXIT_CONTINUE, Interrupted, Interruption, finish, leave
from timm_paf.training.network import chooses_to_compile, create_network, precision_advice
from timm_paf.training.progress import Progress
from timm_paf.training.run_directory import RESULTS, append_metrics, claim_output, latest_checkpoint
from timm_paf.training.sessions import earlier_sessions
from timm_paf.weights import network_of, open_weights
from timm_paf.wording import reason_of


def create_accelerator(config: Config) -> Accelerator:
    """Returns the accelerator of this process.

    Raises:
        ValueError: for an engine or a device that the training does not run on.
    """
    # A broadcast before each of two forward passes would change what the first one's backward pass needs.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=not config.separate_forwards)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=config.trackers or None,
        project_dir=str(Path(config.output) / 'trackers'), kwargs_handlers=[ddp])
    if accelerator.distributed_type.name not in ('NO', 'MULTI_CPU', 'MULTI_GPU'):
        # The attack runs on the bare weights, which must be whole in every process.
        raise ValueError(f'{accelerator.distributed_type.name} of accelerate is not supported; expected --multi_gpu, '
                         'and --fsdp of this program to share out gradients and optimizer state')
    if accelerator.num_processes < WORLD:  # each would be a training of its own
        raise ValueError(f'{WORLD} processes were started, which do not join on {accelerator.device}; expected a GPU '
                         'for each, or without GPUs accelerate launch --cpu, or ACCELERATE_USE_CPU=true')
    if (config.fsdp or config.sync_bn) and accelerator.num_processes == 1:
        raise ValueError('--fsdp and --sync-bn are for several processes and there is one; expected '
                         'accelerate launch --multi_gpu, or torchrun --nproc_per_node N')
    if config.sync_bn and accelerator.device.type != 'cuda':
        raise ValueError(f'--sync-bn needs GPUs and the device is {accelerator.device}; torch has none for others')
    if config.cuda_graphs and accelerator.device.type != 'cuda':
        raise ValueError(f'--cuda-graphs needs a GPU and the device is {accelerator.device}; expected none of it')
    if accelerator.device.type == 'cuda':  # the attack and the weights allow less precision for speed
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return accelerator


def run(config: Config) -> int:
    """Trains a network and returns the exit status."""
    interruption = Interruption(config.max_minutes)
    recipe, output = check(config), Path(config.output)
    end_with_launcher()
    accelerator = create_accelerator(config)
    keep_memory()

    # All that the run needs is made before the output directory is touched.
    recipe, batches, sample, validation, images = open_inputs(config, recipe, accelerator)
    data = batches.data
    with accelerator.main_process_first():  # the main process may have to download the weights
        init = None if config.init is None else open_weights(config.init, config.model, config.model_kwargs)
    model, recipe = create_network(recipe, data.num_classes, sample, data.name, init, accelerator.print)
    recipe = replace(recipe, compile=chooses_to_compile(
        recipe, model, sample, batches.steps_per_epoch, accelerator.device, output))
    trainer = Trainer(recipe, model, batches, accelerator, validation, config.keep)
    with contextlib.ExitStack() as stack:
        refused: list[str | None] = [None]
        if accelerator.is_main_process:
            try:
                stack.enter_context(exclusive_lock(output, 'training'))
            except (ValueError, OSError) as error:
                refused = [str(error)]
        broadcast_object_list(refused)  # all processes end with the same line
        if refused[0] is not None:
            raise ValueError(refused[0])
        return start_or_resume(config, trainer, images, interruption)


def start_or_resume(config: Config, trainer: Trainer, images: dict[str, Any], interruption: Interruption) -> int:
    """Starts or resumes a run in its output directory, to its end or an interruption; returns the exit status.

    Args:
        config: the configuration.
        trainer: the run, before its first step.
        images: the record of the images.
        interruption: the signals and the time limit.
    """
    accelerator, recipe, output, data = trainer.accelerator, trainer.recipe, Path(config.output), trainer.batches.data
    log = accelerator.print
    claim = claim_output(output, recipe.record(), images, config.resume, log, config.resume_anyway)
    accelerator.wait_for_everyone()  # every process has looked before one writes
    if claim.complete:
        log(f'{output} is complete')
        return 0
    if claim.checkpoint is not None:
        trainer.resume(claim.checkpoint, log if config.resume_anyway else None)
        log(f'resumes from {claim.checkpoint}')
    made_with = {'processes': accelerator.num_processes, 'device': accelerator.device.type, **environment()}
    earlier = earlier_sessions(claim.checkpoint, trainer.seconds, made_with) if claim.checkpoint is not None else []
    trainer.facts = {'data': images, **({'resumed_from': claim.resumed_from} if claim.resumed_from else {}),
                     **({'earlier': earlier} if earlier else {}), **made_with}
    record = {'status': 'running', 'architecture': network_of(config.model)[0], 'num_classes': data.num_classes,
              'recipe': recipe.record(), **trainer.facts}
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_record(output / 'run.json', record)
    if config.trackers:
        accelerator.init_trackers('timm-paf', {k: str(v) for k, v in vars(config).items()})
    log(f'{config.model}: {sum(p.numel() for p in trainer.unwrapped.parameters()):,} parameters, {data.name}: '
        f'{len(data):,} images, {recipe.threat.norm} eps {recipe.threat.eps}, {trainer.total_steps:,} steps on '
        f'{accelerator.device}, '
        f'{"compiled (--no-compile turns it off)" if recipe.compile else "not compiled (--compile turns it on)"}, '
        f'{"channels_last" if recipe.channels_last else "contiguous"}')
    # A run that is resumed keeps the precision that it began with.
    for line in () if claim.checkpoint is not None else precision_advice(recipe.mixed_precision, accelerator.device):
        log(line)

    try:
        reason = train(trainer, interruption, output, config.checkpoint_steps)
    except RuntimeError as error:
        if not interruption.ended_compiler(error):
            raise
        log(f'stopped by {interruption.signal} while the network was compiled; the same command goes on')
        return EXIT_CONTINUE
    if not trainer.done:
        log(f'stopped by {reason}; {trainer.save(output)} holds step {trainer.step} of {trainer.total_steps}, the same '
            f'command resumes from there{", first with the end of its epoch" if trainer.at_epoch_end else ""}')
        finish(accelerator)
        return EXIT_CONTINUE if reason != '--max-minutes' else 0
    if accelerator.is_main_process:
        write_result(trainer, output, record)
    log(f'{output}/model.safetensors after {trainer.seconds / 60:.1f} minutes')
    finish(accelerator)
    return 0


def train(trainer: Trainer, interruption: Interruption, output: Path, checkpoint_steps: int) -> str | None:
    """Trains to the end, or to an interruption; returns the reason of the interruption, or None.

    Args:
        trainer: the run, from its current step.
        interruption: the signals and the time limit.
        output: the run directory.
        checkpoint_steps: steps between two checkpoints.

    Raises:
        NonFiniteLoss: if a loss or gradient is not finite; the message says what to do.
    """
    accelerator, progress, reason = trainer.accelerator, Progress(trainer), None
    began = trainer.step

    def look(should_sync: bool) -> str | None:
        found = interruption.reason(accelerator, should_sync)
        # With less time than a validation takes, a run that resumes before one would never get to its next step.
        return None if found == '--max-minutes' and trainer.step == began else found

    def between(name: str, done: int, of: int) -> None:
        progress.validates(name, done, of)
        if found := look(True):
            raise Interrupted(found)

    try:
        while reason is None and not trainer.done:
            if trainer.at_epoch_end:
                row = trainer.end_epoch(between)
                progress.end_epoch(row)
                record_epoch(trainer, output, row)
            else:
                trainer.train_step()
                progress.update()
                # The end of an epoch may take minutes. A run that is stopped there, or later, resumes before it.
                if trainer.at_epoch_end or (checkpoint_steps and trainer.step % checkpoint_steps == 0):
                    trainer.save(output)
            reason = look(trainer.should_sync)
    except Interrupted as interrupted:
        reason = str(interrupted)
    except NonFiniteLoss as error:
        raise NonFiniteLoss(
            f'{error}; stopped before the optimizer step, the last good checkpoint is '
            f'{latest_checkpoint(output) or "not there yet"}; try a lower --lr, with another --output') from None
    finally:
        progress.close()
    return reason


def record_epoch(trainer: Trainer, output: Path, row: dict[str, Any]) -> None:
    """Writes a line of metrics.jsonl, gives it to the trackers, and says where a training has collapsed."""
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        append_metrics(output / 'metrics.jsonl', row, accelerator.print)
    accelerator.log({**row, 'seconds': round(trainer.seconds, 2)}, step=trainer.step)
    if row.get('catastrophic_overfitting'):
        accelerator.print(
            f'epoch {row["epoch"]}: catastrophic overfitting, {row["pgd_adv_accuracy"]:.1%} under PGD; an earlier end, '
            'a smaller --attack-step or --objective pgd-at avoid it')


def write_result(trainer: Trainer, output: Path, record: dict[str, Any]) -> None:
    """Writes model.safetensors, and then run.json with the status complete."""
    with atomic_write(output / 'model.safetensors') as part:
        safetensors.torch.save_file(trainer.result(), part, metadata={'format': 'pt'})
    held_out = trainer.validation
    epoch = trainer.selection.best['epoch'] if held_out else (trainer.step - 1) // trainer.batches.steps_per_epoch
    weights = {'of': 'model' if trainer.ema is None else 'swa' if trainer.recipe.swa else 'ema', 'epoch': int(epoch),
               'chosen_by': f'{len(held_out)} held-out images' if held_out else 'being the last'}
    files = {name: sha256(output / name) for name in RESULTS if (output / name).is_file()}
    write_record(output / 'run.json', {**record, 'status': 'complete', 'steps': trainer.step, 'weights': weights,
                                       'seconds': round(trainer.seconds, 2), 'files': files})


def main(args: Sequence[str] | None = None, prog: str = 'train_robust.py') -> None:
    """Runs the program, and shows every mistake of a user in one line."""
    try:
        leave(run(parse(sys.argv[1:] if args is None else args, prog, (__doc__ or '').split('\n')[0])))
    except KeyboardInterrupt:
        sys.exit(f'{prog}: stopped; the same command resumes')
    except Exception as error:
        shown = isinstance(error, NonFiniteLoss | ValueError | OSError | safetensors.SafetensorError)
        if os.environ.get('TIMM_PAF_DEBUG') or not (shown or is_of_machine(error)):
            raise
        sys.exit(f'{prog}: {reason_of(error, None)}')


if __name__ == '__main__':
    main()
