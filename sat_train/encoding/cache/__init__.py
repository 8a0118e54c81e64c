"""Encoded samples on disk, keyed by a hash of their inputs, never by a name. Independent of the models."""
