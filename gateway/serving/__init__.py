"""Loaded models: their memory and their life cycle. Decides which version may load and which is evicted.
Knows versions; must not know a registry or an alias."""
