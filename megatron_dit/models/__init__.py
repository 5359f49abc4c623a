"""Architectures: a registry, what they share, and one folder each."""
