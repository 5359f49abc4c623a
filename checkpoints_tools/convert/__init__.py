"""``python -m checkpoints_tools convert``: convert checkpoints to and from the formats of other projects."""
