"""Images: whole data sets, seeded batches of them, folders, and generated images on the disk."""

from .batches import Batches, RandomAccess, cutmix, training_batch
from .folders import ImageFolder, open_folder
from .images import DATASETS, ImageSet, derive_seed, find_root, load_dataset, split_validation, to_float
from .indexed import IndexedBatches, IndexedImages
from .synthetic import SyntheticSet, open_synthetic
from .timm_sets import TimmImages, open_images

__all__ = [
    'DATASETS', 'Batches', 'ImageFolder', 'ImageSet', 'IndexedBatches', 'IndexedImages', 'RandomAccess', 'SyntheticSet',
    'TimmImages', 'cutmix', 'derive_seed', 'find_root', 'load_dataset', 'open_folder', 'open_images', 'open_synthetic',
    'split_validation', 'to_float', 'training_batch',
]
