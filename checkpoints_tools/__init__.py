"""``python -m checkpoints_tools``: look into checkpoints, average and convert them."""
