"""The normalisation of the input that some published networks do themselves, with images in [0, 1] as their input."""

# No `from __future__ import annotations`: TorchScript reads no strings.

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

__all__ = ['Normalize', 'StandardizeImage', 'create_normalize', 'normalize_input', 'statistics_of']


class Normalize(nn.Module):
    """(x - mean) / std by channel; mean and std are saved with the weights, which are of another network without them.

    Args:
        mean, std: a number for each channel. Images of another number of channels have the mean of these in each.
        in_chans: channels of the images.
    """

    if TYPE_CHECKING:  # TorchScript would take the annotations for its own
        mean: Tensor
        std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], in_chans: int = 3, device: Any = None,
                 dtype: Any = None):
        super().__init__()
        for name, values in (('mean', mean), ('std', std)):
            each = list(values) if len(values) == in_chans else [sum(values) / len(values)] * in_chans
            self.register_buffer(name, torch.tensor(each, device=device, dtype=dtype).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class StandardizeImage(nn.Module):
    """(x - mean) / std of each image by itself, as the network of Ding et al. 2020 does it (arXiv 1812.02637).

    The standard deviation is at least 1 / sqrt(number of values), so that an image of one colour stays finite.
    """

    def forward(self, x: Tensor) -> Tensor:
        std = x.std(dim=(1, 2, 3), keepdim=True)
        least = torch.ones_like(std) / (x.shape[1] * x.shape[2] * x.shape[3]) ** 0.5
        return (x - x.mean(dim=(1, 2, 3), keepdim=True)) / torch.max(std, least)


def create_normalize(
        normalize: Any, in_chans: int, device: torch.device | str | None, dtype: torch.dtype | None,
) -> nn.Module | None:
    """Returns the module of a network's argument ``normalize``: None, 'image', or (mean, std) by channel.

    Raises:
        ValueError: for anything else.
    """
    if normalize is None:
        return None
    if isinstance(normalize, str) and normalize == 'image':
        return StandardizeImage()
    try:
        mean, std = ([float(value) for value in values] for values in normalize)
        if len(mean) != len(std) or not mean or not all(value > 0 for value in std):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"normalize is {normalize!r}; expected None, 'image', or (mean, std) with as many numbers "
                         'each, the second positive') from None
    return Normalize(mean, std, in_chans, device, dtype)


def statistics_of(cfg: Mapping[str, Any]) -> list[list[float]] | None:
    """Returns mean and std of timm's ``pretrained_cfg``, None where they leave images in [0, 1] as they are."""
    mean, std = ([float(value) for value in cfg[key]] for key in ('mean', 'std'))
    return [mean, std] if any(mean) or any(value != 1 for value in std) else None


def _normalized(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (model.normalize(args[0]), *args[1:])  # type: ignore[operator]


def _normalized_by(normalize: nn.Module, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, own = args[0], dict(normalize.named_buffers())
    if any(value.device != x.device for value in own.values()):  # of DataParallel's replica, which has the first's hook
        own = {name: value.to(x.device) for name, value in own.items()}
        return (torch.func.functional_call(normalize, own, x), *args[1:])
    return (normalize(x), *args[1:])


def normalize_input(model: nn.Module, normalize: Any, first: str = '') -> None:
    """Makes any network normalise its images itself, which are in [0, 1] then; the network is changed in place.

    Its weights are saved with ``normalize.mean`` and ``normalize.std``. Only a call of the network with the images as
    its first argument normalises, not one of its ``forward_features``, unless ``first`` is given. TorchScript does not
    take it. In a ``nn.Sequential`` it is the first layer: the others' numbers are one higher, their names stay.

    Args:
        model: a network that takes normalised images, as most of timm's do.
        normalize: (mean, std) by channel, or 'image'; None changes nothing.
        first: name of the one module that takes the images, such as 'patch_embed', whose calls normalise in place of
            those of the network.

    Raises:
        ValueError: for another value, if the network has a normalisation of its own, or for a subclass of
            ``nn.Sequential`` with a ``forward`` of its own, of which nobody knows whether it runs all of its layers.
    """
    if normalize is None:
        return
    plain = type(model).forward is nn.Sequential.forward
    if isinstance(model, nn.Sequential) and not plain:
        raise ValueError(f'{type(model).__name__} is a Sequential with a forward of its own; expected it wrapped: '
                         'torch.nn.Sequential(model)')
    if isinstance(getattr(model, 'normalize', None), nn.Module):
        raise ValueError(f'{type(model).__name__} normalises its input already; expected no other normalize')
    if hasattr(model, 'normalize'):
        raise ValueError(f'{type(model).__name__} has another attribute normalize; expected a network without one')
    like = next(model.parameters())
    module: Any = create_normalize(normalize, getattr(model, 'in_chans', 3), like.device, like.dtype)
    # It comes first, where a Sequential and timm's wrappers that take a network apart run it as a layer.
    model._modules = {'normalize': module, **model._modules}
    if first:  # the hook has the module, which a copy of the network copies with it
        model.get_submodule(first).register_forward_pre_hook(functools.partial(_normalized_by, module))
    elif not plain:
        model.register_forward_pre_hook(_normalized)
