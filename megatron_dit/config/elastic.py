"""Fit a config to another number of ranks than it was written for, as after a restart on fewer nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_dit.config.schema import Config
from megatron_dit.runtime.errors import UserError


def fit(config: Config, ranks: int) -> Config:
    """Return the config with a layout for ``ranks`` ranks and the same global batch.

    Tensor and pipeline sizes are kept if they divide ``ranks``, otherwise reduced, the pipeline first. The micro-batch
    is the largest one up to ``train.micro_batch`` that divides each rank's part of the global batch.
    Whether the new layout fits in memory is not checked. Raises UserError naming numbers of ranks that are possible.
    """
    found = _fitted(config, ranks)
    if found is not None:
        return found
    smaller = next((n for n in range(ranks - 1, 0, -1) if _fitted(config, n)), None)
    larger = next((n for n in range(ranks + 1, 4 * ranks + 1) if _fitted(config, n)), None)
    possible = " or ".join(str(n) for n in (smaller, larger) if n is not None)
    raise UserError(
        f"train.global_batch={config.train.global_batch} cannot be divided among {ranks} ranks"
        + (f"; start {possible} ranks" if possible else "")
    )


def changes(config: Config, fitted: Config) -> list[str]:
    """Return the keys that :func:`fit` changed, with their values before and after."""
    keys = ("parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual_stages", "train.micro_batch")
    values = [
        (key, *(getattr(getattr(c, key.split(".")[0]), key.split(".")[1]) for c in (config, fitted))) for key in keys
    ]
    return [f"{key} {before} -> {after}" for key, before, after in values if before != after]


def _fitted(config: Config, ranks: int) -> Config | None:
    """Return the first layout that is valid for ``ranks`` ranks."""
    for candidate in _candidates(config, ranks):
        try:
            candidate.data_parallel(ranks)
        except UserError:
            continue
        return candidate
    return None


def _candidates(config: Config, ranks: int) -> Iterator[Config]:
    """Yield configs whose sections are valid, those most like ``config`` first."""
    parallel, train = config.parallel, config.train
    for tensor in _divisors(parallel.tensor):
        for pipeline in _divisors(parallel.pipeline):
            if ranks % (tensor * pipeline):
                continue
            kept = pipeline == parallel.pipeline
            for virtual in dict.fromkeys([parallel.virtual_stages if pipeline > 1 else 1, 1]):
                layout = replace(
                    parallel,
                    tensor=tensor,
                    sequence=parallel.sequence and tensor > 1,
                    pipeline=pipeline,
                    virtual_stages=virtual,
                    blocks_per_stage=parallel.blocks_per_stage if kept and virtual == parallel.virtual_stages else None,
                )
                for micro in range(train.micro_batch, 0, -1):
                    if train.global_batch % (ranks // (tensor * pipeline) * micro):
                        continue
                    try:
                        yield replace(config, parallel=layout, train=replace(train, micro_batch=micro))
                    except UserError:  # FP8 does not support every number of tokens
                        continue


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number, largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]
