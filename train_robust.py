"""Adversarial training of a network with a parametric activation.

    python train_robust.py --model wrn10_1_pssilu --dataset digits --epochs 5 --output runs/digits
    accelerate launch train_robust.py --config RECIPE.yaml --data-dir data --output runs/mine
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train_robust.py ...      (two processes, no GPU)

Stop it with Ctrl-C, SIGTERM or --max-minutes; the same command goes on where it stopped.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import time
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import safetensors
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from jsonargparse import ArgumentError, ArgumentParser
from tqdm import tqdm

import timm_paf  # noqa: F401  registers the models
from timm_paf import training
from timm_paf.activations import list_pafs
from timm_paf.attacks import BN_MODES, ThreatModel, parse_fraction
from timm_paf.convert import SHARES, create_converted
from timm_paf.data import DATASETS, Batches, ImageSet, load_dataset, split_validation, to_float
from timm_paf.files import environment, whole_file, write_json
from timm_paf.folders import FolderBatches, open_folder
from timm_paf.objectives import OBJECTIVES
from timm_paf.optimization import SCHEDULES
from timm_paf.run_directory import (
    append_metrics,
    check_same_run,
    is_complete,
    latest_checkpoint,
    prepare_output,
    recorded_choice,
)
from timm_paf.speed import forward_flops, keep_memory, pays_to_compile
from timm_paf.synthetic import open_synthetic

EXIT_CONTINUE = 75
"""Exit status after a signal (EX_TEMPFAIL in sysexits.h): not finished, the same command goes on."""


@dataclass(frozen=True)
class Config:
    """Every option of the program; a recipe file has the same names with underscores."""

    output: Annotated[str, 'run directory: new, or that of the same run']
    model: Annotated[str, "a model of timm, such as those of timm.list_models('*_pssilu')"] = 'wrn28_10_pssilu'
    act: Annotated[str | None, "activation in place of the model's own, such as pssilu, for any model of timm"] = None
    act_share: Annotated[str, 'of --act: what has one of its own: network, stage, layer or channel'] = 'network'
    act_kwargs: Annotated[dict[str, Any] | None, "of the activation, such as '{beta: 0.3, frozen: [beta]}'"] = None
    dataset: Annotated[str, 'cifar10, cifar100, digits, or folder with train/ and val/'] = 'cifar10'
    data_dir: Annotated[str | None, 'directory with cifar-10-batches-py, cifar-100-python or train/CLASS/*.jpg'] = None
    image_size: Annotated[int, 'side of the crops of --dataset folder'] = 224
    epochs: Annotated[int, 'passes over the training images'] = 200
    batch_size: Annotated[int, 'images per optimizer step, of all processes together'] = 256
    lr: Annotated[float, 'peak learning rate'] = 0.1
    min_lr: Annotated[float, 'learning rate that the schedule ends at'] = 0.001
    optimizer: Annotated[str, 'sgd, adamw, or another of timm.optim'] = 'sgd'
    momentum: Annotated[float, 'of SGD, with nesterov'] = 0.9
    weight_decay: Annotated[float, 'of every parameter, those of the activation too'] = 5e-4
    schedule: Annotated[str, 'cosine, linear, piecewise, one-cycle or constant; per optimizer step'] = 'cosine'
    warmup_epochs: Annotated[float, 'of the learning rate, linear from 0, before the schedule'] = 0.0
    accumulate: Annotated[int, 'parts that a batch is worked on in, one after the other'] = 1
    clip_grad: Annotated[float, 'largest norm of the gradient; 0 does not clip'] = 0.0
    ema: Annotated[float, 'decay of an average of the weights, which then is the result; 0 for none'] = 0.0
    val: Annotated[int, 'training images held out, by which the best epoch is chosen; 0 takes the last'] = 0
    patience: Annotated[int, 'end after so many epochs without a better one on --val; 0 does not'] = 0
    cutmix: Annotated[float, 'alpha of CutMix; 0 for none'] = 0.0
    synthetic: Annotated[str | None, 'PATH[:FRACTION] of generated images beside the real ones; default: half'] = None
    objective: Annotated[str, 'pgd-at, trades, mart or fgsm-rs'] = 'pgd-at'
    robust_weight: Annotated[float, 'beta of TRADES and MART'] = 6.0
    awp: Annotated[float, 'gamma of adversarial weight perturbation; 0 for none'] = 0.0
    label_smoothing: Annotated[float, 'share of the label that all classes get'] = 0.0
    norm: Annotated[str, 'Linf, L2 or L1'] = 'Linf'
    eps: Annotated[str | float, 'radius, exact, for images in [0, 1]; 0 trains plainly'] = '8/255'
    attack_step: Annotated[str | float | None, 'step size; default: a quarter of eps, of fgsm-rs 1.25 eps'] = None
    attack_steps: Annotated[int, 'steps of PGD; of fgsm-rs always 1'] = 10
    attack_bn: Annotated[str, 'BatchNorm under attack: eval, train-frozen or train'] = 'eval'
    eps_warmup_epochs: Annotated[float, 'in which eps and the step size grow from 0'] = 0.0
    clean_ratio: Annotated[float, 'share of the batch that is left clean, and counted with the others'] = 0.0
    paf_lr: Annotated[float | None, 'peak learning rate of alpha and beta; default: --lr'] = None
    paf_weight_decay: Annotated[float | None, 'of alpha and beta; default: --weight-decay'] = None
    paf_penalty: Annotated[float, 'weight of abs(beta) in the loss'] = 10.0
    paf_clip: Annotated[float, "largest norm of beta's gradient; 0 does not clip"] = 0.01
    mixed_precision: Annotated[Literal['no', 'bf16', 'fp16'], 'autocast of the forward passes'] = 'no'
    compile: Annotated[bool | None, 'torch.compile the network, for attack and training; default: for long runs'] = None
    grad_checkpointing: Annotated[bool, 'less memory for more time; BatchNorm counts each batch twice'] = False
    channels_last: Annotated[bool, 'memory format of images and weights'] = True
    fsdp: Annotated[bool, 'share gradients and optimizer state out over the processes'] = False
    sync_bn: Annotated[bool, 'BatchNorm statistics of all processes together; on GPUs'] = False
    seed: Annotated[int, 'of weights, order, augmentation and attack'] = 0
    max_steps: Annotated[int | None, 'end the training, and its schedule, after this many optimizer steps'] = None
    max_minutes: Annotated[float | None, 'stop after this many minutes with a checkpoint'] = None
    checkpoint_steps: Annotated[int, 'checkpoint every so many steps, beside the end of each epoch'] = 0
    keep: Annotated[int, 'number of checkpoints that stay'] = 2
    resume: Annotated[str, 'auto (from the newest checkpoint in --output), never, or a checkpoint directory'] = 'auto'
    resume_anyway: Annotated[bool, 'also with another recipe or number of processes'] = False
    trackers: Annotated[list[str] | None, "'[tensorboard, wandb]', through Accelerate"] = None


def parse(args: list[str] | None = None) -> Config:
    """The configuration from flags and --config files, flags last.

    Raises:
        ValueError: for an unknown name or a value of another type.
    """
    parser = ArgumentParser(
        prog='train_robust.py', description=(__doc__ or '').split('\n')[0], exit_on_error=False)
    parser.add_argument('--config', action='config', help='YAML with any of these options; flags override it')
    hints = get_type_hints(Config, include_extras=True)
    for option in fields(Config):
        kind, text = get_args(hints[option.name])
        default = {'required': True} if option.default is MISSING else {'default': option.default}
        parser.add_argument(f'--{option.name.replace("_", "-")}', type=kind, help=text, **default)
    try:
        found = parser.parse_args(args)
    except ArgumentError as error:
        raise ValueError(' '.join(str(error).split()) + '; see --help') from None
    return Config(**{option.name: getattr(found, option.name) for option in fields(Config)})


def check(config: Config) -> training.Recipe:
    """The recipe that a configuration means.

    Raises:
        ValueError: for every value that can't be meant, in one line.
    """
    wrong = []
    if not timm.is_model(config.model):
        near = difflib.get_close_matches(config.model, timm.list_models(), 3)
        wrong.append(f'unknown model {config.model!r}; expected a name of timm.list_models()'
                     + (f', such as {", ".join(near)}' if near else ''))
    if config.dataset not in (*DATASETS, 'folder'):
        wrong.append(f'unknown data set {config.dataset!r}; expected one of {", ".join(DATASETS)}, folder')
    if config.dataset == 'folder':
        if config.data_dir is None:
            wrong.append('--dataset folder needs a directory; expected --data-dir DIR with DIR/train/CLASS/*.jpg')
        for name, given in (('val', config.val > 0), ('synthetic', config.synthetic is not None),
                            ('objective', config.objective == 'fgsm-rs')):  # which want the images in memory
            if given:
                wrong.append(f'--{name} {getattr(config, name)} does not work with --dataset folder; expected cifar10, '
                             'cifar100 or digits with it')
    if config.schedule not in SCHEDULES:
        wrong.append(f'unknown schedule {config.schedule!r}; expected one of {", ".join(SCHEDULES)}')
    for name in ('epochs', 'batch_size', 'lr', 'accumulate', 'keep'):
        if not getattr(config, name) > 0:
            wrong.append(f'--{name.replace("_", "-")} is {getattr(config, name)}; expected above 0')
    if config.seed < 0 or config.checkpoint_steps < 0:
        wrong.append(f'--seed is {config.seed} and --checkpoint-steps {config.checkpoint_steps}; expected at least 0')
    for name, known in (('objective', OBJECTIVES), ('attack_bn', BN_MODES)):
        if getattr(config, name) not in known:
            wrong.append(f'unknown --{name.replace("_", "-")} {getattr(config, name)!r}; expected one of '
                         f'{", ".join(known)}')
    for name in (
            'awp', 'cutmix', 'robust_weight', 'warmup_epochs', 'eps_warmup_epochs', 'clip_grad', 'val', 'patience',
            'min_lr', 'weight_decay', 'paf_lr', 'paf_weight_decay', 'paf_penalty', 'paf_clip'):
        if not (getattr(config, name) is None or getattr(config, name) >= 0):
            wrong.append(f'--{name.replace("_", "-")} is {getattr(config, name)}; expected at least 0')
    for name in ('ema', 'clean_ratio', 'label_smoothing'):
        if not 0 <= getattr(config, name) < 1:
            wrong.append(f'--{name.replace("_", "-")} is {getattr(config, name)}; expected from 0 to below 1')
    if config.patience and not config.val:
        wrong.append(f'--patience is {config.patience} without --val; expected images to choose by, such as --val 1024')
    if config.fsdp:
        for name, fits, instead in (
                ('optimizer', config.optimizer in ('sgd', 'adamw'), 'sgd or adamw'), ('awp', not config.awp, '0'),
                ('mixed_precision', config.mixed_precision != 'fp16', 'bf16')):
            if not fits:
                wrong.append(f'--{name.replace("_", "-")} {getattr(config, name)} does not work with --fsdp true; '
                             f'expected {instead}')
    trackers = [str(tracker) for tracker in get_available_trackers()]
    missing = sorted(set(config.trackers or ()) - set(trackers))
    if missing:
        wrong.append(f'--trackers {", ".join(missing)}: unknown or not installed; expected some of '
                     f'{", ".join(trackers) or "none"}, or pip install {" ".join(missing)}')
    for name in ('max_steps', 'max_minutes'):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            wrong.append(f'--{name.replace("_", "-")} is {getattr(config, name)}; expected above 0')
    if config.act is not None and config.act not in list_pafs(plain=True):
        wrong.append(f'unknown --act {config.act!r}; expected one of {", ".join(list_pafs(plain=True))}')
    if config.act_share not in SHARES:
        wrong.append(f'unknown --act-share {config.act_share!r}; expected one of {", ".join(SHARES)}')
    elif config.act is None and config.act_share != 'network':
        wrong.append(f'--act-share {config.act_share} without --act; expected the activation to share, such as pssilu')
    threat = ThreatModel()
    try:
        step = None if config.attack_step is None else parse_fraction(config.attack_step)
        one_step = config.objective == 'fgsm-rs'
        if one_step and step is None:
            step = parse_fraction(config.eps) * 5 / 4
        threat = ThreatModel(config.norm, parse_fraction(config.eps), step, 1 if one_step else config.attack_steps)
        if threat.eps and not threat.steps:
            wrong.append(f'--attack-steps is 0 with eps {threat.eps}; expected at least 1, or --eps 0 to train plainly')
    except ValueError as error:
        wrong.append(str(error))
    if wrong:
        raise ValueError('; '.join(wrong))
    shared = {option.name for option in fields(training.Recipe)} & {option.name for option in fields(Config)}
    shared -= {'synthetic'}  # whose record is of the images, not of the path
    values = {name: getattr(config, name) for name in shared}
    return training.Recipe(
        **{**values, 'act_kwargs': config.act_kwargs or {}, 'compile': bool(config.compile),
           'act_share': config.act_share if config.act else None}, threat=threat)


def parse_synthetic(text: str) -> tuple[str, float]:
    """PATH or PATH:FRACTION, half without one.

    Raises:
        ValueError: for a fraction that is no share.
    """
    path, colon, share = text.rpartition(':')
    if not colon or Path(text).exists():
        return text, 0.5
    try:
        fraction = float(share)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise ValueError(f'--synthetic {text}: {share!r} is no share; expected PATH:FRACTION with one in (0, 1)')
    return path, fraction


def compilation_report(timing: dict[str, float], durations: list[float], attack_steps: int) -> str:
    """What compiling took, and after how many steps it is paid back; from the first two steps' durations in seconds."""
    took = timing['compilation'] + durations[0] - durations[1]
    saved = (timing['eager'] - timing['compiled']) * (attack_steps + 1)
    speed = f'an attack step takes {timing["compiled"]:.3f} s in place of {timing["eager"]:.3f} s'
    return f'compiled in {took:.0f} s (less from its cache, the next time); {speed}, ' + (
        f'paid back after {took / saved:.0f} steps' if saved > 0 else 'not faster: use --compile false')


class StopSignal:
    """Remembers SIGINT, SIGTERM and SIGUSR1, which schedulers send before they preempt, until the step at hand is done.

    A second SIGINT is not caught.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


def in_memory(
        config: Config, recipe: training.Recipe, accelerator: Accelerator,
) -> tuple[Batches, ImageSet | None, training.Recipe]:
    """Batches of a data set that is held whole, the images held out of it, and the recipe with what lies beside it."""
    data = load_dataset(config.dataset, config.data_dir, train=True)
    validation = None
    if config.val:
        data, validation = split_validation(data, config.val, config.seed)
    synthetic, fraction = None, 0.5
    if config.synthetic is not None:
        path, fraction = parse_synthetic(config.synthetic)
        with accelerator.main_process_first():  # which may have to unpack them
            synthetic = open_synthetic(path, tuple(data.images.shape[1:]), data.num_classes, say=accelerator.print)
        recipe = replace(recipe, synthetic={**synthetic.record(), 'fraction': fraction})
    batches = Batches(data, config.batch_size, config.seed, accelerator.device,
                      accelerator.process_index, accelerator.num_processes, synthetic, fraction)
    return batches, validation, recipe


def run(config: Config) -> int:
    """Train; the exit status."""
    started = time.monotonic()
    stop = StopSignal()
    recipe = check(config)
    output = Path(config.output)
    trackers = config.trackers or []
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=trackers or None, project_dir=str(output / 'trackers'))
    say = accelerator.print
    if accelerator.distributed_type.name not in ('NO', 'MULTI_CPU', 'MULTI_GPU'):
        # the attack runs on the bare weights, which are whole in every process
        raise ValueError(f'{accelerator.distributed_type.name} of accelerate is not supported; expected --multi_gpu, '
                         'and --fsdp true of this program to share out gradients and optimizer state')
    if (config.fsdp or config.sync_bn) and accelerator.num_processes == 1:
        raise ValueError('--fsdp and --sync-bn are for several processes and there is one; expected '
                         'accelerate launch --multi_gpu, or torchrun --nproc_per_node N')
    if config.sync_bn and accelerator.device.type != 'cuda':
        raise ValueError(f'--sync-bn true needs GPUs and the device is {accelerator.device}; torch has none for others')
    keep_memory()

    # What the run needs, all of it before the output directory is touched.
    validation = None
    if config.dataset == 'folder':
        folder = open_folder(str(config.data_dir), train=True)
        sample = torch.zeros((1, config.image_size, config.image_size, 3), dtype=torch.uint8)
        about = {'name': 'folder', 'split': 'train', 'n': len(folder), 'sha256_of_listing': folder.sha256()}
        batches: Batches | FolderBatches = FolderBatches(
            folder, config.batch_size, config.seed, accelerator.device, accelerator.process_index,
            accelerator.num_processes, config.image_size)
    else:
        batches, validation, recipe = in_memory(config, recipe, accelerator)
        sample = batches.data.images[:1]
        about = {'name': batches.data.name, 'split': 'train', 'n': len(batches.data), 'sha256': batches.data.sha256()}
    data = batches.data
    torch.manual_seed(config.seed)
    try:
        model = create_converted(config.model, recipe.act, recipe.act_share, recipe.act_kwargs,
                                 num_classes=data.num_classes)
        with torch.no_grad():
            shape = model.eval()(to_float(sample)).shape
    except TypeError as error:  # the activation names the arguments that it does not have
        raise ValueError(f'--act-kwargs {config.act_kwargs}: {error}') from error
    except (RuntimeError, AssertionError) as error:  # timm's words for a wrong tag or image size
        reason = ' '.join(str(error).split())
        raise ValueError(f'{config.model} does not take images of {data.name}: {reason}') from error
    if shape != (1, data.num_classes):
        raise ValueError(f'{config.model} gives {tuple(shape)} for an image; expected (1, {data.num_classes})')
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(f'{config.model} has no gradient checkpointing; expected another model, or '
                             '--grad-checkpointing false') from error
    if config.compile is None:
        chosen = recorded_choice(output, 'compile')  # a run goes on as it began
        if chosen is None:
            steps = min(recipe.epochs * batches.steps_per_epoch, recipe.max_steps or sys.maxsize)
            passes = 2 * recipe.threat.steps + 3  # to the logits and back to the image; in training to the weights too
            flops = forward_flops(model, to_float(sample)) * passes * recipe.batch_size * steps
            chosen = pays_to_compile(flops, accelerator.device)
        recipe = replace(recipe, compile=chosen)
    if accelerator.device.type == 'cuda':  # where precision is given up for speed, the attack and the weights allow it
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    trainer = training.Trainer(recipe, model, batches, accelerator, validation, config.keep)
    checkpoint = prepare_output(output, recipe.record(), config.resume, say, config.resume_anyway)
    check_same_run(output, recipe.record(), about, config.resume_anyway)
    complete = is_complete(output)
    accelerator.wait_for_everyone()  # every process has looked before one writes
    if complete:
        say(f'{output} is complete')
        return 0
    if checkpoint is not None:
        trainer.resume(checkpoint, say if config.resume_anyway else None)
        say(f'goes on from {checkpoint}')

    record = {
        'status': 'running', 'architecture': config.model, 'num_classes': data.num_classes, 'recipe': recipe.record(),
        'data': about,
        'processes': accelerator.num_processes, **environment()}
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / 'run.json', record)
    if trackers:
        accelerator.init_trackers('timm-paf', {k: str(v) for k, v in vars(config).items()})
    size = sum(p.numel() for p in model.parameters())
    say(f'{config.model}: {size:,} parameters, {data.name}: {len(data):,} images, '
        f'{recipe.threat.norm} eps {recipe.threat.eps}, {trainer.total_steps:,} steps on {accelerator.device}, '
        f'{"compiled" if recipe.compile else "not compiled"} (--compile {str(not recipe.compile).lower()} for the '
        f'other), {"channels_last" if recipe.channels_last else "contiguous"}')

    interval = 1 if sys.stderr.isatty() else 30  # seconds between two looks at the sums; a log file wants fewer
    bar = tqdm(total=trainer.total_steps, initial=trainer.step, disable=not accelerator.is_main_process, unit='step',
               mininterval=interval, dynamic_ncols=True)
    first, timing = trainer.step, None
    if recipe.compile and recipe.threat.eps and accelerator.is_main_process and trainer.step < trainer.total_steps:
        say('compiling; a minute the first time')
        timing = trainer.time_attack_step()
    before, shown, clock = trainer.seconds, time.monotonic(), time.monotonic()
    durations: list[float] = []
    reason = None
    try:
        while trainer.step < trainer.total_steps and reason is None and not trainer.out_of_patience:
            trainer.train_step()
            now = time.monotonic()
            if timing and len(durations) < 2:
                durations.append(now - clock - sum(durations))
                if len(durations) == 2:
                    say(compilation_report(timing, durations, recipe.threat.steps))
            trainer.seconds = before + now - clock
            if now - shown > interval:
                shown = now
                means = trainer.progress()
                rate = (trainer.step - first) * config.batch_size / (now - clock)
                bar.set_postfix_str(
                    f'epoch {trainer.epoch} loss {means["loss"]:.3f} clean {means["clean_accuracy"]:.1%} '
                    f'adv {means["adv_accuracy"]:.1%} {rate:.0f} images/s', refresh=False)
            bar.update()
            if trainer.step % batches.steps_per_epoch == 0 or trainer.step == trainer.total_steps:
                row = trainer.end_epoch()
                if accelerator.is_main_process:
                    append_metrics(output / 'metrics.jsonl', row)
                accelerator.log({**row, 'seconds': round(trainer.seconds, 2)}, step=trainer.step)
                trainer.save(output)
                if row.get('catastrophic_overfitting'):
                    say(f'epoch {row["epoch"]}: catastrophic overfitting, {row["pgd_adv_accuracy"]:.1%} under PGD; an '
                        'earlier end, a smaller --attack-step or --objective pgd-at avoid it')
            elif config.checkpoint_steps and trainer.step % config.checkpoint_steps == 0:
                trainer.save(output)
            late = config.max_minutes is not None and now - started > config.max_minutes * 60
            signalled = stop.name is not None
            if accelerator.num_processes > 1:
                if not trainer.looks:
                    continue
                # one process has seen a signal or the time: all of them stop after this step
                votes = torch.tensor([float(signalled), float(late)], device=accelerator.device)
                signalled, late = (vote > 0 for vote in accelerator.reduce(votes, 'sum').tolist())
            reason = (stop.name or 'a signal') if signalled else '--max-minutes' if late else None
    except training.NonFiniteLoss as error:
        raise training.NonFiniteLoss(
            f'{error}; stopped before the optimizer step, the last good checkpoint is '
            f'{latest_checkpoint(output) or "not there yet"}; try a lower --lr, with another --output'
        ) from None
    bar.close()

    if trainer.step < trainer.total_steps and not trainer.out_of_patience:
        say(f'stopped by {reason}; {trainer.save(output)} holds step {trainer.step} of {trainer.total_steps}, the same '
            'command goes on from there')
        finish(accelerator)
        return EXIT_CONTINUE if reason != '--max-minutes' else 0
    if accelerator.is_main_process:
        with whole_file(output / 'model.safetensors') as part:
            safetensors.torch.save_file(trainer.result(), part, metadata={'format': 'pt'})
        epoch = trainer.best['epoch'] if validation is not None else (trainer.step - 1) // batches.steps_per_epoch
        weights = {'of': 'model' if trainer.ema is None else 'ema', 'epoch': int(epoch),
                   'chosen_by': f'{len(validation)} held-out images' if validation is not None else 'being the last'}
        write_json(output / 'run.json', {**record, 'status': 'complete', 'steps': trainer.step, 'weights': weights,
                                         'seconds': round(trainer.seconds, 2)})
    say(f'{output}/model.safetensors after {trainer.seconds / 60:.1f} minutes')
    finish(accelerator)
    return 0


def finish(accelerator: Accelerator) -> None:
    """End the trackers; several processes meet here once more before `main` leaves."""
    if accelerator.num_processes == 1:
        accelerator.end_training()
        return
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()


def main() -> None:
    try:
        status = run(parse())
        if int(os.environ.get('WORLD_SIZE', 1)) > 1:
            # All is written. Taken down with the interpreter, gloo's threads now and then abort the process.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)
    except training.NonFiniteLoss as error:
        sys.exit(f'train_robust.py: {error}')
    except (ValueError, OSError, safetensors.SafetensorError) as error:
        if os.environ.get('TIMM_PAF_DEBUG'):
            raise
        sys.exit(f'train_robust.py: {error}')


if __name__ == '__main__':
    main()
