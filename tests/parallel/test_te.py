"""Transformer Engine backend without a GPU: its layers, and invalid settings. On a GPU: test_te_gpu."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from megatron_dit.parallel.backend import Backend
from megatron_dit.parallel.select_backend import open_backend
from megatron_dit.parallel.topology import SOLO
from megatron_dit.runtime.errors import UserError
from megatron_dit.verify import layout_parity
from megatron_dit.verify.layouts import REFERENCE, Layout
from tests.helpers.child import in_child
from tests.helpers.configs import ARCHITECTURES, small
from tests.helpers.te_on_cpu import te_on_cpu
from tests.helpers.traces import EVERY_OPTION, trace

KINDS = [*ARCHITECTURES, "uvit-class"]
FP8 = {"train.dtype": "bf16", "train.fp8": "current"}


# --- layers compared with the local backend ----------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """Properties of a model built by a backend that the rest of the program uses."""

    parameters: dict  # shape, dtype, μP's and Megatron's attributes, by name
    buffers: list
    filled: list  # parameters that have been written to
    hidden: dict  # module that defines the class of each hidden linear layer


def properties_of(model):
    import transformer_engine.pytorch as te

    from megatron_dit.parallel.layers import ColumnGatheredLinear, ColumnLinear, RowLinear

    marks = ("init_kind", "tensor_model_parallel", "partition_dim", "partition_stride")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (ColumnLinear, RowLinear, te.Linear))}
    named = dict(model.named_parameters())
    return Made(
        parameters={
            name: (tuple(p.shape), p.dtype, p.requires_grad, *(getattr(p, mark, None) for mark in marks))
            for name, p in named.items()
        },
        buffers=[name for name, _ in model.named_buffers()],
        filled=[name for name, p in named.items() if not p.isnan().all()],
        hidden={name: type(m).__module__ for name, m in linears.items() if not isinstance(m, ColumnGatheredLinear)},
    )


def make_all():
    """Return (Made locally, Made with TE) by architecture and number of tensor-parallel ranks, 1 or 2.

    Must run in a separate process, because it makes CUDA appear available.
    """
    torch.cuda.is_available = lambda: True
    # New tensors are filled with NaN, so that written parameters can be detected.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_dit.models.build import build
    from megatron_dit.parallel.te import TeBackend
    from megatron_dit.parallel.topology import Topology

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    pair = Topology(world=2, tensor_group=dist.group.WORLD)
    result = {}
    for arch in KINDS:
        for topology in (SOLO, pair):
            config = small(arch, **{"parallel.tensor": topology.world, "parallel.sequence": topology is pair})
            local = build(config.model, Backend(config.model, config.parallel, topology))
            te = build(config.model, TeBackend(config, topology))
            result[arch, topology.world] = properties_of(local), properties_of(te)
    return result


@pytest.fixture(scope="module")
def made(te_importable):
    return in_child(make_all, DS_ACCELERATOR="cpu")


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_parameters_equal_those_of_the_local_backend(made, arch, ranks):
    local, te = made[arch, ranks]
    assert te.parameters == local.parameters
    assert te.buffers == local.buffers
    assert te.filled == local.filled == []  # only mup.initial_values sets values
    assert te.hidden.keys() == local.hidden.keys()
    assert set(local.hidden.values()) == {"megatron_dit.parallel.layers"}
    assert set(te.hidden.values()) == {"megatron_dit.parallel.te"}


# --- layers in several layouts, on the CPU ---------------------------------------------------------


def te_trace(*args, **overrides):
    """Run ``test_layouts.trace`` with Transformer Engine's layers. Runs in the ranks of the pool."""
    from megatron_dit.parallel.te import TeBackend
    from megatron_dit.training import engine

    with te_on_cpu(), mock.patch.object(engine, "open_backend", TeBackend):
        return trace(*args, **overrides)


@pytest.fixture(scope="module")
def reference(te_importable, pool, dataset, tmp_path_factory):
    """First steps of the local backend in one process."""
    scratch = tmp_path_factory.mktemp("reference")
    return {arch: pool.run(1, trace, arch, REFERENCE, dataset, scratch)[0] for arch in KINDS}


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize(
    "layout",
    [Layout(1), Layout(2, zero=3), Layout(2, tensor=2), Layout(4, tensor=2, sequence=True, zero=3)],
    ids=["one", "zero3", "tp2", "tp2-sp-zero3"],
)
def test_layout_equals_the_local_backend(pool, dataset, tmp_path, reference, arch, layout):
    found = pool.run(layout.ranks, te_trace, arch, layout, dataset, tmp_path)[0]
    result = layout_parity.compare("te", found, reference[arch])
    assert result.good, result


@pytest.mark.parametrize("arch", KINDS)
def test_layout_equals_the_local_backend_with_every_option_of_mup_and_muon(
    te_importable, pool, dataset, tmp_path, arch
):
    expected = pool.run(1, trace, arch, REFERENCE, dataset, tmp_path / "one", **EVERY_OPTION)[0]
    layout = Layout(2, tensor=2, sequence=True)
    found = pool.run(layout.ranks, te_trace, arch, layout, dataset, tmp_path / "two", **EVERY_OPTION)[0]
    result = layout_parity.compare("te", found, expected)
    assert result.good, result


def test_verify_detects_a_row_bias_gradient_that_is_not_summed(pool, dataset, tmp_path, reference):
    layout = Layout(2, tensor=2, sequence=True)
    found = pool.run(2, te_trace, "pixart", layout, dataset, tmp_path, "add_up_over_tokens")[0]
    assert not layout_parity.compare("faulty", found, reference["pixart"]).good


# --- scales of delayed FP8 ------------------------------------------------------------------------


def scales_of_two_layers():
    """Give one layer of a model scales and load them into a layer of another. Runs in a process of its own."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.quantization import DelayedScalingRecipeState, FP8GlobalStateManager

    from megatron_dit.parallel.te import TeBackend
    from megatron_dit.runtime.compat import let_megatron_run_on_cpu

    let_megatron_run_on_cpu()
    backend = TeBackend(small("mmdit"), SOLO)
    backend.recipe = DelayedScaling(amax_history_len=5)
    with te_on_cpu():
        *layers, unused = (backend.column(32, 64) for _ in range(3))
    for layer in layers:  # on the CPU instead of a GPU
        for key, mode, count in (("scaling_fwd", "forward", 3), ("scaling_bwd", "backward", 2)):
            layer.fp8_meta[key] = DelayedScalingRecipeState(
                backend.recipe, mode=mode, num_quantizers=count, device=torch.device("cpu")
            )
        layer.fast_setattr("fp8_meta_tensors_initialized", True)
    first, second = layers
    for key in ("scaling_fwd", "scaling_bwd"):
        first.fp8_meta[key].scale.uniform_(1, 2)
        first.fp8_meta[key].amax_history.uniform_()
    # As autocast does, which itself needs a GPU.
    state = FP8GlobalStateManager.quantization_state
    backend.precision = lambda: mock.patch.object(state, "fp8_recipe", backend.recipe)
    second.load_fp8_scales(first.fp8_scales())
    equal = [
        torch.equal(getattr(first.fp8_meta[key], name), getattr(second.fp8_meta[key], name))
        for key in ("scaling_fwd", "scaling_bwd")
        for name in ("scale", "amax_history")
    ]
    try:
        second.load_fp8_scales(torch.ones(7))
        error = None
    except UserError as caught:
        error = str(caught)
    return unused.fp8_scales(), first.fp8_scales().numel(), equal, error


def test_scales_of_a_layer_are_restored(te_importable):
    unused, numel, equal, error = in_child(scales_of_two_layers, DS_ACCELERATOR="cpu")
    assert unused is None
    assert numel == (3 + 2) * (1 + 5)
    assert equal == [True] * 4
    assert "has 7 FP8 scales of a layer" in error
    assert "expects 30" in error


# --- invalid settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "overrides", "words"),
    [
        ("mmdit", {"parallel.backend": "apex"}, ["parallel.backend='apex'", "auto, te, local"]),
        ("mmdit", {**FP8, "train.fp8": "mx"}, ["train.fp8='mx'", "none, delayed, current, blockwise, mxfp8"]),
        ("mmdit", {**FP8, "train.fp8_format": "e5m2"}, ["train.fp8_format='e5m2'", "hybrid, e4m3"]),
        ("mmdit", {"train.fp8": "current"}, ["train.fp8=current", "train.dtype=bf16"]),
        (
            "mmdit",
            {"train.compile": True, "parallel.backend": "te"},
            ["train.compile=true", "parallel.backend=te", "parallel.backend=local"],
        ),
        ("mmdit", {**FP8, "train.compile": True}, ["train.compile=true", "train.fp8=current", "train.fp8=none"]),
        ("mmdit", {**FP8, "parallel.backend": "local"}, ["parallel.backend=local", "train.fp8=none"]),
        ("mmdit", {**FP8, "heads": 3, "base_heads": 3}, ["= 24", "multiple of 16"]),
        ("mmdit", {**FP8, "parallel.tensor": 4}, ["/ parallel.tensor = 8", "multiple of 16"]),
        ("mmdit", {**FP8, "train.fp8": "mxfp8", "parallel.tensor": 2}, ["= 16", "multiple of 32"]),
        ("mmdit", {**FP8, "train.fp8": "mxfp8", "model.text_tokens": 4}, ["4 text tokens", "= 16", "multiple of 8"]),
        ("dit", {**FP8, "model.patch_size": 8}, None),  # 4 tokens * 4
        ("dit", {**FP8, "model.patch_size": 8, "train.micro_batch": 2}, ["4 image tokens per rank", "multiple of 4"]),
        ("mmdit", {**FP8, "model.text_tokens": 6}, ["6 text tokens per rank", "= 24", "multiple of 8"]),
        ("pixart", {**FP8, "model.text_tokens": 6}, ["6 text tokens per rank", "= 24", "multiple of 8"]),
        ("uvit", FP8, None),  # (16 patches + 1 + 23 of text) * 4
        ("uvit-class", FP8, ["18 joint tokens per rank", "= 72", "multiple of 8"]),  # 16 patches + time + class
        ("uvit-class", {**FP8, "train.micro_batch": 8}, None),
        # A rank has half of the image tokens and all text tokens of PixArt-α.
        ("pixart", {**FP8, "parallel.tensor": 2, "parallel.sequence": True, "train.micro_batch": 2}, None),
        (
            "pixart",
            {**FP8, "parallel.tensor": 2, "parallel.sequence": True, "train.micro_batch": 1},
            ["8 image tokens per rank", "multiple of 2"],
        ),
        # Gathered blocks must be complete on each rank.
        (
            "dit",
            {**FP8, "train.fp8": "blockwise", "parallel.tensor": 2, "parallel.sequence": True},
            ["8 image tokens per rank", "multiple of 128", "multiple of 16"],
        ),
    ],
)
def test_config_checks_backend_and_fp8(arch, overrides, words):
    if words is None:
        assert small(arch, **overrides).train.fp8 == "current"
        return
    with pytest.raises(UserError) as caught:
        small(arch, **overrides)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_image_sizes_that_fp8_does_not_support_are_rejected():
    config = small("dit", **FP8)
    config.check_fp8_tokens(16, 32)
    with pytest.raises(UserError, match=r"6 image tokens per rank .* = 24: .* train\.fp8=current; .* multiple of 8"):
        config.check_fp8_tokens(8, 12)
    small("dit").check_fp8_tokens(8, 12)


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a machine with a GPU of compute capability ``capability``, with or without Transformer Engine."""

    def pretend(capability, importable):
        te = types.ModuleType("transformer_engine.pytorch") if importable else None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
        monkeypatch.setitem(sys.modules, "transformer_engine", te and types.ModuleType("transformer_engine"))
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)

    return pretend


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"parallel.backend": "te"}, ["parallel.backend=te", "no CUDA device", "parallel.backend=local"]),
        (FP8, ["train.fp8=current", "no CUDA device", "train.fp8=none"]),
    ],
)
def test_te_without_a_gpu_is_rejected(monkeypatch, overrides, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        open_backend(small("mmdit", **overrides), SOLO)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"parallel.backend": "te"}, ["parallel.backend=te", "cannot be imported", "parallel.backend=local"]),
        (FP8, ["train.fp8=current", "cannot be imported", "train.fp8=none"]),
    ],
)
def test_te_that_is_not_installed_is_rejected(gpu, overrides, words):
    gpu((9, 0), importable=False)
    with pytest.raises(UserError) as caught:
        open_backend(small("mmdit", **overrides), SOLO)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fp8", "capability", "needed"),
    [
        ("delayed", (8, 0), "8.9"),
        ("current", (8, 0), "8.9"),
        ("blockwise", (8, 9), "9.0"),
        ("mxfp8", (9, 0), "10.0"),
        ("mxfp8", (12, 0), "less than 12.0"),
    ],
)
def test_fp8_on_an_unsupported_gpu_is_rejected(gpu, fp8, capability, needed):
    gpu(capability, importable=True)
    with pytest.raises(UserError) as caught:
        open_backend(small("mmdit", **{**FP8, "train.fp8": fp8}), SOLO)
    for word in (f"train.fp8={fp8}", needed, "A100", "{}.{}".format(*capability), "train.fp8=none", "bf16"):
        assert word in str(caught.value)


def test_auto_is_local_without_transformer_engine_gpu_or_bf16_and_with_compile(gpu, monkeypatch):
    bf16 = small("mmdit", **{"train.dtype": "bf16"})
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert type(open_backend(bf16, SOLO)) is Backend
    gpu((9, 0), importable=False)
    assert type(open_backend(bf16, SOLO)) is Backend
    gpu((9, 0), importable=True)
    assert type(open_backend(small("mmdit"), SOLO)) is Backend
    assert type(open_backend(small("mmdit", **{"train.dtype": "bf16", "parallel.backend": "local"}), SOLO)) is Backend
    assert type(open_backend(small("mmdit", **{"train.dtype": "bf16", "train.compile": True}), SOLO)) is Backend
