"""What others run, for the benchmarks: RobustBench's PSSiLU, and PGD training as papers' code has it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_paf  # noqa: F401  lets robustbench import

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10


def robustbench_pssilu() -> nn.Module:
    """RobustBench's module: the paper's formula, operation by operation."""
    from robustbench.model_zoo.architectures.paf_wide_resnet import PSSiLU

    return PSSiLU()


def network(name: str) -> nn.Module:
    """RobustBench's WideResNet for 'wrn<depth>_<width>', else ours with its activation; contiguous, trainable."""
    import timm
    from robustbench.model_zoo.architectures.paf_wide_resnet import PAF_WideResNet

    act = robustbench_pssilu()
    if name.startswith('wrn'):
        depth, width = map(int, name[3:].split('_'))
        return PAF_WideResNet(act, depth=depth, widen_factor=width)
    model = timm.create_model(f'{name}_relu')
    for module in list(model.modules()):
        for child, value in module.named_children():
            if isinstance(value, nn.ReLU):
                setattr(module, child, act)
    return model


def same_weights(bundle: str, model: nn.Module) -> nn.Module:
    """RobustBench's network with the weights of a bundle of ours, 'wrn<depth>_<width>_pssilu', where ``model`` is."""
    peer = network(bundle.removesuffix('_pssilu')).to(next(model.parameters()).device).eval()
    weights = model.state_dict()
    peer.load_state_dict({k: weights[k if k in weights else f'act.{k.rpartition(".")[2]}'] for k in peer.state_dict()})
    return peer


def with_relu(model: nn.Module) -> nn.Module:
    """A copy of a peer's network with ReLU in the place of its activation."""
    act = next(m for m in model.modules() if type(m).__name__ == 'PSSiLU')
    return copy.deepcopy(model, {id(act): nn.ReLU()})


def attack_step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the loss with respect to the images."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]


def pgd(model: nn.Module, x0: Tensor, y: Tensor, steps: int = STEPS) -> Tensor:
    x = (x0 + torch.empty_like(x0).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        x = x.detach() + STEP * attack_step(model, x, y).sign()
        x = torch.min(torch.max(x, x0 - EPS), x0 + EPS).clamp(0, 1)
    return x.detach()


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x0: Tensor, y: Tensor) -> float:
    """PGD-10 training with the penalty and clip of the paper, and a clean forward pass for the log."""
    model.eval()
    x = pgd(model, x0, y)
    model.train()
    optimizer.zero_grad()
    with torch.no_grad():
        (model(x0).argmax(1) == y).sum().item()
    beta = next((p for n, p in model.named_parameters() if n.endswith('beta')), None)
    loss = F.cross_entropy(model(x), y)
    (loss if beta is None else loss + 10 * beta.abs().sum()).backward()
    if beta is not None:
        nn.utils.clip_grad_norm_([beta], 0.01)
    optimizer.step()
    return loss.item()
