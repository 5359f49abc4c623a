"""Write tars, and scan sources of images."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc

from data_prep.sources import Record, Rejected


def write_tar(path, members, **settings):
    """Write a tar of members, given by name, or as (name, bytes) pairs if a name occurs twice."""
    with tarfile.open(path, "w", **settings) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def scan(source):
    """Return the records and rejections of all units, checking that records survive JSON and can be read again."""
    found = []
    for unit in range(source.units):
        for item, data in source.scan(unit):
            found.append(item)
            if isinstance(item, Record):
                again = Record.from_dict(json.loads(json.dumps(item.as_dict())))
                assert again == item
                assert source.read(again) == data
            else:
                assert data is None
    return found


def scan_in_little_memory(source):
    tracemalloc.start()
    try:
        found = scan(source)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    return found


def reasons(found):
    return {item.name: item.reason for item in found if isinstance(item, Rejected)}


def kept(found):
    return {item.name: item for item in found if isinstance(item, Record)}


def header(name, size=0, kind=tarfile.REGTYPE, claim=None):
    """Return a tar header, with the size replaced by ``claim``, in base 256, if given."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    data = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if claim is not None:
        data[124:136] = (b"\xff" if claim < 0 else b"\x80") + claim.to_bytes(11, "big", signed=True)
        data[148:156] = b"        "
        data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)
