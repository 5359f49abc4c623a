"""Statistics of real images: read from ADM's files, or extracted from images once and cached by content."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dit.evaluation.collect import Collected, Extract, collect
from megatron_dit.evaluation.images import open_images
from megatron_dit.evaluation.moments import Moments
from megatron_dit.parallel.collectives import on_all_ranks, on_rank0
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import replacing

# Moments in a file: ADM's names, which its evaluator also reads, for the features that it has.
KEYS = {"inception": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dinov2": ("mu_dinov2", "sigma_dinov2")}
FEATURES = "features_"  # prefix of the names of features in a file
ADM_URL = "https://github.com/openai/guided-diffusion/tree/main/evaluations"
CACHE = Path("~/.cache/megatron_dit/references")


def check_reference(path: Path) -> None:
    """Raise UserError, which says where ADM's files are, if the reference does not exist."""
    if not path.exists():
        raise UserError(
            f"the reference {path} does not exist; set reference in the protocol to ADM's .npz file ({ADM_URL}), or to "
            "statistics made with 'megatron-dit evaluate --write-reference'"
        )


def reference_files(
    path: Path, sha256: str, extractors: Sequence[Extract], names: Sequence[str], kept: Sequence[str], batch: int
) -> list[Path]:
    """Return files that together have the moments ``names`` and the features ``kept`` of a reference. Collective.

    What the reference lacks is extracted from its images, if it has any, and cached under ``sha256``, the hash of the
    reference and of the extractors' weights. Raises UserError if it has neither.
    """
    names, kept = on_rank0(lambda: _lacking(path, names, kept))
    if not names and not kept:
        return [path]
    content = repr((sha256, sorted(names), sorted(kept)))
    cache = CACHE.expanduser() / f"{hashlib.sha256(content.encode()).hexdigest()}.npz"
    if not on_rank0(cache.exists):
        try:
            images = on_all_ranks(lambda: open_images(path))
        except UserError:
            raise UserError(
                f"{path} lacks statistics of {', '.join([*names, *kept])} and has no images to extract them from; make "
                "reference statistics with 'megatron-dit evaluate --write-reference'"
            ) from None
        write_reference(cache, collect(images, extractors, names, kept, batch))
    return [path, cache]


def load_reference(files: Sequence[Path]) -> Collected:
    """Return the statistics in files of :func:`reference_files`."""
    found = Collected()
    for path in files:
        with _opened(path) as arrays:
            for name, keys in KEYS.items():
                if set(keys) <= set(arrays):
                    found.moments[name] = Moments(*(np.asarray(arrays[key], dtype=np.float64) for key in keys))
            found.features.update(
                {key.removeprefix(FEATURES): arrays[key] for key in arrays if key.startswith(FEATURES)}
            )
    return found


def write_reference(path: Path, collected: Collected) -> None:
    """Write statistics to an .npz file, on rank 0. Collective."""
    arrays: dict[str, np.ndarray] = {f"{FEATURES}{name}": values for name, values in collected.features.items()}
    for name, moments in collected.moments.items():
        arrays |= dict(zip(KEYS[name], (moments.mean, moments.covariance), strict=True))

    def write() -> None:
        with replacing(path, makes_folder=True) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    on_rank0(write)


def _lacking(path: Path, names: Sequence[str], kept: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return those of the moments ``names`` and of the features ``kept`` that a reference lacks."""
    with _opened(path) as arrays:
        found = set(arrays)
    lacking = [name for name in names if not set(KEYS[name]) <= found]
    return lacking, [name for name in kept if f"{FEATURES}{name}" not in found]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yield a mapping of the arrays in a file; a folder of images has none. Raises UserError if it is not readable."""
    if path.is_dir():
        yield {}
        return
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"the reference {path} cannot be read ({error}); download or make it again") from None
