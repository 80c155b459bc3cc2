"""Programs that evaluate, pack and publish a trained network: ``python -m hub.evaluate``, ``python -m hub.bundle``."""
