"""Measure the memory and throughput of `megatron-dit evaluate` on a folder of images; compare with torch-fidelity.

    python -m benchmarks.evaluate_folder                   # 10,000 images of 256 x 256, 0.7 GB of disk
    python -m benchmarks.evaluate_folder --compare         # in addition, torch-fidelity on 2,000 of them
    python -m benchmarks.evaluate_folder --folder IMAGES   # images that exist

The images are random, but smooth as photographs are. InceptionV3 has random weights in torch-fidelity's file format.
The metrics are FID, sFID and the inception score, against the statistics of another folder. Memory is this process's
resident memory, sampled every half second. It must not grow with the number of images: only batches and sums are kept
for the first two metrics, and 1,008 logits of each image (4 kB) for the third.

With --compare, both evaluate and torch-fidelity's calculate_metrics compute FID and the inception score with the same
weights, batch size and number of threads; torch-fidelity decodes images in up to four worker processes, and the
reference's statistics are in its cache. The two alternate in one process, after each has evaluated a few images. Their
FIDs must agree. The times include the Fréchet distance, about 20 s on two cores for any number of images, so that
comparisons on less than about 1,000 images mostly compare that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from megatron_dit.evaluation.evaluate import evaluate, write_reference_of
from megatron_dit.evaluation.images import ImageFolder, open_images
from megatron_dit.evaluation.protocol import Protocol, WeightsConfig
from megatron_dit.runtime.progress import ProgressBar
from tests.helpers.feature_models import save_inception

RESULTS = Path(__file__).parent / "results"
METRICS, COMPARED = ("fid", "sfid", "inception_score"), ("fid", "inception_score")
SIDE, COARSE = 256, 12
WARM_UP = 64  # images that each program evaluates before it is timed
SHOWN = 10  # rows of the table of memory


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write ``count`` PNGs: smooth random colors with weak noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with ProgressBar("write images", count) as bar:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (COARSE, COARSE, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = smooth + rng.integers(-2, 3, smooth.shape, dtype=np.int16)
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.save(folder / f"{number:06d}.png", compress_level=1)
            bar.advance()


def link_images(images: Path, folder: Path, count: int) -> Path:
    """Return ``folder`` with links to the first ``count`` images of another."""
    found = open_images(images)
    assert isinstance(found, ImageFolder), images
    folder.mkdir()
    for number, name in enumerate(found.files[:count]):
        (folder / f"{number:06d}{Path(name).suffix}").symlink_to((images / name).resolve())
    return folder


@contextmanager
def resident_memory(seconds: float = 0.5) -> Iterator[list[tuple[float, float]]]:
    """Yield a list of (seconds, MiB) that grows until the end of the context."""
    process, rows, stop = psutil.Process(os.getpid()), [], threading.Event()
    start = time.monotonic()

    def sample() -> None:
        while not stop.wait(seconds if rows else 0):
            rows.append((time.monotonic() - start, process.memory_info().rss / 2**20))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield rows
    finally:
        stop.set()
        thread.join()


def protocol_of(images: int, weights: str, reference: Path, metrics: Sequence[str] = METRICS) -> Protocol:
    return Protocol(
        name="benchmark",
        metrics=list(metrics),
        images=images,
        labels="equal",
        steps=1,
        guidance=1.0,
        reference=str(reference),
        weights=WeightsConfig(inception=weights),
    )


def ours(folder: Path, weights: str, reference: Path, batch: int, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    images = open_images(folder)
    return evaluate(images, protocol_of(len(images), weights, reference, metrics), str(folder), batch).metrics


def theirs(folder: Path, weights: str, reference: Path, cache: Path, batch: int) -> dict[str, float]:
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=str(folder), input2=str(reference), input2_cache_name="reference", cache_root=str(cache),
        isc=True, fid=True, batch_size=batch, cuda=torch.cuda.is_available(), verbose=False,
        feature_extractor_weights_path=weights,
    )  # fmt: skip
    return {"fid": found["frechet_inception_distance"], "inception_score": found["inception_score_mean"]}


def measure(folder: Path, weights: str, reference: Path, batch: int) -> dict[str, Any]:
    start = time.perf_counter()
    with resident_memory() as rows:
        metrics = ours(folder, weights, reference, batch)
    seconds, count = time.perf_counter() - start, len(open_images(folder))
    return {"images": count, "seconds": seconds, "images_per_second": count / seconds, "metrics": metrics,
            "peak_mib": max(mib for _, mib in rows), "resident": rows}  # fmt: skip


def compare(scratch: Path, images: Path, count: int, rounds: int, weights: str, batch: int) -> dict[str, Any]:
    """Return images/s of the two, alternating, and their metrics."""
    few, some = link_images(images, scratch / "few", WARM_UP), link_images(images, scratch / "some", count)
    statistics_of, real = scratch / "reference.npz", scratch / "reference"
    calls = {
        "torch-fidelity": lambda folder: theirs(folder, weights, real, scratch / "cache", batch),
        "megatron_dit": lambda folder: ours(folder, weights, statistics_of, batch, COMPARED),
    }
    rates: dict[str, list[float]] = {name: [] for name in calls}
    metrics: dict[str, dict[str, float]] = {}
    number = len(open_images(some))
    for call in calls.values():
        call(few)
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            metrics[name] = call(some)
            rates[name].append(number / (time.perf_counter() - start))
            print(f"{name}: {rates[name][-1]:.1f} images/s, FID {metrics[name]['fid']:.6g}", flush=True)
    ratios = [a / b for a, b in zip(rates["megatron_dit"], rates["torch-fidelity"], strict=True)]
    return {"images": number, "images_per_second": rates, "ratios": ratios, "ratio": statistics.median(ratios),
            "metrics": metrics}  # fmt: skip


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def markdown(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    memory = results["memory"]
    lines = [
        "# Memory and throughput of evaluate",
        "",
        f"{results['date']}, {results['processor'] or results['device']}, threads: {results['threads']}, {versions}.",
        "",
        f"`{results['command']}`",
        "",
        f"FID, sFID and inception score of {memory['images']:,} images of {SIDE} x {SIDE} pixels, batch size "
        f"{results['batch']}: {memory['images_per_second']:.1f} images/s ({memory['seconds']:.0f} s). Resident memory, "
        f"whose peak was {memory['peak_mib']:,.0f} MiB:",
        "",
        "| seconds | MiB |",
        "|---|---|",
    ]
    rows = memory["resident"]
    places = sorted({round(i * (len(rows) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    lines += [f"| {rows[place][0]:.0f} | {rows[place][1]:,.0f} |" for place in places]
    found = results.get("comparison")
    if found:
        rates = found["images_per_second"]
        lines += [
            "",
            f"## FID and inception score, compared with torch-fidelity on {found['images']:,} images",
            "",
            "| images/s of torch-fidelity | images/s of megatron_dit | ratio |",
            "|---|---|---|",
            *(
                f"| {a:.1f} | {b:.1f} | {ratio:.2f} |"
                for a, b, ratio in zip(rates["torch-fidelity"], rates["megatron_dit"], found["ratios"], strict=True)
            ),
            "",
            f"The median ratio is {found['ratio']:.2f}. FID is {found['metrics']['torch-fidelity']['fid']:.6g} by "
            f"torch-fidelity and {found['metrics']['megatron_dit']['fid']:.6g} by megatron_dit.",
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of images (default: random images in a temporary folder)")
    parser.add_argument("--images", type=int, default=10_000, help="number of random images (default: 10000)")
    parser.add_argument("--reference-images", type=int, default=500, help="images of the reference (default: 500)")
    parser.add_argument("--batch", type=int, default=32, help="batch size (default: 32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of threads (default: all cores)")
    parser.add_argument("--compare", action="store_true", help="compare with torch-fidelity")
    parser.add_argument("--compared-images", type=int, default=2000, help="images to compare on (default: 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of the comparison (default: 3)")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files (default: the system's)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for evaluate.md and evaluate.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    cuda = torch.cuda.is_available()
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": shlex.join(
            ["python", "-m", "benchmarks.evaluate_folder", *(sys.argv[1:] if argv is None else argv)]
        ),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": arguments.threads,
        "versions": {name: version(name) for name in ("torch", "torch-fidelity", "numpy", "pillow")},
        "batch": arguments.batch,
    }
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        scratch = Path(name)
        weights, reference = save_inception(scratch / "inception.pth"), scratch / "reference"
        write_images(reference, arguments.reference_images, seed=1)
        folder = arguments.folder or scratch / "images"
        if arguments.folder is None:
            write_images(folder, arguments.images, seed=0)
        protocol = protocol_of(1, weights, scratch / "reference.npz")
        write_reference_of(open_images(reference), protocol, scratch / "reference.npz", arguments.batch)
        results["memory"] = measure(folder, weights, scratch / "reference.npz", arguments.batch)
        if arguments.compare:
            options = (arguments.compared_images, arguments.rounds, weights, arguments.batch)
            results["comparison"] = compare(scratch, folder, *options)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "evaluate.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "evaluate.md").write_text(markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
