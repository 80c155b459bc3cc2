"""Pack a finished run: weights, timm's config, model card, checksums, and the same weights for RobustBench.

    python -m hub.bundle RUN --out DIR

A bundle that does not load back to the same logits, bit for bit, is not written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

import timm_paf
from timm_paf.activations import create_paf
from timm_paf.files import read_json, save_torch, sha256, whole_directory
from timm_paf.robustbench import load_bundle

from .runs import load_run, read_run

CARD = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, timm_paf, adversarial-robustness]
datasets: [{dataset}]
---
# {name}

`{architecture}` trained on {dataset} ({n_train:,} images) against {threat}, with timm_paf {version}.
Input: {size} x {size} RGB images in [0, 1], without mean and std.

## Robustness

{measured}

## Use

```python
import timm, timm_paf  # timm 1.0.16 or newer
model = timm.create_model('local-dir:DIRECTORY', pretrained=True).eval()  # 'hf-hub:ORG/NAME' once it is on the Hub
```

{robustbench}

## Training

{epochs} epochs, seed {seed}, {processes} process(es), {hardware}, torch {torch}, {minutes:.1f} minutes.

```json
{recipe}
```
{activation}"""

ROBUSTBENCH = """```python
from timm_paf.robustbench import register
from robustbench.utils import load_model
register('DIRECTORY', '{name}')
model = load_model('{name}', dataset='{dataset}', threat_model='{norm}')
```

`robustbench/{name}.pt` holds the same weights for {their_class}."""


def measured(evaluation: dict[str, Any] | None) -> str:
    """The card's table, from evaluation.json alone."""
    if evaluation is None:
        return 'Nothing has been measured.'
    threat = evaluation['threat_model']
    rows = '\n'.join(f'| {name} | {result["accuracy"]:.2%} | {result["correct"]} of {result["n"]} |'
                     for name, result in evaluation['attacks'].items())
    return (f'The {evaluation["images"]} test images of {evaluation["dataset"]}, {threat["norm"]} eps {threat["eps"]}, '
            f'seed {evaluation["seed"]}; `evaluation.json` has the rest.\n\n'
            f'| attack | accuracy | right |\n|---|---|---|\n{rows}')


def card(name: str, run: dict[str, Any], evaluation: dict[str, Any] | None, model: nn.Module, their_class: str) -> str:
    """The model card, README.md."""
    recipe, threat, dataset = run['recipe'], run['recipe']['threat'], run['data']['name']
    hardware = run['hardware'].get('gpu', f'{run["hardware"]["cpu"]}, {run["hardware"]["threads"]} thread(s)')
    usable = dataset in ('cifar10', 'cifar100')  # what RobustBench's load_model can be asked for
    return CARD.format(
        name=name, architecture=run['architecture'], dataset=dataset, n_train=run['data']['n'],
        threat='no attack' if threat['eps'] == '0' else f'{threat["norm"]} perturbations of at most {threat["eps"]}',
        version=timm_paf.__version__, size=model.pretrained_cfg['input_size'][1], measured=measured(evaluation),
        robustbench=ROBUSTBENCH.format(name=name, dataset=dataset, norm=threat['norm'], their_class=their_class)
        if usable else f'RobustBench knows no {dataset}; `timm_paf.robustbench.load_bundle` loads this directory too.',
        epochs=recipe['epochs'], seed=recipe['seed'], processes=run['processes'], hardware=hardware,
        torch=run['versions']['torch'], minutes=run['seconds'] / 60, recipe=json.dumps(recipe, indent=2),
        activation=f'\nThe activation that it learned: `{model.act}`.\n' if timm_paf.paf_parameters(model) else '')


def robustbench_model(architecture: str, num_classes: int, act_kwargs: dict[str, Any]) -> nn.Module | None:
    """RobustBench's own class for an architecture of ours, with random weights; None where it has none.

    Raises:
        ModuleNotFoundError: if RobustBench is not installed.
    """
    from robustbench.model_zoo.architectures import paf_wide_resnet, resnet

    if match := re.fullmatch(r'wrn(\d+)_(\d+)_(\w+)', architecture):
        depth, width, act = int(match[1]), int(match[2]), match[3]
        shared = paf_wide_resnet.PSSiLU() if act == 'pssilu' else create_paf(act, **act_kwargs)
        return paf_wide_resnet.PAF_WideResNet(shared, depth=depth, widen_factor=width, num_classes=num_classes)
    blocks = {'resnet18_relu': (resnet.BasicBlock, [2, 2, 2, 2]), 'resnet34_relu': (resnet.BasicBlock, [3, 4, 6, 3]),
              'resnet50_relu': (resnet.Bottleneck, [3, 4, 6, 3])}
    return resnet.ResNet(*blocks[architecture], num_classes) if architecture in blocks else None


def robustbench_state(model: nn.Module, theirs: nn.Module | None) -> dict[str, torch.Tensor]:
    """Our weights under the keys of RobustBench's class, or under ours where it has none."""
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


def model_info(run: dict[str, Any], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """RobustBench's record of a model, in its schema.

    What only its authors know is null, and so are numbers of fewer than its 10,000 images or of another threat model.
    """
    from robustbench.utils import ModelInfo

    threat = run['recipe']['threat']
    percent: dict[str, str] = {}
    if (evaluation is not None and evaluation['n'] == 10_000 and evaluation['dataset'] == run['data']['name']
            and all(evaluation['threat_model'][key] == threat[key] for key in ('norm', 'eps'))):
        percent = {name: f'{100 * result["accuracy"]:.2f}' for name, result in evaluation['attacks'].items()}
    info = ModelInfo(
        additional_data=False, number_forward_passes=1, dataset=run['data']['name'], architecture=run['architecture'],
        eps=threat['eps'], clean_acc=percent.get('clean'), autoattack_acc=percent.get('autoattack'))
    return dataclasses.asdict(info)


def write(source: Path, out: Path, name: str) -> None:
    """Write the bundle of a run.

    Raises:
        FileExistsError: if ``out`` exists.
        ValueError: if the run is not finished or damaged, its evaluation is of other weights, or the bundle does not
            load back to the same logits.
    """
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9_-]*', name):
        raise ValueError(f'the name is {name!r}; expected letters, digits, _ and -: give --name')
    run, model = read_run(source), load_run(source)
    recipe, threat = run['recipe'], run['recipe']['threat']
    evaluation = None
    if (source / 'evaluation.json').is_file():
        evaluation = read_json(source / 'evaluation.json')
        if not isinstance(evaluation, dict) or not {'weights_sha256', 'attacks', 'threat_model'} <= evaluation.keys():
            raise ValueError(f'{source}/evaluation.json is not of hub.evaluate; run it with --overwrite')
        if evaluation['weights_sha256'] != sha256(source / 'model.safetensors'):
            raise ValueError(f'{source}/evaluation.json is of other weights; run hub.evaluate --overwrite again')
    theirs = robustbench_model(run['architecture'], run['num_classes'], recipe['act_kwargs'])
    their_class = "RobustBench's own class " + f'`{type(theirs).__name__}`' if theirs is not None \
        else 'no class of RobustBench, which has none for this architecture: its keys are those of timm_paf'
    with whole_directory(out) as part:
        weights = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(weights, part / 'model.safetensors', {'format': 'pt'})
        about = {'version': timm_paf.__version__, 'dataset': run['data']['name'],
                 'threat_model': {'norm': threat['norm'], 'eps': threat['eps']}}
        save_config_for_hf(
            model, part / 'config.json', model_config={'timm_paf': about},
            model_args={'act_kwargs': recipe['act_kwargs']} if recipe['act_kwargs'] else None)
        for record in ('run.json', 'metrics.jsonl', 'evaluation.json'):
            if (source / record).is_file():
                shutil.copy(source / record, part)
        (part / 'robustbench').mkdir()
        save_torch(robustbench_state(model, theirs), part / 'robustbench' / f'{name}.pt')
        (part / 'robustbench' / 'model_info.json').write_text(json.dumps(model_info(run, evaluation), indent=2) + '\n')
        (part / 'README.md').write_text(card(name, run, evaluation, model, their_class))
        files = sorted(path for path in part.rglob('*') if path.is_file())
        (part / 'SHA256SUMS').write_text(''.join(f'{sha256(path)}  {path.relative_to(part)}\n' for path in files))
        verify(part, model, theirs)


@torch.no_grad()
def verify(bundle: Path, model: nn.Module, theirs: nn.Module | None) -> None:
    """Load the files back; equal logits, bit for bit with our class and to rounding with RobustBench's formula.

    Raises:
        ValueError: if they differ.
    """
    size = model.pretrained_cfg['input_size']
    x = torch.rand(8, *size, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    if not torch.equal(load_bundle(bundle)(x), expected):
        raise ValueError('the bundle loads back to other logits; nothing was written')
    if theirs is not None:
        theirs.load_state_dict(torch.load(next((bundle / 'robustbench').glob('*.pt')), weights_only=True))
        difference = (theirs.eval()(x) - expected).abs().max().item()
        if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
            raise ValueError(f"RobustBench's class gives logits that differ by {difference:.2g}; nothing was written")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='hub.bundle', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('run', type=Path, metavar='RUN', help='a finished run of train_robust.py')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='directory to make')
    parser.add_argument('--name', help='of the model; default: the name of DIR')
    found = parser.parse_args(args)
    try:
        write(found.run, found.out, found.name or found.out.absolute().name)
    except ModuleNotFoundError as error:
        sys.exit(f"hub.bundle: {error}; pip install 'timm-paf[robustbench]'")
    except (ValueError, OSError, SafetensorError) as error:
        if os.environ.get('TIMM_PAF_DEBUG'):
            raise
        sys.exit(f'hub.bundle: {error}')
    print(f'{found.out}: loads back to the same logits')


if __name__ == '__main__':
    main()
