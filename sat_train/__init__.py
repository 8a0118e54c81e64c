"""CogVideoX training from YAML: SAT's way of working, on torch, SwissArmyTransformer and DeepSpeed."""

__version__ = "0.1.0"
