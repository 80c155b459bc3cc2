"""RobustBench's classes for our networks: their names, their words in code, and our weights under their keys."""

from __future__ import annotations

import importlib
import math
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from timm_paf.activations import create_paf, list_pafs
from timm_paf.data import DATASETS
from timm_paf.models.cifar_net import VARIANTS
from timm_paf.models.preact_resnet import PreActResNet
from timm_paf.models.resnet_cifar import ResNetCifar
from timm_paf.models.resnet_imagenet import ResNetImageNet
from timm_paf.models.wide_resnet import WideResNet

ARCHITECTURES = 'robustbench.model_zoo.architectures'
OWN_FILE = 'paf_networks'
WIDTH = 64  # channels of the first stage of a published ResNet


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
    variant, num_classes, act_kwargs = VARIANTS.get(run['architecture']), run['num_classes'], recipe['act_kwargs']
    if variant is None or variant.model_cls not in (WideResNet, ResNetCifar):
        return None
    act, args, is_paf = variant.act, variant.args, variant.act in list_pafs()
    if not is_paf and not all(isinstance(value, int | float) and math.isfinite(value) for value in act_kwargs.values()):
        return None  # run.json may be somebody else's, and these values become code
    activation = f'PAF({act!r})' if is_paf else f'nn.{create_paf(act, **act_kwargs)!r}'
    if variant.model_cls is WideResNet:
        size = f'depth={args["depth"]}, widen_factor={args["width"]}, num_classes={num_classes:d}'
        if act == 'pssilu':
            return ZooClass('paf_wide_resnet', 'PAF_WideResNet, PSSiLU', f'PAF_WideResNet(PSSiLU(), {size})')
        if not is_paf:
            return ZooClass('paf_wide_resnet', 'PAF_WideResNet', f'PAF_WideResNet({activation}, {size})')
        return ZooClass(OWN_FILE, 'PAF, PAFWideResNet', f'PAFWideResNet({activation}, {size})')
    block, blocks, width = args['block'].__name__, list(args['layers']), args.get('base_width', WIDTH)
    if act == 'relu' and width == WIDTH:  # RobustBench's class has this width alone
        return ZooClass('resnet', f'{block}, ResNet', f'ResNet({block}, {blocks}, num_classes={num_classes:d})')
    return ZooClass(OWN_FILE, 'PAF, PAFResNet' if is_paf else 'PAFResNet',
                    f'PAFResNet({activation}, {blocks}, bottleneck={block == "Bottleneck"}, '
                    f'num_classes={num_classes:d}{"" if width == WIDTH else f", base_width={width}"})')


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


def architecture_name(name: str) -> str:
    """Returns a name as RobustBench spells it, 'WideResNet-28-10-PSSiLU' for 'wrn28_10_pssilu'.

    ReLU is left out. A ResNet with narrower stages has its base width behind: 'ResNet-18-PELU (base width 16)'. Names
    of other networks stay.
    """
    variant = VARIANTS.get(name.partition('.')[0])
    if variant is None:
        return name
    act = '' if variant.act == 'relu' else f'-{type(create_paf(variant.act)).__name__}'
    args, width = variant.args, variant.args.get('base_width', WIDTH)
    if variant.model_cls is WideResNet:
        return f'WideResNet-{args["depth"]}-{args["width"]}{act}'
    convolutions = 3 if getattr(args.get('block'), 'expansion', 1) == 4 else 2  # of a block
    depth = 2 + convolutions * sum(args.get('layers', (2, 2, 2, 2)))
    if variant.model_cls is ResNetImageNet and width != WIDTH:
        return f'WideResNet-{depth}-{width // WIDTH}{act}'
    family = 'PreActResNet' if variant.model_cls is PreActResNet else 'ResNet'
    return f'{family}-{depth}{act}' + ('' if width == WIDTH else f' (base width {width})')
