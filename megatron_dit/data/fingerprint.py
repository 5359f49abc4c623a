"""The fingerprint of a run's datasets, which is stored in checkpoints and compared when the run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256

from megatron_dit.data.index import Index
from megatron_dit.runtime.errors import UserError

logger = logging.getLogger(__name__)


def dataset_fingerprint(data: Sequence[Index]) -> dict[str, str]:
    """Return hashes of a run's encoders and of its samples. They are stored in checkpoints."""
    first = data[0]
    samples = sha256("".join(shard.sha256 for index in data for shard in index.shards).encode()).hexdigest()
    return {"text": first.text.get("sha256", ""), "codec": first.codec["sha256"], "samples": samples}


def check_fingerprint(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise UserError if a resumed run's dataset was encoded by different encoders than before.

    If only the samples changed, log a message. ``before`` is {} for imported weights, whose training data are unknown.
    """
    if not before:
        return
    for name, what in (("text", "text encoder"), ("codec", "VAE")):
        if before[name] != now[name]:
            raise UserError(
                f"data.path was encoded with a different {what} than this run has used so far (SHA-256 "
                f"{now[name][:12]}, expected {before[name][:12]}); use data encoded with the same {what}, or set "
                "run_dir to a new folder"
            )
    if before["samples"] != now["samples"]:
        logger.info("the dataset's shards changed since the last run; continuing at the same step with the new shards")
