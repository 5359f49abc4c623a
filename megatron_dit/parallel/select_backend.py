"""Select the layer backend of a run: Transformer Engine or local."""

from __future__ import annotations

import os
import shutil

import torch

from megatron_dit.config import Config
from megatron_dit.parallel.backend import Backend, backend_options
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.errors import UserError

# Minimum compute capability: FP8 GEMMs need Ada or Hopper, blockwise scaling Hopper, MXFP8 Blackwell.
CAPABILITIES = {"none": (0, 0), "delayed": (8, 9), "current": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
BELOW = {"mxfp8": (12, 0)}  # Transformer Engine does not support MXFP8 on Blackwell's workstation GPUs


def open_backend(config: Config, topology: Topology) -> Backend:
    """Return the backend selected by ``parallel.backend``.

    Raises UserError if the backend, the FP8 recipe selected by ``train.fp8``, or the compiler that GPU kernels need is
    not available on this machine.
    """
    if torch.cuda.is_available():
        check_compiler()
    selected, fp8 = config.parallel.backend, config.train.fp8
    local = selected == "local" or (selected == "auto" and (config.train.dtype != "bf16" or config.train.compile))
    missing = None if local else _missing()
    if missing and selected == "te":
        raise UserError(f"parallel.backend=te, but {missing}; set parallel.backend=local")
    if missing and fp8 != "none":
        raise UserError(f"train.fp8={fp8} needs Transformer Engine, but {missing}; set train.fp8=none")
    if local or missing:
        return Backend(config.model, config.parallel, topology, **backend_options(config))
    check_gpu(fp8)
    from megatron_dit.parallel.te import TeBackend

    return TeBackend(config, topology)


def check_gpu(fp8: str) -> None:
    """Raise UserError if this rank's GPU does not support the FP8 recipe ``fp8``."""
    needed, capability = CAPABILITIES[fp8], torch.cuda.get_device_capability()
    below = BELOW.get(fp8)
    if capability < needed or (below is not None and capability >= below):
        limit = "" if below is None else f" or more, but less than {below[0]}.{below[1]}"
        raise UserError(
            f"train.fp8={fp8} needs compute capability {needed[0]}.{needed[1]}{limit}, {torch.cuda.get_device_name()} "
            f"has {capability[0]}.{capability[1]}; set train.fp8=none, which trains in bf16"
        )


def check_compiler() -> None:
    """Raise UserError if the C compiler is missing with which Triton builds the launchers of its kernels."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UserError(
            "training on a GPU needs a C compiler for Triton's kernels; install gcc, or set CC to a compiler"
        )


def _missing() -> str | None:
    """Return why Transformer Engine is not available, or None if it is."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        import transformer_engine.pytorch  # pyright: ignore[reportMissingImports]  # noqa: F401
    except (
        ImportError,
        OSError,
        RuntimeError,
        AssertionError,
    ) as error:  # not installed, or incompatible with this torch
        return f"Transformer Engine cannot be imported ({' '.join(str(error).split())})"
    return None
