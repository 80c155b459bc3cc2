"""What the tests of the networks share: small ones with random statistics, images, and where their PAFs are."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import timm_paf  # noqa: F401  registers the models
from timm_paf.activations import PAF

SMALL = {
    'wrn10_1': {}, 'wrn16_1': {}, 'resnet18': {'base_width': 8}, 'resnet50': {'base_width': 8, 'layers': (1, 1, 1, 1)},
    'preact_resnet18': {'base_width': 8}}
EXACT = {'rtol': 0, 'atol': 0}


def small(arch: str, act: str = 'pssilu', seed: int = 0, **kwargs) -> nn.Module:
    """In eval mode, with BatchNorm statistics and PAF values that no default could stand in for."""
    torch.manual_seed(seed)
    return randomise(timm.create_model(f'{arch}_{act}', **{**SMALL[arch], **kwargs})).eval()


def randomise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                     (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 1.5)):
                nn.init.uniform_(value, low, high)
        elif hasattr(module, 'alpha') and hasattr(module, 'beta'):
            nn.init.constant_(module.alpha, 1.37)
            nn.init.constant_(module.beta, -0.21)
    return model


def images(batch: int = 2, chans: int = 3, size: tuple[int, int] = (32, 32), dtype=torch.float32) -> Tensor:
    return torch.rand(batch, chans, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def pafs(model: nn.Module) -> list[PAF]:
    """The PAF of every site, so repeated where it is shared."""
    return [child for m in model.modules() for child in m.children() if isinstance(child, PAF)]


def paf_keys(state: dict[str, Tensor]) -> list[str]:
    return [key for key in state if key.rsplit('.', 1)[-1] in ('alpha', 'beta')]
