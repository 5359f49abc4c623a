"""Check one shard with two readers, the standard library's tarfile and the table of samples. Both must agree."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.tars import BoundedFile
from megatron_dit.data.index import Index
from megatron_dit.data.members import class_number
from megatron_dit.data.tar import MEMBERS, TABLE, BadSample, Shard, ShardReader, parse_array, sha256_of, table_dtype

Place = tuple[int, int]  # (offset of a member's data, number of bytes)


@dataclass(frozen=True)
class Checked:
    problems: list[str]  # one line each
    keys: np.ndarray  # (samples,) bytes; empty if the table cannot be read


def check_shard(index: Index, shard: Shard, path: Path) -> Checked:
    """Check the shard at ``path`` completely against the index."""
    problems: list[str] = []
    keys = np.zeros(0, dtype="S1")
    if unknown := sorted(set(index.members) - set(MEMBERS)):
        problems.append(f"{shard.file}: the index lists unknown members {unknown}, expected {', '.join(MEMBERS)}")
    try:
        ShardReader(path, shard, index.members).close()
    except BadSample as error:
        problems.append(str(error))
        if error.cause == "missing_shard":
            return Checked(problems, keys)
    if (found := sha256_of(path)) != shard.sha256:
        problems.append(f"{shard.file}: SHA-256 is {found[:12]}, expected {shard.sha256[:12]}")
    wrong_members: list[str] = []
    try:
        with BoundedFile(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            places, wrong_members = _members(tar)
        rows = _table(path, places.pop(TABLE, None), index, shard)
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        return Checked([*problems, f"{shard.file}: not a valid tar ({error})"], keys)
    except BadSample as error:
        problems += [f"{shard.file}: {line}" for line in wrong_members]
        return Checked([*problems, f"{shard.file}: {error}"], keys)
    wrong_members += _unlisted(places, rows, index.members)
    problems += [f"{shard.file}: {line}" for line in wrong_members]
    with path.open("rb") as file:
        for row in rows:
            key = row["key"].decode("ascii", errors="replace")
            members, wrong = {}, []
            for i, name in enumerate(index.members):
                place = int(row["offset"][i]), int(row["size"][i])
                if place[1] < 0:
                    continue
                if (at := places.get(f"{key}.{name}")) != place:
                    found_at = f"at {at} in the tar" if at else "missing from the tar"
                    wrong.append(f"{name} is {found_at}, but at {place} in the table")
                    continue
                file.seek(place[0])
                members[name] = file.read(place[1])
                if zlib.crc32(members[name]) != row["crc"][i]:
                    wrong.append(f"{name} has a CRC-32 that differs from the table")
            wrong += check_sample(index, shard.bucket, members)
            problems += [f"{shard.file}/{key}: {line}" for line in wrong]
    return Checked(problems, rows["key"].copy())


def _members(tar: tarfile.TarFile) -> tuple[dict[str, Place], list[str]]:
    """Return the place of each member according to the tar's headers, and the problems of the members."""
    places: dict[str, Place] = {}
    wrong = []
    for member in tar:
        if member.size < 0:  # tarfile would read the same headers in an endless loop
            raise tarfile.ReadError(f"member {member.name!r} has {member.size} bytes")
        name = member.name
        if name.startswith("/") or ".." in name.split("/"):
            wrong.append(f"member {name!r} is outside the folder")
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            wrong.append(f"member {name!r} is not a plain file")
        if name in places:
            wrong.append(f"member {name!r} occurs twice")
        places[name] = member.offset_data, member.size
    return places, wrong


def _table(path: Path, place: Place | None, index: Index, shard: Shard) -> np.ndarray:
    """Return the rows of the table. Raise BadSample if their number or offset differs from the index."""
    if place is None:
        raise BadSample("corrupt_shard", f"no member {TABLE}")
    with path.open("rb") as file:
        file.seek(place[0])
        rows = parse_array(file.read(min(place[1], path.stat().st_size)), TABLE)
    key = rows.dtype["key"].itemsize if rows.dtype.names and "key" in rows.dtype.names else 0
    if rows.ndim != 1 or rows.dtype != table_dtype(len(index.members), key):
        raise BadSample("corrupt_shard", f"{TABLE} has shape {rows.shape} and dtype {rows.dtype}, not those of a table")
    if len(rows) != shard.samples:
        raise BadSample("corrupt_shard", f"the table has {len(rows)} samples, the index {shard.samples}")
    if (at := place[0] + place[1] - rows.nbytes) != shard.table:
        raise BadSample("corrupt_shard", f"the table's rows are at byte {at}, expected {shard.table}")
    return rows


def _unlisted(places: Mapping[str, Place], rows: np.ndarray, members: tuple[str, ...]) -> list[str]:
    """Return a line for each member of the tar that is not in the table."""
    known = {
        f"{row['key'].decode('ascii', errors='replace')}.{name}"
        for row in rows
        for name, size in zip(members, row["size"], strict=True)
        if size >= 0
    }
    return [f"member {name!r} is not in the table" for name in places if name not in known]


def check_sample(index: Index, bucket: tuple[int, int], members: Mapping[str, bytes]) -> list[str]:
    """Return the problems of a sample's members: missing or unexpected members, dtypes, shapes and values."""
    wrong: list[str] = []
    expected = _expected(index, bucket)
    classes = {"cls"} if index.classes else set()
    missing = [name for name in (*expected, *classes) if name not in members]
    wrong += [f"has no {name}" for name in missing]
    wrong += [
        f"has {name}, which is not expected from the index"
        for name in members
        if name not in {*expected, *classes, "txt", "json"}
    ]
    arrays = {}
    for name in expected:
        if name not in members:
            continue
        try:
            arrays[name] = _array(members[name], name, *expected[name])
        except BadSample as error:
            wrong.append(str(error))
    if "std.npy" in arrays and (arrays["std.npy"] < 0).any():
        wrong.append("std.npy has negative values")
    if "captions.npy" in arrays:
        wrong += _check_captions(arrays, index.text["tokens"])
    if classes and "cls" in members:
        try:
            class_number(members, "", index.classes)
        except BadSample as error:
            wrong.append(str(error).strip())
    return wrong


def _expected(index: Index, bucket: tuple[int, int]) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Return the dtype and shape of each array that a sample must have. None stands for any size."""
    latent = (index.channels, *bucket)
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = {"latent.npy": ("float16", latent)}
    if index.codec["kind"] != "pixels":
        expected["std.npy"] = ("float16", latent)
    if index.text:
        expected |= {"ids.npy": ("int32", (None,)), "captions.npy": ("float64", (None, 2))}
        if index.text["features"]:
            expected["text.npy"] = ("float16", (None, index.text["dim"]))
    if index.features:
        tokens = bucket[0] * bucket[1] // index.features["patch"] ** 2
        expected["features.npy"] = ("float16", (tokens, index.features["dim"]))
    return expected


def _array(data: bytes, name: str, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """Parse an array. Raise BadSample if its dtype, shape or values are invalid."""
    array = parse_array(data, name)
    if array.dtype != dtype:
        raise BadSample("wrong_shape", f"{name} has dtype {array.dtype}, expected {dtype}")
    sizes = zip(array.shape, shape, strict=False)
    if array.ndim != len(shape) or any(expected not in (None, size) for size, expected in sizes):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise BadSample("wrong_shape", f"{name} has shape {array.shape}, expected ({wanted})")
    if not np.isfinite(array).all():
        raise BadSample("not_finite", f"{name} has NaN or infinite values")
    return array


def _check_captions(arrays: Mapping[str, Any], limit: int) -> Iterator[str]:
    tokens, weights = arrays["captions.npy"].T
    if not len(tokens):
        yield "captions.npy has no captions"
    if (tokens < 1).any() or (tokens > limit).any() or (tokens % 1 != 0).any():
        yield f"captions.npy has captions with {tokens.min():g} to {tokens.max():g} tokens, expected 1 to {limit}"
    if (weights <= 0).any():
        yield f"captions.npy has a weight of {weights.min():g}, expected above 0"
    for name in ("ids.npy", "text.npy"):
        if name in arrays and len(arrays[name]) != tokens.sum():
            yield f"{name} has {len(arrays[name])} tokens, but captions.npy has {tokens.sum():g}"
