"""Generates videos from prompts and images and writes their files, for validation and for the command."""
