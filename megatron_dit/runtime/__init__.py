"""Utilities that every package may use: terminal text, locks, signals, standard output, the launch environment."""
