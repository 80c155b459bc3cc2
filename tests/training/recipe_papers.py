"""What papers and their authors' programs say of each recipe, written from these and not from the recipes.

Where the two differ, the values are those of the program with which the published network was trained; the comments
name it. Tests hold the recipes against this: images and run against `DEFINITIONS`, network against `NETWORKS`,
optimizer and learning rate against `optimizer_of`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
"""Mean and standard deviation of CIFAR-10 that several programs normalise by."""


class Definition(NamedTuple):
    """The images, the length and the choice of the result; the defaults are what most programs do."""

    model: str
    epochs: int = 200
    batch_size: int = 128
    drop_last: bool = False  # torch's DataLoader keeps a smaller last batch
    pad_mode: str = 'zeros'  # torchvision's RandomCrop(32, padding=4)
    aa: str | None = None
    synthetic: str | None = None
    synthetic_augment: bool = True
    val: int = 0
    val_attack: str | None = None
    ema: float = 0.0
    ema_warmup: str | None = None
    ema_bn: str = 'average'


PAPER = Definition('wrn28_10_pssilu', batch_size=256)  # configs/configs_cifar10.yml, data.py
# utils.py: as many generated images beside, by ToTensor alone
OF_PAPER = {'batch_size': 512, 'synthetic': 'data/ddpm_cifar10.npz:0.5', 'synthetic_augment': False}
FASTAT = Definition('resnet18_relu', epochs=100, val=1000, val_attack='ce-10', ema=0.9995, ema_warmup='none')
"""configs/cifar10: common.yaml, pgd_at_wa.yaml, n_fgsm.yaml; at_base.py: the best epoch by PGD-10."""

DEFINITIONS = {
    'paper_linf': PAPER,
    'paper_l2': PAPER,
    'paper_linf_synthetic': PAPER._replace(**OF_PAPER),
    'paper_l2_synthetic': PAPER._replace(**OF_PAPER),
    # README.md: 512 images, 0.7 of them generated, WRN-28-10 with Swish; semisup.py: batches are whole, 1,024 held out;
    # watrain.py: 40 steps of 2/255 on the margin, tau 0.995 by Gowal's ratio, statistics of the network. Their 400
    # epochs of 98 batches are 123 of ours.
    'wang2023_1m': Definition('wrn28_10_silu', 123, 512, True, synthetic='data/1m.npz:0.7', val=1024,
                              val_attack='cw-40', ema=0.995, ema_warmup='ratio', ema_bn='copy'),
    # utils.py: np.pad(mode='reflect'); generate_validation.py: 1,000 images; RobustBench: WRN-34-20
    'rice2020': Definition('wrn34_20_relu', pad_mode='reflect', val=1000, val_attack='ce-10'),
    'wong2020_fast': Definition('preact_resnet18_relu', 15),  # CIFAR10/train_fgsm.py, utils.py
    # train_trades_cifar.py; the choice of the epoch is not said, so it is ours
    'wu2020_trades_awp': Definition('wrn34_10_relu', val=1000),
    # utils/train.py: DataLoader(drop_last=True), and the best epoch by PGD-10 with steps of eps / 4, of test images
    'idbh2023': Definition('preact_resnet18_relu', drop_last=True, aa='idbh-strong', val=1000, val_attack='ce-10'),
    # sh/train_dkl_cifar10.sh; swa.py 0.9 over the ends of all epochs, which is 0.9^(128 / 50,000) by step
    'ikl2023': Definition('wrn34_10_relu', ema=0.99973, ema_warmup='none'),
    'fastat_ema': FASTAT,
    'fastat_nfgsm': FASTAT}


class Network(NamedTuple):
    """A small network for steps: of the same function as the recipe's, and of which it says what is not usual."""

    model: str
    args: dict[str, Any]
    normalised: bool = False  # by `CIFAR10`, in front of the network
    bn_momentum: float = 0.1  # torch's


NETWORKS = {
    'paper': Network('wrn10_1_pssilu', {}),
    'wang2023_1m': Network('wrn10_1_silu', {'pad_type': 'same'}, True, 0.01),  # wideresnetwithswish.py, watrain.py
    'rice2020': Network('wrn10_1_relu', {}, True),  # train_cifar.normalize
    'wong2020_fast': Network('preact_resnet18_relu', {'shortcut': 'input', 'base_width': 8}, True),  # preact_resnet.py
    'wu2020_trades_awp': Network('wrn10_1_relu', {}),
    'idbh2023': Network('preact_resnet18_relu', {'shortcut': 'input', 'base_width': 8}),  # model/preact_resnet.py
    'ikl2023': Network('wrn10_1_relu', {}),
    'fastat_ema': Network('resnet18_relu', {'base_width': 8}),
    'fastat_nfgsm': Network('resnet18_relu', {'base_width': 8})}


def family(name: str) -> str:
    """'paper' for the recipes of the paper that the package is of, which share network and optimizer."""
    return 'paper' if name.startswith('paper') else name


def optimizer_of(name: str, network: nn.Module, steps: int, epochs: int | None = None) -> tuple[
        torch.optim.SGD, LRScheduler]:
    """SGD and the schedule of its learning rate (and of momentum, where it goes round) as a program has them.

    The schedule goes on by ``steps`` in each epoch, also where the program's goes on by epoch.
    """
    total = (epochs or DEFINITIONS[name].epochs) * steps
    parameters: Any = list(network.parameters())
    if name == 'wang2023_1m':  # group_weight
        norms = {id(p) for module in network.modules() if isinstance(module, nn.BatchNorm2d)
                 for p in module.parameters()}
        parameters = [{'params': [p for p in parameters if id(p) not in norms]},
                      {'params': [p for p in parameters if id(p) in norms], 'weight_decay': 0.0}]
    peak = 0.2 if name in ('wang2023_1m', 'wong2020_fast', 'ikl2023') else 0.1
    nesterov = name.startswith('paper') or name == 'wang2023_1m'
    sgd = torch.optim.SGD(parameters, peak, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    if name.startswith('paper'):
        return sgd, CosineAnnealingLR(sgd, total, eta_min=0.001)
    if name in ('wang2023_1m', 'fastat_ema', 'fastat_nfgsm'):  # OneCycleLR's own cycle of momentum is on
        rise = 0.025 if name == 'wang2023_1m' else 0.3
        # torch's peak is at pct_start * total_steps - 1, and its last step at total_steps - 1
        return sgd, OneCycleLR(sgd, peak, total_steps=total + 1, pct_start=(rise * total + 1) / (total + 1))
    if name == 'wong2020_fast':  # CyclicLR's own cycle of momentum is on
        return sgd, CyclicLR(sgd, 0.0, 0.2, step_size_up=total / 2, step_size_down=total / 2)  # type: ignore[arg-type]
    if name == 'ikl2023':
        return sgd, LambdaLR(sgd, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    # adjust_learning_rate of wu2020 counts epochs from 1
    drops = (99, 149) if name == 'wu2020_trades_awp' else (100, 150)
    return sgd, MultiStepLR(sgd, [epoch * steps for epoch in drops], 0.1)


def advance(sgd: torch.optim.SGD, schedule: LRScheduler, steps: int) -> None:
    """Goes on by a number of steps before any gradient, so that the schedule alone changes."""
    for _ in range(steps):
        sgd.step()
        schedule.step()
