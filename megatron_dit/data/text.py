"""Text features by transformers' T5: a local folder or a hub name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_dit.errors import UserError


class TextEncoder:
    """A T5 encoder with its tokenizer, in evaluation mode."""

    def __init__(self, name: str, max_tokens: int, device: torch.device | None = None) -> None:
        """Raises UserError where ``name`` is neither a folder nor to be had from a hub."""
        from transformers import AutoTokenizer, T5EncoderModel, logging
        from transformers.utils.logging import disable_progress_bar

        logging.set_verbosity_error()
        disable_progress_bar()
        self.max_tokens = max_tokens
        self._device = device or torch.device("cpu")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model: Any = T5EncoderModel.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"text encoder {name} cannot be loaded ({reason}): give a T5 folder or hub name") from None

        self._model.to(self._device).eval()

    @property
    def dim(self) -> int:
        return self._model.config.d_model

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features (tokens, dim) fp32 of each caption, cut at ``max_tokens``, without padding."""
        tokens = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self._device)
        features = self._model(**tokens).last_hidden_state.float().cpu()
        lengths = tokens["attention_mask"].sum(1).tolist()
        return [row[:length] for row, length in zip(features, lengths, strict=True)]


def pad(features: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Features of captions -> (B, tokens, dim) zero-padded and their mask (B, tokens), True = a token."""
    text = torch.zeros(len(features), tokens, features[0].shape[1])
    mask = torch.zeros(len(features), tokens, dtype=torch.bool)
    for row, feature in enumerate(features):
        count = min(tokens, len(feature))
        text[row, :count] = feature[:count]
        mask[row, :count] = True
    return text, mask
