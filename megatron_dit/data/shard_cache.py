"""Local access to shard files: in their folder, or in a bounded cache into which they are fetched from a URL."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_dit.config import DataConfig
from megatron_dit.data.index import Index, file_system
from megatron_dit.data.tar import BadSample, Shard, ShardReader, sha256_of
from megatron_dit.runtime.errors import writing
from megatron_dit.runtime.locks import wait_for_lock
from megatron_dit.runtime.paths import user_path


class Store:
    """Provides the local paths of an index's shards."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def path(self, shard: Shard) -> Path:
        """Return the local path of a shard. Raise BadSample if the shard is not available."""
        return Path(self._index.path(shard.file))

    def open(self, shard: Shard) -> ShardReader:
        """Open a shard for reading. Raise BadSample if it is missing or does not match the index."""
        return ShardReader(self.path(shard), shard, self._index.members)


class Cache(Store):
    """Fetches shards of a URL on demand into a folder that all processes of a host share.

    Each file is fetched once, checked against the SHA-256 in the index and renamed into place. The least recently used
    files are deleted to stay within ``limit`` bytes. A file that is open stays readable after its deletion, so readers
    are not affected.
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
            with self._lock(f"{shard.file}.lock"):  # another process may be fetching it: wait, then check again
                if not self._touch(path, shard):
                    self._fetch(shard, path)
        return path

    def open(self, shard: Shard) -> ShardReader:
        while True:
            path = self.path(shard)
            with self._lock("evict.lock"):  # the shard may be evicted between the check in `path` and opening it
                if self._touch(path, shard):
                    return ShardReader(path, shard, self._index.members)

    def _touch(self, path: Path, shard: Shard) -> bool:
        """Mark a cached shard as used. Return whether it is cached with its full size.

        A file truncated by a full disk or a crash is fetched again.
        """
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
            # Created anew each time because fsspec's file systems do not survive forking the DataLoader's workers.
            file_system(self._index.folder).get_file(url, str(part))
            found = sha256_of(part)
        except FileNotFoundError:
            raise BadSample("missing_shard", f"shard {url} is missing; restore it") from None
        except Exception as error:  # each of fsspec's file systems has its own exception types
            raise BadSample("missing_shard", f"shard {url} cannot be fetched ({error})") from None
        if found != shard.sha256:
            part.unlink()
            raise BadSample(
                "corrupt_shard",
                f"shard {url} has SHA-256 {found[:12]}, but the index lists {shard.sha256[:12]}; restore it",
            )
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
        """Hold a lock that excludes other processes of this host. The kernel releases it when the process ends."""
        with wait_for_lock(self._folder / name):
            yield


def open_store(index: Index, config: DataConfig) -> Store:
    if index.local:
        return Store(index)
    assert config.cache is not None  # the config requires it for a URL
    return Cache(index, Path(user_path(config.cache, "data.cache")), int(config.cache_gib * 2**30))
