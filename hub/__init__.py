"""Programs that evaluate, pack and publish a trained network: ``timm-paf evaluate``, ``timm-paf bundle``."""

import timm_paf  # noqa: F401  before timm, whose own import warns
