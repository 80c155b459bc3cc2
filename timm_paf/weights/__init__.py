"""Weights: named sets of weights, bundles, checkpoints of others, and downloads."""

from .bundle import load_bundle, read_bundle
from .checkpoint import Checkpoint, load_checkpoint, read_checkpoint
from .initial import InitialWeights, open_weights
from .zoo import Measured, Weights, find_weights, list_weights, network_of

__all__ = [
    'Checkpoint', 'InitialWeights', 'Measured', 'Weights', 'find_weights', 'list_weights', 'load_bundle',
    'load_checkpoint', 'network_of', 'open_weights', 'read_bundle', 'read_checkpoint',
]
