"""The bench command: derived metrics, FLOPs compared with torch's count of a step, sizes of the plain models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_dit.bench import measure
from megatron_dit.bench.diffusers_baseline import DiffusersBaseline
from megatron_dit.bench.measure import Measurement, Times
from megatron_dit.bench.profile import Kernel, kind_of, summarize
from megatron_dit.cli import run
from megatron_dit.models.flops import model_flops
from megatron_dit.models.mmdit.diffusers import BASELINE_POOLED_TEXT
from megatron_dit.models.param_specs import param_specs
from megatron_dit.parallel.topology import build_topology, connect
from megatron_dit.training.engine import Engine
from tests.helpers.configs import ARCHITECTURES, small, small_dict

REPA = {"model.repa_block": 1, "model.repa_dim": 24}
PLAIN = ["dit", "mmdit", "pixart"]
ROOT = Path(__file__).parents[2]

# Runs the command line as if the packages, separated by commas in the first argument, were not installed.
WITHOUT_PACKAGES = """
import sys
from importlib.abc import MetaPathFinder

missing = sys.argv.pop(1).split(",")

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from megatron_dit.cli import main
main()
"""


def written(folder, arch, **overrides):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(small_dict(arch, **overrides)))
    return str(path)


def bench(config, folder, *flags):
    results = folder / "results.json"
    assert run(["bench", config, "--steps", "4", "--warmup", "1", "--json", str(results), *flags]) == 0
    return json.loads(results.read_text())


def bench_without(packages, config, folder, *flags):
    """Run bench in a process in which ``packages`` cannot be imported. Return the finished process and the results."""
    results = folder / "results.json"
    arguments = ["bench", config, "--steps", "2", "--warmup", "1", "--json", str(results), *flags]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES, ",".join(packages), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads(results.read_text()) if results.exists() else None


def test_derived_metrics_equal_closed_forms():
    found = Measurement(
        device="x", devices=4, precision="bf16", parameters=7, global_batch=30, sample_flops=10**12,
        peak_flops=100e12, peak_memory=3 * 2**30, skipped_steps=0, times=Times((0.4, 0.5, 0.6, 0.5, 9.0)),
        diffusers=Times((0.7, 0.8, 1.0)),
    )  # fmt: skip
    assert found.times.median == 0.5
    assert found.times.quartiles == (0.5, 0.6)
    assert found.samples_per_second == 60
    assert found.flops_per_second == pytest.approx(15e12)
    assert found.mfu == pytest.approx(0.15)
    assert found.speedup == pytest.approx(1.6)
    assert found.results()["peak_memory_gib"] == 3


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_flops_equal_torchs_count_of_a_training_step(arch, recompute):
    connect()
    config = small(arch, **REPA, **{"train.recompute": recompute})
    engine = Engine(config, build_topology(config))
    measure.fill(engine)
    batch = measure.random_batch(config, config.train.global_batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        metrics = engine.train_step(batch)
    assert not metrics.skipped
    found = measure.measure(config, steps=2, warmup=1, diffusers=False, profile=False)
    flops = model_flops(config.model, 16, 16)
    assert found.sample_flops == flops.total.model
    recomputed = sum(block.forward for block in flops.blocks) if recompute == "full" else 0
    assert config.train.global_batch * (flops.total.model + recomputed) == counter.get_total_flops()


def test_bench_prints_mfu_and_writes_metrics(tmp_path, capsys, monkeypatch):
    config = written(tmp_path, "mmdit")
    slow = Engine.train_step

    def train_step(self, *arguments, **options):
        time.sleep(0.05)
        return slow(self, *arguments, **options)

    monkeypatch.setattr(Engine, "train_step", train_step)
    monkeypatch.setattr(measure, "device_peak", lambda precision: {"fp32": 1e9}[precision])
    found = bench(config, tmp_path)
    assert len(found["times"]["seconds"]) == 4
    assert found["step_seconds"] > 0.05
    assert found["mfu"] == pytest.approx(8 * found["sample_flops"] / found["step_seconds"] / 1e9)
    assert 0 < found["peak_memory_gib"] < 100
    assert (found["devices"], found["skipped_steps"], found["speedup"]) == (1, 0, None)
    assert f"{100 * found['mfu']:.1f}%" in capsys.readouterr().out


def test_bench_needs_no_package_that_only_other_commands_use(tmp_path):
    packages = ["diffusers", "transformer_engine", "webdataset", "mup", "optuna", "transformers", "matplotlib"]
    done, results = bench_without(packages, written(tmp_path, "mmdit"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(results["times"]["seconds"]) == 2


def test_diffusers_that_is_not_installed_is_reported_on_one_line(tmp_path):
    done, results = bench_without(["diffusers"], written(tmp_path, "mmdit"), tmp_path, "--diffusers")
    assert (done.returncode, results) == (2, None)
    assert done.stderr == (
        "error: --diffusers needs the package diffusers, which cannot be imported (No module named 'diffusers'); "
        "install diffusers, or omit --diffusers\n"
    )


def test_two_ranks_split_the_global_batch(tmp_path):
    found = bench(written(tmp_path, "dit", **{"parallel.zero_stage": 1}), tmp_path, "--procs", "2")
    assert (found["devices"], found["device"], found["mfu"]) == (2, "cpu", None)
    assert found["samples_per_second"] == pytest.approx(8 / found["step_seconds"])
    per_device = found["sample_flops"] * found["samples_per_second"] / 2
    assert 1e12 * found["tflops_per_device"] == pytest.approx(per_device)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("arch", PLAIN)
def test_speedup_is_the_ratio_of_diffusers_step_time_to_ours(tmp_path, arch, recompute):
    found = bench(written(tmp_path, arch, **{"train.recompute": recompute}), tmp_path, "--diffusers")
    assert len(found["diffusers"]["seconds"]) == 4
    assert found["speedup"] == pytest.approx(found["diffusers_step_seconds"] / found["step_seconds"])


@pytest.mark.parametrize("arch", PLAIN)
def test_plain_model_has_as_many_parameters_as_ours_and_trains(arch):
    config = small(arch)
    model = config.model
    d = model.width
    embedder = (256 + 1) * d + (d + 1) * d
    more = {
        "dit": (model.depth - 1) * (embedder + (model.num_classes + 1) * d),  # embedders in every block
        "pixart": -model.text_tokens * model.text_dim,  # no learned null caption
        "mmdit": (BASELINE_POOLED_TEXT + 1) * d + (d + 1) * d,  # pooled text
    }[arch]
    ours = sum(torch.Size(param.shape).numel() for param in param_specs(config).values())
    plain = DiffusersBaseline(config)
    assert sum(p.numel() for p in plain.model.parameters()) == ours + more
    before = [p.detach().clone() for p in plain.model.parameters()]
    plain.step(measure.random_batch(config, config.train.global_batch))
    assert sum(not torch.equal(p, old) for p, old in zip(plain.model.parameters(), before, strict=True)) > 20


def test_invalid_arguments_and_out_of_memory_are_reported_on_one_line(tmp_path, capsys, monkeypatch):
    def reported(words, arch, *arguments, **overrides):
        assert run(["bench", written(tmp_path, arch, **overrides), *arguments]) == 2
        line = capsys.readouterr().err.strip()
        assert words in line
        assert "\n" not in line

    reported("--steps 1", "dit", "--steps", "1")
    reported("--warmup 0", "dit", "--warmup", "0")
    reported("model.arch=uvit", "uvit", "--diffusers")
    reported("does not support REPA", "mmdit", "--diffusers", **REPA)
    reported("model.mlp_ratio=2", "mmdit", "--diffusers", **{"model.mlp_ratio": 2})

    def full(*_, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(Engine, "train_step", full)
    reported("train.micro_batch=4 or set train.recompute=full", "mmdit")


def test_profile_sums_kernels_by_kind_and_finds_idle_time():
    """Two of the kernels overlap, and nothing runs in the last 20 of 200 microseconds."""
    kernels = [
        Kernel("ampere_bf16_s16816gemm_128x128", 0, 60),
        Kernel("ncclDevKernel_ReduceScatter", 40, 80),
        Kernel("flash_fwd_kernel", 80, 100),
        Kernel("ampere_bf16_s16816gemm_128x128", 100, 160),
        Kernel("add_residual_forward", 160, 180),
    ]
    found = summarize(kernels, 200e-6, steps=2)
    expected = {"matrix products": 0.6, "communication": 0.2, "attention": 0.1, "pointwise and other": 0.1}
    assert {kind: share for kind, share in found.shares.items() if share} == pytest.approx({**expected, "idle": 0.1})
    assert found.kernels[0] == ("ampere_bf16_s16816gemm_128x128", 1, pytest.approx(0.6))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matrix products"),
        ("aten::mm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("void at::native::multi_tensor_apply_kernel<>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("gelu_backward", "pointwise and other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind


def test_bench_profiles_steps(tmp_path):
    found = bench(written(tmp_path, "mmdit"), tmp_path, "--profile")["profile"]
    assert found["shares"]["matrix products"] > 0
    assert 0 <= found["shares"]["idle"] < 1
    assert len(found["kernels"]) == 10
    assert bench(written(tmp_path, "mmdit"), tmp_path)["profile"] is None
