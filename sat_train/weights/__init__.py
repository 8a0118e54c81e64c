"""Weights by name: read lazily, in the formats of SAT, diffusers and PEFT, and sharded for tensor parallelism."""
