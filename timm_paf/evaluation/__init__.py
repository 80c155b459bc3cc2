"""Measures accuracy under attack, with a verdict for every image."""

from .autoattack import AUTOATTACK
from .engine import Evaluation, evaluate, worst_case
from .names import check_attacks, parts_of, passes
from .state import PartResult, State, WorkItem

__all__ = [
    'AUTOATTACK', 'Evaluation', 'PartResult', 'State', 'WorkItem', 'check_attacks', 'evaluate', 'parts_of', 'passes',
    'worst_case',
]
