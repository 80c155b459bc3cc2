"""Imports timm without the warning that torch has for ``torch.jit.interface``, with which timm's HRNet is written.

The package imports it first, so that no program prints the warning; all others stay.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings('ignore', r'`torch\.jit\.interface` is deprecated', FutureWarning)
    import timm  # noqa: F401
