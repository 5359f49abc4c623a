"""Nothing in a shard or an index is executed, and file names cannot refer to files outside the folder."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from webdataset.compat import WebDataset

from megatron_dit.data.index import broken_shards, read_index
from megatron_dit.data.tar import MEMBERS, BadSample, ShardReader, npy, parse_array, write_shard
from megatron_dit.runtime.errors import UserError
from tests.helpers.datasets import make_folder, sample

SIDE = (4, 4)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


@pytest.mark.parametrize("kind", ["object array", "bare pickle", "not an array", "truncated"])
def test_arrays_with_objects_are_rejected_and_not_executed(tmp_path, kind):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(tmp_path / "ran")], dtype=object), allow_pickle=True)  # as in a malicious file
    data = {
        "object array": buffer.getvalue(),
        "bare pickle": pickle.dumps(Payload(tmp_path / "ran")),
        "not an array": b"GIF89a",
        "truncated": npy(np.zeros(100))[:200],
    }[kind]
    with pytest.raises(BadSample, match="sample 7 is not a valid array") as raised:
        parse_array(data, "sample 7")
    assert "allow_pickle" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


HEADERS = {
    "size exceeds memory": "{'descr': '<f2', 'fortran_order': False, 'shape': (10000000000000,)}",
    "size exceeds int64": f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({10**30},)}}",
    "no dtype": "{'descr': ',f2', 'fortran_order': False, 'shape': (4,)}",
    "a key that is a list": "{[]: 1}",
    "keys that do not compare": "{'descr': '<f2', b'fortran_order': False, 'shape': (4,)}",
    "unclosed brackets": "(" * 5000,
    "too deep": "-" * 8000 + "1",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_invalid_array_headers_are_reported(tmp_path, kind):
    """An invalid array header, in a sample or in a shard's table, is reported like any other corruption."""
    header = HEADERS[kind].encode() + b"\n"
    malicious = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with pytest.raises(BadSample, match="sample 7 is not a valid array"):
        parse_array(malicious, "sample 7")
    index = make_folder(tmp_path / "data", [(SIDE, 5)])
    path = tmp_path / "data" / "00000.tar"
    data, begin = bytearray(path.read_bytes()), index.shards[0].table
    data[begin - len(malicious) : begin] = malicious
    path.write_bytes(data)
    assert "no valid table of 5 samples" in broken_shards(index, index.shards)["00000.tar"]


def test_pickle_in_place_of_the_table_is_not_executed(tmp_path):
    index = make_folder(tmp_path / "data", [(SIDE, 5)])
    path = tmp_path / "data" / "00000.tar"
    data, begin = bytearray(path.read_bytes()), index.shards[0].table
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(tmp_path / "ran")] * 5, dtype=object), allow_pickle=True)
    header = buffer.getvalue()[:128]
    data[begin - 128 : begin] = header
    path.write_bytes(data)
    assert "no valid table of 5 samples" in broken_shards(index, index.shards)["00000.tar"]
    assert not (tmp_path / "ran").exists()


def test_members_outside_the_table_are_never_opened(tmp_path):
    """Members of other kinds, or with paths outside the folder, are not in the table and therefore not read."""
    index = make_folder(tmp_path / "data", [(SIDE, 3)])
    path = tmp_path / "data" / "00000.tar"
    with tarfile.open(path, "a") as tar:
        for name in ("000001.pickle", "000001.pyd", "000002.pth", "../escape.latent.npy", "/etc/evil.latent.npy"):
            data = pickle.dumps(Payload(tmp_path / "ran"))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if path.stat().st_size == index.shards[0].bytes:  # the members fitted into the padding at the tar's end
        reader = ShardReader(path, index.shards[0], index.members)
        assert [reader.read(n, MEMBERS)[0] for n in range(3)] == ["000000", "000001", "000002"]
    else:
        assert "bytes, expected" in broken_shards(index, index.shards)["00000.tar"]
    assert not (tmp_path / "ran").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("name", ["../00000.tar", "/etc/passwd", "a/b.tar", ".."])
def test_file_names_outside_the_folder_are_rejected(tmp_path, name):
    make_folder(tmp_path / "data", [(SIDE, 3)])
    path = tmp_path / "data" / "index.json"
    raw = json.loads(path.read_text())
    raw["shards"][0]["file"] = name
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="expected file names inside its own folder"):
        read_index(tmp_path / "data")


def test_webdataset_reads_the_same_samples(tmp_path):
    """webdataset yields the same samples in the same order, and skips the table."""
    shard = write_shard(tmp_path / "0.tar", (sample(n, SIDE) for n in range(12)), SIDE)
    reader = ShardReader(tmp_path / "0.tar", shard, MEMBERS)
    theirs = list(WebDataset(str(tmp_path / "0.tar"), shardshuffle=False))
    assert len(theirs) == 12
    for number, expected in enumerate(theirs):
        key, members = reader.read(number, MEMBERS)
        assert key == expected["__key__"]
        assert members == {name: expected[name] for name in MEMBERS if name in expected}
    assert sorted(members) == ["captions.npy", "cls", "ids.npy", "latent.npy", "text.npy", "txt"]


def test_writing_is_reproducible_and_leaves_no_incomplete_file(tmp_path):
    first = write_shard(tmp_path / "a.tar", (sample(n, SIDE) for n in range(5)), SIDE)
    second = write_shard(tmp_path / "b.tar", (sample(n, SIDE) for n in range(5)), SIDE)
    assert first.sha256 == second.sha256

    def breaks():
        yield sample(0, SIDE)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "c.tar", breaks(), SIDE)
    assert not (tmp_path / "c.tar").exists()
