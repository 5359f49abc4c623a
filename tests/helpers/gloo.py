"""Run a function on N gloo ranks. One pool of processes serves the test session, because imports take seconds."""

from __future__ import annotations

import gc
import os
import queue
import traceback
from dataclasses import dataclass
from typing import Any

import torch.multiprocessing as mp

from tests.helpers.ports import free_port

SIZE = 4
PRELOADED = ["deepspeed", "megatron_dit.training.trainer", "tests.helpers.gloo"]
RENEW = 40  # restart the processes after this many tasks: ZeRO-3 engines leave process groups whose threads poll


@dataclass
class Failure:
    text: str
    user_error: str | None = None


def _serve(rank, tasks, results):
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    import torch

    import megatron_dit.training.engine
    from megatron_dit.parallel.topology import connect
    from megatron_dit.runtime.errors import UserError

    assert megatron_dit.training.engine
    gc.freeze()  # imported objects stay alive, so garbage collection after each task can skip them
    while True:
        task = tasks.get()
        if task is None:
            return
        function, args, kwargs, world, port = task
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
        torch.set_num_threads(1)  # a run may have changed it
        try:
            connect()
            results.put((rank, function(*args, **kwargs)))
        except UserError as error:
            results.put((rank, Failure(traceback.format_exc(), str(error))))
        except BaseException:
            results.put((rank, Failure(traceback.format_exc())))
        finally:
            leave()


def leave():
    """Destroy all process groups of this process, and the state that DeepSpeed and Megatron keep about them."""
    import deepspeed.comm.comm as ds_comm
    import torch.distributed as dist
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    if dist.is_initialized():
        # DeepSpeed's hooks keep an engine and its process groups in reference cycles that the collector cannot detect.
        for engine in [each for each in gc.get_objects() if ds_comm.cdb and type(each) is DeepSpeedEngine]:
            engine.destroy()
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    ds_comm.cdb = None
    FWD_MODULE_STACK.clear()
    # Each gloo group has threads that poll; without collection, those of an engine in a reference cycle would continue.
    gc.collect()
    # ZeRO-3 numbers parameters and modules for the lifetime of a process and checks that the numbers are equal on all
    # ranks, but the ranks of a pool have not all run the same tasks.
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    for name in ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "mpu", "mesh_device"):
        setattr(groups, name, None)
    for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP"):
        setattr(groups, name, None)


class Pool:
    """Pool of ranks. ``run(n, function, *args)`` returns the results in rank order of a module-level function."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._done = 0
        context = mp.get_context("forkserver")  # its server imports once, and each process is a copy of it
        context.set_forkserver_preload(PRELOADED)
        self._tasks = [context.Queue() for _ in range(SIZE)]
        self._results = context.Queue()
        self._processes = [
            context.Process(target=_serve, args=(rank, self._tasks[rank], self._results), daemon=True)
            for rank in range(SIZE)
        ]
        for process in self._processes:
            process.start()

    def run(self, world: int, function: Any, *args: Any, timeout: float = 300, **kwargs: Any) -> list[Any]:
        outcomes = self.outcomes(world, function, *args, timeout=timeout, **kwargs)
        failures = [f"rank {rank}:\n{out.text}" for rank, out in enumerate(outcomes) if isinstance(out, Failure)]
        assert not failures, "\n".join(failures)
        return outcomes

    def outcomes(self, world: int, function: Any, *args: Any, timeout: float = 300, **kwargs: Any) -> list[Any]:
        """Like ``run``, but return a :class:`Failure` for each rank that raised."""
        if self._done == RENEW:
            self.close()
            self._start()
        self._done += 1
        port = free_port()
        for rank in range(world):
            self._tasks[rank].put((function, args, kwargs, world, port))
        outcomes: dict[int, Any] = {}
        while len(outcomes) < world:
            failed = [out.text for out in outcomes.values() if isinstance(out, Failure)]
            try:
                rank, outcome = self._results.get(timeout=20 if failed else timeout)
            except queue.Empty:
                self.close()
                waiting = sorted(set(range(world)) - set(outcomes))
                raise AssertionError("\n".join([f"ranks {waiting} hang", *failed])) from None
            outcomes[rank] = outcome
        return [outcomes[rank] for rank in range(world)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
