"""``python -m checkpoints_tools``: look into checkpoints."""
