"""Measure how long saving a checkpoint blocks training: in the background, and if training waits for the save.

    python benchmarks/save.py                    # 0.18B parameters, 2.9 GB per checkpoint, about 3 minutes
    python benchmarks/save.py --folder /mnt/x    # on another disk

The two kinds of save alternate in one process. A background save blocks training for the copy to CPU memory and for
the commit. While the copy is being written, steps may be slower because hashing and writing occupy a core; this extra
time is reported separately.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dit.bench.measure import random_batch
from megatron_dit.checkpoint.writer import CheckpointWriter, save
from megatron_dit.config import Config, load_config
from megatron_dit.parallel.startup import start_up
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.training.engine import Engine

CONFIG = Path(__file__).parents[1] / "configs/mmdit/proxy.yaml"


def steps_while(engine: Engine, config: Config, saver: CheckpointWriter) -> list[float]:
    """Train until the writer is done and return the seconds of each step."""
    seconds = []
    while saver.writing:
        seconds.append(step(engine, config))
    return seconds


def step(engine: Engine, config: Config) -> float:
    started = time.monotonic()
    engine.train_step(random_batch(config, 1))
    return time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=8, help="heads of size 64 (8: 0.18B parameters)")
    parser.add_argument("--turns", type=int, default=5, help="number of measurements (default: 5)")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file to which the metrics are written")
    parsed = parser.parse_args()
    overrides = [f"model.heads={parsed.heads}", "model.sample_size=16", "train.global_batch=1", "train.micro_batch=1"]
    config = load_config(CONFIG, overrides)
    engine = Engine(config, start_up(config))
    engine.initialize()
    saver, size, held, waited, overlapped = CheckpointWriter(engine), 0, [], [], []
    with tempfile.TemporaryDirectory(dir=parsed.folder) as scratch, ProgressBar("save", parsed.turns + 1) as bar:
        folder = Path(scratch)
        for _ in range(parsed.turns + 1):  # the first one allocates the buffers that later saves reuse
            alone = [step(engine, config) for _ in range(3)]
            started = time.monotonic()
            saver.begin(folder)
            begun = time.monotonic() - started
            during = steps_while(engine, config, saver)
            started = time.monotonic()
            path = saver.commit()
            held.append(begun + time.monotonic() - started)
            overlapped.append((len(during), sum(during) - len(during) * statistics.median(alone)))
            size = sum(file.stat().st_size for file in path.iterdir())
            shutil.rmtree(path)
            started = time.monotonic()
            shutil.rmtree(save(engine, folder))
            waited.append(time.monotonic() - started)
            bar.advance(f"background {held[-1]:.2f} s, blocking {waited[-1]:.2f} s")
    ratios = [one / other for one, other in zip(held[1:], waited[1:], strict=True)]
    metrics = {
        "bytes": size,
        "held": statistics.median(held[1:]),
        "held by the first": held[0],
        "waited": statistics.median(waited[1:]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "steps during a save": statistics.median(count for count, _ in overlapped[1:]),
        "seconds longer": statistics.median(extra for _, extra in overlapped[1:]),
    }
    title = f"time that saving {size / 1e9:.2f} GB blocks training (medians of {parsed.turns} saves)"
    table = Table(title=title, show_header=False)
    table.add_row("blocking save", f"{metrics['waited']:.2f} s")
    table.add_row("background save", f"{metrics['held']:.2f} s (first save {held[0]:.2f} s)")
    table.add_row("ratio", f"{100 * metrics['ratio']:.1f}% ({', '.join(f'{100 * x:.1f}' for x in sorted(ratios))})")
    table.add_row(
        "steps during a background save",
        f"{metrics['steps during a save']:.0f}, in total {metrics['seconds longer']:+.2f} s longer",
    )
    Console().print(table)
    if parsed.json:
        parsed.json.write_text(json.dumps(metrics, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
