"""The images of a training run: batches, held-out images, and the record of both."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..data import (
    DATASETS,
    Augmentation,
    Batches,
    ImageSet,
    IndexedBatches,
    RandomAccess,
    load_dataset,
    open_images,
    open_synthetic,
    split_validation,
    to_float,
)
from .config import Config
from .recipe import Recipe
from .run_directory import recorded_images

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['Inputs', 'open_inputs', 'parse_synthetic']


class Inputs(NamedTuple):
    """The images that a run trains on, and the recipe with their record."""

    recipe: Recipe
    """The recipe, with the record of the generated images."""
    batches: RandomAccess
    sample: Tensor
    """An image as the network will get it, (1, channels, height, width) float32."""
    validation: ImageSet | None
    record: dict[str, Any]
    """The record of the images for run.json: name, split, n, sha256, and the names of the classes where there are."""


def open_inputs(config: Config, recipe: Recipe, accelerator: Accelerator) -> Inputs:
    """Opens the data set of a configuration, for this process.

    Raises:
        FileNotFoundError, ValueError: if the data set is missing or damaged, or does not fit the recipe.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    if config.mixup and config.batch_size // world % 2:
        raise ValueError(f'--mixup pairs the images of a batch and a process has {config.batch_size // world}; '
                         f'expected a --batch-size that is a multiple of {2 * world}')
    if config.dataset not in DATASETS:
        return _open_indexed(config, recipe, accelerator)
    with accelerator.main_process_first():  # the main process may have to download the data set
        data = load_dataset(config.dataset, config.data_dir, train=True, download=config.download)
    validation = None
    if config.val:
        data, validation = split_validation(data, config.val, config.seed)
    synthetic, fraction = None, 0.5
    if config.synthetic is not None:
        path, fraction = parse_synthetic(config.synthetic)
        with accelerator.main_process_first():  # the main process may have to unpack the images
            synthetic = open_synthetic(path, tuple(data.images.shape[1:]), data.num_classes, log=accelerator.print)
        recipe = replace(recipe, synthetic={**synthetic.record(), 'fraction': fraction})
    batches = Batches(
        data, config.batch_size, config.seed, device, rank, world, synthetic, fraction, pad_mode=config.pad_mode,
        augmentation=create_augmentation(config, data.images.shape[1]), synthetic_augment=config.synthetic_augment,
        drop_last=config.drop_last)
    record = {'name': data.name, 'split': 'train', 'n': len(data), 'sha256': data.sha256()}
    return Inputs(recipe, batches, to_float(data.images[:1]), validation, record)


def _open_indexed(config: Config, recipe: Recipe, accelerator: Accelerator) -> Inputs:
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    with accelerator.main_process_first():  # the main process may have to download the data set
        images = open_images(config.dataset, config.data_dir, train=True, download=config.download)
    begun = recorded_images(Path(config.output))
    if begun is not None:  # a run that was begun has checked its images
        left_out = begun.get('left_out', [])
    else:
        from accelerate.utils import gather_object
        left_out = images.check(accelerator.print, rank, world, gather_object, skip=config.skip_unreadable)
    images, validation = images.without(left_out), None
    if config.val:
        images, held_out = split_validation(images, config.val, config.seed)
        validation = ImageSet(
            held_out.name, held_out.centres(config.image_size), held_out.labels, held_out.num_classes)
    batches = IndexedBatches(images, config.batch_size, config.seed, device, rank, world, config.image_size,
                             create_augmentation(config, config.image_size), drop_last=config.drop_last)
    record = {'name': config.dataset, 'split': 'train', 'n': len(images), **images.digest(),
              'label_names': images.label_names(), **({'left_out': left_out} if left_out else {})}
    return Inputs(recipe, batches, torch.zeros(1, 3, config.image_size, config.image_size), validation, record)


def create_augmentation(config: Config, size: int) -> Augmentation | None:
    """Returns the augmentation that a configuration asks for, None for crop and flip alone.

    Args:
        config: the configuration.
        size: side of the images in pixels.

    Raises:
        ValueError: for a policy that is unknown.
    """
    if not (config.aa or config.color_jitter or config.reprob):
        return None
    return Augmentation(size, config.aa, config.color_jitter, config.reprob)


def parse_synthetic(text: str) -> tuple[str, float]:
    """Splits PATH or PATH:FRACTION; the fraction is half without one, and ``~`` is the home directory.

    Raises:
        ValueError: for a fraction that is no share.
    """
    whole = os.path.expanduser(text)
    path, colon, share = whole.rpartition(':')
    if not colon or Path(whole).exists():
        return whole, 0.5
    try:
        fraction = float(share)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise ValueError(f'--synthetic {text}: {share!r} is no share; expected PATH:FRACTION with one in (0, 1)')
    return path, fraction
