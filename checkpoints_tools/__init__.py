"""``python -m checkpoints_tools``: inspect, average, convert, reshard and prune checkpoints."""
