"""From pixels and captions to what the transformer sees: frozen encoders, conditions, and their cache."""
