"""Unreadable samples are counted by cause and do not affect training; the order of the other samples is kept."""

from __future__ import annotations

import functools
import io
import json
import pickle
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dit.cli import run
from megatron_dit.data.stream import batches, read_data, sample_order
from megatron_dit.data.tar import npy
from megatron_dit.training.engine import Engine
from tests.helpers.configs import small, write_config
from tests.helpers.datasets import make_folder

SIDE = (16, 16)
STEPS, BATCH = 40, 8


def corrupted(number, ran):
    """Return corrupted members for a tenth of the samples, cycling through the kinds of corruption.

    The last kind is a flipped byte, which the fixture applies after writing.
    """
    if number % 10 != 3:
        return {}

    class Payload:
        def __reduce__(self):
            return (Path(ran).touch, ())

    pickled = io.BytesIO()
    np.save(pickled, np.array([Payload()], dtype=object), allow_pickle=True)  # as in a malicious file
    return [
        {"latent.npy": npy(np.full((3, *SIDE), np.nan, dtype=np.float32))},
        {"latent.npy": npy(np.zeros((3, 8, 16), dtype=np.float32))},
        {"latent.npy": pickled.getvalue()},
        {"text.npy": pickle.dumps(Payload())},
        {"captions.npy": npy(np.array([[3.0, 1.0]]))},
        {},
    ][number // 10 % 6]


CAUSES = ["not_finite", "wrong_shape", "not_an_array", "not_an_array", "wrong_shape", "wrong_checksum"]


@pytest.fixture
def broken(tmp_path):
    """Return a folder of 8 shards of 30 samples, a tenth of which are corrupted."""
    folder = tmp_path / "data"
    make_folder(folder, [(SIDE, 30)] * 8, members=functools.partial(corrupted, ran=str(tmp_path / "ran")))
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data + member.size - 1 for member in tar}
        data = bytearray(path.read_bytes())
        for name, offset in offsets.items():
            key, _, extension = name.partition(".")
            if extension == "latent.npy" and int(key) % 10 == 3 and int(key) // 10 % 6 == 5:
                data[offset] ^= 1
        path.write_bytes(data)
    return folder


def expected_cause(number, step, missing_from):
    """Return the cause if a sample is unreadable, else None. Shard 2 is missing from step ``missing_from`` on."""
    if number // 30 == 2 and step >= missing_from:
        return "missing_shard"
    return CAUSES[number // 10 % 6] if number % 10 == 3 else None


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_unreadable_samples_and_keeps_the_order_of_the_others(
    broken, tmp_path, monkeypatch, workers, capsys
):
    missing_from = 20
    seen = []
    train_step = Engine.train_step

    def watched(engine, batch, **named):
        seen.append((batch.keys, batch.weight.tolist()))
        if workers == 0 and engine.step == missing_from - 1:
            (broken / "00002.tar").unlink()
        return train_step(engine, batch, **named)

    monkeypatch.setattr(Engine, "train_step", watched)
    options = {"data.path": str(broken), "data.max_bad_fraction": 0.5, "data.workers": workers, "train.log_every": 1}
    path = write_config(tmp_path, "mmdit", **options, **{"train.steps": STEPS, "train.global_batch": BATCH})
    if workers:  # workers read ahead, so the shard is deleted while the run is stopped
        assert run(["train", str(path), f"train.steps={missing_from}"]) == 0
        (broken / "00002.tar").unlink()
    assert run(["train", str(path)]) == 0

    config = small("mmdit", **{"data.path": str(broken), "train.steps": STEPS, "train.global_batch": BATCH})
    order = sample_order(read_data(config.data), config)
    expected = Counter()
    assert len(seen) == STEPS
    for step, (keys, weights) in enumerate(seen):
        numbers = [30 * shard + sample for _, shard, sample in order.batch(step).tolist()]
        causes = [expected_cause(number, step, missing_from) for number in numbers]
        expected.update(cause for cause in causes if cause)
        assert weights == [float(cause is None) for cause in causes]
        for key, number, cause in zip(keys, numbers, causes, strict=True):
            if cause is None:
                assert key.endswith(f"{number // 30:05d}.tar/{number:06d}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {name.partition("/")[2]: n for name, n in lines[-1].items() if name.startswith("bad_samples/")}
    assert found == dict(expected)
    assert expected["missing_shard"] > 5
    assert lines[-1]["step"] == STEPS
    assert all(np.isfinite(line["loss"]) for line in lines)
    out = capsys.readouterr().out
    for cause_text in ("00002.tar", "is corrupt", "has NaN or infinite values", "is not a valid array"):
        assert cause_text in out
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("missing", "message"), [(8, "none of the 8 samples of a step could be read"), (3, "data.max_bad_fraction=0.1")]
)
def test_run_stops_with_a_one_line_error_if_too_many_samples_are_unreadable(
    tmp_path, monkeypatch, capsys, missing, message
):
    folder = tmp_path / "data"
    make_folder(folder, [(SIDE, 30)] * 8)
    train_step = Engine.train_step

    def watched(engine, batch, **named):
        if engine.step == 10:
            for number in range(missing):
                (folder / f"{number:05d}.tar").unlink()
        return train_step(engine, batch, **named)

    monkeypatch.setattr(Engine, "train_step", watched)
    options = {"data.path": str(folder), "train.steps": 200, "train.global_batch": BATCH, "checkpoint.every": 10}
    path = write_config(tmp_path, "mmdit", **options)
    assert run(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "is missing" in line
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert checkpoints
    assert missing < 8 or checkpoints == ["step_00000010"]


def step_with_unreadable(bad):
    """Return (loss, gradient norm, counts) of a step with eight samples, of which those in ``bad`` are unreadable."""
    from megatron_dit.parallel.topology import build_topology
    from tests.helpers.engine import batch

    config = small("mmdit", **{"train.global_batch": 8, "train.micro_batch": 2})
    engine = Engine(config, build_topology(config))
    engine.initialize()
    share = 8 // engine.topology.data_size
    rows = range(engine.topology.data_rank * share, (engine.topology.data_rank + 1) * share)
    weight = torch.tensor([float(row not in bad) for row in rows])
    own = batch(config, engine.topology, 0)
    latents = own.latents + 100 * (1 - weight)[:, None, None, None]
    causes = tuple(("not_finite", f"row {row}") for row in rows if row in bad)
    metrics = engine.train_step(replace(own, weight=weight, latents=latents, bad=causes))
    return metrics.loss, metrics.grad_norm, metrics.bad_samples


def test_unreadable_samples_do_not_affect_loss_or_grad_norm(pool):
    """The loss is the mean over readable samples; the gradient is their sum divided by eight, in any layout."""
    losses = {}
    ((mean_loss, _, none),) = pool.run(1, step_with_unreadable, ())
    assert none == {}
    for row in (1, 6):  # the loss of one sample: the others have weight 0
        ((losses[row], _, counts),) = pool.run(1, step_with_unreadable, tuple(set(range(8)) - {row}))
        assert counts == {"not_finite": 7}
    ((loss, norm, counts),) = pool.run(1, step_with_unreadable, (1, 6))
    assert counts == {"not_finite": 2}
    assert 6 * loss == pytest.approx(8 * mean_loss - losses[1] - losses[6], rel=1e-5)
    for sharded, sharded_norm, counts in pool.run(2, step_with_unreadable, (1, 6)):
        assert (sharded, sharded_norm) == pytest.approx((loss, norm), rel=1e-6)
        assert counts == {"not_finite": 2}


def test_missing_shards_are_tolerated_at_start_up_to_the_maximum_fraction(tmp_path, capsys):
    make_folder(tmp_path / "data", [(SIDE, 20)] * 8)
    (tmp_path / "data" / "00003.tar").unlink()
    options = {"data.path": str(tmp_path / "data"), "train.steps": 2, "train.global_batch": BATCH}
    path = write_config(tmp_path, "mmdit", **options)
    assert run(["train", str(path)]) == 2
    assert "00003.tar is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(["train", str(path), "data.max_bad_fraction=0.2"]) == 0
    assert "1 shards cannot be read; skipping their 20 samples" in capsys.readouterr().out


def test_intact_dataset_has_no_unreadable_samples(tmp_path):
    index = make_folder(tmp_path / "data", [(SIDE, 30)] * 2)
    config = small("mmdit", **{"data.path": index.folder, "train.steps": 5, "train.global_batch": BATCH})
    assert all(batch.bad == () and batch.weight.all() for batch in batches([index], config, 0, 0, 1))
