"""How long saving holds training: beside it, and when training waits for it; in turn, in one process.

    python benchmarks/save.py                    # 0.18B parameters, 2.9 GB a checkpoint, about 3 minutes
    python benchmarks/save.py --folder /mnt/x    # on another disk

Held is what training waits: for the copy to the CPU's memory and for the commit. While a copy is written, steps may
take longer than others, since hashing and writing take a core; that is told beside it.
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
from megatron_dit.checkpoint.save import Saver, save
from megatron_dit.config import Config, load_config
from megatron_dit.engine import Engine
from megatron_dit.parallel.topology import build_topology, connect
from megatron_dit.progress import ProgressBar
from megatron_dit.trainer import use_threads

CONFIG = Path(__file__).parents[1] / "configs/mmdit/proxy.yaml"


def steps_while(engine: Engine, config: Config, saver: Saver) -> list[float]:
    """Seconds of the steps made until the writer is done."""
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
    parser.add_argument("--heads", type=int, default=8, help="of 64 dimensions each")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (a temporary folder)")
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    overrides = [f"model.heads={parsed.heads}", "model.sample_size=16", "train.global_batch=1", "train.micro_batch=1"]
    config = load_config(CONFIG, overrides)
    connect()
    use_threads(config)
    engine = Engine(config, build_topology(config))
    engine.initialise()
    saver, size, held, waited, beside = Saver(engine), 0, [], [], []
    with tempfile.TemporaryDirectory(dir=parsed.folder) as scratch, ProgressBar("save", parsed.turns + 1) as bar:
        folder = Path(scratch)
        for _ in range(parsed.turns + 1):  # the first makes the memory that is kept
            alone = [step(engine, config) for _ in range(3)]
            started = time.monotonic()
            saver.begin(folder)
            begun = time.monotonic() - started
            during = steps_while(engine, config, saver)
            started = time.monotonic()
            path = saver.commit()
            held.append(begun + time.monotonic() - started)
            beside.append((len(during), sum(during) - len(during) * statistics.median(alone)))
            size = sum(file.stat().st_size for file in path.iterdir())
            shutil.rmtree(path)
            started = time.monotonic()
            shutil.rmtree(save(engine, folder))
            waited.append(time.monotonic() - started)
            bar.advance(f"held {held[-1]:.2f} s, waited {waited[-1]:.2f} s")
    ratios = [one / other for one, other in zip(held[1:], waited[1:], strict=True)]
    figures = {
        "bytes": size,
        "held": statistics.median(held[1:]),
        "held by the first": held[0],
        "waited": statistics.median(waited[1:]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "steps beside": statistics.median(count for count, _ in beside[1:]),
        "longer by": statistics.median(extra for _, extra in beside[1:]),
    }
    table = Table(title=f"saving {size / 1e9:.2f} GB, medians of {parsed.turns} turns", show_header=False)
    table.add_row("training waits for a save", f"{figures['waited']:.2f} s")
    table.add_row("a save beside training holds it", f"{figures['held']:.2f} s (the first {held[0]:.2f} s)")
    table.add_row("ratio", f"{100 * figures['ratio']:.1f}% ({', '.join(f'{100 * x:.1f}' for x in sorted(ratios))})")
    table.add_row("steps meanwhile", f"{figures['steps beside']:.0f}, together {figures['longer by']:+.2f} s longer")
    Console().print(table)
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
