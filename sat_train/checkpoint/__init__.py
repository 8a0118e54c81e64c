"""Checkpoints of a run: SAT's folder layout, atomic publishing, verification, resume, retention.

Knows state dicts and folders, not models.
"""
