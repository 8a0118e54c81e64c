"""Encoded samples on disk: found by what they were made from, never by a name. Knows no model."""
