"""Selection of the AdamW implementation, its errors, and how a run reports it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from megatron_dit.optimizer import adamw, choose
from megatron_dit.runtime.errors import UserError
from tests.helpers.configs import small, small_dict
from tests.helpers.runs import finish_run


def config_of(**keys):
    return small("mmdit", **{f"optimizer.{key}": value for key, value in keys.items()}).optimizer


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_without_a_gpu_auto_is_torch_and_gpu_libraries_are_rejected():
    assert choose(config_of()).title == "torch.optim.AdamW(fused=True)"
    for name in ("apex", "te"):
        with pytest.raises(UserError) as error:
            choose(config_of(implementation=name))
        message = str(error.value)
        assert f"optimizer.implementation='{name}'" in message
        assert "GPUs only" in message
        assert message.endswith("torch")
        assert "\n" not in message


def test_unrelated_package_named_apex_is_not_imported(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "amp_C", None)  # only NVIDIA Apex has it
    assert "amp_C" in adamw.AVAILABLE["apex"].absent()


def test_auto_selects_the_first_available_that_needs_no_compiling(monkeypatch):
    def stub(absent, **keywords):
        return adamw.AdamWImplementation("stub", lambda groups: None, lambda: absent, **keywords)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compiles = stub(None, automatic=lambda: False)
    available, later = stub(None), stub(None)
    kinds = {"apex": stub("no module"), "deepspeed": compiles, "te": available, "torch": later}
    monkeypatch.setattr(adamw, "AVAILABLE", kinds)
    assert choose(config_of()) is available
    assert choose(config_of(implementation="deepspeed")) is compiles


def test_missing_compiler_is_reported(monkeypatch):
    monkeypatch.setattr(adamw, "build_path", lambda: "")
    for keys in ({"implementation": "deepspeed"}, {"offload": True}):
        with pytest.raises(UserError, match="ninja is not on PATH"):
            choose(replace(config_of(), **keys))


def test_invalid_optimizer_settings_are_rejected():
    with pytest.raises(UserError, match="expected one of auto, apex, te, deepspeed, torch"):
        config_of(implementation="fast")
    with pytest.raises(UserError, match="uses its own AdamW"):
        small("mmdit", **{"parallel.zero_stage": 1, "optimizer.offload": True, "optimizer.implementation": "torch"})
    with pytest.raises(UserError, match=r"optimizer.offload=true with parallel.zero_stage=0"):
        config_of(offload=True)


def lacks_on_one_rank(config):
    import torch.distributed as dist

    from megatron_dit.parallel.topology import build_topology
    from megatron_dit.training.engine import Engine

    apex = adamw.AVAILABLE["apex"]
    if dist.get_rank() == 0:
        adamw.AVAILABLE["apex"] = adamw.AVAILABLE["torch"]
    try:
        Engine(config, build_topology(config))
    finally:
        adamw.AVAILABLE["apex"] = apex


def test_all_ranks_raise_if_one_lacks_the_implementation(pool):
    for outcome in pool.outcomes(2, lacks_on_one_rank, small("mmdit", **{"optimizer.implementation": "apex"})):
        assert "apex.optimizers.FusedAdam is not available" in outcome.user_error


def test_run_prints_its_implementation_and_may_resume_with_another(compiled, dataset, tmp_path):
    values = {"data.path": str(dataset), "run_dir": str(tmp_path / "run"), "train.steps": 2}
    path, metrics = tmp_path / "config.yaml", tmp_path / "metrics.json"
    path.write_text(yaml.safe_dump(small_dict("mmdit", **values)))
    out = finish_run(path, 1, "--json", str(metrics))
    assert "optimizer: torch.optim.AdamW(fused=True)" in out
    assert json.loads(metrics.read_text())["optimizer"] == "torch.optim.AdamW(fused=True)"
    out = finish_run(path, 2, "train.steps=4", "optimizer.offload=true", "parallel.zero_stage=2")
    assert "resumed" in out
    assert "optimizer: deepspeed.ops.adam.DeepSpeedCPUAdam" in out
