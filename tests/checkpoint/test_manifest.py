"""Corrupt or malicious manifests and files are refused with a one-line message that names the problem."""

from __future__ import annotations

import json
import math
import os
import shutil
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.__main__ import main
from megatron_dit.checkpoint.listing import step_folder
from megatron_dit.checkpoint.load import newest, open_checkpoint
from megatron_dit.checkpoint.manifest import Incomplete
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.model import load_model
from tests.helpers.checkpoints import checkpoint, edit
from tests.helpers.configs import small

RANK = "rank_00000.safetensors"


@pytest.fixture
def path(run):
    return step_folder(run / "checkpoints", 6)


def refused(capsys, path, *named):
    """Check that the checkpoint is refused with one line and status 2, and that its run falls back to step 3."""
    assert main(["inspect", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith(f"error: checkpoint {path} is incomplete (")
    assert all(str(name) in err for name in named), err
    found = newest(path.parent)
    assert found.reader is not None
    assert found.reader.step == 3
    assert len(found.notes) == len(found.incomplete) == 1
    assert len(err) < 700


def setter(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(manifest):
        node = manifest
        for key in keys:
            node = node[key]
        node[last] = value

    return change


PARAM = ("params", "blocks.0.image.qkv.weight")

ILL_TYPED = {
    "step a string": ("step", "6"),
    "step negative": ("step", -6),
    "step true": ("step", True),
    "step a fraction": ("step", 6.5),
    "step huge": ("step", 10**30),
    "num_updates nan": ("num_updates", float("nan")),
    "num_updates infinite": ("num_updates", float("inf")),
    "num_updates null": ("num_updates", None),
    "states empty": ("states", []),
    "states a string": ("states", "master"),
    "states numbers": ("states", [1]),
    "data a list": ("data", []),
    "data without codec": ("data", {"text": "x", "samples": "y"}),
    "data of numbers": ("data", {"text": 1, "codec": 2, "samples": 3}),
    "bad samples a list": ("bad_samples", [1]),
    "bad samples of strings": ("bad_samples", {"corrupt_shard": "1"}),
    "config a list": ("config", []),
    "config empty": ("config", {}),
    "model a list": ("config", "model", []),
    "arch a number": ("config", "model", "arch", 3),
    "layout a string": ("layout", "tensor"),
    "layout without tensor": ("layout", {"world": 1}),
    "layout of 0": ("layout", "tensor", 0),
    "layout that cuts nothing": ("layout", "tensor", 7),
    "params empty": ("params", {}),
    "params a list": ("params", []),
    "shape a number": (*PARAM, "shape", 3),
    "shape negative": (*PARAM, "shape", [-1, 4]),
    "shape huge": (*PARAM, "shape", [96, 10**15]),
    "shape of many": (*PARAM, "shape", [1] * 1000),
    "dim too large": (*PARAM, "dim", 2),
    "fused_parts 0": (*PARAM, "fused_parts", 0),
    "lr nan": (*PARAM, "lr", float("nan")),
    "lr a string": (*PARAM, "lr", "0.5"),
    "multiplier of nothing": ("multipliers", {"nothing.weight": 2.0}),
    "multiplier a string": ("multipliers", {PARAM[1]: "2"}),
    "files empty": ("files", {}),
    "files a list": ("files", [RANK]),
    "file above": ("files", {"../step_00000003/" + RANK: {"bytes": 1, "sha256": "0" * 64}}),
    "file absolute": ("files", {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
    "file with a newline": ("files", {RANK + "\n": {"bytes": 1, "sha256": "0" * 64}}),
    "file the manifest": ("files", {"manifest.json": {"bytes": 1, "sha256": "0" * 64}}),
    "bytes a string": ("files", RANK, "bytes", "1"),
    "bytes negative": ("files", RANK, "bytes", -1),
    "hash not one": ("files", RANK, "sha256", "x"),
    "versions of numbers": ("versions", {"torch": 2}),
    "pooled text huge": ("diffusers", {"pooled_projection_dim": 10**9}),
    "diffusers a list": ("diffusers", []),
    "a role of a megabyte": (*PARAM, "role", "x" * 10**6),
    "a state of a megabyte": ("states", ["x" * 10**6]),
    "format a string": ("format", "3"),
}
NAMED = {  # messages that are not about a single key, but about an inconsistency
    "layout that cuts nothing": "7 tensor-parallel ranks",
    "shape huge": "but the tensors need",
    "dim too large": "cannot be split along dimension 2",
    "multiplier of nothing": "multipliers contains nothing.weight",
    "files empty": "the files have 0 bytes",
}


@pytest.mark.parametrize("name", ILL_TYPED)
def test_ill_typed_manifest_is_refused_on_one_line(path, capsys, name):
    edit(path, setter(*ILL_TYPED[name]))
    value = ILL_TYPED[name][-1]
    named = "is not a number" if isinstance(value, float) and not math.isfinite(value) else NAMED.get(name)
    refused(capsys, path, path / "manifest.json", named or ILL_TYPED[name][0])


@pytest.mark.parametrize(
    "key", ["format", "step", "num_updates", "states", "data", "bad_samples", "config", "layout", "params", "files"]
)
def test_missing_key_is_named(path, capsys, key):
    edit(path, lambda manifest: {name: value for name, value in manifest.items() if name != key})
    refused(capsys, path, f"has no key '{key}'")


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe{}", b"\0" * 100, b"[" * 100_000, b'{"a":' * 100_000),
        *(b'{"step": ' + b"9" * 5000 + b"}", '{"ü": 1}'.encode("utf-16"), "{}".encode("utf-8-sig"), b'{"x": NaN}'),
    ],
    ids=lambda data: repr(data[:6]),
)
def test_manifest_that_is_not_valid_json_is_refused_on_one_line(path, capsys, data):
    (path / "manifest.json").write_bytes(data)
    refused(capsys, path, path / "manifest.json")


def test_oversized_manifest_is_not_read(path, capsys):
    os.truncate(path / "manifest.json", 1 << 40)  # a sparse file, which needs no disk space
    refused(capsys, path, "expected at most 67108864")


def test_other_format_version_is_not_reported_as_incomplete(path, capsys):
    edit(path, setter("format", 4))
    assert main(["inspect", str(path.parents[1])]) == 2
    assert f"{path} has checkpoint format 4, expected 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["manifest.json", RANK])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "outside", "nowhere", "loop"])
def test_only_regular_files_inside_the_checkpoint_are_opened(path, capsys, tmp_path, name, kind):
    """Opening a FIFO would block until a writer appears, and reading a device never ends."""
    file, outside = path / name, tmp_path / name
    shutil.copy(file, outside)
    file.unlink()
    targets = {"device": "/dev/zero", "outside": outside, "nowhere": "nowhere", "loop": name}
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(targets[kind])
    refused(capsys, path, file)


def test_link_to_a_file_inside_the_checkpoint_is_read(path):
    (path / RANK).rename(path / "moved")
    (path / RANK).symlink_to("moved")
    assert open_checkpoint(path).step == 6


def rewrite(path, change):
    """Change a rank's tensors or metadata, and update the manifest's size and hash of the file."""
    tensors = load_file(path / RANK)
    about = {"tensor_rank": "0", "starts": json.dumps({name.partition("/")[2]: 0 for name in tensors})}
    save_file(tensors, path / RANK, change(tensors, about) or about)
    data = (path / RANK).read_bytes()
    edit(path, setter("files", RANK, {"bytes": len(data), "sha256": sha256(data).hexdigest()}))


def first(tensors):
    return next(iter(sorted(tensors)))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: {"nothing": "x"},
        lambda tensors, about: about.update(starts="[1]"),
        lambda tensors, about: about.update(starts='{"x": 0}'),
        lambda tensors, about: about.update(starts=about["starts"].replace(": 0", ': "a"')),
        lambda tensors, about: about.update(starts="[" * 9999),
        lambda tensors, about: about.update(starts="3"),
        lambda tensors, about: about.update(starts=about["starts"].replace(": 0", ": 7")),
        lambda tensors, about: about.update(tensor_rank="x"),
        lambda tensors, about: tensors.update({name: x[:-1].clone() for name, x in tensors.items() if "ema" in name}),
        lambda tensors, about: tensors.update({name: x.view(1, -1) for name, x in tensors.items()}),
    ],
    ids=["none", "list", "unknown", "text", "deep", "number", "moved", "rank", "shorter", "shape"],
)
def test_file_with_a_wrong_header_is_refused_on_one_line(path, tmp_path, capsys, change):
    """All hashes are correct, because whoever created the file also created the manifest."""
    rewrite(path, change)
    # Without one parameter the manifest requires fewer bytes, so a shorter file passes the size check.
    edit(path, lambda manifest: manifest["params"].pop("blocks.0.image.qkv.bias") and None)
    assert main(["reshard", str(path), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert str(path) in err[0]
    assert not list(tmp_path.glob("out*"))


def test_elements_stored_in_two_files_are_refused(tmp_path):
    """Counted twice, they would compensate for elements that no file contains."""
    path = checkpoint(tmp_path, 1)
    shutil.copy(path / RANK, path / "rank_00001.safetensors")
    edit(path, lambda manifest: manifest["files"].update({"rank_00001.safetensors": manifest["files"][RANK]}))
    reader = open_checkpoint(path)
    with pytest.raises(Incomplete, match="store the same elements of"):
        reader.full("ema", next(iter(reader.manifest["params"])))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (("config", "model", "depth", "two"), "model.depth"),
        (("config", "train", "steps", None), "train.steps"),
        (("config", "data", []), "data"),
        (("config", "nothing", 3), "nothing"),
        (("config", "optimizer", "lr", float("inf")), "optimizer.lr"),
    ],
    ids=lambda value: str(value),
)
def test_invalid_config_is_refused_on_one_line(path, capsys, keys, named):
    edit(path, setter(*keys))
    (path / "manifest.json").write_text((path / "manifest.json").read_text().replace("Infinity", "1e999"))
    with pytest.raises(UserError, match=r"the config in .* cannot be used by this version") as caught:
        _ = CheckpointReader(path).config
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ("config", "model", "depth", 3),
            "blocks.1.text.modulation.weight has shape (64, 32), the model expects (192, 32)",
        ),
        (("config", "model", "depth", 9000), "but its config has model.depth=9000"),
        (("config", "model", "heads", 4096), "the model expects (32768, 48)"),
        (("multipliers", {"patch_embed.bias": 2.0}), "a forward multiplier for patch_embed.bias"),
    ],
    ids=lambda value: str(value[-1]),
)
def test_config_of_another_model_is_refused_before_the_model_is_built(path, tmp_path, capsys, keys, message):
    """A model with 4,096 heads would need 300 GB."""
    edit(path, setter(*keys))
    if keys[0] == "config":
        assert main(["convert", str(path), str(tmp_path / "out"), "--to", "diffusers"]) == 2
        assert message in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))
    reader = open_checkpoint(path)
    with pytest.raises(UserError) as caught:
        load_model(reader, reader.config)
    assert message in str(caught.value)


def test_non_finite_weights_are_neither_sampled_from_nor_exported(tmp_path, capsys):
    path = checkpoint(tmp_path, 1)

    def spoil(tensors, about):
        tensors["ema/patch_embed.bias"][3] = math.nan

    rewrite(path, spoil)
    message = f"{path} has NaN or infinite values in ema/patch_embed.bias"
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has NaN or infinite values in ema/patch_embed\.bias"):
        load_model(open_checkpoint(path), small("mmdit"))


@pytest.mark.parametrize("text", ["${oc.env:CHECKPOINT_SECRET}", "x${oc.env:CHECKPOINT_SECRET}y", "${seed}", "${"])
@pytest.mark.parametrize("program", [["convert", "--to", "diffusers"], ["reshard"]], ids=lambda words: words[0])
def test_nothing_in_a_manifest_is_interpolated(path, tmp_path, monkeypatch, capsys, text, program):
    """A user who publishes a converted foreign checkpoint would otherwise publish environment variables with it."""
    monkeypatch.setenv("CHECKPOINT_SECRET", "hunter2")
    edit(path, setter("config", "data", "path", text))
    assert main([program[0], str(path), str(tmp_path / "out"), *program[1:]]) == 2
    captured = capsys.readouterr()
    assert f"data.path={text!r}" in captured.err
    assert captured.err.count("\n") == 1
    assert "hunter2" not in captured.out + captured.err
    assert not list(tmp_path.glob("out*"))


def test_names_in_a_manifest_are_printed_verbatim(path, capsys, monkeypatch):
    """Rich markup, escape sequences and emoji codes have no effect."""
    monkeypatch.setenv("COLUMNS", "300")
    role = "[red]a\x1b[2J\n:smile:[/red]"
    edit(path, lambda manifest: [param.update(role=role) for param in manifest["params"].values()] and None)
    edit(path, setter("config", "model", "arch", "[bold]\x9b"))
    edit(path, setter("layout", "[b]\x07", "[/nothing]\r"))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "[red]a\\x1b[2J\\n:smile:[/red]" in out
    assert "[bold]\\x9b" in out
    assert "[b]\\x07 [/nothing]\\r" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_values_cannot_break_out_of_a_model_cards_tables_and_fences(path, tmp_path):
    """A path stays in its table cell, and a config that contains a fence stays in its code block."""
    name = "data|<b>\n```\n# Title\x1b[2J"
    edit(path, setter("config", "data", "path", name))
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| data | data\\|\\<b>\\\\n\\`\\`\\`\\\\n# Title\\\\x1b\\[2J |" in card
    assert "\x1b" not in card
    assert "````yaml\n" in card or "\n```\n" not in card.partition("```yaml\n")[2].rpartition("\n```\n")[0]


def test_full_tensors_equal_those_read_by_safetensors(path):
    """The checkpoint has one rank, hence one file."""
    held, reader = load_file(path / RANK), open_checkpoint(path)
    for key in ("master", "ema"):
        for name in reader.manifest["params"]:
            assert torch.equal(reader.full(key, name).flatten(), held[f"{key}/{name}"])
