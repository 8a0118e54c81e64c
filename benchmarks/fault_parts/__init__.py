"""What `benchmarks/faults.py` is made of: ranks that start at once, faults, and a judge."""
