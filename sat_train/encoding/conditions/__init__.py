"""Inputs of the model next to the noised latent: one file each, used by training, validation and sampling."""
