"""Statistics of real images: read from ADM's files, or extracted from images once and cached by content."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_dit.evaluation.collect import Collected, Extract, collect
from megatron_dit.evaluation.images import open_images
from megatron_dit.evaluation.moments import Moments
from megatron_dit.parallel.collectives import gather, on_all_ranks
from megatron_dit.parallel.topology import connect
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import replacing

logger = logging.getLogger(__name__)

# Moments in a file: ADM's names, which its evaluator also reads, for the features that it has.
KEYS = {"inception": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dinov2": ("mu_dinov2", "sigma_dinov2")}
ADM_URL = "https://github.com/openai/guided-diffusion/tree/main/evaluations"
CACHE = Path("~/.cache/megatron_dit/references")


def check_reference(path: Path) -> None:
    """Raise UserError, which says where ADM's files are, if the reference does not exist."""
    if not path.exists():
        raise UserError(
            f"the reference {path} does not exist; set reference in the protocol to ADM's .npz file ({ADM_URL}), or to "
            "statistics made with 'megatron-dit evaluate --write-reference'"
        )


def read_reference(
    path: Path, sha256: str, extractors: Sequence[Extract], names: Sequence[str], kept: Sequence[str], batch: int
) -> Collected:
    """Return the statistics in a file, with the moments ``names`` and the features ``kept``. Collective.

    What the file lacks is extracted from its images, if it has any, and cached under ``sha256``, the hash of the file
    and the extractors' weights. Raises UserError if it has neither.
    """
    connect()
    found = on_all_ranks(lambda: _stored(path))
    names = [name for name in names if name not in found.moments]
    kept = [name for name in kept if name not in found.features]
    if not names and not kept:
        return found
    content = repr((sha256, sorted(names), sorted(kept)))
    cache = CACHE.expanduser() / f"{hashlib.sha256(content.encode()).hexdigest()}.npz"
    if all(gather(cache.exists())):  # the folder may not be shared by all hosts
        cached = on_all_ranks(lambda: _stored(cache))
    else:
        try:
            images = on_all_ranks(lambda: open_images(path))
        except UserError:
            raise UserError(
                f"{path} lacks statistics of {', '.join([*names, *kept])} and has no images to extract them from; make "
                "reference statistics with 'megatron-dit evaluate --write-reference'"
            ) from None
        cached = collect(images, extractors, names, kept, batch)
        write_reference(cache, cached)
    # ADM's statistics are those of all images, of which its file has a part.
    return Collected(cached.count, {**cached.moments, **found.moments}, {**cached.features, **found.features})


def write_reference(path: Path, collected: Collected) -> None:
    """Write statistics to an .npz file, on rank 0. Collective."""
    arrays: dict[str, np.ndarray] = {"count": np.array(collected.count)}
    for name, moments in collected.moments.items():
        arrays |= dict(zip(KEYS[name], (moments.mean, moments.covariance), strict=True))
    arrays |= {f"features_{name}": values for name, values in collected.features.items()}
    if dist.get_rank() == 0:
        with replacing(path, makes_folder=True) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    dist.barrier()


def _stored(path: Path) -> Collected:
    """Return the statistics in a file; a folder of images has none."""
    if path.is_dir():
        return Collected(0)
    try:
        with np.load(path, allow_pickle=False) as file:
            count = int(file["count"]) if "count" in file else 0
            moments = {
                name: Moments(count, *(np.asarray(file[key], dtype=np.float64) for key in keys))
                for name, keys in KEYS.items()
                if keys[0] in file and keys[1] in file
            }
            features = {key.removeprefix("features_"): file[key] for key in file if key.startswith("features_")}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"the reference {path} cannot be read ({error}); download or make it again") from None
    return Collected(count, moments, features)
