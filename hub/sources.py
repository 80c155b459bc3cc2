"""Opens what a user names: a run, a bundle or a model, its data and its threat model."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from torch import nn

from timm_paf.attacks import ThreatModel, frozen_view, parse_fraction
from timm_paf.convert import NETWORK_FAULTS, create_converted
from timm_paf.data import DATASETS, ImageSet, IndexedImages, load_dataset, open_images
from timm_paf.data.indexed import evaluation_transform
from timm_paf.data.timm_sets import INDEXED
from timm_paf.files import is_of_machine, read_record, sha256
from timm_paf.normalize import normalize_input, statistics_of
from timm_paf.norms import NORMS
from timm_paf.speed import to_channels_last
from timm_paf.training.option import flag_of
from timm_paf.training.run_directory import latest_checkpoint
from timm_paf.weights import find_weights, list_weights, load_bundle, read_bundle
from timm_paf.weights.initial import create_pretrained
from timm_paf.weights.size_limit import SizeLimit
from timm_paf.wording import did_you_mean, first_line_of, reason_of

from .chosen_images import parse_images, record_text
from .imagenet import open_board, preprocessing
from .record_check import check_run
from .robustbench_names import Entry, entry_names, find_entry, load_entry, may_be_entry


def read_run(path: Path) -> dict[str, Any]:
    """Reads the record of a finished run.

    Raises:
        FileNotFoundError: if there is no record.
        ValueError: if the record is damaged or foreign, or the run has not finished.
    """
    run = read_record(path / 'run.json')
    if not {'status', 'architecture', 'num_classes', 'recipe', 'data'} <= run.keys():
        raise ValueError(f'{path}/run.json is not of train_robust.py; expected architecture, recipe and data')
    if run['status'] != 'complete':
        newest = latest_checkpoint(path)
        raise ValueError(f'{path} has not finished; ' + (
            'it has no checkpoint yet, wait for it or start its training command again' if newest is None else
            f'run its training command again, it resumes from {newest.name}'))
    return check_run(run, path / 'run.json')


def load_run(path: Path) -> nn.Module:
    """Loads the trained network of a finished run, in eval mode.

    Raises:
        FileNotFoundError: if its weights are missing.
        ValueError: if the weights are damaged or do not fit the architecture.
    """
    run = read_run(path)
    weights = path / 'model.safetensors'
    if not weights.is_file():
        raise FileNotFoundError(f'{weights} is missing; run the training command again')
    expected, found = run.get('files', {}).get(weights.name), sha256(weights)
    if expected not in (None, found):
        raise ValueError(f'{weights} is damaged: sha256 {found}, expected {expected}; its training command '
                         'writes them anew while it has a checkpoint')
    if not timm.is_model(run['architecture']):
        raise ValueError(f'{path}/run.json: architecture is {run["architecture"]}; expected a model of this timm_paf '
                         f'or of timm {timm.__version__}; pip install --upgrade timm-paf timm')
    recipe = run['recipe']
    try:
        model: Any = create_converted(run['architecture'], recipe.get('act'), recipe.get('act_share'),
                                      recipe['act_kwargs'], within=SizeLimit(weights), num_classes=run['num_classes'],
                                      **(recipe.get('model_kwargs') or {}))
        model.load_state_dict(safetensors.torch.load_file(weights))
    except safetensors.SafetensorError as error:
        raise ValueError(f'{weights} is damaged ({error}); it may have been cut short') from None
    except NETWORK_FAULTS as error:
        if is_of_machine(error):
            raise
        raise ValueError(f'{weights} does not fit {run["architecture"]}: {reason_of(error, 1000)}') from error
    model.pretrained_cfg = model.default_cfg = trained_cfg(model.pretrained_cfg, run)
    network: nn.Module = model.eval()
    return network


def trained_cfg(cfg: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Returns timm's configuration of a run's weights: what the network is, and the images that it was trained on.

    Args:
        cfg: the ``pretrained_cfg`` that timm gave the network. Its tag, papers, addresses, classes and normalisation
            are of other weights; of these nothing is taken.
        run: the content of run.json.
    """
    kind = run['recipe']['dataset'].partition('/')[0]
    decoded = kind in {name.partition('/')[0] for name in INDEXED}
    side = run['recipe']['image_size'] if decoded else 32
    # Images of one's own in a loop of one's own are of the size that the record says, or of the network's usual one.
    size = tuple(run['data'].get('image_size') or (
        (3, side, side) if decoded or kind in DATASETS else cfg['input_size']))
    kept = {key: cfg[key] for key in (
        'architecture', 'first_conv', 'classifier', 'fixed_input_size', 'min_input_size', 'pool_size') if key in cfg}
    if cfg['input_size'] != size:
        kept.pop('pool_size', None)  # that of the last features, so of the input
    found: dict[str, Any] = PretrainedCfg(
        **kept, num_classes=run['num_classes'], input_size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
        interpolation='bicubic', crop_pct=0.875 if decoded else 1.0,  # as `IndexedImages.centre`, or all of it
        label_names=run['data'].get('label_names')).to_dict()
    return found


def load(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a model in eval mode, with what its files or the zoo say of it.

    Args:
        source: a run, a bundle, or the name of a model with weights, in timm or in RobustBench.

    Returns:
        The model, and a dict with architecture, dataset, threat and sha256 (of its file, or of the file that its
        weights would make). The dataset is None and the threat {} for timm's other models, where no file says them.

    Raises:
        ValueError, FileNotFoundError: if ``source`` is no run, bundle or model with weights, or is damaged.
    """
    path = Path(source)
    if (path / 'config.json').is_file():
        config, model = read_bundle(path), load_bundle(path)
        about = {'architecture': config['architecture'], 'dataset': config['timm_paf']['dataset'],
                 'threat': config['timm_paf']['threat_model'],
                 'label_names': config['pretrained_cfg'].get('label_names')}
    elif (path / 'run.json').is_file():  # a bundle, which holds a run.json too, is taken above
        run, model = read_run(path), load_run(path)
        about = {'architecture': run['architecture'], 'dataset': run['data']['name'], 'threat': run['recipe']['threat'],
                 'label_names': run['data'].get('label_names')}
    elif timm.is_model(source):
        if not timm.models.is_model_pretrained(source):
            raise ValueError(f'{source} has no weights; expected a run, a bundle, or a name of timm.list_pretrained()')
        named = find_weights(source)
        if named is not None and named.bundle:
            return load(str(named.bundle))
        model = takes_unit_images(create_pretrained(source, 'name a run or a bundle')).eval()
        about = {'architecture': source, 'dataset': None, 'threat': {}} if named is None else {
            'architecture': named.model, 'dataset': named.dataset,
            'threat': {'norm': named.norm, 'eps': named.eps} if named.eps else {},
            'preprocessing': named.preprocessing}
        return model, {**about, 'sha256': sha256_of(model)}
    else:
        found = find_name(source)
        if isinstance(found, str):
            return load(found)
        model, about = load_entry(found)
        return model, {**about, 'sha256': sha256_of(model)}
    return model, {**about, 'sha256': sha256(path / 'model.safetensors')}


def sha256_of(model: nn.Module) -> str:
    """Returns the sha256 of the file that the weights of a model would make."""
    return hashlib.sha256(safetensors.torch.save(
        # safetensors takes no two tensors of one memory
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}
    )).hexdigest()


def find_name(source: str) -> str | Entry:
    """Returns timm's name of a model that timm or RobustBench names, else its entry in RobustBench's own zoo.

    Raises:
        ValueError: if RobustBench has several networks of that name, or does not start.
        FileNotFoundError: if neither has one.
        ModuleNotFoundError: if RobustBench, which may have one, lacks a package.
    """
    found = [source] if timm.is_model(source) else [
        weights.name for weights in list_weights() if weights.robustbench and source in (
            weights.robustbench, f'{weights.dataset}/{weights.norm}/{weights.robustbench}')]
    if len(found) > 1:  # RobustBench tells these apart by data set and threat model
        raise ValueError(f'{source} is several networks of RobustBench; expected one of {", ".join(found)}')
    nothing = f'{source} is no run (run.json), no bundle (config.json), and no model of timm'
    theirs: list[str] | None = []
    try:
        if not found and may_be_entry(source):
            if entry := find_entry(source):
                return entry
            theirs = entry_names()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{nothing}; RobustBench, which may have it, lacks {error.name}', name=error.name
                                  ) from error
    except ImportError as error:
        raise ValueError(f'{nothing}; RobustBench, which may have it, does not start: {reason_of(error)}; expected the '
                         "versions of pip install 'timm-paf[robustbench]'") from error
    if not found:
        install = " (not installed: pip install 'timm-paf[robustbench]')" if theirs is None else ''
        known = {*timm.list_models(), *(theirs or ()), *(name for weights in list_weights() for name in (
            weights.name, weights.robustbench, f'{weights.dataset}/{weights.norm}/{weights.robustbench}') if name)}
        raise FileNotFoundError(f'{nothing} or RobustBench{install}{did_you_mean(source, known)}')
    return found[0]


def takes_unit_images(model: nn.Module) -> nn.Module:
    """Returns a network of timm with the normalisation of its ``pretrained_cfg`` inside, so that eps means the same.

    Networks for images in [0, 1], which those of this package are and those that RobustBench names in timm, stay as
    they are.
    """
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    if cfg and not isinstance(getattr(model, 'normalize', None), nn.Module):
        normalize_input(model, statistics_of(cfg))
    return model


def choose_threat(args: argparse.Namespace, trained: dict[str, Any], dataset: str) -> ThreatModel:
    """Returns the threat model asked for, else the one of the training, else that of RobustBench's board.

    Raises:
        ValueError: if neither says an eps for the norm, or the eps is no number.
    """
    norm = args.norm or trained.get('norm', 'Linf')
    eps = args.eps
    if eps is None and norm == trained.get('norm') and trained.get('eps') != '0':
        eps = trained['eps']
    if eps is None and norm == 'Linf':
        eps = '4/255' if dataset == 'imagenet' else '8/255'
    if eps is None:
        raise ValueError(f'{args.source} says no eps for {norm}; expected --eps, such as 0.5')
    step = None if args.attack_step is None else parse_fraction(args.attack_step)
    return ThreatModel(norm, parse_fraction(eps), step)


def choose_threats(args: argparse.Namespace, trained: dict[str, Any], dataset: str) -> list[ThreatModel]:
    """Returns the threat models of ``--norms``, else the one of `choose_threat`.

    Raises:
        ValueError: if ``--norms`` is not such as Linf=8/255,L2=0.5, or stands beside ``--norm`` or ``--eps``.
    """
    if args.norms is None:
        return [choose_threat(args, trained, dataset)]
    given = [flag_of(name) for name in ('norm', 'eps', 'attack_step') if getattr(args, name)]
    if given:
        raise ValueError(f'--norms and {", ".join(given)} are given; expected one of both: --norms says the eps of '
                         'each norm, and a step is a quarter of it')
    pairs = [pair.partition('=') for pair in args.norms.split(',')]
    names = [norm for norm, _, _ in pairs]
    if not all(eps and norm in NORMS for norm, _, eps in pairs) or len(set(names)) < len(names):
        raise ValueError(f'--norms is {args.norms!r}; expected different ones of {", ".join(NORMS)}, each with its '
                         'eps, such as Linf=8/255,L2=0.5,L1=12')
    return [ThreatModel(norm, parse_fraction(eps)) for norm, _, eps in pairs]


def add_data_options(parser: argparse._ActionsContainer) -> None:
    """Adds the options that say where a data set is."""
    parser.add_argument('--data-dir', help='directory with the data set; default of CIFAR: CIFAR10_ROOT, '
                                           'CIFAR100_ROOT, then data, ~/data, ~/datasets')
    parser.add_argument('--download', action=argparse.BooleanOptionalAction, default=False,
                        help='let torchvision fetch what --data-dir lacks')


def choose_data(
        args: argparse.Namespace, about: dict[str, Any], model: nn.Module) -> tuple[ImageSet, range, dict[str, str]]:
    """Returns test images, the places of those that ``--images`` names among them, and for evaluation.json which these
    are and how they were made ready.

    Images of any size are resized and cut as ``--preprocessing`` says, else as the entry of the zoo, else as timm's
    configuration of the network's weights.

    Raises:
        ValueError, FileNotFoundError: if there are no images, nothing says which data set to take, or ``--images`` has
            a range of images of any size.
    """
    asked = parse_images(args.images)
    dataset = args.dataset or about['dataset']
    if dataset is None:
        raise ValueError(f'{args.source} does not say its data set; expected --dataset '
                         + '|'.join((*DATASETS, *INDEXED)))
    name = args.preprocessing or about.get('preprocessing')
    if dataset in DATASETS:
        if (trained_on := about['dataset']) in DATASETS and trained_on != dataset:
            raise ValueError(f'{args.source} was trained on {trained_on}, and the classes of {dataset} are others; '
                             f'expected {trained_on}')
        if args.preprocessing:
            raise ValueError(f'--preprocessing is for images of any size and those of {dataset} have one; leave it out')
        data = load_dataset(dataset, args.data_dir, train=False, download=args.download)
        places = range(len(data))[asked]
        return data, places, {'images': record_text(places)}
    if asked.start is not None:
        which = "the first ones of RobustBench's list" if dataset == 'imagenet' else 'evenly spaced ones'
        raise ValueError(f'--images is {args.images} and those of {dataset} are {which}; expected their number')
    images: IndexedImages = open_board(args.data_dir, asked.stop) if dataset == 'imagenet' else open_images(
        dataset, args.data_dir, train=False, download=args.download)
    trained = about.get('label_names')
    if trained is not None and dataset == about['dataset'] and list(trained) != images.label_names():
        apart = next((pair for pair in zip(trained, images.label_names()) if pair[0] != pair[1]), None)
        such = f', such as {apart[1]} in place of {apart[0]}' if apart else ''
        raise ValueError(f'{args.source} was trained on {len(trained)} classes and {dataset} has {images.num_classes}'
                         f'{such}; expected the same ones')
    if dataset != 'imagenet':
        images = images.spread(asked.stop)
    if name is None:
        cfg = resolve_data_config(pretrained_cfg=getattr(model, 'pretrained_cfg', {}))
        of_timm = cfg['input_size'][-1], cfg['crop_pct'], cfg['interpolation'], cfg['crop_mode']
        name, transform = f'timm: {", ".join(map(str, of_timm))}', evaluation_transform(*of_timm)
    else:
        transform = preprocessing(name)
    which = f'first {len(images)}' if dataset == 'imagenet' else f'{len(images)} evenly spaced'
    return (ImageSet(dataset, images.transformed(transform), images.labels, images.num_classes,
                     label_names=tuple(images.label_names())), range(len(images)),
            {'images': which, 'preprocessing': name})


def to_device(source: str, model: nn.Module, data: ImageSet, device: str) -> nn.Module:
    """Returns the network for attacks on its device.

    Raises:
        ValueError: if there is no such device, or the network has other classes than the data.
    """
    if getattr(model, 'num_classes', data.num_classes) != data.num_classes:
        raise ValueError(f'{source} has {model.num_classes} classes; expected the {data.num_classes} of {data.name}')
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {device} is not to be had here: {first_line_of(error)}') from error
    return frozen_view(to_channels_last(model))
