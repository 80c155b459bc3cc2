"""Makes what RobustBench wants of a model: weights in its layout, its record, its zoo's entry, the form of an issue."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from timm_paf.activations import create_paf, list_pafs
from timm_paf.attacks import parse_fraction
from timm_paf.data import DATASETS
from timm_paf.files import write_json

from ..training_summary import training_summary


class Board(NamedTuple):
    """A leaderboard of RobustBench: eps as its records write it, None of corruptions, and the number of its images."""

    eps: str | None
    n: int = 10_000
    robust: str = 'autoattack_acc'
    """The entry of its records that ranks."""


CORRUPTIONS = Board(None, 10_000, 'corruptions_acc')
BOARDS = {
    ('cifar10', 'Linf'): Board('8/255'), ('cifar10', 'L2'): Board('0.5'), ('cifar10', 'corruptions'): CORRUPTIONS,
    ('cifar100', 'Linf'): Board('8/255'), ('cifar100', 'corruptions'): CORRUPTIONS,
    ('imagenet', 'Linf'): Board('4/255', 5_000), ('imagenet', 'corruptions'): CORRUPTIONS._replace(n=5_000),
    ('imagenet', 'corruptions_3d'): Board(None, 5_000, 'corruptions_acc_3d')}
"""RobustBench's leaderboards, by data set and threat model."""

FIELDS = {
    'title': 'of the paper',
    'paper': 'its URL',
    'authors': 'separated by commas',
    'venue': "such as 'ICML 2026', or 'arXiv, Nov 2026'",
    'licence': 'of the weights: MIT, or the URL of another',
    'code': 'URL of the code',
    'gdrive_id': 'of robustbench/NAME.pt on Google Drive, from where RobustBench loads it',
    'additional_data': ('after training with generated images or from weights: yes if real ones beyond the data set '
                        'made them, else no'),
}
"""The facts that only the authors know. The last is asked for where ``run.json`` names generated images."""

ARCHITECTURES = 'robustbench.model_zoo.architectures'
OWN_FILE = 'paf_networks'


class ZooClass(NamedTuple):
    """The words by which RobustBench makes a network: ``from ARCHITECTURES.module import names``, then ``call``."""

    module: str
    names: str
    call: str


def zoo_class(run: dict[str, Any]) -> ZooClass | None:
    """Returns RobustBench's class for the network of a run, or that of our `paf_networks`; None if neither has one."""
    recipe = run['recipe']
    if recipe.get('act') or (recipe.get('model_kwargs') or {}).keys() - {'drop_rate', 'drop_path_rate'}:
        return None
    if recipe.get('dataset', 'cifar10') not in DATASETS and recipe['image_size'] != 32:
        return None  # RobustBench's classes of these networks pool a window of 32 x 32 images
    match = re.fullmatch(r'(?:wrn(\d+)_(\d+)|resnet(18|34|50))_(\w+)', run['architecture'], re.ASCII)
    if match is None or match[4] not in list_pafs(plain=True):
        return None
    depth, width, layers, act = match.groups()
    is_paf, num_classes, act_kwargs = act in list_pafs(), run['num_classes'], run['recipe']['act_kwargs']
    if not is_paf and not all(isinstance(value, int | float) and math.isfinite(value) for value in act_kwargs.values()):
        return None  # run.json may be somebody else's, and these values become code
    activation = f'PAF({act!r})' if is_paf else f'nn.{create_paf(act, **act_kwargs)!r}'
    if depth:
        size = f'depth={depth}, widen_factor={width}, num_classes={num_classes:d}'
        if act == 'pssilu':
            return ZooClass('paf_wide_resnet', 'PAF_WideResNet, PSSiLU', f'PAF_WideResNet(PSSiLU(), {size})')
        if not is_paf:
            return ZooClass('paf_wide_resnet', 'PAF_WideResNet', f'PAF_WideResNet({activation}, {size})')
        return ZooClass(OWN_FILE, 'PAF, PAFWideResNet', f'PAFWideResNet({activation}, {size})')
    blocks = [2, 2, 2, 2] if layers == '18' else [3, 4, 6, 3]
    if act == 'relu':
        block = 'Bottleneck' if layers == '50' else 'BasicBlock'
        return ZooClass('resnet', f'{block}, ResNet', f'ResNet({block}, {blocks}, num_classes={num_classes:d})')
    return ZooClass(OWN_FILE, 'PAF, PAFResNet' if is_paf else 'PAFResNet',
                    f'PAFResNet({activation}, {blocks}, bottleneck={layers == "50"}, num_classes={num_classes:d})')


def describe(found: ZooClass | None) -> str:
    """Returns whose class it is, for the model card."""
    if found is None:
        return 'no class of RobustBench, which has none for this architecture: its keys are those of timm_paf'
    name = found.call.partition('(')[0]
    return f'`{name}` of `robustbench/{OWN_FILE}.py`, which needs torch alone' if found.module == OWN_FILE \
        else f"RobustBench's own class `{name}`"


def robustbench_model(found: ZooClass) -> nn.Module:
    """Returns the network, with random weights, made by the words that the zoo's entry has.

    Raises:
        ModuleNotFoundError: if the class is RobustBench's own and RobustBench is not installed.
    """
    ours = found.module == OWN_FILE
    module = importlib.import_module(f'{__package__ if ours else ARCHITECTURES}.{found.module}')
    model: nn.Module = eval(found.call, {'nn': nn, **vars(module)})
    return model


def robustbench_state(model: nn.Module, theirs: nn.Module | None) -> dict[str, torch.Tensor]:
    """Returns our weights under the keys of the other class, or under ours where there is no such class."""
    ours = {k: v.contiguous() for k, v in model.state_dict().items()}
    if theirs is None:
        return ours
    renamed = {}
    for key in theirs.state_dict():
        if re.search(r'(^|\.)activation\.\w+$', key):
            renamed[key] = ours['act.' + key.rsplit('.', 1)[1]]
        else:
            renamed[key] = ours[re.sub(r'^linear\.', 'fc.', key.replace('.shortcut.', '.downsample.'))]
    return renamed


def board_eps(dataset: str, norm: str, eps: str) -> str | None:
    """Returns RobustBench's spelling of eps ('0.5' for '1/2') if this threat model has a leaderboard, else None."""
    board = BOARDS.get((dataset, norm))
    return board.eps if board and board.eps and parse_fraction(eps) == parse_fraction(board.eps) else None


def boards_in_words() -> str:
    """Returns the boards on which a result under attack has a place."""
    return ', '.join(f'{dataset} {norm} {board.eps}' for (dataset, norm), board in BOARDS.items() if board.eps)


def model_info(run: dict[str, Any], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Returns RobustBench's record of a model, in its schema.

    Facts that only the model's authors know are null, and so are numbers of fewer images than the board has, of another
    threat model or of a faster evaluation than the standard one.
    """
    from robustbench.utils import ModelInfo

    dataset, threat, synthetic = run['data']['name'], run['recipe']['threat'], run['recipe'].get('synthetic')
    init = run['recipe'].get('init')
    notes = [f'Trained with {training_summary(run).generated:,} synthetic images.'] if synthetic else []
    notes += [f'Started from the weights {init["source"]}.'] if init else []
    percent: dict[str, str] = {}
    whole = BOARDS.get((dataset, threat['norm']), Board(None)).n
    if (evaluation is not None and evaluation['n'] == whole and evaluation['dataset'] == dataset
            and evaluation.get('standard', True)
            and all(evaluation['threat_model'][key] == threat[key] for key in ('norm', 'eps'))):
        percent = {name: f'{100 * result["accuracy"]:.2f}' for name, result in evaluation['attacks'].items()
                   if result['n'] == whole}
    info = ModelInfo(
        additional_data=None if synthetic or init else False, number_forward_passes=1, dataset=dataset,
        architecture=architecture_name(run['architecture']),
        eps=board_eps(dataset, threat['norm'], threat['eps']) or threat['eps'],
        clean_acc=percent.get('clean'), autoattack_acc=percent.get('autoattack'),
        footnote=' '.join(notes) or None)
    return dataclasses.asdict(info)


def architecture_name(name: str) -> str:
    """Returns a name as RobustBench spells it, 'WideResNet-28-10-PSSiLU' for 'wrn28_10_pssilu'; ReLU is left out."""
    match = re.fullmatch(r'(wrn|resnet)(\d+(?:_\d+)?)_(\w+)', name)
    if match is None or match[3] not in list_pafs(plain=True):
        return name
    family = {'wrn': 'WideResNet', 'resnet': 'ResNet'}[match[1]]
    act = '' if match[3] == 'relu' else f'-{type(create_paf(match[3])).__name__}'
    return f'{family}-{match[2].replace("_", "-")}{act}'


def check(name: str, run: dict[str, Any], evaluation: dict[str, Any] | None, fields: dict[str, str]) -> None:
    """Checks that a submission is complete: every flag, the name, and an evaluation by RobustBench's rules.

    Args:
        name: name of the model.
        run: the content of run.json.
        evaluation: the content of evaluation.json, if there is one.
        fields: what the user gave, by the names of `FIELDS`.

    Raises:
        ValueError: with everything that is missing or wrong, in one line.
    """
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    problems = []
    synthetic = bool(run['recipe'].get('synthetic') or run['recipe'].get('init'))
    wanted = [key for key in FIELDS if key != 'additional_data' or synthetic]
    missing = [_flag(key) for key in wanted if not fields.get(key, '').strip()]
    if missing:
        problems.append(f'it needs {", ".join(missing)}')
    for key, pattern, expected in (
            ('paper', r'https?://\S+', 'a URL'), ('code', r'https?://\S+', 'a URL'),
            ('licence', r'MIT|https?://\S+', 'MIT or a URL'),
            ('gdrive_id', r'[A-Za-z0-9_-]{25,100}', 'an id of Google Drive'),
            ('additional_data', r'yes|no', 'yes or no')):
        value = fields.get(key, '').strip()
        if value and not re.fullmatch(pattern, value):
            problems.append(f'{_flag(key)} is {value!r}, expected {expected}')
    if fields.get('additional_data') and not synthetic:
        problems.append('--additional-data is given, but run.json names no generated images and no initial weights')
    if not re.fullmatch(r'[A-Za-z-]+\d{4}[A-Za-z][\w-]*', name, re.ASCII):
        problems.append(f'--name is {name!r}, expected author, year, first word of the title, as Dai2021Parameterizing')
    dataset, threat = run['data']['name'], run['recipe']['threat']
    if board_eps(dataset, threat['norm'], threat['eps']) is None:
        problems.append(f'the run is for {dataset} {threat["norm"]} {threat["eps"]}, expected one of '
                        f'{boards_in_words()}')
    elif name in model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat['norm'])]:
        problems.append(f"--name is {name}, which RobustBench's zoo has, expected another, such as {name}_PAF")
    if evaluation is None:
        problems.append(f'there is no evaluation.json, {_MEND}')
    elif not evaluation.get('standard', True):
        problems.append('evaluation.json is of a fast evaluation, run timm-paf evaluate without --fast')
    else:
        info = model_info(run, evaluation)
        if info['clean_acc'] is None or info['autoattack_acc'] is None:
            found, attacks = evaluation['threat_model'], ', '.join(evaluation['attacks'])
            whole = BOARDS.get((dataset, threat['norm']), Board(None)).n
            problems.append(f'evaluation.json has {attacks} of {evaluation["n"]:,} images of {evaluation["dataset"]}, '
                            f'{found["norm"]} {found["eps"]}, expected clean, autoattack of {whole:,} of {dataset}, '
                            f'{threat["norm"]} {threat["eps"]}, {_MEND}')
    if zoo_class(run) is None:
        problems.append(f'{run["architecture"]} has no self-contained file, expected a wrn or a resnet of timm_paf')
    if problems:
        raise ValueError(f'no submission to RobustBench: {"; ".join(problems)}')


_MEND = 'run timm-paf evaluate --n 10000 --attacks clean,autoattack'


def _flag(key: str) -> str:
    return '--' + key.replace('_', '-')


def write(
        folder: Path, name: str, run: dict[str, Any], evaluation: dict[str, Any] | None, fields: dict[str, str] | None,
) -> None:
    """Writes what RobustBench wants beside the weights: its record, and our architecture file where it has no class.

    With ``fields``, which `check` has found complete, the record stands under its path in RobustBench, and with it the
    entry of its model zoo, ``zoo_entry.py``, and the text of its form, ``new_model.md``.
    """
    found, info = zoo_class(run), model_info(run, evaluation)
    is_own = found is not None and found.module == OWN_FILE
    if is_own:
        shutil.copy(Path(__file__).with_name(f'{OWN_FILE}.py'), folder)
    if fields is None:
        write_json(folder / 'model_info.json', info)
        return
    assert found is not None  # `check` has made sure of this and of the next condition
    assert evaluation is not None
    given = {key: ' '.join(value.split()) for key, value in fields.items()}
    info.update(link=given['paper'], name=given['title'], authors=given['authors'], venue=given['venue'],
                reported=info['autoattack_acc'])  # the accuracy that is claimed here
    if 'additional_data' in given:
        info['additional_data'] = given['additional_data'] == 'yes'
    norm, is_mit = run['recipe']['threat']['norm'], given['licence'] == 'MIT'
    record = folder / 'model_info' / info['dataset'] / norm / f'{name}.json'
    record.parent.mkdir(parents=True)
    write_json(record, {key: value for key, value in info.items() if value is not None})
    entry = ENTRY.format(dataset=info['dataset'], table=norm.lower(), package=ARCHITECTURES, name=name,
                         architecture=f', {OWN_FILE}.py in robustbench/model_zoo/architectures/' if is_own else '',
                         gdrive_id=given['gdrive_id'], **found._asdict())
    versions = evaluation['versions']
    package = next((key for key in ('autoattack', 'pyautoattack') if key in versions), 'autoattack')
    data = str(info['additional_data']).lower() + (f' ({info["footnote"]})' if info['footnote'] else '')
    form = FORM.format(
        **info, norm=norm, model=name, data=data,
        method=f'AutoAttack (standard version, {package} {versions.get(package, "of unknown version")}) on all '
               f'{evaluation["n"]:,} test images of {info["dataset"]}, seed {evaluation["seed"]}; the attached '
               'evaluation.json has the verdict of every image',
        code=given['code'], gdrive_id=given['gdrive_id'], lacks=_box(is_own), mit=_box(is_mit),
        custom=_box(not is_mit), licence_url='' if is_mit else given['licence'])
    (folder / 'zoo_entry.py').write_text(entry)
    (folder / 'new_model.md').write_text(form)


def _box(ticked: bool) -> str:
    return '[x]' if ticked else '[ ]'


ENTRY = """\
# In a checkout of RobustBench: model_info/ as it lies here{architecture}, and in
# robustbench/model_zoo/{dataset}.py this import and, in the table `{table}`, the entry.
from {package}.{module} import {names}

{table} = [
    ({name!r}, {{
        'model': lambda: {call},
        'gdrive_id': {gdrive_id!r},
    }}),
]
"""

# The headings, and the words in bold, are those of RobustBench's form.
FORM = """\
<!-- Title of the issue: [New Model] {model} -->

# Paper Information

- **Paper Title**: {name}
- **Paper URL**: {link}
- **Paper authors**: {authors}

# Leaderboard Claim(s)

## Model 1

- **Architecture**: {architecture}
- **Threat Model**: {norm}
- **eps**: {eps}
- **Clean accuracy**: {clean_acc}
- **Robust accuracy**: {autoattack_acc}
- **Additional data**: {data}
- **Evaluation method**: {method}
- **Checkpoint and code**: https://drive.google.com/file/d/{gdrive_id}, {code}

# Model Zoo:

- [x] I want to add my models to the Model Zoo
- {lacks} I use an architecture that is **not** included among those of the Model Zoo
- {mit} I agree to release my model(s) under MIT license **OR**
- {custom} I want my models to be released under a custom license, located here: {licence_url}
"""
