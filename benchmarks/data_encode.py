"""Compare the throughput of `data_prep encode` with that of a plain loop over the same encoder calls.

    python benchmarks/data_encode.py [--rounds N] [--json FILE]      # 3 minutes on two cores

Both read the same JPEGs of 320 x 256 pixels, resize and crop them to 64 x 64, run a randomly initialized small
AutoencoderKL and T5 in batches of 32, and write a tar. They run alternately, each in a process of its own. The plain
loop runs these stages sequentially, without any checks. It computes with one thread, like a worker of `encode`, which
uses one thread so that a shard's bytes do not depend on the number of cores. A second comparison uses all cores: as
threads of the plain loop, and as workers of `encode --procs`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data_prep.tiny_t5 import build_tiny_t5

IMAGES, BATCH, SIDE, TOKENS = 1024, 32, 64, 24


def prepare(folder: Path) -> None:
    """Write the images and the encoders to ``folder``."""
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number in range(IMAGES):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
            jpeg = io.BytesIO()
            coarse.resize((320, 256), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=90)
            caption = " ".join(f"word{rng.integers(50)}" for _ in range(12)).encode()
            for name, data in ((f"{number:06d}.jpg", jpeg.getvalue()), (f"{number:06d}.txt", caption)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64, 64), "norm_num_groups": 16, "layers_per_block": 1, "sample_size": SIDE}
    AutoencoderKL(
        **sizes, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3
    ).save_pretrained(folder / "vae")
    build_tiny_t5(folder / "t5", [f"word{i}" for i in range(50)], seed=0, d_model=256, layers=4, max_tokens=TOKENS)


def plain_loop(folder: Path, threads: int) -> None:
    """Read, resize, encode and write the images sequentially."""
    from transformers import AutoTokenizer, T5EncoderModel

    torch.set_num_threads(threads)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    t5, tokenizer = T5EncoderModel.from_pretrained(folder / "t5").eval(), AutoTokenizer.from_pretrained(folder / "t5")

    def fit(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        scale = SIDE / min(image.size)
        size = [max(SIDE, round(side * scale)) for side in image.size]
        left, top = ((side - SIDE) // 2 for side in size)
        resized = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        return np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)))

    def members(source: tarfile.TarFile, first: int) -> list[tuple[bytes, str]]:
        names = [f"{number:06d}" for number in range(first, first + BATCH)]
        read = {end: [source.extractfile(f"{name}.{end}").read() for name in names] for end in ("jpg", "txt")}  # pyright: ignore
        return [(jpeg, text.decode()) for jpeg, text in zip(read["jpg"], read["txt"], strict=True)]

    with tarfile.open(folder / "images.tar") as source, tarfile.open(folder / "plain.tar", "w") as out:
        for first in range(0, IMAGES, BATCH):
            group = members(source, first)
            pixels = torch.from_numpy(np.stack([fit(jpeg) for jpeg, _ in group])).permute(0, 3, 1, 2)
            with torch.no_grad():
                latent = vae.encode(pixels.float() / 127.5 - 1).latent_dist
                tokens = tokenizer([text for _, text in group], padding=True, return_tensors="pt")
                features = t5(**tokens).last_hidden_state
            lengths = tokens["attention_mask"].sum(1).tolist()
            for row, length in enumerate(lengths):
                arrays = (latent.mean[row], latent.std[row], features[row, :length])
                for name, array in zip(("latent", "std", "text"), arrays, strict=True):
                    data = io.BytesIO()
                    np.save(data, array.half().numpy())
                    info = tarfile.TarInfo(f"{first + row:06d}.{name}.npy")
                    info.size = data.tell()
                    data.seek(0)
                    out.addfile(info, data)


def seconds(command: list[str]) -> float:
    """Return the seconds that a command takes, including start-up and imports."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    cores = os.cpu_count() or 1
    encode = ["-m", "data_prep", "encode", str(folder / "images.tar")]
    options = ["--vae", str(folder / "vae"), "--text-encoder", str(folder / "t5"), "--tokens", str(TOKENS)]
    options += ["--size", str(SIDE), "--batch", str(BATCH), "--per-shard", "256"]
    for number in range(rounds):
        commands = {
            "plain": [__file__, "--plain", str(folder), "1"],
            "encode": [*encode, str(folder / f"one{number}"), *options],
            "plain, all cores": [__file__, "--plain", str(folder), str(cores)],
            "encode, all cores": [*encode, str(folder / f"all{number}"), *options, "--procs", str(cores)],
        }
        for name, command in commands.items():
            times.setdefault(name, []).append(seconds([sys.executable, *command]))
            print(f"{name}: {times[name][-1]:.1f} s", flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each command (default: 3)")
    parser.add_argument("--json", type=Path, help="file to which the metrics are written")
    parser.add_argument("--plain", nargs=2, metavar=("FOLDER", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        plain_loop(Path(arguments.plain[0]), int(arguments.plain[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        times = measure(Path(folder), arguments.rounds)
    pairs = {"one worker": ("plain", "encode"), "all cores": ("plain, all cores", "encode, all cores")}
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[plain], times[ours], strict=True))
        for name, (plain, ours) in pairs.items()
    }
    for name, ratio in ratios.items():
        print(f"{name}: the throughput of encode is {ratio:.2f} times that of the plain loop")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": times, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
