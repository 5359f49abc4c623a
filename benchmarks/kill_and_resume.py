"""Kill and resume a run repeatedly, and compare its final checkpoint with that of an uninterrupted run.

    python benchmarks/kill_and_resume.py configs/quickstart.yaml $SMALL --procs 2 --signal KILL
    python benchmarks/kill_and_resume.py configs/quickstart.yaml $SMALL --procs 2 --signal TERM

Here SMALL is "model.depth=2 model.heads=2 mup.base_heads=2 train.global_batch=16 train.micro_batch=8
parallel.zero_stage=3 train.steps=1500". Each command takes ten minutes on two cores.

The moment of each signal is random: while the ranks start, some time after a step, or while a checkpoint is written.
So is its target: one rank, or the launcher and thereby all ranks. The exit status is 0 if every weight, moment and
average is bit-identical and each step is logged exactly once.
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

from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.checkpoint.reader import CheckpointReader
from megatron_dit.runtime.launcher import die_with_parent
from megatron_dit.runtime.progress import ProgressBar

MOMENTS = ("start", "step", "save", "save")
PATIENCE = 120.0  # timeout in seconds


def command_of(config: str, overrides: Sequence[str], run: Path, procs: int) -> list[str]:
    often = ["checkpoint.every=2", "train.log_every=1"]
    values = [*often, *overrides, f"run_dir={run}"]
    return [sys.executable, "-m", "megatron_dit", "train", config, *values, "--procs", str(procs)]


def undisturbed(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent)


def kill_repeatedly(
    command: Sequence[str], run: Path, times: int, number: int, draw: random.Random, longest: float
) -> Counter[str]:
    """Start the run and kill it at a random moment, ``times`` times; then let it finish.

    Signals after a step are sent at most ``longest`` seconds after it. Return how often each kind of interruption
    occurred.
    """
    counts: Counter[str] = Counter()
    with ProgressBar("kill and resume", times) as bar:
        for _ in range(times):
            with tempfile.TemporaryFile("w+") as output:
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent, text=True
                )
                moment, one = draw.choice(MOMENTS), draw.random() < 0.5
                _wait(process, run, moment, draw, longest)
                output.seek(0)
                assert process.poll() is None, f"the run ended before it was killed {times} times:\n{output.read()}"
                _send(process, number, draw if one else None)
                process.wait(PATIENCE)
            incomplete = number == signal.SIGKILL and any(run.glob("checkpoints/*.part"))
            counts[f"{moment}, {'one rank' if one else 'all'}"] += 1
            counts["left an incomplete checkpoint"] += incomplete
            bar.advance(f"{moment}, step {_step(run)}{', incomplete checkpoint' if incomplete else ''}")
    undisturbed(command)
    return counts


def _wait(process: subprocess.Popen[str], run: Path, moment: str, draw: random.Random, longest: float) -> None:
    deadline, before = time.monotonic() + PATIENCE, _step(run)
    latest = time.monotonic() + draw.uniform(0, 10) if moment == "start" else deadline
    while process.poll() is None and _step(run) in (0, before) and time.monotonic() < latest:
        time.sleep(0.001)
    assert time.monotonic() < deadline, f"no step within {PATIENCE:g} s"
    if moment != "start":
        time.sleep(draw.uniform(0, longest))
    while moment == "save" and process.poll() is None and not any(run.glob("checkpoints/*.part")):
        assert time.monotonic() < deadline, f"no checkpoint was started within {PATIENCE:g} s"
    if moment == "save":
        time.sleep(draw.uniform(0, 0.01))


def _send(process: subprocess.Popen[str], number: int, draw: random.Random | None) -> None:
    """Send the signal to the launcher or, if ``draw`` is given, to a random rank. Ranks end with their launcher."""
    target = process.pid
    if draw is not None:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        target = int(draw.choice(ranks)) if ranks else target
    with contextlib.suppress(ProcessLookupError):  # the process has just ended
        os.kill(target, number)


def _step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def differences(one: CheckpointReader, other: CheckpointReader) -> list[str]:
    """Return the names of the tensors that are not bit-identical in both checkpoints."""
    pairs = [(key, name) for key in one.states for name in one.manifest["params"]]
    return [f"{key}/{name}" for key, name in pairs if not one.full(key, name).equal(other.full(key, name))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config of the run")
    parser.add_argument("overrides", nargs="*", help="overrides of the config")
    parser.add_argument("--procs", type=int, default=2, help="number of ranks (default: 2)")
    parser.add_argument("--times", type=int, default=30, help="number of kills (default: 30)")
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL", help="signal to send (default: KILL)")
    parser.add_argument(
        "--longest", type=float, default=3.0, help="maximum seconds from a run's first step to the signal (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments and targets (default: 0)")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        reference, killed = Path(scratch) / "reference", Path(scratch) / "killed"
        commands = [command_of(parsed.config, parsed.overrides, run, parsed.procs) for run in (reference, killed)]
        started = time.monotonic()
        undisturbed(commands[0])
        print(f"uninterrupted run: {time.monotonic() - started:.0f} s")
        number = signal.Signals[f"SIG{parsed.signal}"]
        counts = kill_repeatedly(commands[1], killed, parsed.times, number, random.Random(parsed.seed), parsed.longest)
        one, other = open_checkpoint(reference), open_checkpoint(killed)
        different = differences(one, other)
        steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
        print(*(f"{what}: {count}" for what, count in sorted(counts.items())), sep="\n")
        print(f"step {one.step} and {other.step}; {len(different)} of {len(one.states)} x "
              f"{len(one.manifest['params'])} tensors differ; {len(steps)} steps logged")  # fmt: skip
    return 0 if not different and one.step == other.step and steps == list(range(1, one.step + 1)) else 1


if __name__ == "__main__":
    sys.exit(main())
