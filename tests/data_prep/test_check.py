"""``check`` finds every kind of corruption in a folder of shards, and reports none in an intact one."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main as data_prep
from megatron_dit.data.index import Index, read_index, write_index
from megatron_dit.data.tar import npy, write_shard
from tests.helpers.datasets import make_folder, sample
from tests.helpers.sources import header

SIDE = (4, 4)


def halves(number):
    return {"latent.npy": npy(np.full((3, *SIDE), number, dtype=np.float16))}


@pytest.fixture
def folder(tmp_path):
    """Make two shards of six samples, as encode writes them."""
    make_folder(tmp_path / "data", [(SIDE, 6)] * 2, members=halves)
    return tmp_path / "data"


def problems(folder, tmp_path, *flags):
    """Run the command and return (exit status, problems)."""
    status = data_prep(["check", str(folder), "--json", str(tmp_path / "report.json"), *flags])
    return status, json.loads((tmp_path / "report.json").read_text())["problems"]


def places(path):
    with tarfile.open(path) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def replaced(folder, **members):
    """Rewrite shard 0 with other members in its first sample, and update the index."""
    rows = [{**sample(n, SIDE), **halves(n), **(members if n == 0 else {})} for n in range(6)]
    shard = write_shard(folder / "00000.tar", rows, SIDE)
    index = read_index(folder)
    write_index(Index(**{**vars(index), "shards": (shard, *index.shards[1:])}))


def append(path, name, data, kind=tarfile.REGTYPE):
    """Append a member after the table, within the padding at the end of the tar."""
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size, info.type = len(data), kind
        tar.addfile(info, io.BytesIO(data))


def change_index(folder, **values):
    path = folder / "index.json"
    raw = json.loads(path.read_text())
    for key, value in values.items():
        raw["shards"][0][key] = value
    path.write_text(json.dumps(raw))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


def object_array(path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(path)], dtype=object), allow_pickle=True)  # as in a malicious file
    return buffer.getvalue()


def plant(kind, folder, ran):
    """Corrupt the folder, and return the text that the report must contain."""
    first = folder / "00000.tar"
    where = places(first)
    if kind == "byte in data":
        flip(first, sum(where["000002.latent.npy"]) - 1)
        return "00000.tar/000002: latent.npy has a CRC-32 that differs from the table"
    if kind == "byte in table":
        flip(first, read_index(folder).shards[0].table)  # in the first key
        return "00000.tar/100000: latent.npy is missing from the tar"
    if kind == "extra member":
        append(first, "000001.jpg", b"x")
        return "member '000001.jpg' is not in the table"
    if kind == "name outside the folder":
        append(first, "../evil.npy", b"x")
        return "member '../evil.npy' is outside the folder"
    if kind == "link":
        append(first, "000001.link", b"", tarfile.SYMTYPE)
        return "member '000001.link' is not a plain file"
    if kind == "pickle":
        append(first, "000001.pickle", pickle.dumps(Payload(ran)))
        return "member '000001.pickle' is not in the table"
    if kind == "object array":
        replaced(folder, **{"latent.npy": object_array(ran)})
        return "00000.tar/000000: latent.npy is not a valid array"
    if kind == "not finite":
        replaced(folder, **{"latent.npy": npy(np.full((3, *SIDE), np.nan, dtype=np.float16))})
        return "00000.tar/000000: latent.npy has NaN or infinite values"
    if kind == "shape":
        replaced(folder, **{"latent.npy": npy(np.zeros((3, 8, 2), dtype=np.float16))})
        return "00000.tar/000000: latent.npy has shape (3, 8, 2), expected (3, 4, 4)"
    if kind == "dtype":
        replaced(folder, **{"ids.npy": npy(np.zeros(2))})
        return "00000.tar/000000: ids.npy has dtype float64, expected int32"
    if kind == "tokens":
        replaced(folder, **{"captions.npy": npy(np.array([[3.0, 1.0]]))})
        return "00000.tar/000000: ids.npy has 2 tokens, but captions.npy has 3"
    if kind == "weight":
        replaced(folder, **{"captions.npy": npy(np.array([[2.0, -1.0]]))})
        return "00000.tar/000000: captions.npy has a weight of -1, expected above 0"
    if kind == "class":
        replaced(folder, cls="24")
        return "00000.tar/000000: has class '24', expected 0 to 23"
    if kind == "count":
        change_index(folder, samples=5)
        return "00000.tar has no valid table of 5 samples"
    if kind == "hash":
        change_index(folder, sha256="0" * 64)
        return "00000.tar: SHA-256 is"
    if kind == "duplicate key":
        rows = [{**sample(n, SIDE), **halves(n)} for n in (6, 7, 8, 2, 9, 10)]
        shard = write_shard(folder / "00001.tar", rows, SIDE)
        index = read_index(folder)
        write_index(Index(**{**vars(index), "shards": (index.shards[0], shard)}))
        return "duplicate key 000002 in 00000.tar and 00001.tar"
    assert kind == "missing"
    first.unlink()
    return "00000.tar is missing"


KINDS = ["byte in data", "byte in table", "extra member", "name outside the folder", "link", "pickle", "object array"]
KINDS += ["not finite", "shape", "dtype", "tokens", "weight", "class", "count", "hash", "duplicate key", "missing"]


@pytest.mark.parametrize("kind", KINDS)
def test_corruption_is_found_and_reported(folder, tmp_path, kind, capsys):
    words = plant(kind, folder, tmp_path / "ran")
    status, lines = problems(folder, tmp_path)
    assert status == 1
    assert any(words in line for line in lines), lines
    assert words in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_names_are_printed_without_interpreting_markup_or_control_characters(folder, tmp_path, capsys):
    append(folder / "00000.tar", "[red]x[/red]\x1b[2J\n.txt", b"x")
    status, _ = problems(folder, tmp_path)
    assert status == 1
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "\x1b" not in out
    assert all("wrong" not in line for line in out.splitlines())


@pytest.mark.parametrize("claim", [-1024, 100 * 2**30])
def test_tar_with_an_invalid_member_size_is_reported(folder, tmp_path, claim):
    shard = folder / "00000.tar"
    with tarfile.open(shard) as tar:
        at = tar.getmembers()[1].offset
    data = bytearray(shard.read_bytes())
    data[at : at + 512] = header("x.png", claim=claim)
    shard.write_bytes(data)
    status, lines = problems(folder, tmp_path)
    assert status == 1
    assert any(line.startswith("00000.tar: not a valid tar") or "00000.tar: no member" in line for line in lines), lines


@pytest.mark.parametrize("procs", ["1", "2"])
def test_intact_folder_has_no_problems(folder, tmp_path, procs, capsys):
    assert problems(folder, tmp_path, "--procs", procs) == (0, [])
    out = capsys.readouterr().out
    assert "no problems found" in out
    assert "12" in out


def test_encoded_dataset_is_valid_until_its_text_encoder_changes(dataset, tmp_path):
    assert problems(dataset, tmp_path) == (0, [])
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    weights = copy / "text_encoder" / "model.safetensors"
    flip(weights, weights.stat().st_size - 1)
    status, (line,) = problems(copy, tmp_path)
    assert status == 1
    assert "text_encoder: weights have SHA-256" in line


def test_twenty_problems_are_printed_and_the_others_counted(tmp_path, capsys):
    make_folder(tmp_path / "data", [(SIDE, 30)])  # latents in fp32: every sample is invalid
    status, lines = problems(tmp_path / "data", tmp_path)
    assert (status, len(lines)) == (1, 30)
    out = capsys.readouterr().out
    assert out.count("expected float16") == 20
    assert "... and 10 more" in out


def test_folder_without_an_index_is_rejected(tmp_path, capsys):
    assert data_prep(["check", str(tmp_path)]) == 2
    assert "has no index.json" in capsys.readouterr().err
