"""Makes the table of RobustBench's model zoo: which of its networks ours compute, and with which arguments.

    python -m hub.publish.zoo --model-info robustbench/model_info

RobustBench's package says how each entry builds its network; ``model_info`` of its repository has the numbers. Each
entry is built, its random weights are read by ours, and the logits of both are compared: an entry is named in
``timm_paf/weights/robustbench.json`` if they agree, and listed there with a reason if not. No weights are downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_paf
from timm_paf.files import atomic_write, is_of_machine, read_json
from timm_paf.models.timm_imagenet import NETWORKS
from timm_paf.weights.checkpoint import read_checkpoint
from timm_paf.wording import reason_of

from ..cli import Parser, one_line, user_path

TABLE = Path(timm_paf.__file__).parent / 'weights' / 'robustbench.json'
CLASSES = {'cifar10': 10, 'cifar100': 100, 'imagenet': 1000}
TOLERANCE = 1e-4  # of logits whose standard deviation is about 1, from networks of up to 106 layers
_ACTS = {'ReLU': 'relu', 'SiLU': 'silu', 'Swish': 'silu'}
# Parts of RobustBench's names that say what the model's name says already.
_SAID = re.compile(r'\d+|WRN\d*|R18|R50|RN18|PARN18|eps|Swin|ConvNeXt|ViT|[BL]')


def facts(theirs: nn.Module) -> tuple[str, dict[str, Any]]:
    """Returns the name in timm of our network for one of RobustBench's, and the arguments that its structure shows.

    Raises:
        ValueError: if none of ours has this structure.
    """
    families = {cls.__name__ for cls in type(theirs).__mro__
                if cls.__module__.rpartition('.')[0] == 'robustbench.model_zoo.architectures'
                and cls.__module__.rpartition('.')[2] in (
                    'wide_resnet', 'dm_wide_resnet', 'resnet', 'paf_wide_resnet')}
    net: Any = theirs
    inner: Any = net[-1] if isinstance(net, nn.Sequential) else net  # before it is a normalisation
    if type(inner).__module__ == 'torchvision.models.resnet':
        block, depths = type(inner.layer1[0]).__name__, tuple(len(getattr(inner, f'layer{i}')) for i in (1, 2, 3, 4))
        if (block, depths) == ('BasicBlock', (2, 2, 2, 2)):
            return 'resnet18_in_relu', {}
        if (block, depths) == ('Bottleneck', (3, 4, 6, 3)):
            return f'{"wide_resnet50_2" if inner.base_width == 128 else "resnet50"}_in_relu', {}
    if families & {'WideResNet', 'PAF_WideResNet'}:
        act = 'pssilu' if 'PAF_WideResNet' in families else 'relu'
        return _wide(net.block1.layer, 'conv1', act), {}
    if 'DMWideResNet' in families:
        act = _ACTS[type(net.relu).__name__]
        return _wide(net.layer[0].block, 'conv_0', act), {'pad_type': 'same'}
    if 'DMPreActResNet' in families:
        act = _ACTS[type(net.relu).__name__]
        return f'preact_resnet18_{act}', {'pad_type': 'same', 'shortcut': 'conv3x3'}
    if families & {'ResNet', 'PreActResNet'}:
        depths = tuple(len(getattr(net, f'layer{i}')) for i in (1, 2, 3, 4))
        block = type(net.layer1[0]).__name__
        if (block, depths) in (('BasicBlock', (2, 2, 2, 2)), ('Bottleneck', (3, 4, 6, 3))):
            return f'resnet{"18" if block == "BasicBlock" else "50"}_relu', {}
        if block in ('PreActBlock', 'PreActBlockV2') and depths == (2, 2, 2, 2):
            preact = block == 'PreActBlockV2' or net.out_shortcut
            return 'preact_resnet18_relu', {**({} if preact else {'shortcut': 'input'}),
                                            **({} if net.bn_before_fc else {'final_norm': False})}
    if isinstance(net, nn.Sequential) and type(net[-1]).__module__.startswith('timm.models.'):
        name = str(net[-1].default_cfg['architecture'])  # type: ignore[index]
        if name in NETWORKS:
            return f'{name}_in', {}
    if isinstance(net, nn.Sequential):
        raise ValueError(f'a network of another package behind a normalisation ({type(net[-1]).__name__})')
    raise ValueError(f'an architecture of its own ({type(theirs).__name__})')


def _wide(blocks: Any, conv: str, act: str) -> str:
    return f'wrn{6 * len(blocks) + 4}_{getattr(blocks[0], conv).out_channels // 16}_{act}'


def normalisations(theirs: nn.Module) -> Iterator[Any]:
    """Yields the values of ``normalize`` that a network of RobustBench may need, the likeliest first."""
    if isinstance(theirs, nn.Sequential):
        yield None  # the mean and std of ImageNet are in our networks with the ImageNet stem
        return
    if type(theirs).__module__ == 'torchvision.models.resnet':
        yield [[0.0] * 3, [1.0] * 3]
        return
    for mean, std in (('mu', 'sigma'), ('mean', 'std')):
        if hasattr(theirs, mean) and hasattr(theirs, std):
            yield [[round(value, 7) for value in getattr(theirs, name).flatten().tolist()] for name in (mean, std)]
            return
    yield from (None, [[0.5] * 3, [0.5] * 3], 'image')


def randomise(model: nn.Module) -> None:
    """Gives norms and activations values that no default could stand in for."""
    generator = torch.Generator().manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and value.dim() == 1:
            shift = 0.5 if name.endswith(('weight', 'running_var')) else -0.5
            with torch.no_grad():
                value.copy_(torch.rand(value.shape, generator=generator) + shift)


def arguments(theirs: nn.Module, num_classes: int) -> tuple[str, dict[str, Any]]:
    """Returns the name in timm and the arguments with which our network has the logits of one of RobustBench's.

    Raises:
        ValueError: if there are none.
    """
    name, given = facts(theirs)
    randomise(theirs)
    side, whole = 224 if num_classes == 1000 else 32, theirs[-1] if isinstance(theirs, nn.Sequential) else theirs
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        file = Path(directory) / 'theirs.pt'
        # The published files lack mean and std, as does this one: what the table says has to do without.
        torch.save({key: value for key, value in whole.state_dict().items()
                    if key not in ('mu', 'sigma', 'mean', 'std')}, file)
        expected = theirs.eval()(x)
        found = None
        for normalize in normalisations(theirs):
            kwargs = {**given, **({} if normalize is None else {'normalize': normalize})}
            ours = timm.create_model(name, num_classes=num_classes, **kwargs).eval()
            convert: Any = getattr(ours, 'weights_from_timm', None)
            try:
                ours.load_state_dict(read_checkpoint(file, ours, convert=convert, known=True).state_dict)
            except ValueError:
                raise ValueError(f'other weights than {name} has ({type(theirs).__name__})') from None
            found = _difference(ours(x), expected)
            if found < TOLERANCE:
                return name, kwargs
    raise ValueError(f'logits that differ by {found:.2g} of their standard deviation ({type(theirs).__name__})')


def _difference(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.std())


def source(name: str) -> tuple[str, str]:
    """Returns what a tag says of an entry, ``<author><year>`` and what tells it from its siblings; and its title."""
    found = re.fullmatch(r'([A-Za-z]+\d{4})([A-Za-z-]*)(.*)', name)
    if found is None:
        return name.lower(), ''
    rest = [part for part in re.split('[_-]', found[3]) if part and not _SAID.fullmatch(part)]
    return '_'.join([found[1], *rest]).lower(), found[2].replace('-', '_').lower()


def row(name: str, dataset: str, threat: str, spec: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of an entry that its record has."""
    images = re.search(r'(\d+M) synthetic', info.get('footnote') or '')
    numbers = {'clean': info['clean_acc'], 'autoattack': info.get('autoattack_acc') or None,
               'best known attack': info.get('external') or None, 'corruptions': info.get('corruptions_acc') or None}
    last = 'Kireev2021' in name or name == 'Andriushchenko2020Understanding'  # robustbench.utils.load_model knows it
    return {
        'name': name, 'dataset': dataset, 'threat': threat, 'eps': info['eps'] if threat != 'corruptions' else '',
        'gdrive_id': spec['gdrive_id'], **({'entry': 'last'} if last else {}),
        **({'preprocessing': spec['preprocessing']} if 'preprocessing' in spec else {}),
        'training_data': dataset + (' and other real images' if info['additional_data'] else '')
        + (f' and {images[1]} generated images' if images else ''),
        **{key: float(value) for key, value in numbers.items() if value is not None}, 'paper': info['link']}


def _computed(spec: dict[str, Any], num_classes: int, known: dict[Any, Any]) -> tuple[str, str, dict[str, Any]] | str:
    """Returns the model, RobustBench's class and the arguments of an entry, or why no network here computes it."""
    if not isinstance(spec['gdrive_id'], str):
        return 'several networks together' if spec['gdrive_id'] else \
            'weights that are not on Google Drive; RobustBench names them in timm'
    if not spec['gdrive_id']:
        return "torchvision's own weights, without adversarial training"
    try:
        with contextlib.redirect_stdout(None):
            theirs = spec['model']()
    except Exception as error:  # of theirs: some want a GPU, or files of their own
        if isinstance(error, ImportError | NameError) or is_of_machine(error):
            raise
        return reason_of(error)
    try:
        buffers = {key: value.flatten().tolist() for key, value in theirs.named_buffers()
                   if key in ('mu', 'sigma', 'mean', 'std')}
        key = (num_classes, repr(theirs), repr(buffers), getattr(theirs, 'out_shortcut', None), type(theirs))
        if key not in known:
            known[key] = arguments(theirs, num_classes)
    except ValueError as error:
        return str(error)
    model, kwargs = known[key]
    return model, type(theirs).__name__, kwargs


def make_table(model_info: Path, log: Any = print) -> dict[str, Any]:
    """Returns the table: the entries that our networks compute, and the others with the reason."""
    import robustbench.model_zoo.models as zoo

    named: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    known: dict[Any, tuple[str, dict[str, Any]]] = {}
    for board, threats in zoo.model_dicts.items():
        for kind, entries in threats.items():
            for name, spec in entries.items():
                where = {'name': name, 'dataset': board.value, 'threat': kind.value}
                found = _computed(spec, CLASSES[board.value], known)
                log(f'{board.value} {kind.value} {name}: {found}')
                if isinstance(found, str):
                    refused.append({**where, 'reason': found})
                    continue
                info = read_json(model_info / board.value / kind.value / f'{name}.json')
                model, cls, kwargs = found
                named.append({'model': model, 'source': '', **row(**where, spec=spec, info=info),
                              'num_classes': CLASSES[board.value], 'class': cls, 'model_args': kwargs})
    named.sort(key=lambda each: (
        ('cifar10', 'cifar100', 'imagenet').index(each['dataset']), ('Linf', 'L2', 'corruptions').index(each['threat']),
        -each.get('autoattack', each.get('corruptions', 0))))
    _name_sources(named)
    return {'made_by': 'python -m hub.publish.zoo', 'entries': named, 'refused': refused}


def _name_sources(named: list[dict[str, Any]]) -> None:
    """Gives each entry the source of its tag; two of one model, data set and threat have their titles in it too."""
    for titled in (False, True):
        seen: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for each in named:
            short, title = source(each['name'])
            each['source'] = each['source'] or short
            seen.setdefault((each['model'], each['dataset'], each['threat'], each['source']), []).append(each)
        for group in seen.values():
            if len(group) > 1 and titled:
                raise ValueError(f'entries with one name: {", ".join(each["name"] for each in group)}')
            if len(group) > 1:
                for each in group:
                    short, title = source(each['name'])
                    author, _, rest = short.partition('_')
                    each['source'] = '_'.join(filter(None, (author, title, rest)))


def main() -> None:
    parser = Parser(prog='python -m hub.publish.zoo', description=(__doc__ or '').split('\n')[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--model-info', type=user_path, required=True, metavar='DIR',
                        help="model_info of a checkout of RobustBench's repository")
    parser.add_argument('--output', type=user_path, default=TABLE, help='the table')
    options = parser.parse_args()
    with one_line(parser.prog, 'robustbench'):
        table = make_table(options.model_info)
        with atomic_write(options.output) as part:
            part.write_text(json.dumps(table, indent=1) + '\n')
    print(f'{options.output}: {len(table["entries"])} named, {len(table["refused"])} refused')


if __name__ == '__main__':
    main()
