"""``megatron-dit verify``: compare layouts with a single process, in the first steps and across checkpoints."""
