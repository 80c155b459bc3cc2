"""What the tests of the networks share: small ones with random statistics, images, and where their PAFs are."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
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


def in_hub_cache(cache: Path, repo: str, model: nn.Module) -> None:
    """Puts weights where a download from the Hub keeps them, so that HF_HUB_CACHE and HF_HUB_OFFLINE find them."""
    folder = cache / f'models--{repo.replace("/", "--")}'
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs' / 'main').write_text('0' * 40)
    (folder / 'snapshots' / ('0' * 40)).mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()},
              folder / 'snapshots' / ('0' * 40) / 'model.safetensors')
