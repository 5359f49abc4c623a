"""Published checkpoints that are not taken: what would run code, is torn, or has no place in our models."""

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
from checkpoints_tools.convert.published.pickles import read_published
from tests.checkpoints_tools.made import convert, our_model
from tests.models.published import DiT, PixArt, UViT, dit_mup, randomise


class Payload:
    """Unpickling it calls ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Empty:
    """A class of somebody's own."""


def save(path, model, **changes):
    """A plain state dict; None takes a tensor away."""
    state = {**randomise(model, seed=0).state_dict(), **changes}
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    return path


def refused(capsys, path, form, *words):
    """The one line of an error, after which there is no run."""
    out = path.with_name("run")
    assert main(["convert", str(path), str(out), "--from", form, *map(str, words)]) == 2
    assert not list(path.parent.glob("run*"))
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    return line


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("function", "named"), [(os.system, "posix.system"), (eval, "eval")])
def test_a_pickle_with_a_payload_is_refused_and_nothing_is_run(tmp_path, capsys, function, named, zipped):
    mark = tmp_path / "mark"
    payload = Payload(function, f"open({str(mark)!r}, 'w')" if function is eval else f"touch {mark}")
    state = {"model": DiT().state_dict(), "args": payload}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    line = refused(capsys, tmp_path / "x.pt", "dit", "--set", "model.heads=2")
    assert f"needs {named}, which would run code" in line
    assert not mark.exists()
    call, arguments = payload.__reduce__()  # what unpickling does
    call(*arguments)
    assert mark.exists()


@pytest.mark.parametrize("value", [Empty(), torch.distributed.ReduceOp.SUM, argparse.Namespace(x=Empty())])
def test_what_is_no_tensor_and_no_plain_value_is_refused_by_name(tmp_path, capsys, value):
    torch.save({"model": DiT().state_dict(), "args": value}, tmp_path / "x.pt")
    line = refused(capsys, tmp_path / "x.pt", "dit", "--set", "model.heads=2")
    assert "nothing of it was run" in line


def test_types_that_other_libraries_allow_are_refused_and_stay_allowed(tmp_path, capsys):
    """megatron-core lets torch.load make pathlib.PosixPath, among others, in the whole process."""
    torch.save({"model": DiT().state_dict(), "args": Empty()}, tmp_path / "x.pt")
    with torch.serialization.safe_globals([Empty]):
        before = set(torch.serialization.get_safe_globals())
        assert f"needs {__name__}.Empty" in refused(capsys, tmp_path / "x.pt", "dit", "--set", "model.heads=2")
        assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kept", [0.99, 0.5, 0.01, 0])
def test_a_torn_file_is_refused(tmp_path, capsys, kept, zipped):
    path = tmp_path / "x.pt"
    torch.save(randomise(DiT(), seed=0).state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    expected = "is an empty file" if kept == 0 else "is a truncated zip archive" if zipped else "cannot be read"
    assert expected in refused(capsys, path, "dit", "--set", "model.heads=2")


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    path = tmp_path / "x.pt"
    assert "is no file" in refused(capsys, path, "dit")
    torch.save([torch.ones(2)], path)
    assert "holds a list" in refused(capsys, path, "dit")
    torch.save({"step": 3}, path)
    assert "has 'step', which is no dense tensor of floats" in refused(capsys, path, "dit")
    torch.save({"model": {"x": torch.ones(2)}, "ema": {"y": torch.ones(2)}}, path)
    assert "they are of two models" in refused(capsys, path, "dit")


def rewritten(path, change):
    """The same zip with ``change(name, bytes)`` of every entry: (name, bytes, compression), or several of them."""
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
def test_a_zip_that_would_take_more_memory_than_it_has_bytes_is_refused(tmp_path, capsys, change, message):
    """The sizes in the zip's directory are compared with the file before anything in it is read."""
    path = save(tmp_path / "x.pt", DiT())
    rewritten(path, change)
    assert message in refused(capsys, path, "dit", "--set", "model.heads=2")


def test_a_zip_that_declares_more_bytes_than_the_file_has_is_refused(tmp_path, capsys):
    path = save(tmp_path / "x.pt", DiT())
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")  # of the directory: bytes 20 to 28 are the compressed and the true size
    while b"data/0" not in data[entry + 46 : entry + 80]:
        entry = data.index(b"PK\x01\x02", entry + 1)
    data[entry + 20 : entry + 28] = struct.pack("<II", 3 << 30, 3 << 30)
    path.write_bytes(data)
    assert f"but has {len(data):,}" in refused(capsys, path, "dit", "--set", "model.heads=2")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_tensor_that_is_larger_than_its_bytes_is_refused(tmp_path, capsys, zipped):
    """Strides of zero: each element is the same four bytes, until somebody copies them."""
    state = {**DiT().state_dict(), "x_embedder.proj.bias": torch.ones(1).expand(10**9)}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    line = refused(capsys, tmp_path / "x.pt", "dit", "--set", "model.heads=2")
    assert "declares 4,000,000,000 bytes for x_embedder.proj.bias" in line


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("numel", [70002, 2**31 - 1])
def test_a_storage_that_is_larger_than_its_bytes_is_refused(tmp_path, capsys, zipped, numel):
    """By two elements it would read the next storage's, or what lies between them."""
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(70000), "y": torch.ones(9)}, path, _use_new_zipfile_serialization=zipped)
    old, new = (b"J" + struct.pack("<i", value) for value in (70000, numel))
    data = path.read_bytes()
    assert data.count(old) == 2  # the storage's and the tensor's
    path.write_bytes(data.replace(old, new))
    line = refused(capsys, path, "dit")
    assert "declares 280,008 bytes for x" in line or "cannot be read" in line


def test_a_legacy_pickle_larger_than_weights_need_is_refused(tmp_path, capsys):
    """Every byte of this pickle would become a dictionary."""
    (tmp_path / "x.pt").write_bytes(b"\x80\x02" + b"}" * (5 << 20) + b".")
    assert "no pickles of at most 4,194,304 bytes" in refused(capsys, tmp_path / "x.pt", "dit")


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
def test_a_file_is_called_what_it_is_and_unsafe_loading_is_not_advised(tmp_path, capsys, data, kind, size):
    (tmp_path / "x.pt").write_bytes(data + bytes(size))
    line = refused(capsys, tmp_path / "x.pt", "dit")
    assert ("is zeros" if size and not data else kind) in line
    assert "weights_only" not in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, capsys, value):
    path = save(tmp_path / "x.pt", DiT(), **{"blocks.1.mlp.fc2.bias": torch.full((16,), value)})
    assert "blocks.1.mlp.fc2.bias would get NaN" in refused(capsys, path, "dit", "--set", "model.heads=2")


def test_wrappers_of_a_model_are_recognised(tmp_path):
    torch.save({"model": {f"module._orig_mod.model.{x}": torch.ones(1) for x in "ab"}}, tmp_path / "x.pt")
    assert list(read_published(tmp_path / "x.pt").raw) == ["a", "b"]


def test_another_format_is_told(tmp_path, capsys):
    path = save(tmp_path / "x.pt", PixArt())
    assert "has no y_embedder.embedding_table.weight of 2 dimensions" in refused(capsys, path, "dit")
    assert "has no patch_embed.proj.weight of 4 dimensions" in refused(capsys, path, "uvit")
    assert main(["convert", str(path), str(tmp_path / "run"), "--from", "sit"]) == 2
    assert "invalid choice: 'sit'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "make", "changes", "message"),
    [
        ("dit", DiT, {"extra.weight": torch.ones(2)}, "has extra.weight, for which dit has no place"),
        ("dit", DiT, {"blocks.1.mlp.fc2.bias": None}, "has nothing that becomes blocks.1.mlp.fc2.bias"),
        ("dit", DiT, {"blocks.1.attn.proj.bias": torch.ones(3)}, "has [3] for blocks.1.out.bias, which is [16]"),
        ("dit", DiT, {"final_layer.linear.weight": torch.ones(12, 16)}, "has [12, 16] for head.linear.weight"),
        ("dit", DiT, {"pos_embed": torch.zeros(1, 16, 16)}, "another pos_embed than sin-cos"),
        ("dit", DiT, {"pos_embed": torch.zeros(1, 15, 16)}, "positions of 15 patches: expected a square"),
        ("dit", DiT, {"pos_embed": None}, "add --set model.sample_size=N"),
        ("dit", DiT, {"blocks.0.attn.q_norm.weight": torch.ones(8)}, "has blocks.0.attn.q_norm.weight, for which"),
        ("dit", DiT, {"t_embedder.mlp.0.weight": torch.ones(2, 2, dtype=torch.int8)}, "no dense tensor of floats"),
        ("pixart", PixArt, {"csize_embedder.mlp.0.weight": torch.ones(2)}, "multi-scale models of side 1024"),
        ("pixart", PixArt, {"ar_embedder.mlp.0.weight": torch.ones(2)}, "are told the picture's size"),
        ("uvit", UViT, {"time_embed.0.weight": torch.ones(2)}, "has time_embed.0.weight: ours adds the timestep's"),
        ("uvit", UViT, {"in_blocks.0.attn.qkv.bias": torch.ones(48)}, "has in_blocks.0.attn.qkv.bias, for which"),
        ("uvit", lambda: UViT(channels=3), {}, "is a U-ViT on pixels (3 channels)"),
        ("uvit", UViT, {"label_emb.weight": None}, "has neither label_emb nor context_embed"),
        ("uvit", UViT, {"final_layer.bias": None}, "has nothing that becomes head.conv.bias"),
    ],
)
def test_weights_that_ours_has_no_place_for_or_lacks_are_refused(tmp_path, capsys, form, make, changes, message):
    path = save(tmp_path / "x.pt", make(), **changes)
    assert message in refused(capsys, path, form, "--set", "model.heads=2")


def test_positions_that_averaging_moved_are_taken(tmp_path):
    """DiT's script averages them with the weights: a decay of 0.9999 in fp32 moves them by up to 1.7e-4."""
    fixed = DiT().pos_embed.data
    moved = fixed.clone()
    for _ in range(20_000):
        moved.mul_(0.9999).add_(fixed, alpha=1 - 0.9999)
    assert 5e-5 < (moved - fixed).abs().max() < 1e-3
    path = save(tmp_path / "x.pt", DiT(), pos_embed=moved)
    convert(path, tmp_path / "run", "--from", "dit", "--set", "model.heads=2")
    assert our_model(tmp_path / "run").config.interpolation_scale == 1


def test_what_the_file_does_not_say_is_asked_for(tmp_path, capsys):
    path = save(tmp_path / "x.pt", DiT())
    assert "depth 2 and width 16: add --set model.heads=N" in refused(capsys, path, "dit")
    for heads in ("3", "0", "x"):
        line = refused(capsys, path, "dit", "--set", f"model.heads={heads}")
        assert f"model.heads={heads}: expected a divisor of the width 16" in line
    heads = ["--set", "model.heads=2"]
    assert "give the base width in one way: --base-shapes F.bsh, or" in refused(capsys, path, "dit-mup", *heads)
    bsh = ["--base-shapes", tmp_path / "x.bsh"]
    assert "give the base width in one way" in refused(capsys, path, "dit-mup", *heads, "mup.base_heads=1", *bsh)
    assert "x.bsh does not exist" in refused(capsys, path, "dit-mup", *heads, *bsh)
    assert "--base-shapes goes with --from dit-mup or pixart-mup" in refused(capsys, path, "dit", *heads, *bsh)
    assert "--base-shapes goes with --from dit-mup" in refused(capsys, path, "diffusers", *bsh)
    assert "--drop-clip goes with --from diffusers" in refused(capsys, path, "dit", *heads, "--drop-clip")


def test_base_shapes_of_another_model_are_refused(tmp_path, capsys):
    path = save(tmp_path / "x.pt", dit_mup(8, 2))
    dit_mup(8, 2, base_shapes=tmp_path / "deep.bsh", depth=3)
    words = ["--set", "model.heads=8", "--base-shapes"]
    assert "has blocks.2." in refused(capsys, path, "dit-mup", *words, tmp_path / "deep.bsh")
    dit_mup(8, 2, base_shapes=tmp_path / "x.bsh")
    line = refused(capsys, path, "dit-mup", "--set", "model.heads=2", "--base-shapes", tmp_path / "x.bsh")
    assert "has no base of whole heads of 32" in line


def test_the_two_parametrizations_are_not_mixed_up(tmp_path, capsys):
    for name, mup, other in (("dit", True, "dit-mup"), ("dit-mup", False, "dit")):
        state = {"model": DiT().state_dict(), "args": argparse.Namespace(mup=mup, num_heads=2)}
        torch.save(state, tmp_path / "x.pt")
        assert f"in its args: import it with --from {other}" in refused(capsys, tmp_path / "x.pt", name)
