"""Text features of transformers' T5 encoder, from a local folder, a hub name or a pipeline that contains one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.hub import T5, Source, load, locate
from megatron_dit.data.tokenizer import open_tokenizer

# Dtypes that an encoder may run in, by their names in an index.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_t5(source: Source, dtype: torch.dtype = torch.float32) -> Any:
    """Load transformers' T5EncoderModel. Raise UserError if the files are not those of a T5."""
    from transformers import T5EncoderModel

    model = load(T5, source, T5EncoderModel, dtype=dtype, weights_only=True, ignore_mismatched_sizes=True)
    return model.eval()


class TextEncoder:
    """T5 encoder with its tokenizer, in evaluation mode; it runs in ``dtype``."""

    def __init__(
        self, name: str, max_tokens: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load encoder and tokenizer. Raise UserError if ``name`` has no T5, or no tokenizer that belongs to it."""
        source = locate(T5, name)
        self.name = source.name  # for a pipeline, the encoder's folder inside it
        self._device = device or torch.device("cpu")
        self._tokenizer = open_tokenizer(source, max_tokens)
        self.model: Any = load_t5(source, dtype)
        self._tokenizer.check(self.name, self.model.config)
        self.model.to(self._device)

    @property
    def dim(self) -> int:
        return self.model.config.d_model

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the weight files. The first access reads all of them."""
        return weights_sha256(self.name)

    def tokenize(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Return the unpadded ids (tokens,) int32 of each caption, at most ``max_tokens`` including T5's end token."""
        return [np.array(ids, dtype=np.int32) for ids in self._tokenizer.encode(captions)]

    @torch.no_grad()
    def encode_ids(self, ids: Sequence[np.ndarray]) -> list[Tensor]:
        """Return the features (tokens, dim) fp32 of each caption's ids, without padding, on the encoder's device.

        Runs a single forward pass in which identical captions are encoded only once.
        """
        rows: dict[bytes, int] = {}
        places = [rows.setdefault(caption.tobytes(), len(rows)) for caption in ids]
        lengths = torch.tensor([len(row) // ids[0].itemsize for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = torch.zeros(mask.shape, dtype=torch.long)  # padding is masked, so its ids do not matter
        tokens[mask] = torch.from_numpy(np.frombuffer(b"".join(rows), dtype=ids[0].dtype).astype(np.int64))
        output = self.model(input_ids=tokens.to(self._device), attention_mask=mask.to(self._device))
        features = output.last_hidden_state.float()
        return [features[place, : len(caption)] for place, caption in zip(places, ids, strict=True)]

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Return the features (tokens, dim) fp32 of each caption, truncated to ``max_tokens``, without padding."""
        return self.encode_ids(self.tokenize(captions))


def pad(features: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Pad the captions' features with zeros.

    Return the features (B, tokens, dim) on their device, and a mask (B, tokens) on the CPU: True for tokens, False for
    padding.
    """
    text = features[0].new_zeros(len(features), tokens, features[0].shape[1])
    mask = torch.zeros(len(features), tokens, dtype=torch.bool)
    for row, feature in enumerate(features):
        count = min(tokens, len(feature))
        text[row, :count] = feature[:count]
        mask[row, :count] = True
    return text, mask
