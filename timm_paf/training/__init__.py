"""Adversarial training: recipe, trainer, and what the program ``train_robust.py`` is made of."""

from .nonfinite import NonFiniteLoss
from .recipe import Recipe
from .trainer import Trainer

__all__ = ['NonFiniteLoss', 'Recipe', 'Trainer']
