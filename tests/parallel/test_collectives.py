"""What only rank 0 does, its result and its errors reach all ranks."""

import pytest
import torch.distributed as dist

from megatron_dit.parallel.collectives import gather_to_rank0, on_rank0
from megatron_dit.runtime.errors import UserError


def rank_of_the_caller():
    calls = []

    def function():
        calls.append(dist.get_rank())
        return {"rank": dist.get_rank()}

    return on_rank0(function), calls, gather_to_rank0(dist.get_rank())


def failing():
    on_rank0(fail)


def fail():
    raise UserError(f"not readable on rank {dist.get_rank()}")


@pytest.mark.parametrize("world", [1, 3])
def test_rank_0_calls_and_all_ranks_get_the_result(pool, world):
    for rank, (result, calls, gathered) in enumerate(pool.run(world, rank_of_the_caller)):
        assert result == {"rank": 0}
        assert calls == ([0] if rank == 0 else [])
        assert gathered == (list(range(world)) if rank == 0 else [])


def test_an_error_of_rank_0_is_raised_on_all_ranks(pool):
    assert [each.user_error for each in pool.outcomes(2, failing)] == ["not readable on rank 0"] * 2
