"""``python -m checkpoints_tools convert``: checkpoints to and from what others read and write."""
