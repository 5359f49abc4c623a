"""Published checkpoints that are rejected: unsafe pickles, incomplete files, and weights of unsupported models."""

from __future__ import annotations

import argparse
import gzip
import os
import pickle
import struct
import zipfile

import pytest
import safetensors.torch
import torch

from checkpoints_tools.__main__ import main
from checkpoints_tools.convert.original.torch_files import read_original
from tests.helpers.conversion import convert, our_model
from tests.helpers.original_models import DiT, PixArt, UViT, dit_mup, randomize


class Payload:
    """An object whose unpickling calls ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Empty:
    """A class that unpickling must not accept."""


def save(path, model, **changes):
    """Save a plain state dict with ``changes``; None removes a tensor."""
    state = {**randomize(model, seed=0).state_dict(), **changes}
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    return path


def refused(capsys, path, form, *words):
    """Run ``convert``, check that it fails with a one-line error and writes no run, and return the line."""
    out = path.with_name("run")
    assert main(["convert", str(path), str(out), "--from", form, *map(str, words)]) == 2
    assert not list(path.parent.glob("run*"))
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    return line


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("function", "named"), [(os.system, "posix.system"), (eval, "eval")])
def test_a_pickle_with_a_payload_is_rejected_and_runs_no_code(tmp_path, capsys, function, named, zipped):
    mark = tmp_path / "mark"
    payload = Payload(function, f"open({str(mark)!r}, 'w')" if function is eval else f"touch {mark}")
    state = {"model": DiT().state_dict(), "args": payload}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    line = refused(capsys, tmp_path / "x.pt", "dit", "model.heads=2")
    assert f"needs {named}, which could run arbitrary code" in line
    assert not mark.exists()
    call, arguments = payload.__reduce__()  # unpickling would make this call
    call(*arguments)
    assert mark.exists()


@pytest.mark.parametrize("value", [Empty(), torch.distributed.ReduceOp.SUM, argparse.Namespace(x=Empty())])
def test_pickled_objects_of_other_types_are_rejected(tmp_path, capsys, value):
    torch.save({"model": DiT().state_dict(), "args": value}, tmp_path / "x.pt")
    line = refused(capsys, tmp_path / "x.pt", "dit", "model.heads=2")
    assert "so it was not loaded" in line


def test_types_allowed_by_other_libraries_are_rejected_and_stay_allowed_elsewhere(tmp_path, capsys):
    """For example, megatron-core allows torch.load to create pathlib.PosixPath in the entire process."""
    torch.save({"model": DiT().state_dict(), "args": Empty()}, tmp_path / "x.pt")
    with torch.serialization.safe_globals([Empty]):
        before = set(torch.serialization.get_safe_globals())
        assert f"needs {__name__}.Empty" in refused(capsys, tmp_path / "x.pt", "dit", "model.heads=2")
        assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.01, 0])
def test_a_truncated_file_is_rejected(tmp_path, capsys, kept, zipped):
    path = tmp_path / "x.pt"
    torch.save(randomize(DiT(), seed=0).state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    expected = "is an empty file" if kept == 0 else "is a truncated zip archive" if zipped else "cannot be read"
    assert expected in refused(capsys, path, "dit", "model.heads=2")


def test_files_that_are_not_checkpoints_are_rejected(tmp_path, capsys):
    path = tmp_path / "x.pt"
    assert "is not a file" in refused(capsys, path, "dit")
    torch.save([torch.ones(2)], path)
    assert "contains a list" in refused(capsys, path, "dit")
    torch.save({"step": 3}, path)
    assert "has 'step', which is not a dense float tensor" in refused(capsys, path, "dit")
    torch.save({"model": {"x": torch.ones(2)}, "ema": {"y": torch.ones(2)}}, path)
    assert "are not of the same model" in refused(capsys, path, "dit")


def rewritten(path, change):
    """Rewrite a zip. ``change(name, bytes)`` returns a list of (name, bytes, compression) to write for each entry."""
    with zipfile.ZipFile(path) as file:
        entries = [(name, file.read(name)) for name in file.namelist()]
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries:
            for new, value, compression in change(name, data):
                file.writestr(new, value, compression)


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n, d: [(n, d + bytes(200 << 20) if n.endswith("data.pkl") else d, DEFLATED)],
            "has the compressed entry",
        ),
        (lambda n, d: [(n, d + bytes(5 << 20) if n.endswith("data.pkl") else d, STORED)], "expected at most 4,194,304"),
        (lambda n, d: [(n, d, STORED)] * (2 if n.endswith("data.pkl") else 1), "has two entries"),
    ],
    ids=["bomb", "large pickle", "duplicate"],
)
def test_a_zip_that_would_need_more_memory_than_its_size_is_rejected(tmp_path, capsys, change, message):
    """The sizes in the zip's directory are compared with the file before any entry is read."""
    path = save(tmp_path / "x.pt", DiT())
    rewritten(path, change)
    assert message in refused(capsys, path, "dit", "model.heads=2")


def test_a_zip_that_declares_more_bytes_than_the_file_has_is_rejected(tmp_path, capsys):
    path = save(tmp_path / "x.pt", DiT())
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")  # an entry of the directory; bytes 20 to 28: compressed and uncompressed size
    while b"data/0" not in data[entry + 46 : entry + 80]:
        entry = data.index(b"PK\x01\x02", entry + 1)
    data[entry + 20 : entry + 28] = struct.pack("<II", 3 << 30, 3 << 30)
    path.write_bytes(data)
    assert f"but has {len(data):,}" in refused(capsys, path, "dit", "model.heads=2")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_tensor_larger_than_its_storage_is_rejected(tmp_path, capsys, zipped):
    """With strides of zero all elements share the same four bytes, until the tensor is copied."""
    state = {**DiT().state_dict(), "x_embedder.proj.bias": torch.ones(1).expand(10**9)}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    line = refused(capsys, tmp_path / "x.pt", "dit", "model.heads=2")
    assert "declares 4,000,000,000 bytes for x_embedder.proj.bias" in line


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("numel", [70002, 2**31 - 1])
def test_a_storage_larger_than_its_bytes_is_rejected(tmp_path, capsys, zipped, numel):
    """A storage that is two elements too large would extend into the padding or into the next storage."""
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(70000), "y": torch.ones(9)}, path, _use_new_zipfile_serialization=zipped)
    old, new = (b"J" + struct.pack("<i", value) for value in (70000, numel))
    data = path.read_bytes()
    assert data.count(old) == 2  # the sizes of the storage and of the tensor
    path.write_bytes(data.replace(old, new))
    line = refused(capsys, path, "dit")
    assert "declares 280,008 bytes for x" in line or "cannot be read" in line


def test_a_legacy_pickle_larger_than_weights_need_is_rejected(tmp_path, capsys):
    """Every byte of this pickle would become a dictionary."""
    (tmp_path / "x.pt").write_bytes(b"\x80\x02" + b"}" * (5 << 20) + b".")
    assert "no complete pickles in its first 4,194,304 bytes" in refused(capsys, tmp_path / "x.pt", "dit")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        (safetensors.torch.save({"x": torch.ones(9)}), "is a safetensors file"),
        (gzip.compress(b"x"), "is a gzip archive"),
        (pickle.dumps({"a": 1}, protocol=4), "cannot be read"),
        (b"", "is an empty file"),
    ],
    ids=["html", "lfs", "safetensors", "gzip", "pickle", "empty"],
)
@pytest.mark.parametrize("size", [0, 5 << 20])
def test_the_error_names_the_type_of_the_file_and_does_not_advise_unsafe_loading(tmp_path, capsys, data, kind, size):
    (tmp_path / "x.pt").write_bytes(data + bytes(size))
    line = refused(capsys, tmp_path / "x.pt", "dit")
    assert ("is filled with zeros" if size and not data else kind) in line
    assert "weights_only" not in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_rejected(tmp_path, capsys, value):
    path = save(tmp_path / "x.pt", DiT(), **{"blocks.1.mlp.fc2.bias": torch.full((16,), value)})
    line = refused(capsys, path, "dit", "model.heads=2")
    assert "the weights for blocks.1.mlp.fc2.bias have NaN" in line


def test_prefixes_of_wrapping_modules_are_removed(tmp_path):
    torch.save({"model": {f"module._orig_mod.model.{x}": torch.ones(1) for x in "ab"}}, tmp_path / "x.pt")
    assert list(read_original(tmp_path / "x.pt").raw) == ["a", "b"]


def test_a_file_in_another_format_than_given_is_rejected(tmp_path, capsys):
    path = save(tmp_path / "x.pt", PixArt())
    assert "has no y_embedder.embedding_table.weight with 2 dimensions" in refused(capsys, path, "dit")
    assert "has no patch_embed.proj.weight with 4 dimensions" in refused(capsys, path, "uvit")
    assert main(["convert", str(path), str(tmp_path / "run"), "--from", "sit"]) == 2
    assert "--from sit: expected one of diffusers, dit, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "make", "changes", "message"),
    [
        ("dit", DiT, {"extra.weight": torch.ones(2)}, "has extra.weight, which has no counterpart in dit"),
        ("dit", DiT, {"blocks.1.mlp.fc2.bias": None}, "has no tensor for blocks.1.mlp.fc2.bias"),
        (
            "dit",
            DiT,
            {"blocks.1.attn.proj.bias": torch.ones(3)},
            "has shape [3] for blocks.1.out.bias, but dit with depth 2 and 2 heads needs [16]",
        ),
        ("dit", DiT, {"final_layer.linear.weight": torch.ones(12, 16)}, "has shape [12, 16] for head.linear.weight"),
        ("dit", DiT, {"pos_embed": torch.zeros(1, 16, 16)}, "has a pos_embed that differs from the sin-cos table"),
        ("dit", DiT, {"pos_embed": torch.zeros(1, 15, 16)}, "positions for 15 patches: expected a square"),
        ("dit", DiT, {"pos_embed": None}, "add model.sample_size=N"),
        ("dit", DiT, {"blocks.0.attn.q_norm.weight": torch.ones(8)}, "has blocks.0.attn.q_norm.weight, which has no"),
        ("dit", DiT, {"t_embedder.mlp.0.weight": torch.ones(2, 2, dtype=torch.int8)}, "not a dense float tensor"),
        ("pixart", PixArt, {"csize_embedder.mlp.0.weight": torch.ones(2)}, "multi-scale models of side 1024"),
        ("pixart", PixArt, {"ar_embedder.mlp.0.weight": torch.ones(2)}, "take the image size as a condition"),
        ("uvit", UViT, {"time_embed.0.weight": torch.ones(2)}, "cannot be imported: our U-ViT has no MLP after"),
        ("uvit", UViT, {"in_blocks.0.attn.qkv.bias": torch.ones(48)}, "has in_blocks.0.attn.qkv.bias, which has no"),
        ("uvit", lambda: UViT(channels=3), {}, "is a U-ViT on pixels (3 channels)"),
        ("uvit", UViT, {"label_emb.weight": None}, "has neither label_emb nor context_embed"),
        ("uvit", UViT, {"final_layer.bias": None}, "has no tensor for head.conv.bias"),
    ],
)
def test_unexpected_missing_and_mismatched_weights_are_rejected(tmp_path, capsys, form, make, changes, message):
    path = save(tmp_path / "x.pt", make(), **changes)
    assert message in refused(capsys, path, form, "model.heads=2")


def test_positions_changed_by_averaging_are_accepted(tmp_path):
    """DiT's script averages them with the weights: a decay of 0.9999 in fp32 changes them by up to 1.7e-4."""
    fixed = DiT().pos_embed.data
    moved = fixed.clone()
    for _ in range(20_000):
        moved.mul_(0.9999).add_(fixed, alpha=1 - 0.9999)
    assert 5e-5 < (moved - fixed).abs().max() < 1e-3
    path = save(tmp_path / "x.pt", DiT(), pos_embed=moved)
    convert(path, tmp_path / "run", "--from", "dit", "model.heads=2")
    assert our_model(tmp_path / "run").config.interpolation_scale == 1


def test_missing_and_invalid_options_are_reported(tmp_path, capsys):
    path = save(tmp_path / "x.pt", DiT())
    assert "depth 2 and width 16; add model.heads=N" in refused(capsys, path, "dit")
    for heads in ("3", "0", "x"):
        line = refused(capsys, path, "dit", f"model.heads={heads}")
        assert f"model.heads={heads} does not divide the width 16" in line
    heads = ["model.heads=2"]
    assert "give the base width by exactly one of --base-shapes F.bsh and" in refused(capsys, path, "dit-mup", *heads)
    bsh = ["--base-shapes", tmp_path / "x.bsh"]
    assert "give the base width by exactly one of" in refused(capsys, path, "dit-mup", *heads, "mup.base_heads=1", *bsh)
    assert "x.bsh does not exist" in refused(capsys, path, "dit-mup", *heads, *bsh)
    assert "--base-shapes is only valid with --from dit-mup or pixart-mup" in refused(capsys, path, "dit", *heads, *bsh)
    assert "--base-shapes is only valid with --from dit-mup" in refused(capsys, path, "diffusers", *bsh)
    assert "--drop-clip is only valid with --from diffusers" in refused(capsys, path, "dit", *heads, "--drop-clip")


def test_base_shapes_of_another_model_are_rejected(tmp_path, capsys):
    path = save(tmp_path / "x.pt", dit_mup(8, 2))
    dit_mup(8, 2, base_shapes=tmp_path / "deep.bsh", depth=3)
    words = ["model.heads=8", "--base-shapes"]
    assert "has blocks.2." in refused(capsys, path, "dit-mup", *words, tmp_path / "deep.bsh")
    dit_mup(8, 2, base_shapes=tmp_path / "x.bsh")
    line = refused(capsys, path, "dit-mup", "model.heads=2", "--base-shapes", tmp_path / "x.bsh")
    assert "are not those of a whole number of heads of head_dim=32" in line


def test_importing_with_the_wrong_parametrization_is_rejected(tmp_path, capsys):
    for name, mup, other in (("dit", True, "dit-mup"), ("dit-mup", False, "dit")):
        state = {"model": DiT().state_dict(), "args": argparse.Namespace(mup=mup, num_heads=2)}
        torch.save(state, tmp_path / "x.pt")
        assert f"in its args: import it with --from {other}" in refused(capsys, tmp_path / "x.pt", name)
