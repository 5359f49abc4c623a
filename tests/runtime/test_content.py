"""Formats are detected from the bytes of files that the libraries themselves wrote, regardless of file names."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_dit.runtime.content import content_of, mismatch

BYTES = {
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "html": b"\xef\xbb\xbf\n <!DOCTYPE html>\n<html></html>",
    "xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "json": b'\n{"a": 1}',
    "text": "not found: é".encode(),
    "parquet": b"PAR1\x15\x04PAR1",
    "empty": b"",
    "unknown": bytes(range(256)),
}


def write(path, name):
    """Write a file of format ``name``."""
    if name in BYTES:
        path.write_bytes(BYTES[name])
    elif name == "safetensors":
        save_file({"a": torch.zeros(3)}, path)
    elif name == "torch":
        torch.save({"a": torch.zeros(3)}, path)
    elif name == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif name == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif name == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "a.py")
    elif name == "gzip":
        path.write_bytes(gzip.compress(b"a"))
    elif name == "numpy":
        np.save(path.open("wb"), np.zeros(2))
    else:
        Image.new("RGB", (4, 4)).save(path, format=name)


@pytest.mark.parametrize(
    "name", [*BYTES, "safetensors", "torch", "pickle", "zip", "tar", "gzip", "numpy", "png", "jpeg"]
)
def test_format_is_detected_from_the_bytes(tmp_path, name):
    path = tmp_path / "model.bin"
    write(path, name)
    assert content_of(path).name == name


@pytest.mark.parametrize("name", ["safetensors", "torch"])
def test_truncated_files_are_detected(tmp_path, name):
    path = tmp_path / "model"
    write(path, name)
    path.write_bytes(path.read_bytes()[:-4])
    assert content_of(path).name == "truncated"
    assert "truncated" in (message := mismatch(path, "safetensors") or "")
    assert message.endswith("not a safetensors file: download or export it again")


def test_safetensors_with_damaged_header_is_unknown(tmp_path):
    for header in (b"{]", json.dumps({"a": 1}).encode(), b"[" * 5000):
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert content_of(path).name == "unknown"


def test_message_about_a_wrong_extension_suggests_renaming(tmp_path):
    write(tmp_path / "model.pt", "safetensors")
    message = mismatch(tmp_path / "model.pt", "torch") or ""
    assert "model.pt is a safetensors file, not a file written by torch.save: rename it to model.safetensors" in message
    assert mismatch(tmp_path / "model.pt", "safetensors", "torch") is None
