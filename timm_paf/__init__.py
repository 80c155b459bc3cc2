"""Parametric activation functions for adversarial robustness, as a plugin of timm.

Importing the package registers every ``<arch>_<activation>`` with timm, and each PAF's name for timm's ``act_layer``.
"""

# The first imports timm. The others register the models and the activations with it, and let robustbench import.
from . import _quiet, act_layers, models  # noqa: F401
from .activations import (
    PAF,
    PELU,
    ChannelPAF,
    PReLU,
    PReLUPlus,
    PSiLU,
    PSoftplus,
    PSSiLU,
    ReBLU,
    SSiLU,
    create_paf,
    list_pafs,
    paf_parameters,
)
from .attacks import ThreatModel, pgd
from .convert import convert_activations
from .evaluation import evaluate
from .kernels import set_fused_pafs, use_fused_pafs
from .plots import plot_activations
from .robustbench import register
from .second_derivative import curvature
from .training import Recipe, Trainer
from .version import __version__
from .weights import list_weights, load_bundle, load_checkpoint

__all__ = [
    'PAF', 'PELU', 'ChannelPAF', 'PReLU', 'PReLUPlus', 'PSSiLU', 'PSiLU', 'PSoftplus', 'ReBLU', 'Recipe', 'SSiLU',
    'ThreatModel', 'Trainer', '__version__', 'convert_activations', 'create_paf', 'curvature', 'evaluate',
    'list_pafs', 'list_weights', 'load_bundle', 'load_checkpoint', 'paf_parameters', 'pgd', 'plot_activations',
    'register', 'set_fused_pafs', 'use_fused_pafs',
]
