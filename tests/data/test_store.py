"""Shards of a URL are fetched once into a bounded cache, checked, and read like local ones."""

from __future__ import annotations

import functools
import http.server
import itertools
import threading
from pathlib import Path

import pytest
import torch

from megatron_dit.data.index import read_index
from megatron_dit.data.shard_cache import Cache
from megatron_dit.data.stream import batches
from megatron_dit.data.tar import BadSample, sha256_of
from megatron_dit.runtime.errors import UserError
from tests.helpers.configs import small
from tests.helpers.datasets import make_folder

SIDE = (16, 16)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and records the requested paths."""

    asked: list[str]

    def __init__(self, *arguments, asked, **named):
        self.asked = asked
        super().__init__(*arguments, **named)

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """Return (local index, index of the same data by URL, requested paths)."""
    local = make_folder(tmp_path / "data", [(SIDE, 20)] * 6)
    asked = []
    handler = functools.partial(Handler, directory=str(tmp_path), asked=asked)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield local, read_index(f"http://127.0.0.1:{server.server_port}/data"), asked
    server.shutdown()
    server.server_close()


def configured(index, folder, **overrides):
    return small("mmdit", **{"data.path": index.folder, "data.cache": str(folder), "train.steps": 30, **overrides})


@pytest.mark.parametrize("workers", [0, 2])
def test_url_yields_the_same_batches_as_the_local_folder(served, tmp_path, workers):
    local, remote, asked = served
    config = configured(remote, tmp_path / "cache", **{"data.workers": workers})
    expected = batches([local], configured(local, ""), 0, 0, 1)
    for ours, theirs in zip(batches([remote], config, 0, 0, 1), expected, strict=True):
        assert torch.equal(ours.latents, theirs.latents)
        assert [key.rpartition("data/")[2] for key in ours.keys] == [key.rpartition("data/")[2] for key in theirs.keys]
    fetched = [path for path in asked if path.endswith(".tar")]
    assert sorted(fetched) == sorted({f"/data/{shard.file}" for shard in local.shards})  # each once, by any worker


def test_cache_stays_within_its_limit(served, tmp_path):
    local, remote, asked = served
    size = max(shard.bytes for shard in local.shards)
    cache = Cache(remote, tmp_path / "cache", 3 * size)
    for shard in itertools.chain(remote.shards, remote.shards):
        path = cache.path(shard)
        assert sha256_of(path) == shard.sha256
        held = list((tmp_path / "cache").rglob("*.tar"))
        assert len(held) <= 3
    assert len([path for path in asked if path.endswith(".tar")]) == 12
    assert cache.path(remote.shards[5]).exists()
    assert len([path for path in asked if path.endswith(".tar")]) == 12  # cached, so not fetched again


def test_shards_evicted_while_open_are_fetched_again(served, tmp_path):
    """The cache has room for two of six shards, so shards are evicted while they are open, and fetched again."""
    local, remote, _ = served
    gib = 2.5 * local.shards[0].bytes / 2**30
    config = configured(remote, tmp_path / "cache", **{"data.cache_gib": gib, "train.steps": 14})
    expected = batches([local], configured(local, "", **{"train.steps": 14}), 0, 0, 1)
    for ours, theirs in zip(batches([remote], config, 0, 0, 1), expected, strict=True):
        assert torch.equal(ours.latents, theirs.latents)
        assert not ours.bad


def test_file_that_does_not_match_the_index_is_not_used(served, tmp_path):
    local, remote, _ = served
    path = Path(local.folder, "00001.tar")
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    Path(local.folder, "00002.tar").unlink()
    cache = Cache(remote, tmp_path / "cache", 2**30)
    with pytest.raises(BadSample, match="but the index lists") as corrupt:
        cache.path(remote.shards[1])
    with pytest.raises(BadSample, match="is missing") as missing:
        cache.path(remote.shards[2])
    assert (corrupt.value.cause, missing.value.cause) == ("corrupt_shard", "missing_shard")
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("url", ["pipe:cat shards", "pipe://cat", "ssh://host/data", "simplecache::http://x/data"])
def test_unsupported_urls_are_rejected(url):
    with pytest.raises(UserError, match="expected a folder or a URL of"):
        read_index(url)


def test_url_requires_a_cache():
    with pytest.raises(UserError, match=r"set data\.cache"):
        small("mmdit", **{"data.path": "s3://bucket/data"})
