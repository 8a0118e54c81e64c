"""Parts of `benchmarks/faults.py`: ranks that start at once, faults, and a judge."""
