"""Which layer backend a run gets: Transformer Engine's or the local one."""

from __future__ import annotations

import torch

from megatron_dit.config import Config
from megatron_dit.errors import UserError
from megatron_dit.parallel.layers import Backend
from megatron_dit.parallel.topology import Topology

# Least compute capability: Ada and Hopper multiply FP8, Hopper in blocks.
CAPABILITIES = {"none": (0, 0), "delayed": (8, 9), "current": (8, 9), "blockwise": (9, 0)}


def open_backend(config: Config, topology: Topology) -> Backend:
    """The backend that ``parallel.backend`` asks for.

    Raises UserError where it, or what ``train.fp8`` asks for, is not to be had here.
    """
    asked, fp8 = config.parallel.backend, config.train.fp8
    local = asked == "local" or (asked == "auto" and config.train.dtype != "bf16")
    missing = None if local else _missing()
    if missing and asked == "te":
        raise UserError(f"parallel.backend=te, but {missing}: set parallel.backend=local")
    if missing and fp8 != "none":
        raise UserError(f"train.fp8={fp8} needs Transformer Engine, but {missing}: set train.fp8=none")
    if local or missing:
        train = config.train
        return Backend(config.model, config.parallel, topology, train.recompute, train.recompute_blocks)
    check_gpu(fp8)
    from megatron_dit.parallel.te import TeBackend

    return TeBackend(config, topology)


def check_gpu(fp8: str) -> None:
    """Raise UserError where this rank's GPU cannot multiply as ``fp8`` says."""
    needed, found = CAPABILITIES[fp8], torch.cuda.get_device_capability()
    if found < needed:
        raise UserError(
            f"train.fp8={fp8} needs compute capability {needed[0]}.{needed[1]}, {torch.cuda.get_device_name()} has "
            f"{found[0]}.{found[1]}: set train.fp8=none, which trains in bf16"
        )


def _missing() -> str | None:
    """Why there is no Transformer Engine here, None where there is."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        import transformer_engine.pytorch  # pyright: ignore[reportMissingImports]  # noqa: F401
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # not installed, or not with this torch
        return f"Transformer Engine cannot be imported ({' '.join(str(error).split())})"
    return None
