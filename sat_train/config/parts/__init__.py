"""The parts that YAML may name, and the records of those that come with the package."""
