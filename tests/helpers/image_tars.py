"""Helpers that write small sources and read the encoded shards back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from webdataset.writer import TarWriter

from megatron_dit.data.index import read_index
from megatron_dit.data.tar import MEMBERS, ShardReader, parse_array


def noise(height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(image):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, samples):
    """Write a tar of samples, given as members by extension. Keys are consecutive numbers."""
    with TarWriter(str(path)) as writer:
        for number, members in enumerate(samples):
            writer.write({"__key__": f"{number:04d}", **members})
    return str(path)


COLORS, SHAPES = ("red", "green", "blue", "orange", "purple"), ("ellipse", "rectangle", "rounded_rectangle")


def write_img2dataset_tar(path, count):
    """Write a tar as img2dataset does: ``count`` RGB images of 64 x 64 pixels with a .txt and a .json; return captions.

    Keys have nine digits, and a sample's members are in alphabetical order.
    """
    captions = []
    with TarWriter(str(path)) as writer:
        for number in range(count):
            color, shape = COLORS[number % 5], SHAPES[number % 3]
            image = Image.new("RGB", (64, 64), "white")
            left, top = number % 30, number * 7 % 30
            getattr(ImageDraw.Draw(image), shape)((left, top, left + 30, top + 25), fill=color, outline="black")
            key, caption = f"{number:09d}", f"{color} {shape.replace('_', ' ')} number {number}"
            meta = {"key": key, "caption": caption, "width": 64, "height": 64}
            writer.write({"__key__": key, "json": json.dumps(meta), "png": png(image), "txt": caption})
            captions.append(caption)
    return captions


def read_samples(folder):
    """Return the index, and the parsed members (arrays, class label, text and dict) of each sample by key."""
    index = read_index(folder)
    samples = {}
    for shard in index.shards:
        reader = ShardReader(Path(index.path(shard.file)), shard, index.members)
        for number in range(shard.samples):
            key, members = reader.read(number, MEMBERS)
            assert key not in samples
            samples[key] = {name: _parse(name, data) for name, data in members.items()}
    return index, samples


def _parse(name, data):
    if name.endswith(".npy"):
        return parse_array(data, name)
    return {"cls": int, "txt": bytes.decode, "json": json.loads}[name](data)


def folder_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
