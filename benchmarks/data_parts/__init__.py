"""The parts of `benchmarks/data.py`."""
