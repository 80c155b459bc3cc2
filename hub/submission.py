"""What RobustBench wants of a model: the weights in its layout, and its record."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import nn

from timm_paf.activations import create_paf


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
