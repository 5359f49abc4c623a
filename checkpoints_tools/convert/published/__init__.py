"""Checkpoints as the architectures' own projects publish them, as runs."""
