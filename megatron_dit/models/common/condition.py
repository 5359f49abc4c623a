"""The condition of a generated image: text or a class label, and whether it is dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Condition of a batch. A model uses the fields that its architecture needs."""

    dropped: Tensor  # (B,) bool, True = unconditional (classifier-free guidance)
    text: Tensor | None = None  # (B, T, text_dim), zero-padded; fp16 as stored in the shards, or fp32
    mask: Tensor | None = None  # (B, T) bool, True = token, False = padding
    label: Tensor | None = None  # (B,) int64 in [0, num_classes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Return a condition with ``function`` applied to each tensor."""
        values = (getattr(self, item.name) for item in fields(self))
        return Condition(*(None if value is None else function(value) for value in values))  # pyright: ignore

    def text_and_mask(self) -> tuple[Tensor, Tensor]:
        """Return (text, mask), which must not be None."""
        assert self.text is not None
        assert self.mask is not None
        return self.text, self.mask

    def zeroed_text(self) -> Tensor:
        """Return the text, which must not be None, with zeros at padding; all zeros if the text is dropped."""
        text, mask = self.text_and_mask()
        return text * (mask & ~self.dropped[:, None]).to(text.dtype)[..., None]

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Concatenate conditions along the batch."""
        columns = {item.name: [getattr(part, item.name) for part in parts] for item in fields(Condition)}
        joined = {name: None if None in values else torch.cat(values) for name, values in columns.items()}
        return Condition(**joined)  # pyright: ignore
