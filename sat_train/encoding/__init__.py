"""From pixels and captions to the transformer's inputs: frozen encoders, conditions, and their cache."""
