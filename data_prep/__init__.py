"""``python -m data_prep``: pictures and captions to shards of latents and text features."""
