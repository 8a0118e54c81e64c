"""The training engine: the only package that imports DeepSpeed, except for the start of the processes."""
