"""Encoders that run while training, instead of features in the shards."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dit.data.text import DTYPES, TextEncoder
from megatron_dit.errors import UserError
from megatron_dit.parallel.cpu import device

CACHE_BYTES = 2**30
DIGITS = 12  # of a hash that a message shows
END = np.ones(1, np.int32)  # T5's end token: a caption of no words


class OnlineText:
    """Text features of captions' ids, as the shards would hold them; those of the latest captions are kept.

    ``text`` is the index's description of the text: the encoder must be the one that made the ids. ``sharded``: its
    weights lie on all ranks (ZeRO-3), and every rank must construct it and call it as often as the others.
    """

    def __init__(self, text: Mapping[str, Any], name: str, sharded: bool) -> None:
        """Raises UserError for an encoder that is not the index's."""
        dtype = DTYPES[text["dtype"]]
        if sharded and text["dtype"] == "fp16":
            raise UserError(
                "data.text_sharded=true, but the index has text in fp16, for which T5 keeps a part of its weights in "
                "fp32 and ZeRO-3 does not: set data.text_sharded=false, or prepare the data in bf16 or fp32"
            )
        self._sharded = sharded
        with _sharded_weights(text["dtype"]) if sharded else contextlib.nullcontext():
            self._encoder = TextEncoder(name, text["tokens"], device(), dtype)
        if self._encoder.dim != text["dim"]:
            raise UserError(
                f"data.text_encoder={name} has features of {self._encoder.dim}, but the index has text of {text['dim']}"
            )
        if self._encoder.sha256 != text["sha256"]:
            raise UserError(
                f"data.text_encoder={name} has weights {self._encoder.sha256[:DIGITS]}, but the index was made with "
                f"{text['sha256'][:DIGITS]} ({text['encoder']}): give that encoder, or prepare the data again"
            )
        if sharded:
            self._engine = _gather_on_use(self._encoder.model, text["dtype"])
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    @property
    def vocabulary(self) -> int:
        """Ids that the encoder knows: those below this number."""
        return self._encoder.model.config.vocab_size

    def __call__(self, ids: Sequence[np.ndarray]) -> list[Tensor]:
        """Features (tokens, dim) fp16 of each caption's ids. Collective where the weights are sharded."""
        captions = {caption.tobytes(): caption for caption in ids}
        found = {key: self._cache[key] for key in captions if key in self._cache}
        missing = {key: caption for key, caption in captions.items() if key not in found and len(caption)}
        if missing or self._sharded:
            # Ranks gather the weights from each other: one that misses nothing takes part with a caption of no words.
            features = self._encoder.encode_ids(list(missing.values()) or [END])
            found.update({key: feature.half() for key, feature in zip(missing, features, strict=False)})
        # An unreadable sample has no ids.
        found[b""] = torch.zeros(0, self._encoder.dim, dtype=torch.float16)
        for key in captions:
            self._keep(key, found[key])
        return [found[caption.tobytes()] for caption in ids]

    def _keep(self, key: bytes, features: Tensor) -> None:
        """Make it the latest used, and drop the least recently used beyond the bound."""
        if key not in self._cache:
            self._cache[key] = features
            self._bytes += features.nbytes
        self._cache.move_to_end(key)
        while self._bytes > CACHE_BYTES:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes


# DeepSpeed is the engine's business elsewhere. This is no training: the encoder has no gradient, no optimizer and no
# part in the layout, and the engine stands above the data.


def _zero_config(dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {
            "stage": 3,
            # It would replace torch.nn.functional.linear for the whole process.
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 0,
        },
    }


@contextlib.contextmanager
def _sharded_weights(dtype: str) -> Iterator[None]:
    """Models that transformers loads meanwhile are sharded over all ranks as they are built."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A shared-memory all-reduce for CPUs that DeepSpeed would compile at start-up; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = HfDeepSpeedConfig(_zero_config(dtype))  # transformers has but a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def _gather_on_use(model: Any, dtype: str) -> Any:
    """Hooks that gather a sharded module's weights before its forward pass and release them after it."""
    import deepspeed
    from deepspeed.utils import groups

    # Without an mpu DeepSpeed takes the one of an engine made before, whose groups are the training layout's.
    mpu, groups.mpu = groups.mpu, None
    try:
        return deepspeed.initialize(model=model, config=_zero_config(dtype), dist_init_required=False)[0].eval()
    finally:
        groups.mpu = mpu
