"""Runs that continue on other numbers of ranks equal a run of one process."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dit.checkpoint.load import open_checkpoint
from tests.helpers.configs import write_config
from tests.helpers.runs import train_in_pool, two_ranks

PART = 4  # steps on each number of ranks
OVERRIDES = {"train.global_batch": 12, "train.micro_batch": 3, "checkpoint.every": PART, "model.depth": 4}


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_on(pool, dataset, folder, worlds, layout=()):
    """Train PART steps on each number of ranks; return the losses and the worlds that wrote the checkpoints."""
    folder.mkdir()
    path = write_config(folder, **{"data.path": str(dataset), **OVERRIDES, **dict(layout)})
    wrote = []
    for part, ranks in enumerate(worlds, start=1):
        train_in_pool(pool, ranks, path, "--elastic", f"train.steps={PART * part}")
        wrote.append(open_checkpoint(folder / "run").manifest["layout"]["world"])
    return losses(folder / "run"), wrote


@pytest.fixture(scope="module")
def expected(pool, dataset, tmp_path_factory):
    return train_on(pool, dataset, tmp_path_factory.mktemp("one") / "one", [1] * 4)[0]


@pytest.mark.parametrize(
    "layout", [{"parallel.zero_stage": 1}, {"parallel.tensor": 2, "parallel.pipeline": 2}], ids=["zero1", "tp2-pp2"]
)
def test_four_two_three_and_four_ranks_equal_one_process(pool, dataset, tmp_path, expected, layout):
    found, wrote = train_on(pool, dataset, tmp_path / "elastic", [4, 2, 3, 4], layout)
    assert wrote == [4, 2, 3, 4]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_random_layouts_in_sequence_equal_one_process(pool, dataset, tmp_path, expected):
    layouts = st.fixed_dictionaries(
        {
            "parallel.tensor": st.sampled_from([1, 2]),
            "parallel.pipeline": st.sampled_from([1, 2]),
            "parallel.zero_stage": st.sampled_from([0, 1]),
        }
    )
    count = 0

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(layout=layouts, worlds=st.lists(st.integers(1, 4), min_size=4, max_size=4))
    def run(layout, worlds):
        nonlocal count
        count += 1
        found, wrote = train_on(pool, dataset, tmp_path / str(count), worlds, layout)
        assert wrote == worlds
        assert found == pytest.approx(expected, rel=1e-5)

    run()


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_refused(dataset, tmp_path):
    path = write_config(tmp_path, **{"data.path": str(dataset), "train.global_batch": 9, "train.micro_batch": 9})
    status, lines = two_ranks("--elastic", str(path))
    assert status == 2
    assert lines == ["error: train.global_batch=9 cannot be divided among 2 ranks; start 1 or 3 ranks"]
