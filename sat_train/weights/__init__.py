"""Weights by name: lazy, in the formats of SAT, diffusers and PEFT, and sharded for tensor parallelism."""
