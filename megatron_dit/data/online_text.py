"""Text encoding during training, as an alternative to precomputed features in the shards."""

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
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError

CACHE_BYTES = 2**30
DIGITS = 12  # number of hash digits that a message shows
END = np.ones(1, np.int32)  # T5's end token: the ids of an empty caption


class OnlineText:
    """Computes text features from token ids. They are equal to the features that ``data_prep`` stores in shards.

    They stay on this rank's device, where those of the most recently used captions are cached. ``text`` is the index's
    description of the text; the encoder must be the one that produced the ids. If ``sharded``, the weights are sharded
    over all ranks (ZeRO-3), and every rank must construct this object and call it equally often.
    """

    def __init__(self, text: Mapping[str, Any], name: str, sharded: bool) -> None:
        """Load the encoder. Raise UserError if it is not the one in the index."""
        dtype = DTYPES[text["dtype"]]
        if sharded and text["dtype"] == "fp16":
            raise UserError(
                "data.shard_text_encoder=true does not support an index whose text was encoded in fp16, because T5 "
                "keeps some weights in fp32 and ZeRO-3 does not; set data.shard_text_encoder=false, or encode the data "
                "in bf16 or fp32"
            )
        self._sharded = sharded
        with _sharded_weights(text["dtype"]) if sharded else contextlib.nullcontext():
            self._encoder = TextEncoder(name, text["tokens"], device(), dtype)
        if self._encoder.dim != text["dim"]:
            raise UserError(
                f"data.text_encoder={name} has features of dimension {self._encoder.dim}, but the index expects "
                f"{text['dim']}; use the encoder {text['encoder']}"
            )
        if self._encoder.sha256 != text["sha256"]:
            raise UserError(
                f"data.text_encoder={name} has weights with SHA-256 {self._encoder.sha256[:DIGITS]}, but the data were "
                f"encoded with {text['sha256'][:DIGITS]} ({text['encoder']}); use that encoder, or encode the data "
                "again"
            )
        if sharded:
            self._engine = _gather_on_use(self._encoder.model, text["dtype"])
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0

    @property
    def vocabulary(self) -> int:
        """Size of the encoder's vocabulary; valid ids are below it."""
        return self._encoder.model.config.vocab_size

    def __call__(self, ids: Sequence[np.ndarray]) -> list[Tensor]:
        """Return the features (tokens, dim) fp16 of each caption's ids. Collective if the weights are sharded."""
        captions = {caption.tobytes(): caption for caption in ids}
        found = {key: self._cache[key] for key in captions if key in self._cache}
        missing = {key: caption for key, caption in captions.items() if key not in found and len(caption)}
        if missing or self._sharded:
            # All ranks must take part in gathering the weights: a rank with only cached captions encodes an empty one.
            features = self._encoder.encode_ids(list(missing.values()) or [END])
            found.update({key: feature.half() for key, feature in zip(missing, features, strict=False)})
        # An unreadable sample has no ids.
        found[b""] = torch.zeros(0, self._encoder.dim, dtype=torch.float16, device=device())
        for key in captions:
            self._keep(key, found[key])
        return [found[caption.tobytes()] for caption in ids]

    def _keep(self, key: bytes, features: Tensor) -> None:
        """Mark the entry as most recently used, and evict the least recently used ones above CACHE_BYTES."""
        if key not in self._cache:
            self._cache[key] = features
            self._bytes += features.nbytes
        self._cache.move_to_end(key)
        while self._bytes > CACHE_BYTES:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes


# Elsewhere only training/zero.py uses DeepSpeed. It is used directly here because the encoder is not trained and is
# not part of the parallel layout, and because this package must not depend on the engine.


def _zero_config(dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {
            "stage": 3,
            # Otherwise DeepSpeed replaces torch.nn.functional.linear for the entire process.
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 0,
        },
    }


@contextlib.contextmanager
def _sharded_weights(dtype: str) -> Iterator[None]:
    """Shard the models that transformers loads inside this context over all ranks, as they are constructed."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed would compile a shared-memory all-reduce for CPUs at start-up; gloo is sufficient.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = HfDeepSpeedConfig(_zero_config(dtype))  # transformers keeps only a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def _gather_on_use(model: Any, dtype: str) -> Any:
    """Return the model with hooks that gather each sharded module's weights before its forward and free them after."""
    import deepspeed
    from deepspeed.utils import groups

    # Without an mpu, DeepSpeed would use the mpu of the previously created engine, with the training layout's groups.
    mpu, groups.mpu = groups.mpu, None
    try:
        return deepspeed.initialize(model=model, config=_zero_config(dtype), dist_init_required=False)[0].eval()
    finally:
        groups.mpu = mpu
