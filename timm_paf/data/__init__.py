"""Images: whole data sets, seeded batches of them, folders, and generated images on the disk."""

from .batches import Batches, RandomAccess, cutmix, training_batch
from .folders import FolderBatches, ImageFolder, open_folder
from .images import DATASETS, ImageSet, derive_seed, find_root, load_dataset, split_validation, to_float
from .synthetic import SyntheticSet, open_synthetic

__all__ = [
    'DATASETS', 'Batches', 'FolderBatches', 'ImageFolder', 'ImageSet', 'RandomAccess', 'SyntheticSet', 'cutmix',
    'derive_seed', 'find_root', 'load_dataset', 'open_folder', 'open_synthetic', 'split_validation', 'to_float',
    'training_batch',
]
