"""The zoo of every named set of weights: where it is, what it was trained on, what was measured of it and by whom.

`timm.create_model` finds weights by the name of the model (``wrn28_10_pssilu``) or with the tag
(``wrn28_10_pssilu.dai2021_cifar10_linf``) and ``pretrained=True``; `robustbench.utils.load_model` by
``wrn28_10_pssilu`` or ``wrn28_10_pssilu.dai2021``, the data set and the threat model.

The bundles in ``hub/models``, which a wheel carries too, are found by themselves, with the numbers of their
``evaluation.json``: to publish one, add its directory. The published ones are in ``robustbench.json``, a table of
facts that ``python -m hub.publish.zoo`` makes from RobustBench's package.
"""

from __future__ import annotations

import fnmatch
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, load_pretrained, resolve_pretrained_cfg
from torch import Tensor, nn

from ..files import atomic_write, hub_directory, read_json, sha256
from .bundle import bundle_cfg, read_bundle
from .bundle_files import CONFIG, WEIGHTS, read_checksums, read_config
from .checkpoint import Checkpoint, read_checkpoint
from .checkpoint_files import read_file
from .download import download
from .sources import checked_models, only_source, read_checkpoint_path, source_file

__all__ = ['Measured', 'Weights', 'build_model', 'bundled_weights', 'find_weights', 'list_weights', 'network_of',
           'weights_of']

_logger = logging.getLogger(__name__)


# RobustBench's preprocessing of ImageNet (robustbench/data.py) in the words of timm's pretrained_cfg. 'Crop288' crops
# images as they are; timm's nearest is to resize the shorter side to the crop.
_PREPROCESSING: dict[str, dict[str, Any]] = {
    'Res256Crop224': {'interpolation': 'bilinear', 'crop_pct': 0.875},
    'BicubicRes256Crop224': {'interpolation': 'bicubic', 'crop_pct': 0.875},
    'Res224': {'interpolation': 'bilinear', 'crop_pct': 1.0, 'crop_mode': 'squash'},
    'Crop288': {'interpolation': 'bilinear', 'crop_pct': 1.0, 'input_size': (3, 288, 288)}}


@dataclass(frozen=True)
class Measured:
    """An accuracy in percent, with the number of test images, the attack, and who measured it."""

    attack: str
    accuracy: float
    images: int
    by: str


@dataclass(frozen=True)
class Weights:
    """One set of weights. One of ``bundle``, ``gdrive_id``, ``url`` and ``hf_hub_id`` says where it is."""

    model: str
    source: str
    dataset: str
    norm: str
    eps: str  # exact, as '8/255'; '' for corruptions
    training_data: str
    num_classes: int = 10
    seed: int | None = None  # seed of the training, where a record says it
    bundle: Path | None = None
    gdrive_id: str | None = None
    url: str | None = None
    hf_hub_id: str | None = None
    robustbench: str | None = None  # name in RobustBench, if it is a model of RobustBench
    model_args: dict[str, Any] = field(default_factory=dict)  # of the network, as 'normalize', which belong to weights
    preprocessing: str | None = None  # of images of any size, a name of RobustBench such as 'Res256Crop224'
    entry: str = ''  # where the file has several state dicts, the key of these
    sha256: str | None = None  # digest of the file at its source; None where nobody has recorded it yet
    size: int | None = None  # size of that file in bytes
    measured: tuple[Measured, ...] = ()
    paper: str | None = None

    @property
    def tag(self) -> str:
        """The tag of timm's name, ``<source>_<dataset>_<norm>`` in lower case."""
        return f'{self.source}_{self.dataset}_{self.norm}'.lower()

    @property
    def name(self) -> str:
        """The name that timm knows."""
        return f'{self.model}.{self.tag}'

    @property
    def plain_name(self) -> str:
        """The name that RobustBench asks timm for: of the first weights of a model, a data set and a threat model."""
        return f'{self.model}_{self.dataset}_{self.norm}'.lower()

    @property
    def location(self) -> str:
        """The address of the file, for timm and for messages."""
        if self.gdrive_id:
            return f'https://drive.google.com/uc?id={self.gdrive_id}'
        return str(self.bundle / WEIGHTS if self.bundle else self.url or f'hf-hub:{self.hf_hub_id}')

    def cfg(self) -> dict[str, Any]:
        """Returns the entries of timm's ``pretrained_cfg`` that differ from those of the model without weights."""
        if self.bundle:
            return bundle_cfg(read_config(self.bundle / CONFIG), self.bundle)
        source = {'hf_hub_id': self.hf_hub_id} if self.hf_hub_id else {'url': self.location}
        return {**source, 'num_classes': self.num_classes, 'origin_url': self.paper,
                **_PREPROCESSING.get(self.preprocessing or '', {})}


def _published(file: Path) -> tuple[Weights, ...]:
    """Returns the entries of RobustBench's model zoo that the networks here compute, from the table of their facts."""
    found = []
    for row in read_json(file)['entries']:
        images = 5_000 if row['dataset'] == 'imagenet' else 10_000
        measured = [Measured(attack, row[attack], images, 'RobustBench')
                    for attack in ('clean', 'autoattack', 'best known attack', 'corruptions') if attack in row]
        if row['name'] == 'Dai2021Parameterizing':
            measured.append(Measured('autoattack', 61.96, 10_000, 'the paper, whose code has eps 0.031'))
        found.append(Weights(
            row['model'], row['source'], row['dataset'], row['threat'], row['eps'], row['training_data'],
            row['num_classes'], gdrive_id=row['gdrive_id'], robustbench=row['name'], model_args=row['model_args'],
            preprocessing=row.get('preprocessing'), entry=row.get('entry', ''),
            measured=tuple(measured), paper=row['paper']))
    return tuple(found)


def _bundled(path: Path) -> Weights:
    """Returns what the files of a bundle say.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or damaged; the weights themselves are checked when loaded.
    """
    config, run = read_config(path / CONFIG), read_json(path / 'run.json')
    about, synthetic = config['timm_paf'], run['recipe'].get('synthetic')
    measured = []
    if (path / 'evaluation.json').is_file():
        evaluation = read_json(path / 'evaluation.json')
        threat = evaluation['threat_model']
        same = all(threat[key] == about['threat_model'][key] for key in ('norm', 'eps'))
        measured = [
            Measured(attack if same or attack == 'clean' else f'{attack}, {threat["norm"]} {threat["eps"]}',
                     100 * found['correct'] / found['n'], found['n'], 'timm_paf')
            for attack, found in evaluation['attacks'].items()]
    return Weights(
        config['architecture'], path.name.removeprefix(config['architecture']).strip('_-') or 'timm_paf',
        about['dataset'], about['threat_model']['norm'], about['threat_model']['eps'],
        f'{about["dataset"]}, {run["data"]["n"]:,} images' + (' and generated ones' if synthetic else ''),
        config['num_classes'], run['recipe'].get('seed'), path,
        sha256=read_checksums(path).get(WEIGHTS), size=(path / WEIGHTS).stat().st_size,
        measured=tuple(measured))


def bundled_weights(directory: Path) -> tuple[Weights, ...]:
    """Returns what the bundles in a directory say; a damaged one is left out with a warning."""
    found = []
    for config in sorted(directory.glob(f'*/{CONFIG}')):
        try:
            if 'act' not in read_config(config)['timm_paf']:  # a converted network has no name of its own in timm
                found.append(_bundled(config.parent))
        except (OSError, ValueError, LookupError, TypeError) as error:
            warnings.warn(f'{config.parent} is left out of the named weights: {error!r}', stacklevel=2)
    return tuple(found)


_WEIGHTS = (*_published(Path(__file__).with_name('robustbench.json')), *bundled_weights(hub_directory() / 'models'))


def list_weights(filter: str = '*') -> list[Weights]:
    """Returns the named sets of weights whose name matches, as in ``list_weights('*pssilu*')``.

    Args:
        filter: a pattern for `Weights.name` with ``*`` and ``?``, as timm's ``list_models`` takes it.
    """
    return [weights for weights in _WEIGHTS if fnmatch.fnmatch(weights.name, filter)]


def weights_of(model: str) -> list[Weights]:
    """Returns the sets of weights of one model, the default first."""
    return [weights for weights in _WEIGHTS if weights.model == model]


def find_weights(name: str) -> Weights | None:
    """Returns the weights that ``timm.create_model(name, pretrained=True)`` loads; None if the zoo has none.

    Args:
        name: name of a model (``wrn28_10_pssilu``), also with the tag (``wrn28_10_pssilu.dai2021_cifar10_linf``) or
            with data set and threat model (``wrn28_10_pssilu_cifar10_linf``).
    """
    return next((weights for weights in _WEIGHTS if name in (weights.model, weights.name, weights.plain_name)), None)


def network_of(name: str) -> tuple[str, dict[str, Any]]:
    """Returns the network that a name means, without the tag of weights, and the arguments that the weights bring."""
    named = find_weights(name)
    if named is None or name == named.model:
        return name.partition('.')[0], {}
    return named.model, named.model_args


def build_model(
        model_cls: Callable[..., nn.Module], name: str, pretrained: bool = False, pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None, cache_dir: str | Path | None = None,
        convert: Callable[..., dict[str, Tensor]] | None = None, **kwargs: Any,
) -> nn.Module:
    """Builds a model like timm's `build_model_with_cfg`, with weights of this zoo or any file `read_checkpoint` knows.

    Files, bundles and downloads, of the Hub too, are read here: checked, never run, and strict but for a classifier or
    a first convolution of another size, which timm adapts. A source in the overlay takes the place of those that the
    name has. ``checkpoint_path`` of ``timm.create_model`` is read in the same way.

    Raises:
        ConnectionError, FileNotFoundError, ModuleNotFoundError, ValueError: if the weights can't be had.
    """
    read_checkpoint_path()
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, only_source(pretrained_cfg_overlay))
    weights = next((w for w in weights_of(cfg.architecture or name) if w.tag == cfg.tag), None)
    own = weights and not cfg.hf_hub_id and weights.location in (cfg.url, cfg.file)
    named = weights if pretrained and own else None
    # A tag means its network, without its weights too, and so does timm's configuration of them.
    asked = weights if isinstance(pretrained_cfg, str) or (pretrained_cfg is not None and own) else named
    if asked:
        kwargs = {**asked.model_args, **kwargs}
    if cache_dir is not None and not pretrained:
        kwargs['cache_dir'] = cache_dir  # unknown to older timm
    if not pretrained or not (cfg.state_dict or cfg.file or cfg.hf_hub_id or cfg.url):
        return checked_models.added(build_model_with_cfg(model_cls, name, pretrained, pretrained_cfg=cfg, **kwargs))
    if named and named.bundle:
        kwargs = {**read_bundle(named.bundle)['model_args'], **kwargs}
    features = kwargs.get('features_only', False)
    directory = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'

    def build(**model_kwargs: Any) -> nn.Module:
        model, in_chans = model_cls(**model_kwargs), model_kwargs.get('in_chans', 3)
        num_classes = getattr(model, 'num_classes', cfg.num_classes)
        adapt = [name for name, other in (
            (cfg.classifier, num_classes != cfg.num_classes), (cfg.first_conv, in_chans != 3)) if name and other]
        model.pretrained_cfg = cfg.to_dict()  # convert looks at it
        if cfg.state_dict:
            state = convert(cfg.state_dict, model) if convert else cfg.state_dict
        elif named and not named.bundle:
            state = _fetch(named, model, adapt, directory, convert).state_dict
        else:
            state = read_checkpoint(source_file(cfg, cache_dir, directory), model, adapt, convert,
                                    asked.entry if asked else '', known=asked is not None).state_dict
        load_pretrained(
            model, {**cfg.to_dict(), 'state_dict': state, 'source': None, 'custom_load': False},
            num_classes=0 if features else num_classes, in_chans=in_chans)
        return model

    return checked_models.added(build_model_with_cfg(build, name, False, pretrained_cfg=cfg, **kwargs))


def _fetch(
        weights: Weights, model: nn.Module, adapt: list[str], directory: Path,
        convert: Callable[..., dict[str, Tensor]] | None) -> Checkpoint:
    """Returns the weights from where they are on this machine, and downloads them if they are not there."""
    ready, filename = directory / f'{weights.name}.safetensors', f'{weights.name}.pt'
    # RobustBench's load_model puts the file there; it has one name for the files of several boards.
    theirs = Path('models', weights.dataset, weights.norm, f'{weights.robustbench}.pt')

    def check(file: Path) -> None:
        read_file(file)
        if weights.sha256 and sha256(file) != weights.sha256:
            raise ValueError(f'{file} has sha256 {sha256(file)}, expected {weights.sha256}')

    if weights.robustbench and not ready.is_file() and theirs.is_file():
        check(theirs)
        _logger.info('%s: weights of %s', weights.name, theirs.resolve())
        return read_checkpoint(theirs, model, adapt, convert, weights.entry, known=True)
    from filelock import FileLock  # torch needs filelock too

    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / f'.{weights.name}.lock'):  # processes that start together download the file once
        if ready.is_file():
            return _checked(weights, ready, model, adapt)
        file = directory / filename
        if file.is_file():
            check(file)
        else:
            download(weights.location, file, check,
                     f"put the file at {theirs} (train takes it by --init too, Python by "
                     "pretrained_cfg_overlay=dict(file='...'))")
        checkpoint, origin = read_checkpoint(file, model, adapt, convert, weights.entry, known=True), sha256(file)
        with atomic_write(ready) as part:
            save_file({k: v.contiguous() for k, v in checkpoint.state_dict.items()}, part,
                      {'format': 'pt', 'sha256': origin, 'url': weights.location})
            _recorded(ready).write_text(f'{sha256(part)}  {ready.name}\n')
    known = 'as the zoo expects' if weights.sha256 else 'the zoo knows none to compare it with'
    _logger.warning('%s: %s; sha256 of the download %s (%s), of %s %s', weights.name, checkpoint, origin, known, ready,
                    sha256(ready))
    return checkpoint


def _recorded(ready: Path) -> Path:
    return ready.with_name(f'{ready.name}.sha256')


def _checked(weights: Weights, ready: Path, model: nn.Module, adapt: list[str]) -> Checkpoint:
    recorded, found = _recorded(ready), sha256(ready)
    expected = recorded.read_text().split()[0] if recorded.is_file() else None
    if expected != found:
        raise ValueError(f'{ready}: sha256 is {found}, expected {expected} ({recorded.name}); remove it to have it '
                         'made again')
    with safe_open(ready, framework='pt') as opened:
        origin = opened.metadata()['sha256']
    if weights.sha256 not in (None, origin):
        raise ValueError(f'{ready} was made from a file with sha256 {origin}, expected {weights.sha256}; remove it and '
                         'the file beside it to have them downloaded again')
    return read_checkpoint(ready, model, adapt)
