"""The recipe of a training run: each option once, and what does not fit together."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from ..activations import list_pafs
from ..attacks import BN_MODES, STARTS, ThreatModel, as_threat
from ..convert import SHARES, START_NAMES
from ..data import DATASETS, PAD_MODES, POLICIES_WITH_CROP
from ..data.timm_sets import INDEXED
from ..objectives import OBJECTIVES, ONE_STEP
from ..wording import split_commas
from .option import GROUPS, Option, as_typed, flag_of, kind_fault, negated, options_of
from .schedules import RISE, SCHEDULES

__all__ = ['Recipe', 'RecipeOptions', 'faults', 'numbers', 'threat_faults']

_model, _data, _objective, _attack, _optimisation, _run = (functools.partial(Option, group) for group in GROUPS)
_activations = functools.partial(list_pafs, plain=True)
_OF_BOTH = {'objective': [name for name, objective in OBJECTIVES.items() if objective.sees_clean]}


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The options that decide which weights come out, for the program and for a notebook alike.

    The defaults are the paper's recipe without its synthetic images (arXiv 2110.05626).
    """

    model: Annotated[str, _model("model of timm, such as those of timm.list_models('*_pssilu')")] = 'wrn28_10_pssilu'
    act: Annotated[str | None, _model("activation in place of the model's own, for any model of timm",
                                      choices=_activations)] = None
    act_share: Annotated[str, _model('what has one --act of its own', choices=SHARES)] = 'network'
    act_kwargs: Annotated[dict[str, Any], _model(
        "of the activation, such as '{beta: 0.3, frozen: [beta]}' or '{curvature: 8}'")] = field(default_factory=dict)
    act_start: Annotated[str | None, _model(
        'activation that the new one starts as, exactly or nearly; same: the one in whose place it is; default: same '
        'with --init, else its own initial values', choices=START_NAMES)] = None
    model_kwargs: Annotated[dict[str, Any], _model(
        "arguments of the network, such as '{drop_path_rate: 0.1}'")] = field(default_factory=dict)
    dataset: Annotated[str, _data('data set; folder has train/CLASS/*.jpg and val/CLASS/*.jpg; NAME as timm has it',
                                  choices=(*DATASETS, *INDEXED))] = 'cifar10'
    image_size: Annotated[int, _data('side of the crops; not of cifar and digits', above=0)] = 224
    cutmix: Annotated[float, _data('alpha of CutMix; 0 for none', least=0)] = 0.0
    mixup: Annotated[float, _data('alpha of mixup; 0 for none; with --cutmix a batch has one of both', least=0)] = 0.0
    aa: Annotated[str | None, _data("policy of timm, such as rand-m9-mstd0.5-inc1, or cifar10 (torchvision's "
                                    'AutoAugment); for cifar and digits also idbh-weak, idbh-strong')] = None
    color_jitter: Annotated[float, _data('change of brightness, contrast, saturation', least=0)] = 0.0
    reprob: Annotated[float, _data('probability that a box is erased', least=0, below=1)] = 0.0
    pad_mode: Annotated[str, _data('what is around the crops of cifar and digits', choices=PAD_MODES)] = 'zeros'
    synthetic_augment: Annotated[bool, _data('augment generated images as the real ones')] = True
    drop_last: Annotated[bool, _data('leave out the images of an epoch that fill no batch')] = True
    val: Annotated[int, _data('training images held out, by which the best epoch is chosen; 0 takes the last',
                              least=0)] = 0
    val_attack: Annotated[str | None, _data(
        'attack on them: cross-entropy or margin, STEPS of eps / 4 from a random start; default: 20 of eps / 8 on the '
        'margin without one', choices=('ce-STEPS', 'cw-STEPS'), needs={'val': ()})] = None
    objective: Annotated[str, _objective('training objective', choices=tuple(OBJECTIVES))] = 'pgd-at'
    robust_weight: Annotated[float, _objective('beta of TRADES and MART, alpha of IKL', least=0, needs=_OF_BOTH)] = 6.0
    ikl_mse: Annotated[float, _objective("beta of IKL, the weight of its squared error", least=0,
                                         needs={'objective': ('ikl',)})] = 20.0
    ikl_temperature: Annotated[float, _objective("of the class probabilities that weigh IKL's squared error", above=0,
                                                 needs={'objective': ('ikl',)})] = 4.0
    separate_forwards: Annotated[bool, _objective(
        'clean and adversarial images of TRADES, MART and IKL in two forward passes, two batches to BatchNorm',
        needs=_OF_BOTH)] = False
    clean_pass: Annotated[str, _objective(
        "an extra forward pass of the clean images in train mode, for BatchNorm's running statistics alone, before the "
        'attack or after the step',
        choices=('none', 'before', 'after'))] = 'none'
    awp: Annotated[float, _objective(
        'gamma of adversarial weight perturbation, of each part of --accumulate by itself; 0 for none', least=0)] = 0.0
    awp_warmup_epochs: Annotated[float, _objective('epochs without it at the start', least=0, needs={'awp': ()})] = 0.0
    label_smoothing: Annotated[float, _objective('share of the label that all classes get', least=0, below=1)] = 0.0
    clean_ratio: Annotated[float, _objective('share of the images that is left clean, of each part and process',
                                             least=0, below=1)] = 0.0
    paf_penalty: Annotated[float, _objective('weight of abs(beta) in the loss', least=0)] = 10.0
    attack_bn: Annotated[str, _attack('BatchNorm under attack', choices=BN_MODES)] = 'eval'
    attack_start: Annotated[str, _attack(
        'random start: in the ball, there without a clip to [0, 1], or normal noise of 0.001',
        choices=STARTS, needs={'objective': [name for name in OBJECTIVES if name != 'n-fgsm']})] = 'uniform'
    eps_warmup_epochs: Annotated[float, _attack('epochs in which eps and the step size grow from 0', least=0)] = 0.0
    epochs: Annotated[int, _optimisation('passes over the training images', above=0)] = 200
    batch_size: Annotated[int, _optimisation('images per optimizer step, of all processes together', above=0)] = 256
    lr: Annotated[float, _optimisation('peak learning rate', above=0)] = 0.1
    min_lr: Annotated[float, _optimisation('learning rate that the schedule ends at', least=0)] = 0.001
    optimizer: Annotated[str, _optimisation('sgd, adamw, or another of timm.optim')] = 'sgd'
    momentum: Annotated[float, _optimisation('of SGD', least=0, below=1)] = 0.9
    momentum_cycle: Annotated[str | None, _optimisation(
        'least and most momentum, such as 0.85,0.95, between which it falls and rises against the learning rate of '
        'one-cycle and triangular; default: --momentum')] = None
    nesterov: Annotated[bool, _optimisation("Nesterov's momentum", needs={'optimizer': ('sgd',)})] = True
    weight_decay: Annotated[float, _optimisation('of every parameter, those of the activation too', least=0)] = 5e-4
    no_decay: Annotated[str | None, _optimisation('what is not decayed, with commas, bn: BatchNorm; default: nothing',
                                                  choices=('bn', 'bias', 'paf'), many=True)] = None
    schedule: Annotated[str, _optimisation('of the learning rate, per optimizer step',
                                           choices=tuple(SCHEDULES))] = 'cosine'
    milestones: Annotated[str | None, _optimisation(
        'epochs at which piecewise divides what is above --min-lr by ten, such as 75,90; default: half and three '
        'quarters of what follows the warm-up')] = None
    pct_start: Annotated[float | None, _optimisation(
        'share of the run in which one-cycle (default: 0.3) and triangular (default: 0.5) rise', above=0,
        below=1)] = None
    warmup_epochs: Annotated[float, _optimisation('of the learning rate, linear from 0, before the schedule',
                                                  least=0)] = 0.0
    accumulate: Annotated[int, _optimisation('parts that a batch is worked on in, one after the other', above=0)] = 1
    clip_grad: Annotated[float, _optimisation('largest norm of the gradient; 0 does not clip', least=0)] = 0.0
    ema: Annotated[float, _optimisation('decay of an average of the weights, which then is the result; 0 for none',
                                        least=0, below=1)] = 0.0
    ema_warmup: Annotated[str, _optimisation(
        "how its decay begins: timm's power of the step; Gowal's ratio, 0 while the learning rate rises, then "
        '(1 + d) / (10 + d); or at once',
        choices=('power', 'ratio', 'none'), needs={'ema': ()})] = 'power'
    ema_bn: Annotated[str, _optimisation("BatchNorm's statistics in the average",
                                         choices=('average', 'copy'), needs={'ema': (), 'swa': ()})] = 'average'
    swa: Annotated[int, _optimisation('first epoch, from 1, whose end counts in an equal average, which then is the '
                                      'result; 0 for none', least=0)] = 0
    bn_momentum: Annotated[float | None, _optimisation(
        "share of a batch in BatchNorm's running statistics; default: the network's, mostly 0.1", above=0,
        below=1)] = None
    patience: Annotated[int, _optimisation('end after so many epochs without a better one on --val; 0 does not',
                                           least=0, needs={'val': ()})] = 0
    paf_lr: Annotated[float | None, _optimisation('peak learning rate of alpha and beta; default: --lr',
                                                  least=0)] = None
    paf_weight_decay: Annotated[float | None, _optimisation('of alpha and beta; default: --weight-decay',
                                                            least=0)] = None
    paf_clip: Annotated[float, _optimisation("largest norm of beta's gradient; 0 does not clip", least=0)] = 0.01
    head_lr: Annotated[float | None, _optimisation('peak learning rate of the classifier; default: --lr',
                                                   least=0)] = None
    layer_decay: Annotated[float | None, _optimisation(
        "factor of the learning rate from each layer to the one before, in timm's groups, which decay no bias and no "
        'norm; default: none', above=0)] = None
    freeze_bn: Annotated[bool, _optimisation(
        'BatchNorm as in evaluation: statistics, weight and bias stay as they are')] = False
    mixed_precision: Annotated[str, _run('autocast of the forward passes', choices=('no', 'bf16', 'fp16'))] = 'no'
    compile: Annotated[bool | None, _run('torch.compile the network; default: for long runs')] = None
    cuda_graphs: Annotated[bool, _run('compile, and launch each pass as one CUDA graph; on one GPU')] = False
    grad_checkpointing: Annotated[bool, _run('less memory for more time; BatchNorm counts each batch twice')] = False
    channels_last: Annotated[bool, _run('memory format of images and weights')] = True
    fsdp: Annotated[bool, _run('share gradients and optimizer state out over the processes')] = False
    sync_bn: Annotated[bool, _run('BatchNorm statistics of all processes together; on GPUs')] = False
    seed: Annotated[int, _run('of weights, order, augmentation and attack', least=0, below=2 ** 63)] = 0
    max_steps: Annotated[int | None, _run('end the training, and its schedule, after this many optimizer steps',
                                          above=0)] = None


LATER = (
    'freeze_bn', 'model_kwargs', 'mixup', 'color_jitter', 'reprob', 'ikl_mse', 'ikl_temperature', 'separate_forwards',
    'clean_pass', 'awp_warmup_epochs', 'attack_start', 'nesterov', 'ema_warmup', 'ema_bn', 'swa', 'pad_mode',
    'synthetic_augment', 'drop_last', 'cuda_graphs')
"""Options that runs of before lack; their defaults are what those runs did."""


@dataclass(frozen=True, kw_only=True)
class Recipe(RecipeOptions):
    """A recipe: what determines the weights that come out, beside the number of processes.

    ``Recipe(model='resnet18_pssilu', epochs=30, threat=ThreatModel(steps=2))`` has the program's defaults in all else.
    ``compile=None`` does not compile: only the program decides by the length of the run. What the command line has as
    a text may be a list or a number (``milestones=[75, 90]``), and numbers may be numpy's.

    Args:
        threat: threat model of the training's attack; or its eps in Linf, such as '8/255', for the program's steps.
        synthetic: the record of the generated images beside the real ones; None for none.
        init: the record of the weights that the training starts from; None for random ones.
        **options: the fields of `RecipeOptions`, such as ``model``, ``epochs`` and ``lr``; the ``help`` of each says
            its meaning and unit, and its bounds are checked.

    Raises:
        ValueError: if an option is of another type, out of its bounds or not one of its choices; the message has all
            of them in one line.
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    synthetic: dict[str, Any] | None = None
    init: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, (kind, _) in options_of(type(self)).items():
            object.__setattr__(self, name, as_typed(kind, getattr(self, name)))
        if not isinstance(self.threat, ThreatModel):
            eps, of_one = as_threat(self.threat).eps, ONE_STEP.get(str(self.objective))
            object.__setattr__(self, 'threat', ThreatModel(eps=eps) if of_one is None else ThreatModel(
                eps=eps, step=of_one * eps, steps=1))
        records = (kind_fault(name, dict[str, Any] | None, getattr(self, name)) for name in ('synthetic', 'init'))
        # a notebook's data set has any name
        if wrong := [text for text in (*records, *faults(self), *threat_faults(self.objective, self.threat))
                     if text and not text.startswith('unknown --dataset')]:
            raise ValueError(' '.join('; '.join(wrong).split()))

    def total_steps(self, steps_per_epoch: int) -> int:
        """Returns the number of optimizer steps of the whole run."""
        steps = self.epochs * steps_per_epoch
        return min(steps, self.max_steps or steps)

    def record(self) -> dict[str, Any]:
        """Returns the recipe as JSON keeps it; equal records give equal weights."""
        return {**vars(self), 'threat': self.threat.record(), 'compile': bool(self.compile),
                'act_share': self.act_share if self.act else None,
                # None is what a run before these options has.
                **{name: None for name in LATER if getattr(self, name) == getattr(_DEFAULTS, name)}}


_DEFAULTS = RecipeOptions()


def faults(options: RecipeOptions) -> list[str]:
    """Returns what is wrong with each value by itself, bounds and choices, and with those that do not fit together."""
    known = options_of(type(options)).items()
    if wrong := [text for name, (kind, _) in known if (text := kind_fault(name, kind, getattr(options, name)))]:
        return wrong
    found = (option.fault(name, getattr(options, name)) for name, (_, option) in known)
    return [*(text for text in found if text is not None), *_misfits(options), *_without_effect(options)]


def _without_effect(options: RecipeOptions) -> Iterable[str]:
    """Yields what options are set that have no effect without another."""
    for name, (_, option) in options_of(type(options)).items():
        value = getattr(options, name)
        if option.has_effect(options) or value == getattr(_DEFAULTS, name):
            continue
        (other, values), *_ = option.needs.items()
        flag = flag_of(name)
        given = negated(flag) if value is False else flag + ('' if value is True else f' {value}')
        yield f'{given} has no effect ' + (
            f'with {flag_of(other)} {getattr(options, other)}; expected one of {", ".join(values)}' if values else
            f'without {" or ".join(map(flag_of, option.needs))}; give both or neither')


def threat_faults(objective: str, threat: ThreatModel) -> Iterable[str]:
    """Yields what is wrong with the threat model of an objective whose attack has one step."""
    if str(objective) in ONE_STEP and threat.steps != 1:  # what is no text is a fault of its own
        yield (f'--objective {objective} has one step and the threat model {threat.steps}; expected steps 1, with a '
               f'step of {ONE_STEP[objective]} eps')
    if objective == 'n-fgsm' and threat.norm != 'Linf':
        yield f'--norm {threat.norm} does not work with --objective n-fgsm, whose noise is in Linf; expected Linf'


def numbers(text: str) -> list[float]:
    """Returns the numbers of a text with commas, [] if it is none of positive numbers."""
    parts = split_commas(text)
    found = [float(part) for part in parts if re.fullmatch(r'\d{1,9}(\.\d{1,9})?', part)]
    return found if len(found) == len(parts) and all(found) else []


def _misfits(options: RecipeOptions) -> Iterable[str]:
    """Yields what is wrong with the values of options that do not fit together."""
    epochs = options.epochs
    for option, name, *values in (
            ('freeze_bn', 'attack_bn', 'eval'), ('freeze_bn', 'sync_bn', False), ('freeze_bn', 'clean_pass', 'none'),
            ('freeze_bn', 'bn_momentum', None), ('fsdp', 'optimizer', 'sgd', 'adamw'), ('fsdp', 'awp', 0),
            ('fsdp', 'mixed_precision', 'no', 'bf16'), ('cuda_graphs', 'accumulate', 1),
            ('cuda_graphs', 'fsdp', False)):
        if getattr(options, option) and getattr(options, name) not in values:
            wanted = ' or '.join(map(str, values)) if values[0] else f'no {flag_of(name)}'
            yield f'{flag_of(name)} {getattr(options, name)} does not work with {flag_of(option)}; expected {wanted}'
    if options.cuda_graphs and options.compile is False:
        yield '--no-compile does not work with --cuda-graphs, which compiles; expected one of them'
    if options.aa in POLICIES_WITH_CROP and options.pad_mode != 'zeros':
        yield (f'--pad-mode {options.pad_mode} does not work with --aa {options.aa}, which has its own crop; expected '
               'zeros')
    if options.act is None and options.act_share != 'network':
        yield f'--act-share {options.act_share} without --act; expected the activation to share, such as pssilu'
    if options.milestones is not None:
        found = numbers(options.milestones)
        if options.schedule != 'piecewise':
            yield (f'--milestones {options.milestones} with --schedule {options.schedule}; expected piecewise, or no '
                   '--milestones')
        elif not found:
            yield f'--milestones {options.milestones}; expected epochs above 0, with commas, such as 75,90'
        elif max(found) >= epochs:
            half = ','.join(f'{epochs * share:g}' for share in (0.5, 0.75))
            yield (f'--milestones {options.milestones} is past the end; expected epochs before --epochs {epochs}: give '
                   f'--milestones too, such as {half}')
    for name in ('pct_start', 'momentum_cycle'):
        if getattr(options, name) is not None and options.schedule not in RISE:
            yield (f'{flag_of(name)} {getattr(options, name)} with --schedule {options.schedule}; expected '
                   f'{" or ".join(RISE)}')
    if options.momentum_cycle is not None:
        ends = numbers(options.momentum_cycle)
        if len(ends) != 2 or not ends[0] <= ends[1] < 1 or options.optimizer != 'sgd':
            yield (f'--momentum-cycle {options.momentum_cycle} with --optimizer {options.optimizer}; expected two '
                   'numbers below 1, the smaller first, such as 0.85,0.95, and sgd')
    if options.warmup_epochs and options.schedule in RISE:
        yield (f'--warmup-epochs {options.warmup_epochs} with --schedule {options.schedule}, which rises by itself; '
               'expected one of the two: --pct-start says how long the schedule does')
    if options.swa and options.ema:
        yield f'--swa {options.swa} with --ema {options.ema}; expected one average'
    if options.min_lr > options.lr and options.schedule != 'constant':
        by_default = ' by default' if options.min_lr == _DEFAULTS.min_lr else ''
        yield (f'--min-lr is {options.min_lr}{by_default}, above --lr {options.lr}, so that the learning rate would '
               'rise; expected at most that: give --min-lr too')
    for name, most in (('swa', epochs), ('warmup_epochs', epochs), ('eps_warmup_epochs', epochs),
                       ('awp_warmup_epochs', epochs)):
        if getattr(options, name) > most:
            yield (f'{flag_of(name)} is {getattr(options, name)}, past the end; expected at most --epochs {epochs}: '
                   f'give {flag_of(name)} too')
    if options.val_attack is not None and not re.fullmatch(r'c[ew]-[1-9]\d{0,3}', options.val_attack):
        yield f'--val-attack {options.val_attack} has no number of steps; expected one such as ce-10'
