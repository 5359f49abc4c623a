"""``python -m data_prep``: encode images and captions into shards of latents and text features."""
