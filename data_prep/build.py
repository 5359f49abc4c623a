"""Pictures and captions through the codec and the text encoder into shards."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from webdataset.compat import WebDataset

from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data import scenes
from megatron_dit.data.codec import open_codec
from megatron_dit.data.shards import INDEX, SCENES, Index, class_number, write_index, write_shard
from megatron_dit.data.text import TextEncoder
from megatron_dit.data.vision import VisionEncoder
from megatron_dit.errors import UserError
from megatron_dit.parallel.cpu import device
from megatron_dit.progress import ProgressBar

BATCH = 256


@dataclass(frozen=True)
class Example:
    key: str
    picture: np.ndarray  # (H, W, 3) uint8
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)
    label: int | None = None


@dataclass(frozen=True)
class Vision:
    """Features for REPA: an encoder's folder or hub name, and the side of a token in latent pixels."""

    encoder: str
    patch: int


def demo(folder: Path, pictures: int, seed: int, per_shard: int = 2500, vision: Vision | None = None) -> Index:
    """The embedded dataset: ``pictures`` drawn scenes on 16 x 16 pixels, none of a held-out combination."""
    builder = _start(folder)
    build_tiny_t5(builder / "text_encoder", [" ".join(scenes.vocabulary())], seed=seed)

    def draw() -> Iterator[Example]:
        for i in range(pictures):
            rng = np.random.Generator(np.random.Philox(key=[seed, i]))
            scene = scenes.draw_scene(rng)
            label = scenes.kind_index(scene.objects[0].colour, scene.objects[0].shape)
            yield Example(f"{i:09d}", scenes.render(scene, rng), scene.caption, label=label)

    codec = {"kind": "pixels"}
    named = {
        "text": "text_encoder",
        "tokens": 24,
        "codec": codec,
        "side": scenes.SIDE,
        "source": SCENES,
        "classes": scenes.KINDS,
    }
    return _build(builder, folder, draw(), pictures, **named, per_shard=per_shard, vision=vision)


def encode(
    source: str,
    folder: Path,
    size: int,
    text_encoder: str,
    vae: str,
    tokens: int,
    vision: Vision | None = None,
    classes: int = 0,
) -> Index:
    """Webdataset shards of pictures and ``.txt`` captions (img2dataset's layout), resized and centre-cropped.

    ``text_encoder`` "tiny" builds a random one from the captions' words; ``vae`` "pixels" keeps the pixels.
    Transparent pictures are laid on white. With ``classes``, a picture has its class number in ``.cls`` and may lack a
    caption.
    """
    paths = sorted(Path().glob(source) if not source.startswith("/") else Path("/").glob(source[1:]))
    if not paths:
        raise UserError(f"source {source!r} names no files: give a glob of tars, such as 'photos/*.tar'")
    builder = _start(folder)
    found = [(caption, label) for _, _, caption, _, label in _read(paths, classes)]
    if not found:
        beside = "KEY.cls with a class number" if classes else "KEY.txt"
        raise UserError(f"source {source!r} holds no picture to use: expected KEY.jpg or .png beside {beside}")
    captions = [caption for caption, _ in found]
    text = text_encoder
    if text_encoder == "tiny":
        text = "text_encoder"
        build_tiny_t5(builder / text, captions, seed=0, max_tokens=tokens)
    codec = {"kind": "pixels"} if vae == "pixels" else {"kind": "vae", "path": vae}
    examples = (
        Example(f"{i:09d}", _fit(picture, size), caption, {**meta, "source_key": key}, label)
        for i, (key, picture, caption, meta, label) in enumerate(_read(paths, classes))
    )
    named = {"text": text, "tokens": tokens, "codec": codec, "side": size, "source": source, "classes": classes}
    return _build(builder, folder, examples, len(captions), **named, vision=vision)


def _start(folder: Path) -> Path:
    """A fresh folder aside, which becomes ``folder`` when all is written."""
    if folder.exists():
        raise UserError(f"{folder} exists: give a new folder or delete it")
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def _build(
    aside: Path,
    folder: Path,
    examples: Iterable[Example],
    total: int,
    *,
    text: str,
    tokens: int,
    codec: dict[str, Any],
    side: int,
    source: str,
    classes: int = 0,
    per_shard: int = 2500,
    vision: Vision | None = None,
) -> Index:
    local = aside / text
    encoder = TextEncoder(str(local) if local.is_dir() else text, tokens, device())
    pictures = open_codec(codec, device())
    if side % pictures.scale:
        raise UserError(f"pictures of {side} pixels: the codec needs a multiple of {pictures.scale}")
    bucket = (side // pictures.scale, side // pictures.scale)
    shards = []
    eye = VisionEncoder(vision.encoder, device()) if vision else None
    if vision and bucket[0] % vision.patch:
        raise UserError(f"--patch {vision.patch}: latents of {bucket[0]} pixels need a divisor")

    def seen(batch: torch.Tensor) -> list[dict[str, Any]]:
        """The members that hold the vision encoder's features, one dict a picture."""
        if eye is None or vision is None:
            return [{}] * len(batch)
        side = bucket[0] // vision.patch
        return [{"features.npy": _npy(row)} for row in eye.features(batch, side, side).half().cpu().numpy()]

    def encoded(bar: ProgressBar, share: Iterator[Example]) -> Iterator[dict[str, Any]]:
        while group := list(itertools.islice(share, BATCH)):
            batch = torch.from_numpy(np.stack([example.picture for example in group])).permute(0, 3, 1, 2)
            latents = pictures.encode(batch).half().numpy()
            features = encoder.encode([example.caption for example in group])
            for example, latent, feature, vision_members in zip(group, latents, features, seen(batch), strict=True):
                label = {} if example.label is None else {"cls": str(example.label).encode()}
                yield {
                    **label,
                    **vision_members,
                    "__key__": example.key,
                    "latent.npy": _npy(latent),
                    "text.npy": _npy(feature.half().numpy()),
                    "txt": example.caption,
                    "json": json.dumps(example.meta).encode(),
                }
                bar.advance()

    with ProgressBar("encode", total) as bar:
        stream = iter(examples)
        for number in range(-(-total // per_shard)):
            share = itertools.islice(stream, per_shard)
            shards.append(write_shard(aside / f"{number:05d}.tar", encoded(bar, share), bucket))
    described = {"encoder": text, "dim": encoder.dim, "tokens": tokens}
    index = Index(
        folder=aside,
        shards=tuple(shards),
        channels=pictures.channels,
        text=described,
        codec=codec,
        source=source,
        classes=classes,
        features={"encoder": vision.encoder, "dim": eye.dim, "patch": vision.patch} if vision and eye else None,
    )
    write_index(index)
    aside.replace(folder)
    assert (folder / INDEX).is_file()
    return index


def _read(paths: list[Path], classes: int) -> Iterator[tuple[str, bytes, str, dict[str, Any], int | None]]:
    """(key, picture bytes, caption, json, class) of each captioned or classified picture; nothing is decoded.

    Raises UserError for a class number that is not below ``classes``.
    """
    for path in paths:
        for sample in WebDataset(str(path), shardshuffle=False, empty_check=False):
            picture = next((sample[kind] for kind in ("png", "jpg", "jpeg", "webp") if kind in sample), None)
            caption = sample.get("txt", b"").decode("utf-8", errors="replace").strip()
            label = (
                class_number(sample["cls"], classes, f"{sample['__key__']} of {path}")
                if classes and "cls" in sample
                else None
            )
            if picture is not None and (label is not None if classes else caption):
                yield sample["__key__"], picture, caption, json.loads(sample.get("json", b"{}")), label


def _fit(data: bytes, size: int) -> np.ndarray:
    """Decode, lay on white, resize the shorter side to ``size`` and crop the centre: (size, size, 3) uint8."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
