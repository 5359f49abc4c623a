"""The settings that, together with the source, determine the content of the shards."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dit.data.images import Limits
from megatron_dit.data.text import DTYPES
from megatron_dit.runtime.errors import UserError

TINY = "tiny"
PIXELS = "pixels"
GREATEST_SIDE = 2**16  # pixels; an index cannot store a larger side of a latent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of ``encode``, under the same names. They are checked on construction."""

    size: int = 256
    ratios: tuple[str, ...] = ("1:1",)
    multiple: int = 0  # sides of images are multiples of this; 0: side of a token of the model
    min_side: int = 0  # 0: size
    max_aspect: float = 4.0
    max_pixels: int = 178_956_970
    text_encoder: str = TINY
    tokens: int = 120
    text: str = "features"
    vae: str = PIXELS
    dtype: str = "fp32"
    vision_encoder: str | None = None
    patch: int = 2
    per_shard: int = 10_000
    batch: int = 64

    def __post_init__(self) -> None:
        for name in ("size", "max_aspect", "max_pixels", "tokens", "patch", "per_shard", "batch"):
            _at_least(name, getattr(self, name), 1)
        if self.size > GREATEST_SIDE:
            raise UserError(f"--size {self.size}: expected at most {GREATEST_SIDE:,}")
        for name in ("multiple", "min_side"):
            _at_least(name, getattr(self, name), 0)
        for name, choices in (("text", ("features", "ids")), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} {getattr(self, name)}: expected {' or '.join(choices)}")

    @property
    def limits(self) -> Limits:
        return Limits(self.min_side or self.size, self.max_aspect, self.max_pixels)


def _at_least(name: str, value: float, least: int) -> None:
    if not value >= least:
        raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
