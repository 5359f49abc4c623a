"""Ends a job that hangs, and names the ranks for which the others wait.

A thread of each rank writes every few seconds to the store of the rendezvous what the rank does: the step, the phase,
and for how long. Rank 0 reads all of these. If no rank has changed its phase for ``launch.hang_seconds``, it asks all
ranks for their Python stacks, prints what each rank was doing, and all ranks end. This also works while a collective
waits in C++, and if a rank's process is stopped or its host is lost: its thread then no longer writes. If rank 0 is the
one that no longer answers, each of the others ends by itself.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from megatron_dit.parallel.failures import job_store
from megatron_dit.parallel.rendezvous import ranges
from megatron_dit.runtime.launcher import leave

T = TypeVar("T")
BEAT_SECONDS = 5.0  # at most, between two messages of a rank
FAREWELL_SECONDS = 3.0
STACK_SECONDS = 5.0  # that rank 0 waits for the stacks
SHOWN_STACKS = 4  # different stacks that are printed
STATUS = 1  # exit status of a job that hung


@dataclass(frozen=True)
class Beat:
    """What a rank does, in its own words."""

    count: int  # number of messages so far
    host: str
    step: int  # that the rank is in, counted from 1
    phase: str
    seconds: float  # since the phase began
    limited: bool  # whether the phase may not last longer than the limit


@dataclass(frozen=True)
class RankState:
    """The last message of a rank, and the seconds since rank 0 first saw it."""

    beat: Beat
    silent: float

    @property
    def idle(self) -> float:
        """Seconds since the rank's phase began."""
        return self.beat.seconds + self.silent

    def describe(self) -> str:
        return f"in step {self.beat.step}, {self.beat.phase}"


class Watchdog:
    """Context of a loop of steps, in which the job ends if no rank makes progress for ``limit`` seconds.

    ``limit`` None, or a job of one rank: no watchdog.
    """

    def __init__(self, limit: float | None, rank: int, world: int) -> None:
        self._limit, self._rank, self._world = limit or 0.0, rank, world
        self._interval = min(BEAT_SECONDS, self._limit / 10)
        self._main = threading.get_ident()
        self._now = (0, "starting", time.monotonic(), True)
        self._count = 0
        self._ended = threading.Event()
        store = job_store()
        self._store = None if limit is None or store is None else store.clone()
        if self._store is not None:
            self._store = dist.PrefixStore("watchdog", self._store)
        self._answered = time.monotonic()  # when the store answered last

    def doing(self, step: int, phase: str, *, limited: bool = True) -> None:
        """Record what this rank begins to do. ``limited=False``: it may take any time, such as an evaluation."""
        self._now = (step, phase, time.monotonic(), limited)

    def reading(self, stream: Iterator[T], step: int) -> Iterator[T]:
        """Yield from a stream of batches, the first of which is that of ``step``, and record when it is waited for."""
        while True:
            self.doing(step, "waiting for data")
            try:
                batch = next(stream)
            except StopIteration:
                return
            yield batch
            step += 1

    def __enter__(self) -> Watchdog:
        if self._store is not None:
            threading.Thread(target=self._run, args=(self._store,), name="watchdog", daemon=True).start()
            if self._rank > 0:
                threading.Thread(target=self._watch_rank0, name="watchdog of rank 0", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()

    # --- the threads -------------------------------------------------------------------------------------

    def _watch_rank0(self) -> None:
        """End this rank if rank 0, which serves the store, no longer answers: calls of the store then never return."""
        while not self._ended.wait(self._interval):
            if time.monotonic() - self._answered >= self._limit:
                _print(f"error: rank 0 has not answered for {self._limit:g} s (launch.hang_seconds)")
                leave(STATUS)

    def _run(self, store: dist.Store) -> None:
        watch = Watch(self._world, self._limit)
        while not self._ended.wait(self._interval):
            with contextlib.suppress(RuntimeError):  # rank 0, which serves the store, has ended
                store.set(f"beat{self._rank}", json.dumps(asdict(self._beat())))
                if self._rank == 0:
                    watch.read(store)
                    if watch.hangs and not self._ended.is_set():
                        self._end_job(store, watch)
                elif store.check(["hang"]):
                    store.set(f"stack{self._rank}", self._stack())
                    _wait(store, "printed", 2 * STACK_SECONDS)
                    time.sleep(FAREWELL_SECONDS)  # rank 0, whose message explains the failure, ends first
                    leave(STATUS)
                self._answered = time.monotonic()

    def _beat(self) -> Beat:
        step, phase, began, limited = self._now
        self._count += 1
        return Beat(self._count, socket.gethostname(), step, phase, time.monotonic() - began, limited)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def _end_job(self, store: dist.Store, watch: Watch) -> None:
        """Print the ranks' states and stacks, and end this rank; the others end when they see it."""
        store.set("hang", "1")
        stacks = {0: self._stack()}
        until = time.monotonic() + STACK_SECONDS
        expected = [rank for rank in range(1, self._world) if rank not in watch.silent]
        while time.monotonic() < until and len(stacks) <= len(expected):
            for rank in expected:
                if rank not in stacks and store.check([f"stack{rank}"]):
                    stacks[rank] = store.get(f"stack{rank}").decode()
            time.sleep(0.1)
        for line in report(watch.states, watch.silent, stacks, self._limit):
            _print(line)
        store.set("printed", "1")
        leave(STATUS)


class Watch:
    """What rank 0 knows of all ranks."""

    def __init__(self, world: int, limit: float) -> None:
        self._world, self._limit = world, limit
        self.states: dict[int, RankState] = {}
        self._missing = list(range(world))  # ranks that have not written yet
        self._seen: dict[int, tuple[Beat, float]] = {}

    def read(self, store: dist.Store) -> None:
        """Read the ranks' last messages."""
        self._missing = [rank for rank in self._missing if not store.check([f"beat{rank}"])]
        if self._missing:
            return
        ranks = range(self._world)
        texts = store.multi_get([f"beat{rank}" for rank in ranks])
        self.update({rank: Beat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}, time.monotonic())

    def update(self, beats: Mapping[int, Beat], now: float) -> None:
        for rank, beat in beats.items():
            if rank not in self._seen or self._seen[rank][0].count != beat.count:
                self._seen[rank] = beat, now
            first = self._seen[rank][1]
            self.states[rank] = RankState(beat, now - first)

    @property
    def silent(self) -> list[int]:
        """Ranks that no longer write."""
        return [rank for rank, state in self.states.items() if state.silent >= self._limit / 2]

    @property
    def hangs(self) -> bool:
        """Whether no rank makes progress. A phase without a limit counts as progress while its rank writes."""
        idle = [state.idle if state.beat.limited else state.silent for state in self.states.values()]
        return bool(idle) and min(idle) >= self._limit


def report(
    states: Mapping[int, RankState], silent: Sequence[int], stacks: Mapping[int, str], limit: float
) -> list[str]:
    """Return the lines that describe a hang; the ranks for which the others wait come last."""
    lines = []
    for text, ranks in _grouped({rank: state.describe() for rank, state in states.items()}).items():
        longest = max(states[rank].idle for rank in ranks)
        lines.append(f"{_ranks(ranks)}: {text} for {longest:.0f} s")
    grouped = _grouped({rank: stack for rank, stack in stacks.items() if stack})
    for stack, ranks in sorted(grouped.items(), key=lambda item: -len(item[1]))[:SHOWN_STACKS]:
        lines.append(f"stack of {_ranks(ranks)}:\n{stack.rstrip()}")
    reason = f"error: no rank has made progress for {limit:g} s (launch.hang_seconds)"
    if silent:
        named = "; ".join(f"rank {rank} on {states[rank].beat.host} {states[rank].describe()}" for rank in silent)
        return [*lines, f"{reason}; no longer responding: {named}"]
    first = min((state.beat.step, state.beat.phase != "waiting for data") for state in states.values())
    behind = [r for r, s in states.items() if (s.beat.step, s.beat.phase != "waiting for data") == first]
    if len(behind) < len(states):
        named = "; ".join(f"rank {rank} on {states[rank].beat.host} {states[rank].describe()}" for rank in behind)
        return [*lines, f"{reason}; the others wait for {named}"]
    alone = [ranks for ranks in grouped.values() if len(ranks) == 1]
    if len(grouped) > 1 and alone:
        named = ", ".join(f"{rank} on {states[rank].beat.host}" for (rank,) in alone)
        return [*lines, f"{reason}; all are {states[0].describe()}; with a stack of its own: rank {named}"]
    return [*lines, f"{reason}; all are {states[0].describe()}"]


def _grouped(texts: Mapping[int, str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        groups.setdefault(text, []).append(rank)
    return groups


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranges(ranks)}"


def _wait(store: dist.Store, key: str, seconds: float) -> None:
    """Wait until another rank sets a key, or until its store has ended."""
    until = time.monotonic() + seconds
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < until and not store.check([key]):
            time.sleep(0.1)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
