"""Every config loads, its model can be built, and its size agrees with its paper."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_dit.config import load, load_config
from megatron_dit.models.param_specs import param_specs
from megatron_dit.tuning.space import SweepConfig

CONFIGS = Path(__file__).parents[2] / "configs"

# (exact number of parameters, number in the paper)
SIZES = {
    "dit/proxy-144": (10_762_304, 10.76e6),
    "dit/proxy-288": (42_550_880, 42.55e6),
    "dit/proxy-576": (169_206_944, 169.2e6),
    "dit/xl2-mup": (674_834_720, 674.8e6),
    "dit/xl2": (674_834_720, 674.8e6),
    "uvit/small": (44_261_472, 44e6),
    "uvit/large": (286_763_172, 287e6),
    "uvit/huge": (500_832_164, 501e6),
    "pixart/proxy": (39_738_176, 39.2e6),  # the original's null caption (491,520 values) is a buffer, not a parameter
    "pixart/target": (611_347_616, 610.9e6),
    "pixart/original": (611_347_616, 610.9e6),
    "mmdit/proxy": (181_635_648, 0.18e9),  # including REPA's projector
    "mmdit/18b": (17_859_518_016, 17.9e9),
}


# Numbers of trials: products of the sizes of the grids in the files, or the number of random trials.
TRIALS = {"quickstart-sweep": 2 * 6, "dit/sweep": 15, "pixart/sweep": 5, "mmdit/sweep": 80}


def files(kind):
    names = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
    kinds = {name: "sweep" if "sweep" in name else "protocol" if "evaluation" in name else "run" for name in names}
    return [name for name in names if kinds[name] == kind]


def test_every_config_has_an_expected_size():
    assert {name for name in files("run") if not name.startswith("quickstart")} == set(SIZES)


@pytest.mark.parametrize("name", files("run"))
def test_config_loads_and_has_its_published_size(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    size = sum(math.prod(param.shape) for param in param_specs(config).values())
    if name in SIZES:
        exact, published = SIZES[name]
        assert size == exact
        learned_null = config.model.text_tokens * config.model.text_dim if config.model.arch == "pixart" else 0
        assert size - learned_null == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name", files("run") + files("protocol"))
def test_the_head_says_what_to_run_and_what_to_expect(name):
    head = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Cost:", "Expect:"):
        assert any(word in line for line in head), f"{name} has no {word}"


def test_every_sweep_has_an_expected_number_of_trials():
    assert set(files("sweep")) == set(TRIALS)


@pytest.mark.parametrize("name", TRIALS)
def test_sweep_config_loads_and_has_its_number_of_trials(name):
    assert load(SweepConfig, CONFIGS / f"{name}.yaml").count == TRIALS[name]
