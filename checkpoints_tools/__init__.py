"""``python -m checkpoints_tools``: look into checkpoints, and average them."""
