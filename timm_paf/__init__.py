"""Parametric activation functions for adversarial robustness, as a plugin of timm.

Importing it registers every ``<arch>_<activation>`` with timm, and each PAF's name for its ``act_layer``.
"""

# These register the models and the activations with timm, and let robustbench import.
from . import act_layers, resnet_cifar, resnet_imagenet, robustbench, wide_resnet  # noqa: F401
from .activations import create_paf, list_pafs, paf_parameters
from .convert import convert_activations
from .kernels import set_fused_pafs, use_fused_pafs
from .version import __version__
from .zoo import list_weights

__all__ = [
    '__version__', 'convert_activations', 'create_paf', 'list_pafs', 'list_weights', 'paf_parameters', 'set_fused_pafs',
    'use_fused_pafs',
]
