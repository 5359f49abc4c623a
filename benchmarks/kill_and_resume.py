"""Kill a run again and again, start it again each time, and compare its end with that of an undisturbed run.

    python benchmarks/kill_and_resume.py configs/quickstart.yaml $SMALL --procs 2 --signal KILL
    python benchmarks/kill_and_resume.py configs/quickstart.yaml $SMALL --procs 2 --signal TERM

where SMALL is "model.depth=2 model.heads=2 mup.base_heads=2 train.global_batch=16 train.micro_batch=8
parallel.zero_stage=3 train.steps=1500": ten minutes each on two cores.

Each time a moment is drawn: while the ranks start, some time after a step, or while a checkpoint is being written;
and who gets the signal: one rank, or the launcher and with it all. Exit status 0 if every weight, moment and average
is equal bit for bit and each step stands in the log once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_dit.checkpoint.format import CheckpointReader
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.launch import die_with_parent
from megatron_dit.progress import ProgressBar

MOMENTS = ("start", "step", "save", "save")
PATIENCE = 120.0  # seconds


def command_of(config: str, overrides: Sequence[str], run: Path, procs: int) -> list[str]:
    often = ["checkpoint.every=2", "train.log_every=1"]
    values = [*often, *overrides, f"run_dir={run}"]
    return [sys.executable, "-m", "megatron_dit", "train", config, *values, "--procs", str(procs)]


def undisturbed(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)


def torment(
    command: Sequence[str], run: Path, times: int, number: int, draw: random.Random, longest: float
) -> Counter[str]:
    """Start, send the signal at a random moment, ``times`` times; then let the run finish. Returns what was met.

    A moment after a step is at most ``longest`` seconds after it.
    """
    met: Counter[str] = Counter()
    with ProgressBar("torment", times) as bar:
        for _ in range(times):
            with tempfile.TemporaryFile("w+") as output:
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent, text=True
                )
                moment, one = draw.choice(MOMENTS), draw.random() < 0.5
                _wait(process, run, moment, draw, longest)
                output.seek(0)
                assert process.poll() is None, f"it ended before it was killed {times} times:\n{output.read()}"
                _send(process, number, draw if one else None)
                process.wait(PATIENCE)
            torn = number == signal.SIGKILL and any(run.glob("checkpoints/*.part"))
            met[f"{moment}, {'one rank' if one else 'all'}"] += 1
            met["with an unfinished checkpoint in the folder"] += torn
            bar.advance(f"{moment}, step {_step(run)}{', a checkpoint under way' if torn else ''}")
    undisturbed(command)
    return met


def _wait(process: subprocess.Popen[str], run: Path, moment: str, draw: random.Random, longest: float) -> None:
    deadline, before = time.monotonic() + PATIENCE, _step(run)
    latest = time.monotonic() + draw.uniform(0, 10) if moment == "start" else deadline
    while process.poll() is None and _step(run) in (0, before) and time.monotonic() < latest:
        time.sleep(0.001)
    assert time.monotonic() < deadline, "no step was made"
    if moment != "start":
        time.sleep(draw.uniform(0, longest))
    while moment == "save" and process.poll() is None and not any(run.glob("checkpoints/*.part")):
        assert time.monotonic() < deadline, "no checkpoint was begun"
    if moment == "save":
        time.sleep(draw.uniform(0, 0.01))


def _send(process: subprocess.Popen[str], number: int, draw: random.Random | None) -> None:
    """To the launcher, or to a rank that is drawn. The launcher's death is its ranks' too."""
    target = process.pid
    if draw is not None:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        target = int(draw.choice(ranks)) if ranks else target
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(target, number)


def _step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def differences(one: CheckpointReader, other: CheckpointReader) -> list[str]:
    """Names of states that are not equal bit for bit."""
    pairs = [(key, name) for key in one.states for name in one.manifest["params"]]
    return [f"{key}/{name}" for key, name in pairs if not one.full(key, name).equal(other.full(key, name))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--procs", type=int, default=2)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--longest", type=float, default=3.0, help="seconds from a run's first step to the signal")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        commands = [command_of(parsed.config, parsed.overrides, run, parsed.procs) for run in (whole, killed)]
        started = time.monotonic()
        undisturbed(commands[0])
        print(f"undisturbed: {time.monotonic() - started:.0f} s")
        number = signal.Signals[f"SIG{parsed.signal}"]
        met = torment(commands[1], killed, parsed.times, number, random.Random(parsed.seed), parsed.longest)
        one, other = open_checkpoint(whole), open_checkpoint(killed)
        different = differences(one, other)
        steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
        print(*(f"{what}: {count}" for what, count in sorted(met.items())), sep="\n")
        print(f"step {one.step} and {other.step}; {len(different)} of {len(one.states)} x "
              f"{len(one.manifest['params'])} tensors differ; {len(steps)} steps logged")  # fmt: skip
    return 0 if not different and one.step == other.step and steps == list(range(1, one.step + 1)) else 1


if __name__ == "__main__":
    sys.exit(main())
