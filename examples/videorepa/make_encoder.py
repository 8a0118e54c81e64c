"""Writes the weights of the tiny encoder: random, and always the same.

python examples/videorepa/make_encoder.py encoder.safetensors
"""

import sys

import torch
from network import TinyVideoEncoder
from safetensors.torch import save_file

if __name__ == "__main__":
    torch.manual_seed(0)
    save_file(TinyVideoEncoder().state_dict(), sys.argv[1])
