"""Images: whole data sets, seeded batches of them, folders, and generated images on the disk."""

from .augmentation import POLICIES_WITH_CROP, Augmentation
from .batches import PAD_MODES, Batches
from .folders import ImageFolder, open_folder
from .held_out import split_validation
from .images import DATASETS, ImageSet, derive_seed, find_root, load_dataset, to_float
from .indexed import IndexedBatches, IndexedImages
from .mixing import RandomAccess, cutmix, mixup, training_batch
from .synthetic import SyntheticSet, open_synthetic
from .timm_sets import TimmImages, open_images

__all__ = [
    'DATASETS', 'PAD_MODES', 'POLICIES_WITH_CROP', 'Augmentation', 'Batches', 'ImageFolder', 'ImageSet',
    'IndexedBatches', 'IndexedImages', 'RandomAccess', 'SyntheticSet', 'TimmImages', 'cutmix', 'derive_seed',
    'find_root', 'load_dataset', 'mixup', 'open_folder', 'open_images', 'open_synthetic', 'split_validation',
    'to_float', 'training_batch',
]
