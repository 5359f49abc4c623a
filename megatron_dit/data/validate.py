"""Checks that the datasets match the model, and that the datasets of a mixture match each other."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dit.config import Config
from megatron_dit.data.index import Index
from megatron_dit.runtime.errors import UserError


def check_data(data: Sequence[Index], config: Config) -> None:
    """Raise UserError if the datasets do not match the model or were encoded by different encoders.

    The shards' channels, classes, text features, vision features and buckets are compared with the config.
    """
    for index in data:
        _check_alike(data[0], index)
        _check_channels(index, config)
        for bucket in sorted({shard.bucket for shard in index.shards}):
            _check_bucket(bucket, index, config)


def _check_alike(first: Index, index: Index) -> None:
    """Raise UserError if two datasets of a mixture were encoded by different encoders."""
    for name, one, other in (
        ("codec", first.codec, index.codec),
        ("text encoder", first.text, index.text),
        ("vision encoder", first.features or {}, index.features or {}),
    ):
        if one.get("sha256") != other.get("sha256"):
            found, expected = (str(described.get("sha256"))[:12] for described in (other, one))
            raise UserError(
                f"data.mixture: {index.folder} was encoded with a different {name} than {first.folder} (SHA-256 "
                f"{found}, expected {expected}); encode both with the same {name}"
            )


def _check_channels(index: Index, config: Config) -> None:
    model = config.model
    if index.channels != model.in_channels:
        raise UserError(
            f"model.in_channels={model.in_channels}, but {index.folder} has {index.channels} channels; "
            f"set model.in_channels={index.channels}"
        )
    if model.num_classes:
        if model.num_classes != index.classes:
            raise UserError(
                f"model.num_classes={model.num_classes}, but {index.folder} has {index.classes} classes; "
                f"set model.num_classes={index.classes}"
            )
    elif not index.text:
        raise UserError(
            f"model.arch={model.arch} is conditioned on captions, but {index.folder} has none; set model.num_classes"
        )
    elif index.text["dim"] != model.text_dim:
        raise UserError(
            f"model.text_dim={model.text_dim}, but {index.folder} has text features of dimension {index.text['dim']}; "
            f"set model.text_dim={index.text['dim']}"
        )
    elif not index.text["features"] and not config.data.text_encoder:
        raise UserError(
            f"{index.folder} has token ids but no text features; set data.text_encoder={index.text['encoder']} to "
            "encode the captions during training"
        )
    if model.repa_block and not config.data.repa_encoder:
        held = index.features
        if held is None or (held["dim"], held["patch"]) != (model.repa_dim, model.patch_size):
            found = "has no features" if held is None else f"has features with dim={held['dim']}, patch={held['patch']}"
            raise UserError(
                f"REPA needs features of model.repa_dim={model.repa_dim} at model.patch_size={model.patch_size}, but "
                f"{index.folder} {found}; encode the data with --vision-encoder and --patch, or set data.repa_encoder"
            )


def _check_bucket(bucket: tuple[int, int], index: Index, config: Config) -> None:
    model = config.model
    if any(side % model.patch_size for side in bucket):
        raise UserError(
            f"bucket {bucket} of {index.folder} is not divisible by model.patch_size={model.patch_size}; "
            "choose another patch size or encode the data in other sizes"
        )
    error = model.spec.bucket_error(model, *bucket)
    if error is not None:
        raise UserError(f"bucket {bucket} of {index.folder} {error}")
    error = config.sequence_error(bucket[0] * bucket[1] // model.patch_size**2)
    if error is not None:
        raise UserError(f"in bucket {bucket} of {index.folder} {error}")
    config.check_fp8_tokens(*bucket)
