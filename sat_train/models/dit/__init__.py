"""The diffusion transformer as SAT mixins."""
