"""Parts of `benchmarks/gpu_check.py`: what only a GPU can show, each with its prediction."""
