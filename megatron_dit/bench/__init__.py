"""Throughput, MFU and memory of a config's training step, alone or beside a plain diffusers model."""
