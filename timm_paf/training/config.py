"""The command line of the training program: its options, recipe files, and the recipe that they mean."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import timm
from accelerate.tracking import get_available_trackers
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from ..attacks import ThreatModel, parse_fraction
from ..data import DATASETS, POLICIES_WITH_CROP, Augmentation
from ..data.timm_sets import name_fault
from ..files import hub_directory
from ..norms import NORMS
from ..objectives import ONE_STEP
from ..weights.bundle_config import check_act_kwargs, check_model_args
from ..wording import did_you_mean, reason_of
from .option import GROUPS, Option, flag_of, is_flag, kind_fault, negated, options_of
from .recipe import Recipe, RecipeOptions, faults, threat_faults
from .recipe_file import check_recipe_file

__all__ = ['Config', 'check', 'load_recipe', 'parse', 'plain_flags']

EXAMPLE = 'example: accelerate launch %s --config fastat_ema --model resnet18_pssilu --data-dir data --output runs/r18'


@dataclass(frozen=True, kw_only=True)
class Config(RecipeOptions):
    """All options of the program. A recipe file has the same names with underscores."""

    data_dir: Annotated[str | None, Option('data', (
        'directory with the data set; default: CIFAR10_ROOT or CIFAR100_ROOT, then data, ~/data, ~/datasets'))] = None
    download: Annotated[bool, Option('data', 'let torchvision fetch what --data-dir lacks')] = False
    synthetic: Annotated[str | None, Option('data', (
        'PATH[:FRACTION] of generated images beside the real ones; default: half'))] = None
    skip_unreadable: Annotated[bool, Option('data', "leave out images that can't be read")] = False
    init: Annotated[str | None, Option('model', (
        "weights to start from: pretrained (timm's own of --model), a name of timm.list_pretrained(), a file, a bundle "
        'or a run; default: random ones'))] = None
    norm: Annotated[str, Option('attack', 'norm of the perturbation', choices=tuple(NORMS))] = 'Linf'
    eps: Annotated[str | float, Option('attack', 'radius, exact, for images in [0, 1]; 0 trains plainly')] = '8/255'
    attack_step: Annotated[str | float | None, Option('attack', (
        'step size; default: a quarter of eps, of fgsm-rs 1.25 eps, of n-fgsm eps'))] = None
    attack_steps: Annotated[int, Option('attack', 'steps of PGD; of fgsm-rs and n-fgsm always 1')] = 10
    output: Annotated[str, Option('run', 'run directory: new, or that of the same run')]
    max_minutes: Annotated[float | None, Option('run', 'stop after this many minutes with a checkpoint',
                                                above=0)] = None
    checkpoint_steps: Annotated[int, Option('run', 'checkpoint every so many steps, beside the end of each epoch',
                                            least=0)] = 0
    keep: Annotated[int, Option('run', 'number of checkpoints that stay', above=0)] = 2
    resume: Annotated[str, Option('run', 'auto (from the newest checkpoint in --output), never, or a checkpoint '
                                         'directory')] = 'auto'
    resume_anyway: Annotated[bool, Option('run', 'also with another recipe or number of processes')] = False
    trackers: Annotated[list[str] | None, Option('run', "'[tensorboard, wandb]', through Accelerate")] = None


def plain_flags(args: Sequence[str], names: Iterable[str]) -> list[str]:
    """Returns the arguments with ``--flag true`` and ``--flag=false`` as ``--flag`` and ``--no-flag``.

    Args:
        args: arguments of a command line.
        names: names of the flags, without ``--``, with hyphens or underscores.
    """
    known = {flag_of(name) for name in names}
    found: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition('=')
        if flag in known and equals and value.lower() in ('true', 'false'):
            found.append(flag if value.lower() == 'true' else negated(flag))
        elif found and found[-1] in known and arg.lower() in ('true', 'false'):
            found[-1] = found[-1] if arg.lower() == 'true' else negated(found[-1])
        else:
            found.append(arg)
    return found


def parse(args: Sequence[str], prog: str = 'train_robust.py', description: str = '') -> Config:
    """Returns the configuration from flags and --config files, flags last.

    Args:
        args: arguments of the command line.
        prog: name of the program, for --help.
        description: what the program does, for --help.

    Raises:
        ValueError: for an unknown name, with the nearest known one, or a value of another type.
    """
    options = options_of(Config)
    args = plain_flags(_recipe_paths(args), (name for name, (kind, _) in options.items() if is_flag(kind)))
    try:
        found = _parser(prog, description).parse_args(args)
    except ArgumentError as error:
        text = reason_of(error, None)
        value = re.match(r'Parser key "(\w+)": .*?(?:Got|Given) value: ?(.*)', text)
        if value and value[1] in options:
            raise ValueError(kind_fault(value[1], options[value[1]][0], value[2]) or (
                f'{flag_of(value[1])} is {value[2][:80]}; expected a text, in quotes where YAML takes it for something '
                'else')) from None
        wrong = re.search(r"unrecognized arguments: -*([\w-]+)|Option '([\w-]+)' is not accepted", text)
        near = did_you_mean((wrong[1] or wrong[2]).replace('-', '_'), [*options, 'config']) if wrong else ''
        if wrong and wrong[1]:  # the name is of the command line, where names have hyphens
            near = re.sub(r'(?<=mean ).*(?=\?)', lambda names: ' or '.join(
                flag_of(name) for name in names[0].split(' or ')), near)
        raise ValueError(f'{text[:500]}{near or "; see --help"}') from None
    except RecursionError:
        raise ValueError('a value has too many brackets in one another; see --help') from None
    values = {name: getattr(found, name) for name in options}
    config = Config(**values | {
        name: os.path.expanduser(values[name]) for name in ('output', 'resume', 'init') if values[name] is not None})
    return _without_needless(config, {
        flag.replace('-', '_') for arg in args for flag in re.findall(r'^--(?:no-)?([\w-]+)', arg)})


@functools.lru_cache
def _parser(prog: str, description: str) -> ArgumentParser:
    """Returns the parser of a program; to make it takes longer than what it is used for, in a study or a notebook."""
    program = '-m timm_paf train' if prog == 'timm-paf train' else prog
    parser = ArgumentParser(prog=prog, description=description, epilog=EXAMPLE % program, exit_on_error=False,
                            allow_abbrev=False)  # what is looked at before has to know each option
    parser.add_argument('--config', action='config', help=(
        'recipe file with any of these options, flags override it: a YAML, or the name of a shipped one '
        f'({", ".join(shipped_recipes())})'))
    groups = {name: parser.add_argument_group(f'{name}: {about}') for name, about in GROUPS.items()}
    defaults = {each.name: _default(each) for each in fields(Config)}
    for name, (kind, option) in options_of(Config).items():
        text = f'{option.help} ({", ".join(option.names())})' if option.choices else option.help
        how: dict[str, Any] = {'required': True} if defaults[name] is MISSING else {'default': defaults[name]}
        how |= {'action': ActionYesNo(no_prefix='no-')} if is_flag(kind) else {'type': kind}
        groups[option.group].add_argument(flag_of(name), help=text, **how)
    return parser


def _default(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default


def _without_needless(config: Config, given: set[str]) -> Config:
    """Returns a configuration without what only a recipe says where the options ``given`` took away what it needs."""
    defaults = {each.name: _default(each) for each in fields(Config)}
    gone: dict[str, Any] = {
        name: defaults[name] for name, (_, option) in options_of(Config).items()
        if name not in given and given & option.needs.keys() and not option.has_effect(config)}
    config = replace(config, **gone)
    for name, needed in (('synthetic_augment', {'synthetic'}), ('act_start', {'init', 'act'})):
        if name not in given and given & needed and all(getattr(config, each) is None for each in needed):
            config = replace(config, **{name: defaults[name]})
    return config


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that come along, by name."""
    return {path.stem: path for path in sorted((hub_directory() / 'recipes').glob('*.yaml'))}


def _recipe_paths(args: Sequence[str]) -> list[str]:
    """Returns the arguments with the file of a shipped recipe where --config names one."""
    found = list(args)
    for i, arg in enumerate(found):
        before, name = ('', arg) if i and found[i - 1] == '--config' else arg.split('=', 1) if arg.startswith(
            '--config=') else ('', '')
        if not name:
            continue
        if (file := Path(os.path.expanduser(name))).is_file():
            check_recipe_file(file)
            found[i] = f'{before}={file}' if before else str(file)
            continue
        shipped = shipped_recipes()
        if name not in shipped:
            raise ValueError(f'--config {name} is no file; expected a YAML, or one of {", ".join(shipped)}'
                             + did_you_mean(Path(name).stem, shipped))
        path = os.path.relpath(shipped[name]) if shipped[name].is_relative_to(Path.cwd()) else str(shipped[name])
        found[i] = f'{before}={path}' if before else path
    return found


def load_recipe(source: str | Path, **changes: Any) -> Recipe:
    """Returns a recipe for a loop of one's own, ``load_recipe('fastat_ema', model='resnet18_pssilu', epochs=1)``.

    Args:
        source: name of a shipped recipe, or a YAML file with options of the program.
        **changes: other values of its options, as `Recipe` takes them, with norm, eps, attack_step and attack_steps
            in place of a threat model.

    Raises:
        TypeError: for an unknown option.
        ValueError: if there is no such recipe, for every value that can't be meant, or if it names generated images or
            weights to start from, which a loop of one's own opens itself.
    """
    known = options_of(Config)
    if unknown := next((name for name in changes if name not in known), None):
        near = did_you_mean(unknown, known) if unknown != 'threat' else (
            '; expected norm, eps, attack_step and attack_steps')
        raise TypeError(f'load_recipe has no option {unknown}{near}')
    config = _without_needless(
        replace(parse(['--config', str(source), '--output', '']), **changes), set(changes))
    if given := [f'{name}={getattr(config, name)!r}' for name in ('synthetic', 'init') if getattr(config, name)]:
        raise ValueError(f'{source} has {" and ".join(given)}, which a loop opens itself (by '
                         'timm_paf.data.open_synthetic and timm_paf.weights.open_weights); expected '
                         f'{given[0].partition("=")[0]}=None here')
    if not isinstance(config.dataset, str):
        raise ValueError(f'dataset is {config.dataset!r}; expected a name')
    if known['dataset'][1].fault('dataset', config.dataset) is None:  # a loop opens them itself, so without a directory
        return check(replace(config, data_dir=config.data_dir or '.') if config.dataset not in DATASETS else config)
    # Images of a loop's own have any name and size; the rest of the recipe is checked as for others.
    usual = replace(config, dataset=Config.dataset, image_size=Config.image_size, skip_unreadable=False)
    return replace(check(usual), dataset=config.dataset, image_size=config.image_size)


def check(config: Config) -> Recipe:
    """Returns the recipe that a configuration means.

    Raises:
        ValueError: for every value that can't be meant, in one line.
    """
    wrong = faults(config) + [text for text in (*_combinations(config), _trackers(config)) if text]
    if not timm.is_model(config.model):
        wrong.insert(0, f'unknown model {config.model!r}; expected a name of timm.list_models()'
                     + did_you_mean(config.model, timm.list_models()))
    threat = None
    try:
        threat = _threat(config) if config.norm in NORMS else None
        wrong += threat_faults(config.objective, threat) if threat else ()
    except ValueError as error:
        wrong.append(str(error))
    if wrong or threat is None:
        raise ValueError(' '.join('; '.join(dict.fromkeys(wrong)).split()))
    shared = {each.name: getattr(config, each.name) for each in fields(RecipeOptions)}
    return Recipe(**shared, threat=threat)


def _combinations(config: Config) -> Iterable[str]:
    """Yields what is wrong with options that do not fit together."""
    if config.aa:
        try:
            Augmentation(config.image_size, config.aa)
        except ValueError as error:
            yield str(error)
    if fault := name_fault(config.dataset):
        yield fault
    elif config.dataset not in DATASETS and options_of(Config)['dataset'][1].fault('dataset', config.dataset) is None:
        if config.data_dir is None and not config.dataset.startswith('hfds/'):
            yield (f'--dataset {config.dataset} needs a directory; expected --data-dir DIR, for folder with '
                   'DIR/train/CLASS/*.jpg')
        for name, given, why in (
                ('synthetic', config.synthetic is not None, 'generated images need real ones of their size'),
                ('objective', config.objective in ONE_STEP, 'it is looked at with training images from memory'),
                ('aa', config.aa in POLICIES_WITH_CROP, 'it shifts by pixels of small images'),
                ('pad_mode', config.pad_mode != 'zeros', 'its crops are not padded')):
            if given:
                yield (f'{flag_of(name)} {getattr(config, name)} does not work with --dataset '
                       f'{config.dataset}: {why}; expected {", ".join(DATASETS)} with it')
    if config.dataset in DATASETS and config.image_size != RecipeOptions.image_size:
        yield (f'--image-size {config.image_size} has no effect with --dataset {config.dataset}, whose images are '
               '32 x 32; expected none, or another data set')
    if config.dataset in DATASETS and config.skip_unreadable:
        yield f'--skip-unreadable has no effect with --dataset {config.dataset}, which is read whole; expected none'
    if config.synthetic is None and not config.synthetic_augment:
        yield '--no-synthetic-augment has no effect without --synthetic; give both or neither'
    others = {'num_classes': 'the images give it', 'in_chans': 'images have the 3 of RGB',
              'act_kwargs': '--act-kwargs give it'}
    for name, why in others.items():
        if name in config.model_kwargs:
            yield f'--model-kwargs has {name}; expected other arguments: {why}'
    rest = {name: value for name, value in config.model_kwargs.items() if name not in others}
    for check_arguments in (functools.partial(check_act_kwargs, config.act_kwargs, '--act-kwargs'),
                            functools.partial(check_model_args, rest, '--model-kwargs', but=others)):
        try:
            check_arguments()
        except ValueError as error:
            yield str(error)
    if config.act_start and config.act is None and config.init is None:
        yield (f'--act-start {config.act_start} without --act or --init; expected the activation that starts, such as '
               '--act pssilu, or weights')


def _trackers(config: Config) -> str:
    known = [str(tracker) for tracker in get_available_trackers()]
    missing = sorted(set(config.trackers or ()) - set(known))
    return (f'--trackers {", ".join(missing)}: unknown or not installed; expected some of '
            f'{", ".join(known) or "none"}, or pip install {" ".join(missing)}') if missing else ''


def _threat(config: Config) -> ThreatModel:
    one_step = ONE_STEP.get(config.objective)
    step = None if config.attack_step is None else parse_fraction(config.attack_step)
    if one_step and step is None:
        step = parse_fraction(config.eps) * one_step
    threat = ThreatModel(config.norm, parse_fraction(config.eps), step, 1 if one_step else config.attack_steps)
    if threat.eps and not threat.steps:
        raise ValueError(f'--attack-steps is 0 with eps {threat.eps}; expected at least 1, or --eps 0 to train plainly')
    return threat
