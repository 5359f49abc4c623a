"""Any single fault in a sample or index gives a cause or a one-line error, in bounded memory, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dit.data import stream
from megatron_dit.data.batch import Batch
from megatron_dit.data.health import DataHealth
from megatron_dit.data.index import broken_shards, read_index
from megatron_dit.data.samples import Samples
from megatron_dit.data.shard_cache import Cache
from megatron_dit.data.tar import BadSample, ShardReader, npy, parse_array, sha256_of, table_dtype
from megatron_dit.models.common.condition import Condition
from megatron_dit.runtime.errors import UserError
from tests.helpers.configs import small
from tests.helpers.datasets import make_folder

SIDE = (16, 16)


def read_all(folder, arch="mmdit"):
    """Return each sample of shard 0 as training reads it."""
    config = small(arch, **{"data.path": str(folder)})
    samples = Samples([read_index(folder)], config)
    count = read_index(folder).shards[0].samples
    return [samples[0, number, 0, 0, number] for number in range(count)]


def test_flipped_bit_in_the_table_affects_only_its_own_sample(tmp_path):
    folder = tmp_path / "data"
    index = make_folder(folder, [(SIDE, 4)])
    path, shard = folder / "00000.tar", index.shards[0]
    original = path.read_bytes()
    rows = np.frombuffer(original, table_dtype(len(index.members), 6), 4, shard.table)
    assert rows["key"].tolist() == [f"{number:06d}".encode() for number in range(4)]
    begin = shard.table + rows.itemsize  # of sample 1
    samples = Samples([index], small("mmdit", **{"data.path": str(folder)}))
    assert samples[0, 1, 0, 0, 1].bad is None
    causes = set()
    tracemalloc.start()
    for bit in range(0, 8 * (rows.itemsize - 6), 3):
        data = bytearray(original)
        data[begin + 6 + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        sample = samples[0, 1, 0, 0, 1]
        assert tracemalloc.get_traced_memory()[1] - held < 2**20
        if sample.bad is None:  # the flipped bit belongs to a member that training does not read
            assert np.array_equal(sample.latent, np.full((3, *SIDE), 1))
        else:
            causes.add(sample.bad[0])
        assert samples[0, 2, 0, 0, 2].bad is None
    tracemalloc.stop()
    assert causes == {"corrupt_shard", "wrong_checksum"}


def array_of(header, body=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def header(dtype, shape):
    return array_of(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}")


def captions(*rows):
    return {"captions.npy": npy(np.array(rows, dtype=np.float64).reshape(-1, 2))}


BLANK = np.zeros((3, *SIDE))
MEMBERS = {
    "a shape of 10 ** 12": ({"latent.npy": header("<f2", (10**12,))}, "not_an_array"),
    "a negative shape": ({"latent.npy": header("<f2", (-2, -2)) + bytes(8)}, "not_an_array"),
    "more bytes than the shape": ({"latent.npy": npy(BLANK) + b"x"}, "not_an_array"),
    "strings": ({"latent.npy": npy(BLANK.astype(str))}, "wrong_shape"),
    "a trillion empty strings": ({"text.npy": header("|S0", (10**12, 64))}, "wrong_shape"),
    "complex": ({"latent.npy": npy(BLANK.astype(complex))}, "wrong_shape"),
    "no captions": (captions(), "wrong_captions"),
    "weights of 0": (captions([1, 0], [1, 0]), "wrong_captions"),
    "negative tokens": (captions([-1, 1], [3, 1]), "wrong_captions"),
    "half tokens": (captions([0.5, 1], [1.5, 1]), "wrong_captions"),
    "weights whose sum is infinite": (captions([1, 1e308], [1, 1e308]), "wrong_captions"),
    "weight NaN": (captions([2, np.nan]), "not_finite"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_invalid_members_are_reported_with_a_cause(tmp_path, case):
    members, cause = MEMBERS[case]
    make_folder(tmp_path / "data", [(SIDE, 2)], members=lambda number: members if number == 0 else {})
    bad, good = read_all(tmp_path / "data")
    assert (bad.bad[0], good.bad) == (cause, None)


@pytest.mark.parametrize("label", ["1" * 5000, "-1", "x", "\xb2", ""])
def test_invalid_class_labels_are_reported_with_a_cause(tmp_path, label):
    make_folder(tmp_path / "data", [(SIDE, 2)], members=lambda number: {"cls": label} if number == 0 else {})
    bad, good = read_all(tmp_path / "data", "dit")
    assert (bad.bad[0], good.bad, good.label) == ("wrong_class", None, 1)


def test_parsing_an_array_allocates_no_more_than_its_bytes():
    malicious = array_of(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({10**9},)}}", bytes(64))
    tracemalloc.start()
    with pytest.raises(BadSample, match="8000000000 bytes"):
        parse_array(malicious, "sample")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_non_regular_file_is_a_missing_shard_and_does_not_block(tmp_path, kind):
    index = make_folder(tmp_path / "data", [(SIDE, 2)])
    path = tmp_path / "data" / "00000.tar"
    path.unlink()
    {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/zero")}[kind](path)
    with pytest.raises(BadSample, match="missing") as caught:
        ShardReader(path, index.shards[0], index.members)
    assert caught.value.cause == "missing_shard"


def test_ids_outside_the_vocabulary_are_reported_with_a_cause(tmp_path):
    ids = (np.array([5, 1]), np.array([5, 99]), np.array([-1]), np.zeros(0))
    blank = torch.zeros(4, 1)
    batch = Batch(
        latents=blank,
        condition=Condition(torch.zeros(4, dtype=torch.bool), None, None),
        u=blank,
        noise=blank,
        weight=torch.tensor([1.0, 1, 1, 0]),
        keys=("a", "b", "c", "d"),
        bad=(("not_finite", "d"),),
        ids=ids,
    )
    found = stream._without_unknown_ids(batch, 99)
    assert found.weight.tolist() == [1, 0, 0, 0]
    assert [len(each) for each in found.ids] == [2, 0, 0, 0]
    assert [cause for cause, _ in found.bad] == ["not_finite", "wrong_captions", "wrong_captions"]


def test_truncated_file_in_the_cache_is_fetched_again(tmp_path):
    make_folder(tmp_path / "data", [(SIDE, 2)])
    index = read_index(f"file://{tmp_path}/data")
    cache = Cache(index, tmp_path / "cache", 2**30)
    path = cache.path(index.shards[0])
    path.write_bytes(path.read_bytes()[:1000])
    assert sha256_of(cache.path(index.shards[0])) == index.shards[0].sha256


def test_log_line_of_an_unreadable_sample_escapes_control_characters(monkeypatch, capsys):
    config = small("mmdit", **{"train.global_batch": 8})
    monkeypatch.setattr("megatron_dit.data.health.gather", lambda value: [value])
    DataHealth(config).check({"wrong_class": 1}, [("wrong_class", "a\x1b[2J\nb has class 'x'")])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(r"a\x1b[2J\nb has class 'x'")


FIELDS = [None, True, -1, 0, 1.5, "x", "", [], {}, [1], 10**30, "\x1b[2J\n"]
SHARD = ("file", "samples", "bytes", "sha256", "bucket", "table")
TEXT = ("encoder", "sha256", "dtype", "dim", "tokens", "features")
TOP = ("format", "shards", "members", "channels", "text", "codec", "classes", "source", "features")
PLACES = [(), *((name,) for name in TOP), ("shards", 0), ("codec", "kind"), ("codec", "sha256")]
PLACES += [("shards", 0, "bucket", 0), *(("shards", 0, name) for name in SHARD), *(("text", name) for name in TEXT)]
FREE = ("source", "sha256", "encoder", "file")  # these may be any text
ALLOWED = {
    ("text",): "{}",
    ("features",): "None",
    ("classes",): "0",
    ("members",): "[]",
    ("text", "features"): "True",
    ("shards", 0, "table"): "0",  # opening the shard detects it, because no array header precedes the offset
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)) or "all")
def test_index_fields_of_a_wrong_type_give_a_one_line_error(tmp_path, place):
    folder = tmp_path / "data"
    make_folder(folder, [(SIDE, 2)])
    original = json.loads((folder / "index.json").read_text())
    for value in FIELDS:
        if repr(value) == ALLOWED.get(place) or (isinstance(value, str) and place and place[-1] in FREE):
            continue
        raw = json.loads(json.dumps({"all": original}))
        target, name = raw, "all"
        for inner in place:
            target, name = target[name], inner
        target[name] = value
        (folder / "index.json").write_text(json.dumps(raw["all"]))
        with pytest.raises(UserError, match=r"index\.json") as caught:
            read_index(folder)
        assert str(caught.value).isprintable(), value


@pytest.mark.parametrize("missing", TOP)
def test_missing_index_field_gives_a_one_line_error(tmp_path, missing):
    make_folder(tmp_path / "data", [(SIDE, 2)])
    path = tmp_path / "data" / "index.json"
    raw = json.loads(path.read_text())
    del raw[missing]
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"not a valid index of shards .*{missing}"):
        read_index(tmp_path / "data")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("samples", 2 * 10**9, "cannot hold 2000000000 samples of 3 x 16 x 16"),
        ("bucket", [60000, 60000], "cannot hold 2 samples of 3 x 60000 x 60000"),
        ("table", 10**12, "a table at byte 1000000000000"),
    ],
)
def test_index_with_sizes_that_exceed_the_shard_is_rejected(tmp_path, field, value, message):
    make_folder(tmp_path / "data", [(SIDE, 2)])
    path = tmp_path / "data" / "index.json"
    raw = json.loads(path.read_text())
    raw["shards"][0][field] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        read_index(tmp_path / "data")


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[" * 10**5, b"{" * 2000, b'{"format": ' + b"9" * 5000 + b"}", b"null"]
)
def test_index_with_invalid_content_gives_a_one_line_error(tmp_path, data):
    (tmp_path / "index.json").write_bytes(data)
    with pytest.raises(UserError, match="is not a valid index of shards"):
        read_index(tmp_path)


def test_index_that_is_not_a_regular_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "index.json")
    with pytest.raises(UserError, match="is not a regular file"):
        read_index(tmp_path)


def test_text_encoder_path_outside_the_folder_is_rejected(tmp_path):
    make_folder(tmp_path / "data", [(SIDE, 2)])
    path = tmp_path / "data" / "index.json"
    raw = json.loads(path.read_text())
    raw["text"]["encoder"] = "./../elsewhere"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="expected a sub-folder of its own folder"):
        read_index(tmp_path / "data")


@pytest.mark.parametrize("name", ["data[1]", "a%20b", "-x", "two\nlines", "café", "cafe\u0301", "[red]", "a b", "*"])
def test_folders_with_special_names_are_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / name, [(SIDE, 2)])
    for folder in (name, str(tmp_path / name), f"file://{tmp_path}/{name}"):
        index = read_index(folder)
        assert broken_shards(index, index.shards) == {}
        if "://" not in folder:
            assert all(sample.bad is None for sample in read_all(folder))


def test_file_url_may_contain_percent_escapes(tmp_path):
    """A folder whose actual name contains the percent sign takes precedence over the decoded name."""
    make_folder(tmp_path / "a b", [(SIDE, 2)])
    assert read_index((tmp_path / "a b").as_uri()).folder == f"file://{tmp_path}/a b"
    shutil.copytree(tmp_path / "a b", tmp_path / "a%20b")
    assert read_index(f"file://{tmp_path}/a%20b").folder == f"file://{tmp_path}/a%20b"


def test_home_folder_is_expanded_but_variables_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "data", [(SIDE, 2)])
    index = read_index("~/data")
    assert Path(index.path("00000.tar")).is_file()
    with pytest.raises(UserError, match=r"data.path=\$HOME/data: \$HOME is not expanded"):
        read_index("$HOME/data")
