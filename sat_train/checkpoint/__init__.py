"""Checkpoints and weights: SAT's folder layout, atomic publishing, resume, import and export.

Knows state dicts and folders, not models.
"""
