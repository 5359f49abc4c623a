"""Sampling's weights are those of the checkpoint, for any tensor-parallel size that wrote it and that reads it."""

from __future__ import annotations

import pytest
import torch

from checkpoints_tools.write import write_checkpoint
from megatron_dit.checkpoint.manifest import manifest_of
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.config import ParallelConfig
from megatron_dit.models.param_specs import param_specs
from megatron_dit.parallel.sharding import cut
from megatron_dit.parallel.topology import SOLO, build_groups
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.model import load_model, meta_model
from tests.helpers.configs import small

CONFIG = small("mmdit")
STATES = ["master", "ema"]


def write(folder, written_by, changed=None):
    generator, params = torch.Generator().manual_seed(0), param_specs(CONFIG)
    tensors = [
        (state, name, torch.randn(param.shape, generator=generator))
        for state in STATES
        for name, param in params.items()
    ]
    for state, name, value in tensors:
        if (state, name) == ("ema", changed):
            value.view(-1)[-1] = float("nan")
    write_checkpoint(folder, manifest_of(CONFIG, params, STATES, step=1, num_updates=1), tensors, written_by)
    return folder


def check(folder, size):
    """Return how many of the loaded parameters differ from the checkpoint's, and how many are shards."""
    topology = SOLO if size == 1 else build_groups(ParallelConfig(tensor=size))
    reader = CheckpointReader(folder)
    model = load_model(reader, CONFIG, dtype=torch.bfloat16, topology=topology)
    wrong = shards = 0
    for name, p in model.named_parameters():
        full, param = reader.full("ema", name), reader.manifest["params"][name]
        expected = cut(full, param["dim"], param["fused_parts"], topology.tensor_rank, size).bfloat16()
        wrong += not torch.equal(p, expected)
        shards += p.numel() < full.numel()
    return wrong, shards


@pytest.mark.parametrize(("written_by", "size"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_weights_equal_those_of_the_checkpoint(pool, tmp_path, written_by, size):
    folder = write(tmp_path / "step_00000001", written_by)
    results = pool.run(size, check, folder, size) if size > 1 else [check(folder, size)]
    for wrong, shards in results:
        assert wrong == 0
        assert (shards > 10) == (size > 1)


def load_nan(folder, size):
    try:
        check(folder, size)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("written_by", [1, 2])
def test_weights_that_are_not_finite_are_refused(pool, tmp_path, written_by):
    name = next(name for name, param in param_specs(CONFIG).items() if param.dim is None)
    folder = write(tmp_path / "step_00000001", written_by, changed=name)
    for message in [load_nan(folder, 1), *pool.run(2, load_nan, folder, 2)]:
        assert f"has NaN or infinite values in ema/{name}" in message


def test_meta_model_has_the_parameters_of_the_loaded_model_and_no_memory():
    model = meta_model(CONFIG, dtype=torch.bfloat16)
    params = dict(model.named_parameters())
    assert {name: tuple(p.shape) for name, p in params.items()} == {
        name: tuple(param.shape) for name, param in param_specs(CONFIG).items()
    }
    assert {(p.device.type, p.dtype) for p in params.values()} == {("meta", torch.bfloat16)}
