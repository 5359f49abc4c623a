"""Invalid input: a one-line message, exit status 2, all ranks exit, no partially written files remain."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml

from megatron_dit.cli import run
from megatron_dit.data.tar import npy
from tests.helpers.configs import write_config
from tests.helpers.datasets import TEXT, make_folder
from tests.helpers.output import one_line
from tests.helpers.runs import refused


@pytest.fixture
def config(dataset, tmp_path):
    """Return a function that writes a config for the shared dataset and returns its path."""

    def write(arch="mmdit", **overrides):
        return write_config(tmp_path, arch, **{"data.path": str(dataset), **overrides})

    return write


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dept=3", ["model.dept", "model.depth"]),
        ("optimiser.lr=1", ["'optimiser'", "'optimizer'"]),
        ("model.depth=three", ["model.depth", "three"]),
        ("model.depth=2.5", ["model.depth", "2.5"]),
        ("model.depth=0", ["model.depth=0", "at least 1"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1", "positive"]),
        ("optimizer.lr=nan", ["optimizer.lr=nan", "finite"]),
        ("parallel.tensor=3", ["model.heads=4", "parallel.tensor=3"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage=4", "0, 1, 2, 3"]),
        ("parallel.pipeline=3", ["model.depth=2", "parallel.pipeline=3"]),
        ("parallel.virtual_stages=2", ["parallel.virtual_stages=2", "parallel.pipeline"]),
        ("parallel.blocks_per_stage=[1,2]", ["parallel.blocks_per_stage=[1, 2]", "model.depth=2"]),
        ("train.compile=true train.recompute=selective", ["train.compile=true", "none or full"]),
        ("train.compile=true parallel.zero_stage=3", ["train.compile=true", "ZeRO 0, 1 or 2"]),
        ("train.recompute=some", ["train.recompute='some'", "selective"]),
        ("parallel.sequence=true", ["parallel.sequence=true", "parallel.tensor"]),
        ("train.micro_batch=3", ["train.global_batch=8", "3"]),
        ("train.dtype=fp8", ["train.dtype='fp8'", "bf16"]),
        ("model.arch=vgg", ["model.arch='vgg'", "pixart"]),
        ("objective.name=ddpm", ["objective.name='ddpm'", "rectified_flow"]),
        ("sampling.solver=ddim", ["sampling.solver='ddim'", "euler"]),
        ("data.path=/nowhere", ["/nowhere", "data_prep"]),
        ("data.path", ["data.path", "key=value"]),
        ("model.text_dim=32", ["model.text_dim=32", "64"]),
        ("model.in_channels=4", ["model.in_channels=4", "3"]),
        ("train.global_batch=6000", ["train.global_batch=6000", "600"]),
    ],
)
def test_invalid_config_value_is_rejected_with_a_one_line_message(config, capsys, tmp_path, override, words):
    path = config()
    extra = ["train.micro_batch=6000"] if "6000" in override else []
    assert run(["train", str(path), *override.split(), *extra]) == 2
    line = one_line(capsys)
    for word in words:
        assert word in line, line
    assert not (tmp_path / "run").exists()


def test_missing_config_and_invalid_yaml_are_rejected(capsys, tmp_path):
    assert run(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml does not exist" in one_line(capsys)
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: {depth: 3\nheads: ]")
    assert run(["train", str(broken)]) == 2
    assert "broken.yaml is not valid YAML" in one_line(capsys)


def test_config_without_a_required_key_is_rejected(config, capsys, tmp_path):
    path = config()
    values = yaml.safe_load(path.read_text())
    del values["model"]["depth"]
    path.write_text(yaml.safe_dump(values))
    assert run(["train", str(path)]) == 2
    assert "model.depth is missing" in one_line(capsys)


def test_unknown_command_and_flag_are_rejected(capsys):
    assert run(["tain"]) == 2
    assert "tain" in one_line(capsys)
    assert run(["sample", "runs/x", "--promt", "a"]) == 2
    assert "--prompt" in one_line(capsys)


def test_number_of_ranks_that_does_not_fit_the_config_is_rejected(config, capsys):
    path = str(config())
    assert run(["train", path, "--procs", "3"]) == 2
    assert "train.global_batch=8 is not divisible by 3 data-parallel ranks" in one_line(capsys)
    assert run(["train", path, "parallel.tensor=2", "--procs", "1"]) == 2
    assert "1 ranks are not divisible by parallel.tensor=2" in one_line(capsys)
    assert run(["train", path, "--procs", "0"]) == 2
    assert "--procs 0" in one_line(capsys)


# --- on two ranks -----------------------------------------------------------------------------------


@pytest.fixture
def own_data(dataset, tmp_path):
    """Copy of the dataset that a test may modify."""
    folder = tmp_path / "broken"
    shutil.copytree(dataset, folder)
    return folder


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("missing", ["00001.tar is missing"]),
        ("empty", ["00001.tar has 0 bytes"]),
        ("short", ["00001.tar has", "bytes, expected"]),
        ("garbage", ["00001.tar has no valid table of 150 samples"]),
    ],
)
def test_unreadable_shard_ends_both_ranks(config, own_data, tmp_path, harm, words):
    # Only rank 1 checks shard 1, so rank 0 must learn of the error.
    shard = own_data / "00001.tar"
    size = shard.stat().st_size
    if harm == "missing":
        shard.unlink()
    elif harm == "empty":
        shard.write_bytes(b"")
    elif harm == "short":
        shard.write_bytes(shard.read_bytes()[: size // 2])
    else:
        shard.write_bytes(bytes(range(256)) * (size // 256 + 1))
        with shard.open("r+b") as file:
            file.truncate(size)
    refused(config(**{"data.path": str(own_data)}), *words)
    assert not (tmp_path / "run").exists()


def test_too_many_corrupt_samples_end_both_ranks(config, own_data, tmp_path):
    """Corrupt bytes in shards whose sizes and tables are intact: the rank that reads them ends the other rank too."""
    for shard in sorted(own_data.glob("*.tar")):
        data = shard.read_bytes()
        shard.write_bytes(data.replace(b"\x93NUMPY", b"\x93NUMPX", 40))
    path = config(**{"data.path": str(own_data), "train.steps": 60, "data.max_bad_fraction": 0.005})
    refused(path, "exceeds data.max_bad_fraction=0.005", ".tar", "is corrupt")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_sample_without_the_text_encoder_folder_is_rejected(config, own_data, tmp_path, capsys):
    path = config(**{"data.path": str(own_data)})
    assert run(["train", str(path), "train.steps=1"]) == 0
    capsys.readouterr()
    shutil.rmtree(own_data / "text_encoder")
    assert run(["sample", str(tmp_path / "run"), "--prompt", "a", "--out", str(tmp_path / "x.png")]) == 2
    assert "text encoder" in one_line(capsys)
    assert not (tmp_path / "x.png").exists()


def test_run_folder_of_another_config_is_rejected_and_not_modified(config, tmp_path):
    path = config(**{"train.steps": 2})
    assert run(["train", str(path)]) == 0
    before = sorted((tmp_path / "run").rglob("*"))
    refused(path, "contains another run", "model.depth is 2 there and 3 here", overrides=["model.depth=3"])
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_run_folder_with_other_files_is_rejected_and_not_modified(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    refused(config(), "exists and is not a run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_checkpoint_of_another_architecture_is_rejected(config, tmp_path):
    path = config("pixart", **{"train.steps": 2, "run_dir": str(tmp_path / "other")})
    assert run(["train", str(path)]) == 0
    path = config("mmdit", **{"train.steps": 2})
    assert run(["train", str(path)]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    refused(config("mmdit", **{"train.steps": 4}), "checkpoint of another architecture")


def test_sample_without_a_checkpoint_is_rejected(capsys, tmp_path):
    assert run(["sample", str(tmp_path / "none"), "--prompt", "a"]) == 2
    assert "does not exist" in one_line(capsys)
    assert run(["sample", str(tmp_path), "--prompt", "a"]) == 2
    assert "contains no complete checkpoint" in one_line(capsys)


def test_too_many_skipped_steps_stop_the_run(config, tmp_path):
    """Latents so large that the loss overflows: steps are skipped up to the limit, then the run stops."""
    make_folder(
        tmp_path / "large",
        [((16, 16), 64)],
        members=lambda _: {"latent.npy": npy(np.full((3, 16, 16), 3e38, dtype=np.float32))},
    )
    path = config(**{"data.path": str(tmp_path / "large"), "train.max_skipped_steps": 3})
    refused(path, "3 consecutive steps up to step 3", "optimizer.lr")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [1, 2, 3]


def test_run_resumes_on_other_shards_but_not_on_another_text_encoder(config, tmp_path, capsys):
    """A run resumes with other shards made by the same encoders and logs this; with another encoder it is an error."""
    first = make_folder(tmp_path / "first", [((16, 16), 64)])
    path = config(**{"data.path": first.folder, "train.steps": 2})
    assert run(["train", str(path)]) == 0
    more = make_folder(tmp_path / "more", [((16, 16), 80)])
    other = make_folder(tmp_path / "other", [((16, 16), 64)], text={**TEXT, "sha256": "another"})
    capsys.readouterr()
    assert run(["train", str(path), "train.steps=4", f"data.path={more.folder}"]) == 0
    assert "the dataset's shards changed since the last run" in capsys.readouterr().out
    assert run(["train", str(path), "train.steps=6", f"data.path={other.folder}"]) == 2
    assert "encoded with a different text encoder" in one_line(capsys)


def test_data_prep_rejects_existing_outputs_and_missing_inputs(capsys, tmp_path, dataset):
    from data_prep.__main__ import main

    assert main(["toy", str(dataset)]) == 2
    assert "exists" in one_line(capsys)
    assert main(["encode", str(tmp_path / "*.tar"), str(tmp_path / "out")]) == 2
    assert "matches no files" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_overrides_may_follow_flags(config, capsys):
    path = config()
    assert run(["config", str(path), "train.steps=7", "--procs", "1", "train.log_every=3"]) == 0
    out = capsys.readouterr().out
    assert "steps: 7" in out
    assert "log_every: 3" in out
    assert run(["config", str(path), "--steps=7"]) == 2
    assert "unrecognized arguments: --steps=7" in capsys.readouterr().err
