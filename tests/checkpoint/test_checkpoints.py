"""Checkpoints are loaded in any layout; incomplete and incompatible ones are refused."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open

from megatron_dit.checkpoint import reader as format_module
from megatron_dit.checkpoint.listing import checkpoints_to_delete, clear, step_folder
from megatron_dit.checkpoint.load import restore
from megatron_dit.checkpoint.manifest import Incomplete
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.models.param_specs import param_specs
from megatron_dit.parallel.sharding import cut, unshard
from megatron_dit.parallel.topology import connect
from megatron_dit.runtime.errors import UserError
from tests.helpers.checkpoints import checkpoint
from tests.helpers.configs import small
from tests.helpers.engine import start
from tests.helpers.trained_checkpoints import LAYOUTS, save_after


def load_and_save_again(arch, layout, source, folder):
    from pathlib import Path

    from megatron_dit.checkpoint.load import newest, restore
    from megatron_dit.checkpoint.writer import save

    engine = start(small(arch, **layout))
    restore(engine, newest(Path(source)).reader)
    save(engine, Path(folder))


def everything(folder):
    reader = CheckpointReader(step_folder(folder, 2))
    keys = ("master", "exp_avg", "exp_avg_sq", "ema")
    return {(k, n): reader.full(k, n) for k in keys for n in reader.manifest["params"]}


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """Checkpoints of step 2 of each architecture, written by four ranks with tensor parallelism and ZeRO-3."""
    folders = {arch: tmp_path_factory.mktemp(arch) for arch in ("mmdit", "pixart")}
    for arch, folder in folders.items():
        pool.run(4, save_after, arch, LAYOUTS["dp2-tp2-zero3"][1], str(folder))
    return folders


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("arch", ["mmdit", "pixart"])
def test_loading_and_saving_in_any_layout_changes_no_bit(pool, saved, tmp_path, arch, name):
    ranks, layout = LAYOUTS[name]
    pool.run(ranks, load_and_save_again, arch, layout, str(saved[arch]), str(tmp_path))
    expected, found = everything(saved[arch]), everything(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_each_element_is_written_by_one_rank_only(saved):
    """The files together contain each element of each state once."""
    folder = step_folder(saved["mmdit"], 2)
    reader = CheckpointReader(folder)
    elements = sum(torch.Size(p["shape"]).numel() for p in reader.manifest["params"].values())
    payload = 4 * 4 * elements  # four fp32 states
    sizes = [record["bytes"] for record in reader.manifest["files"].values()]
    assert len(sizes) == 4
    assert payload < sum(sizes) < payload * 1.2 + 4 * 50000
    assert max(sizes) < 0.5 * sum(sizes)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_part_equals_slice_of_full_tensor(saved, size):
    """The checkpoint has two tensor-parallel and two ZeRO-3 ranks, so a part is in one file or in several."""
    reader = CheckpointReader(step_folder(saved["mmdit"], 2))
    rng = random.Random(size)
    for name, param in reader.manifest["params"].items():
        for rank in range(size):
            shard = cut(reader.full("ema", name), param["dim"], param["fused_parts"], rank, size).reshape(-1)
            start = rng.randrange(len(shard))
            numel = rng.randint(1, len(shard) - start)
            part = reader.part("ema", name, rank, size, start, numel)
            assert torch.equal(part, shard[start : start + numel])


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that the reader opens, in order."""
    names = []
    monkeypatch.setattr(format_module, "safe_open", lambda file, **kw: names.append(file.name) or safe_open(file, **kw))
    return names


def test_rank_opens_only_its_own_file_if_tensor_parallel_size_is_unchanged(saved, opened):
    reader = CheckpointReader(step_folder(saved["mmdit"], 2))
    name = next(name for name, param in reader.manifest["params"].items() if param["dim"] is not None)
    shard = reader.part("master", name, 1, 2, 0, math.prod(reader.manifest["params"][name]["shape"]) // 2)
    opened.clear()
    assert torch.equal(reader.part("master", name, 1, 2, 3, 2), shard[3:5])
    assert len(opened) == 1


def test_restoring_opens_each_file_once(saved, opened):
    connect()
    engine = start(small("mmdit"))
    reader = CheckpointReader(step_folder(saved["mmdit"], 2))
    restore(engine, reader)
    assert sorted(opened) == sorted(reader.manifest["files"])


def test_files_are_closed_after_the_context_that_keeps_them_open(saved):
    reader = CheckpointReader(step_folder(saved["mmdit"], 2))
    name = next(iter(reader.manifest["params"]))
    with reader.keep_files_open():
        kept = reader._open(reader.folder / "rank_00000.safetensors").__enter__()
        assert kept.keys()
        assert torch.equal(reader.full("ema", name), reader.full("ema", name))
    with pytest.raises(SafetensorError, match="closed"):
        kept.keys()
    assert reader.full("ema", name).numel()


def test_checkpoint_with_other_mup_multipliers_is_refused(saved):
    """The hidden weights were trained at half the base learning rate; the config gives another multiplier."""
    config = small("mmdit", **{"mup.base_heads": 4})
    reader = CheckpointReader(step_folder(saved["mmdit"], 2))
    reader.check_mup(param_specs(small("mmdit")))
    with pytest.raises(UserError, match=r"was trained with lr x 0\.5 for .*, but the config's μP rules give x 1;"):
        reader.check_mup(param_specs(config))


def test_unshard_is_the_inverse_of_cut():
    full = torch.arange(24.0).view(12, 2)
    shards = [cut(full, 0, 3, rank, 2) for rank in range(2)]
    # q, k and v have 4 rows each; rank 0 has the first half of each.
    assert shards[0][:, 0].tolist() == [0, 2, 8, 10, 16, 18]
    assert torch.equal(unshard(shards, 0, 3), full)


@pytest.mark.parametrize("harm", ["short", "missing", "manifest", "version", "digit"])
def test_incomplete_and_corrupt_checkpoints_are_detected(pool, tmp_path, harm):
    pool.run(1, save_after, "mmdit", {}, str(tmp_path))
    folder = step_folder(tmp_path, 2)
    file = folder / "rank_00000.safetensors"
    manifest = folder / "manifest.json"
    if harm == "short":
        file.write_bytes(file.read_bytes()[:-10])
    elif harm == "missing":
        file.unlink()
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif harm == "digit":  # otherwise still a valid manifest
        text = manifest.read_text()
        assert '"num_updates": 2,' in text
        manifest.write_text(text.replace('"num_updates": 2,', '"num_updates": 3,'))
    else:
        manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "files"}))
    with pytest.raises(Incomplete):
        CheckpointReader(folder)


def test_checkpoints_to_delete_excludes_the_newest_and_every_mth_step(tmp_path):
    for step in (1, 20, 300):
        checkpoint(tmp_path, step)
    (tmp_path / "step_00000400.part").mkdir()
    assert checkpoints_to_delete(tmp_path, keep=2) == [step_folder(tmp_path, 1)]
    for step in (100, 310, 320):
        checkpoint(tmp_path, step)
    assert checkpoints_to_delete(tmp_path, keep=1, keep_every=100) == [
        step_folder(tmp_path, step) for step in (1, 20, 310)
    ]
    clear(tmp_path)
    assert not list(tmp_path.glob("*.part"))
    assert len(list(tmp_path.iterdir())) == 6


def save_to_unwritable_folder(folder):
    from pathlib import Path

    from megatron_dit.checkpoint.writer import save

    engine = start(small("mmdit"))
    save(engine, Path(folder))


def test_unwritable_folder_raises_on_every_rank(pool, tmp_path):
    (tmp_path / "file").write_text("")
    for outcome in pool.outcomes(2, save_to_unwritable_folder, str(tmp_path / "file" / "x")):
        assert "cannot be written" in outcome.user_error


def test_inspect_prints_and_writes_a_summary(pool, tmp_path, capsys):
    from checkpoints_tools.__main__ import main

    pool.run(1, save_after, "pixart", {}, str(tmp_path))
    summary = tmp_path / "summary.json"
    assert main(["inspect", str(step_folder(tmp_path, 2)), "--json", str(summary)]) == 0
    found = json.loads(summary.read_text())
    assert (found["arch"], found["step"]) == ("pixart", 2)
    assert found["roles"]["output"]["tensors"] == 1
    assert "pixart" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "none")]) == 2
