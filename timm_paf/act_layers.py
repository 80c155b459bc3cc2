"""Puts the names of the PAFs into timm's table, so that ``act_layer='pssilu'`` works in any timm model that takes it.

timm makes one activation at each place, so each has parameters of its own; `convert_activations` shares one. timm has a
``prelu`` itself (torch's, alpha 0.25), which stays what it is.
"""

from __future__ import annotations

from timm.layers.create_act import _ACT_LAYER_DEFAULT  # timm has no public way in

from .activations import create_paf, list_pafs

for _name in list_pafs():
    _ACT_LAYER_DEFAULT.setdefault(_name, type(create_paf(_name)))
