"""Processes, groups, collectives and seeds. Knows no model."""
