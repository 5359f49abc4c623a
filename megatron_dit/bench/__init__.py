"""Throughput, MFU and memory of a config's training step, optionally compared with a diffusers baseline."""
