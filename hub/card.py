"""The model card of a bundle, made from its records alone."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

import timm_paf
from timm_paf.activations import PAF

CARD = """---
library_name: timm
pipeline_tag: image-classification
tags: [image-classification, timm, timm_paf, adversarial-robustness]
datasets: [{dataset}]
---
# {name}

{architecture} trained on {dataset} ({n_train:,} images) against {threat}, with timm_paf {version}.
Input: {size} x {size} RGB images in [0, 1], without mean and std.

## Robustness

{measured}

## Use

```python
{use}
```

{robustbench}

## Training

{epochs} epochs, seed {seed}, {processes} process(es), {hardware}, torch {torch}, {minutes:.1f} minutes.

```json
{recipe}
```
{activation}"""

USE = '''import timm, timm_paf  # timm 1.0.16 or newer
model = timm.create_model('local-dir:DIRECTORY', pretrained=True).eval()  # 'hf-hub:ORG/NAME' once it is on the Hub'''

# timm would make the network with the activations that it has itself, and refuse the weights
USE_CONVERTED = '''from timm_paf.robustbench import load_bundle
model = load_bundle('DIRECTORY')'''

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
    act = recipe.get('act')
    architecture = f'`{run["architecture"]}`' + (f' with one {act} per {recipe["act_share"]},' if act else '')
    pafs = [module for module in model.modules() if isinstance(module, PAF)]
    usable = dataset in ('cifar10', 'cifar100')  # what RobustBench's load_model can be asked for
    return CARD.format(
        name=name, architecture=architecture, dataset=dataset, n_train=run['data']['n'],
        use=USE_CONVERTED if act else USE,
        threat='no attack' if threat['eps'] == '0' else f'{threat["norm"]} perturbations of at most {threat["eps"]}',
        version=timm_paf.__version__, size=model.pretrained_cfg['input_size'][1], measured=measured(evaluation),
        robustbench=ROBUSTBENCH.format(name=name, dataset=dataset, norm=threat['norm'], their_class=their_class)
        if usable else f'RobustBench knows no {dataset}; `timm_paf.robustbench.load_bundle` loads this directory too.',
        epochs=recipe['epochs'], seed=recipe['seed'], processes=run['processes'], hardware=hardware,
        torch=run['versions']['torch'], minutes=run['seconds'] / 60, recipe=json.dumps(recipe, indent=2),
        activation=f'\nThe activation that it learned: `{pafs[0]}`.\n'
        if len(pafs) == 1 and timm_paf.paf_parameters(model) else '')
