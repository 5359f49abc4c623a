"""Where a shard's file is on this host: in its folder, or in a bounded cache that it is fetched to from a URL."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_dit.config import DataConfig
from megatron_dit.data.shards import Index, file_system
from megatron_dit.data.tar import BadSample, Shard, ShardReader, sha256_of
from megatron_dit.errors import writing
from megatron_dit.runtime.locks import wait_for_lock
from megatron_dit.runtime.paths import user_path


class Store:
    """Local paths of an index's shards."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def path(self, shard: Shard) -> Path:
        """Raises BadSample where the shard cannot be had."""
        return Path(self._index.path(shard.file))

    def open(self, shard: Shard) -> ShardReader:
        """Open a shard for reading. Raises BadSample if it is missing or is not the shard of the index."""
        return ShardReader(self.path(shard), shard, self._index.members)


class Cache(Store):
    """Shards of a URL, fetched when asked for into a folder that all of a host's processes share.

    A file is fetched once, checked against the index's SHA-256 and renamed into place; those not used for longest are
    deleted to stay within ``limit`` bytes. An open file outlives its deletion, so nobody who reads is disturbed.
    """

    def __init__(self, index: Index, folder: Path, limit: int) -> None:
        super().__init__(index)
        name = hashlib.sha256(index.folder.encode()).hexdigest()[:16]
        self._folder, self._limit = folder / name, limit
        with writing(folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, shard: Shard) -> Path:
        path = self._folder / shard.file
        if not self._touch(path, shard):
            with self._lock(f"{shard.file}.lock"):  # another process may be fetching it: wait, and look again
                if not self._touch(path, shard):
                    self._fetch(shard, path)
        return path

    def open(self, shard: Shard) -> ShardReader:
        while True:
            path = self.path(shard)
            with self._lock(
                "evict.lock"
            ):  # a shard may be deleted for another one after it was found, before it is open
                if self._touch(path, shard):
                    return ShardReader(path, shard, self._index.members)

    def _touch(self, path: Path, shard: Shard) -> bool:
        """Whether the shard is held, in its size: one that a full disk or a crash has cut is fetched again."""
        try:
            os.utime(path)
            return path.stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    def _fetch(self, shard: Shard, path: Path) -> None:
        url, part = self._index.path(shard.file), path.with_suffix(".part")
        with self._lock("evict.lock"):
            self._make_room(shard.bytes)
        try:
            # Asked for anew each time: fsspec's file systems do not survive the fork into the loader's workers.
            file_system(self._index.folder).get_file(url, str(part))
            found = sha256_of(part)
        except FileNotFoundError:
            raise BadSample("missing_shard", f"shard {url} is missing: restore it") from None
        except Exception as error:  # each of fsspec's file systems has its own kinds
            raise BadSample("missing_shard", f"shard {url} cannot be fetched ({error})") from None
        if found != shard.sha256:
            part.unlink()
            raise BadSample("torn_shard", f"shard {url} is not the one of its index (SHA-256 {found[:12]}): restore it")
        part.replace(path)

    def _make_room(self, size: int) -> None:
        held = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._folder.glob("*.tar"))
        total = size + sum(bytes_held for _, bytes_held, _ in held)
        for _, bytes_held, path in held:
            if total <= self._limit:
                break
            total -= bytes_held
            path.unlink()

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Held by one process of the host; the kernel frees it when the process ends, however it ends."""
        with wait_for_lock(self._folder / name):
            yield


def open_store(index: Index, config: DataConfig) -> Store:
    return (
        Store(index)
        if index.local
        else Cache(index, Path(user_path(config.cache, "data.cache")), int(config.cache_gib * 2**30))
    )
