"""Encode batches of images and captions with the codec, the text encoder and the vision encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.buckets import Buckets
from data_prep.recipe import PIXELS, TINY, Recipe
from data_prep.sources import Record
from megatron_dit.data.codec import VaeCodec, open_codec
from megatron_dit.data.index import OWN
from megatron_dit.data.tar import npy
from megatron_dit.data.text import DTYPES, TextEncoder
from megatron_dit.data.vision import VisionEncoder
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError

TINY_FOLDER = "text_encoder"  # inside the folder of the shards


@dataclass(frozen=True)
class Example:
    key: str
    record: Record
    image: np.ndarray  # (H, W, 3) uint8
    original: tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Batch:
    """Examples of one bucket, with the ids of all their captions, concatenated."""

    examples: Sequence[Example]
    ids: Sequence[np.ndarray]


@dataclass(frozen=True)
class Encoded:
    """The encoders' outputs for a batch, in fp16."""

    batch: Batch
    mean: np.ndarray  # (B, C, h, w)
    std: np.ndarray | None
    text: Sequence[np.ndarray] | None  # (tokens, dim) of each caption
    features: np.ndarray | None  # (B, tokens, dim) of the vision encoder


class Encoders:
    """The encoders of a recipe. Raise UserError if one cannot be loaded or the image sizes do not fit them."""

    def __init__(self, recipe: Recipe, captioned: bool) -> None:
        self._recipe = recipe
        asked = {"kind": "pixels"} if recipe.vae == PIXELS else {"kind": "vae", "path": recipe.vae}
        self._codec = open_codec(asked, device(), DTYPES[recipe.dtype])
        self.buckets = self._buckets()
        self._text: TextEncoder | None = None
        if captioned and recipe.text_encoder != TINY:
            self._open_text(recipe.text_encoder)
        self._vision_encoder = VisionEncoder(recipe.vision_encoder, device()) if recipe.vision_encoder else None

    def _buckets(self) -> Buckets:
        recipe, scale = self._recipe, self._codec.scale
        token = scale * recipe.patch
        multiple = recipe.multiple or token
        if multiple % (token if recipe.vision_encoder else scale):
            raise UserError(
                f"--multiple {multiple}: expected a multiple of {token} (the codec's {scale} times --patch)"
            )
        if recipe.size % multiple:
            of = f"the codec's {scale} times --patch {recipe.patch}" if multiple == token else "--multiple"
            raise UserError(f"--size {recipe.size}: expected a multiple of {multiple} ({of})")
        return Buckets.of(recipe.size, recipe.ratios, multiple)

    def _open_text(self, name: str) -> None:
        self._text = TextEncoder(name, self._recipe.tokens, device(), DTYPES[self._recipe.dtype])

    def open_tiny(self, folder: Path) -> None:
        """Load the tiny text encoder that was built in the shards' ``folder``."""
        self._open_text(str(folder / TINY_FOLDER))

    def drop_text(self) -> None:
        """Discard the text encoder because there are no captions; samples get no text."""
        self._text = None

    def weights(self) -> dict[str, str]:
        """Return the SHA-256 of each encoder's weights, "" if it has none yet. The first call reads all files."""
        text = self._text.sha256 if self._text else ""
        vision = self._vision_encoder.sha256 if self._vision_encoder else ""
        found = {"vae": self._codec.sha256, "text_encoder": text, "vision_encoder": vision}
        return {f"{name}_sha256": value for name, value in found.items()}

    def latent(self, side: tuple[int, int]) -> tuple[int, int]:
        """Return the latents' (height, width) for a bucket of images of size ``side``."""
        return side[0] // self._codec.scale, side[1] // self._codec.scale

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Tokenize the captions. Labeled images without a caption get the ids of an empty one."""
        if self._text is None:
            return Batch(examples, ())
        texts = [text for example in examples for text, _ in _captions(example.record)]
        return Batch(examples, self._text.tokenize(texts))

    def encode(self, batch: Batch) -> Encoded:
        """Run the encoders on a batch. Raise UserError if an output is not finite in fp16."""
        images = torch.from_numpy(np.stack([each.image for each in batch.examples])).permute(0, 3, 1, 2)
        mean, std = self._codec.posterior(images)
        text = features = None
        if self._text is not None and self._recipe.text == "features":
            text = [row.half().cpu().numpy() for row in self._text.encode_ids(batch.ids)]
        if self._vision_encoder is not None:
            rows, columns = (side // self._recipe.patch for side in mean.shape[2:])
            features = self._vision_encoder.features(images, rows, columns).half().cpu().numpy()
        halves = mean.half().numpy(), None if std is None else std.half().numpy()
        for encoder, arrays in (("vae", halves), ("text-encoder", text or ()), ("vision-encoder", (features,))):
            if not all(array is None or np.isfinite(array).all() for array in arrays):
                first, last = batch.examples[0].record.name, batch.examples[-1].record.name
                raise UserError(
                    f"--{encoder} produced values that are not finite in fp16, for an image from {first} to {last}, "
                    f"with --dtype {self._recipe.dtype}; use another --dtype or encoder"
                )
        return Encoded(batch, *halves, text, features)

    def members(self, encoded: Encoded) -> list[dict[str, bytes | str]]:
        """Return the samples of a batch in the form that ``write_shard`` expects."""
        samples = []
        first = 0
        for row, example in enumerate(encoded.batch.examples):
            record = example.record
            sample: dict[str, bytes | str] = {"__key__": example.key, "latent.npy": npy(encoded.mean[row])}
            if encoded.std is not None:
                sample["std.npy"] = npy(encoded.std[row])
            captions = _captions(record)
            if self._text is not None:
                own = slice(first, first + len(captions))
                first = own.stop
                ids = encoded.batch.ids[own]
                sample["ids.npy"] = npy(np.concatenate(ids))
                if encoded.text is not None:
                    sample["text.npy"] = npy(np.concatenate(encoded.text[own]))
                weights = [[len(each), weight] for each, (_, weight) in zip(ids, captions, strict=True)]
                sample["captions.npy"] = npy(np.array(weights, dtype=np.float64))
            if encoded.features is not None:
                sample["features.npy"] = npy(encoded.features[row])
            if record.label is not None:
                sample["cls"] = str(record.label)
            width, height = example.original
            about = {**record.meta, "source": record.name, "width": width, "height": height}
            if len(captions) > 1:
                about["captions"] = captions
            samples.append(sample | {"txt": captions[0][0], "json": json.dumps(about)})
        return samples

    def describe(self) -> dict[str, Any]:
        """Return the index fields that describe the encoders: channels, codec, text and features."""
        recipe, text, features = self._recipe, {}, None
        codec: dict[str, Any] = {"kind": "pixels", "sha256": self._codec.sha256}
        if isinstance(self._codec, VaeCodec):
            codec |= {"kind": "vae", "path": self._codec.path, "dtype": recipe.dtype}
        if self._text is not None:
            text = {
                "encoder": OWN + TINY_FOLDER if recipe.text_encoder == TINY else self._text.name,
                "sha256": self._text.sha256,
                "dtype": recipe.dtype,
                "dim": self._text.dim,
                "tokens": recipe.tokens,
                "features": recipe.text == "features",
            }
        if self._vision_encoder is not None:
            features = {
                "encoder": recipe.vision_encoder,
                "sha256": self._vision_encoder.sha256,
                "dim": self._vision_encoder.dim,
                "patch": recipe.patch,
            }
        return {"channels": self._codec.channels, "codec": codec, "text": text, "features": features}


def _captions(record: Record) -> list[tuple[str, float]]:
    """Return the (text, weight) of each caption, or a single empty caption if there is none."""
    return [(caption.text, caption.weight) for caption in record.captions] or [("", 1.0)]
