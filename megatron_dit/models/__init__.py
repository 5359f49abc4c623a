"""Architectures: a registry, the code that they share, and one folder per architecture."""
