"""Pretraining diffusion Transformers at scale, tuned by μTransfer."""

__version__ = "0.1.0"
