"""Whether the data fit the model, and a mixture's datasets each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

from megatron_dit.config import Config
from megatron_dit.data.shards import Index
from megatron_dit.errors import UserError


def check_fit(data: Sequence[Index], config: Config) -> None:
    """Raise UserError where shards' channels, text features or buckets do not fit the model or were made by others."""
    for index in data:
        _check_alike(data[0], index)
        _check_channels(index, config)
        for bucket in sorted({shard.bucket for shard in index.shards}):
            _check_bucket(bucket, index, config)


def identity(data: Sequence[Index]) -> dict[str, str]:
    """What a run's data are: the encoders that made them, and which samples they hold. Kept in checkpoints."""
    first = data[0]
    samples = sha256("".join(shard.sha256 for index in data for shard in index.shards).encode()).hexdigest()
    return {"text": first.text.get("sha256", ""), "codec": first.codec["sha256"], "samples": samples}


def check_same(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Raise UserError where a run would go on with data of other encoders; a line to say where the samples changed.

    ``before`` is {} of imported weights whose data are not known.
    """
    if not before:
        return None
    for name, what in (("text", "text encoder"), ("codec", "VAE")):
        if before[name] != now[name]:
            raise UserError(
                f"data.path was made with another {what} than the run's (SHA-256 {now[name][:12]}, not "
                f"{before[name][:12]}): give data of the same one, or set run_dir to a new folder"
            )
    if before["samples"] == now["samples"]:
        return None
    return "the data's shards are others than before: the order goes on at the same step, over them"


def _check_alike(first: Index, index: Index) -> None:
    """The datasets of a mixture were encoded by the same encoders."""
    for name, one, other in (
        ("codec", first.codec, index.codec),
        ("text encoder", first.text, index.text),
        ("vision encoder", first.features or {}, index.features or {}),
    ):
        if one.get("sha256") != other.get("sha256"):
            found, expected = (str(described.get("sha256"))[:12] for described in (other, one))
            raise UserError(
                f"data.mix: {index.folder} was made with another {name} than {first.folder} (SHA-256 {found}, not "
                f"{expected}): prepare both with the same"
            )


def _check_channels(index: Index, config: Config) -> None:
    model = config.model
    if index.channels != model.in_channels:
        raise UserError(f"model.in_channels={model.in_channels}, but {index.folder} has {index.channels} channels")
    if model.num_classes:
        if model.num_classes != index.classes:
            raise UserError(f"model.num_classes={model.num_classes}, but {index.folder} has {index.classes} classes")
    elif not index.text:
        raise UserError(f"model.arch={model.arch} draws captions, but {index.folder} has none: set model.num_classes")
    elif index.text["dim"] != model.text_dim:
        raise UserError(f"model.text_dim={model.text_dim}, but {index.folder} has text of {index.text['dim']}")
    elif not index.text["features"] and not config.data.text_encoder:
        raise UserError(
            f"{index.folder} holds token ids without features: set data.text_encoder={index.text['encoder']} to encode "
            "them in training"
        )
    if model.repa_block and not config.data.repa_encoder:
        held = index.features or {"dim": "no", "patch": "no"}
        if (held["dim"], held["patch"]) != (model.repa_dim, model.patch_size):
            raise UserError(
                f"model.repa_dim={model.repa_dim} at model.patch_size={model.patch_size}, but {index.folder} has "
                f"{held['dim']} features at patch {held['patch']}: prepare them with --vision-encoder, or set "
                "data.repa_encoder"
            )


def _check_bucket(bucket: tuple[int, int], index: Index, config: Config) -> None:
    model = config.model
    if any(side % model.patch_size for side in bucket):
        raise UserError(f"bucket {bucket} of {index.folder} is not divisible by model.patch_size={model.patch_size}")
    side = model.sample_size
    if model.arch == "uvit" and bucket != (side, side):
        raise UserError(
            f"bucket {bucket} of {index.folder} is not model.sample_size={side} squared: "
            "uvit learns the positions of one size"
        )
    table = model.position_size or side // model.patch_size
    if model.arch == "mmdit" and max(bucket) > table * model.patch_size:
        raise UserError(
            f"bucket {bucket} of {index.folder} is larger than the table of {table} positions a side: set "
            f"model.position_size={max(bucket) // model.patch_size} or more"
        )
    tokens = bucket[0] * bucket[1] // model.patch_size**2
    if config.parallel.sequence and model.arch != "uvit" and tokens % config.parallel.tensor:
        raise UserError(
            f"bucket {bucket} of {index.folder} has {tokens} tokens, not divisible by "
            f"parallel.tensor={config.parallel.tensor}: set parallel.sequence=false"
        )
    config.check_fp8_tokens(*bucket)
