"""Weights in from whatever people have, and out to what others load."""
