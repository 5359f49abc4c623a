"""Out-of-memory errors of device and host are reported in one line with sizes, config keys and the command to use."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_dit.cli import run
from megatron_dit.models.build import build_unsharded
from megatron_dit.runtime.errors import RankError, UserError
from megatron_dit.training import memory
from megatron_dit.training.memory import explain_out_of_memory
from tests.helpers.configs import small, write_config

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free."
)


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (lambda: torch.empty(2**58), "DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        (lambda: bytearray(2**62), "out of memory (host memory is exhausted)"),
        (lambda: raises(torch.OutOfMemoryError(f"{CUDA}\nmore")), CUDA.rstrip(".")),
        (lambda: raises(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
         "CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)  # fmt: skip
def test_message_is_one_line_with_sizes_and_keys(fail, words):
    config = small("mmdit", **{"model.heads": 128, "train.micro_batch": 2})
    with torch.device("meta"):
        numel = sum(param.numel() for param in build_unsharded(config.model).parameters())
    with pytest.raises(RankError) as caught, explain_out_of_memory(config):
        fail()
    line = str(caught.value)
    assert "\n" not in line
    for word in (words, "rank 0 on host", "train.micro_batch=2", "train.recompute=full", "parallel.zero_stage"):
        assert word in line
    assert "'megatron-dit plan CONFIG --gpus 1 --build 0' prints the memory of rank 0" in line
    # fp32 without ZeRO: weights, gradients, two moments and one average, 4 bytes each.
    assert float(re.search(r"averages take ([\d.]+) of", line)[1]) == pytest.approx(20 * numel / 2**30, abs=0.006)


def test_message_starts_with_the_more_likely_remedy(monkeypatch):
    config = small("mmdit")
    for total, first in ((2**40, "lower train.micro_batch"), (2**20, "shard the model")):
        monkeypatch.setattr(memory, "_total_memory", lambda total=total: total)
        with pytest.raises(UserError, match=f"activations and buffers; {first}"), explain_out_of_memory(config):
            raise MemoryError


def test_other_errors_are_not_converted():
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError) as caught, explain_out_of_memory(small("mmdit")):
        raise error
    assert caught.value is error


def test_rank_out_of_memory_prints_its_own_error(monkeypatch, capsys, tmp_path, dataset):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = str(write_config(tmp_path, "mmdit", **{"data.path": str(dataset)}))
    monkeypatch.setattr("megatron_dit.training.trainer.start_up", lambda config: raises(MemoryError()))
    assert run(["train", path]) == 2
    assert capsys.readouterr().err.startswith("error: rank 1 on host ")
    monkeypatch.setattr("megatron_dit.training.trainer.start_up", lambda config: raises(UserError("known to all")))
    assert run(["train", path]) == 2
    assert capsys.readouterr().err == ""
