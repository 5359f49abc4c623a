"""Errors, logging, files and locks, devices, signals, launchers, and patches of third-party libraries."""
