"""Programs that evaluate, pack and publish a trained network: ``timm-paf evaluate``, ``timm-paf bundle``."""
