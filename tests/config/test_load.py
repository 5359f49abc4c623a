"""Conversion of YAML text to the types of config keys, and one-line errors for invalid values and files."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml

from megatron_dit.config import Config, config_from_dict, load, load_config, save_config
from megatron_dit.config.keys import Interval, hints_of
from megatron_dit.runtime.errors import UserError
from megatron_dit.tuning.space import SweepConfig
from tests.helpers.configs import small_dict, write_config


@pytest.fixture
def path(tmp_path):
    return write_config(tmp_path)


BOMB = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 18))


def rejected(path, *overrides):
    """Return the one-line error message of a rejected config; it names the file."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *itertools.product(
            ["train.steps", "model.depth", "seed", "parallel.reduce_bucket_size"],
            ["010", "0x10", "0o10", "0b1", "1_000", "1:30", "1e3", "2.0", "true", "null", "", "~", "'3'", "-0", "+3"],
        ),
        *itertools.product(
            ["optimizer.lr", "optimizer.eps", "mup.output_multiplier", "sampling.guidance", "data.caption_dropout"],
            ["nan", ".nan", "inf", ".inf", "-.inf", "Infinity", "1e400", "1_0.0", "1:30.5", "true", "null", "'1'", "."],
        ),
        *itertools.product(
            ["init.zero_output", "train.compile"], ["yes", "no", "on", "off", "1", "0", "null", "'true'"]
        ),
        *itertools.product(["run_dir", "data.path"], ["null", "~", "true", "False", ""]),
        ("init.std.hidden", "nan"),
        ("init.zero_adaln", "no"),
        ("train.steps", "\u0663"),  # an Arabic digit, which Python's int accepts
    ],
)
def test_values_of_the_wrong_type_are_rejected(path, key, text):
    assert key in rejected(path, f"{key}={text}")


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", ".0001", "0.0001", "1e-04", "100e-6"])
def test_floats_are_read_as_in_python(path, number):
    # PyYAML reads the first as text, because YAML 1.1 requires a dot.
    assert load_config(path, [f"optimizer.lr={number}"]).optimizer.lr == float(number)


@pytest.mark.parametrize(
    "text", ["010", "1_000", "no", "on", "1:30", "2024-01-01", "1e3", "0x10", "a: b", "x #1", "*a", "[b]"]
)
def test_text_values_are_literal(path, text):
    assert load_config(path, [f"run_dir={text}"]).run_dir == text
    assert load_config(path, [f'run_dir="{text}"']).run_dir == text


def test_override_values_may_contain_equals_signs_and_spaces(path):
    assert load_config(path, ["run_dir=/data/a b/lr=3"]).run_dir == "/data/a b/lr=3"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.final_lr_ratio=5", "at most 1"),
        ("optimizer.beta1=1", "below 1"),
        ("optimizer.eps=0", "at least 1e-30"),
        ("optimizer.lr=-1", "positive"),
        ("optimizer.lr=0", "positive"),
        ("seed=99999999999999999999", "below 2^63"),
        ("seed=9223372036854775808", "below 2^63"),
        ("seed=-1", "at least 0"),
        ("train.steps=99999999999", "below 2^31"),
        ("sampling.guidance=1e9", "at most 1000"),
        ("mup.output_multiplier=-1", "positive"),
        ("objective.shift=0", "positive"),
        ("model.mlp_ratio=0", "at least 1"),
        ("model.interpolation_scale=0", "positive"),
        ("data.mixture.b=1", "below 1"),
        ("parallel.blocks_per_stage=[1, 0]", "at least 1"),
    ],
)
def test_numbers_out_of_range_are_rejected(path, override, words):
    message = rejected(path, override)
    assert override.split("=")[0] in message
    assert words in message


def numbers_in(schema, prefix=""):
    """Yield (dotted key, type) of every number of a schema, including those in lists, mappings and optional values."""
    for name, kind in hints_of(schema).items():
        if isinstance(kind, type) and is_dataclass(kind):
            yield from numbers_in(kind, f"{prefix}{name}.")
            continue
        while get_origin(kind) in (list, dict) or type(None) in get_args(kind):
            kind = get_args(kind)[-1] if get_origin(kind) in (list, dict) else get_args(kind)[0]
        if getattr(kind, "__origin__", kind) in (int, float):
            yield prefix + name, kind


@pytest.mark.parametrize(("key", "kind"), [*numbers_in(Config), *numbers_in(SweepConfig)])
def test_every_number_declares_its_range(key, kind):
    assert any(isinstance(item, Interval) for item in getattr(kind, "__metadata__", ())), key


def test_intervals_contain_exactly_the_numbers_within_their_bounds():
    for text, inside, outside in (
        ("[0, 1)", [0, 0.5, math.nextafter(1, 0)], [-1e-300, 1, math.nan, math.inf]),
        ("(0, 1]", [5e-324, 1], [0, -0.0, math.nextafter(1, 2), math.nan]),
        ("[1, 2^31)", [1, 2**31 - 1], [0, 2**31]),
        ("[0, inf)", [0, 1e308], [math.inf, math.nan, -1]),
        ("[0, 2^63)", [2**63 - 1], [2**63]),
    ):
        interval = Interval(text)
        assert all(interval.holds(value) for value in inside), text
        assert not any(interval.holds(value) for value in outside), text


# --- secrets and paths --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["${oc.env:SECRET}", "${oc.env:SECRET,x}", "a/${run_dir}", "${env:SECRET}", "${SECRET}"]
)
def test_interpolation_is_rejected_and_reveals_no_secret(path, monkeypatch, text):
    monkeypatch.setenv("SECRET", "hunter2")
    for key in ("data.path", "run_dir", "data.text_encoder", "mup.base_shapes", "train.dtype"):
        assert "hunter2" not in rejected(path, f"{key}={text}")
    values = small_dict(**{"data.path": text})
    path.write_text(yaml.safe_dump(values))
    assert "hunter2" not in rejected(path)
    with pytest.raises(UserError, match=r"data\.path") as caught:  # as from a checkpoint's manifest
        config_from_dict({**asdict(load_config(write_config(path.parent))), "data": {"path": text}})
    assert "hunter2" not in str(caught.value)


def test_home_folder_is_expanded_in_every_path(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    keys = ("run_dir", "data.path", "data.cache", "data.text_encoder", "data.repa_encoder")
    config = load_config(path, [*(f"{key}=~/x" for key in keys), "data.mixture={~/a.b: 0.2}", "data.mixture.~/c=0.1"])
    assert (config.run_dir, config.data.path, config.data.cache) == ("/home/somebody/x",) * 3
    assert (config.data.text_encoder, config.data.repa_encoder) == ("/home/somebody/x",) * 2
    assert config.data.mixture == {"/home/somebody/a.b": 0.2, "/home/somebody/c": 0.1}
    values = {**asdict(config), "run_dir": "~/x"}  # values from a manifest are not expanded
    assert config_from_dict(values).run_dir == "~/x"
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    assert load_config(f"~/{path.name}").seed == 1


def test_shell_variables_in_paths_are_rejected(path):
    for override in ("run_dir=$SCRATCH/run", "data.path=$HOME/x", "data.mixture.$HOME/y=0.2"):
        assert "$" in rejected(path, override)
    assert not Path("$SCRATCH").exists()


# --- the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("# caf\u00e9\n".encode("latin-1"), "not UTF-8 (byte 0xe9 at position 5)"),
        ("seed: 1\n".encode("utf-16"), "not UTF-8 (byte 0xff at position 0)"),
        (b"\x00\x01\x02", "not valid YAML"),
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- a\n", "it contains [a]"),
        (b"3\n", "it contains 3"),
        (b"a: 1\n---\nb: 2\n", "another document"),
        (b"model:\n\tdepth: 3\n", "line 2"),
        (b"seed: 1\nseed: 2\n", "line 2: 'seed' is given twice"),
        (b"model: {depth: 1, depth: 2}\n", "'depth' is given twice"),
        (b"? [a]\n: b\n", "a key must be text"),
        (b"seed: !!int 3\n", "tag"),
        (b"seed: !!python/object/apply:os.system ['true']\n", "tag"),
        (b"a: &a [*a]\n", "nested too deeply"),
        (b"[" * 5000, "nested too deeply"),
        (BOMB, "more than 100,000 values"),
        (b"x" * 5_000_000, "5,000,000 bytes"),
        (b"model: 3\n", "model=3: expected a section with keys such as model.arch"),
        (b"model:\n", "model=null: expected a section"),
    ],
)  # fmt: skip
def test_invalid_config_files_are_rejected(path, content, words):
    path.write_bytes(content)
    assert words in rejected(path)


def test_pipes_folders_and_missing_files_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would block forever
    assert "not a regular file" in rejected(tmp_path / "pipe")
    assert "is a folder" in rejected(tmp_path)
    with pytest.raises(UserError, match="at most 255 bytes in each name"):
        load_config(tmp_path / ("x" * 300))
    assert "does not exist" in rejected(tmp_path / "none.yaml")


def test_byte_order_mark_is_ignored(path):
    plain = load_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(path) == plain


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.mixture=[a]", "data.mixture=[a]: expected a mapping"),
        ("model=3", "model=3: expected a section"),
        ("model.depth.x=3", "model.depth is a single value"),
        ("ema.sigma_rel=0.1", "expected a list"),
        ("ema.sigma_rel=[0.1", "not valid YAML"),
        ("parallel.blocks_per_stage=[true, 1]", "parallel.blocks_per_stage[0]=true"),
        ("mup={base_heads: 2, base_heads: 4}", "given twice"),
        ('run_dir="a\\0b"', "NUL"),
        ("=3", "unknown key ''"),
        (".seed=3", "unknown key ''"),
    ],
)
def test_malformed_overrides_are_rejected(path, override, words):
    assert words in rejected(path, override)


def test_sections_are_merged_and_other_values_replaced(path):
    config = load_config(path, ["model={depth: 3}", "data.mixture.a/b.c=0.2", "data.mixture.d=0.1"])
    assert (config.model.depth, config.model.heads) == (3, 4)
    assert config.data.mixture == {"a/b.c": 0.2, "d": 0.1}  # keys of a mapping may contain dots
    assert load_config(path, ["data.mixture={e: 0.3}"]).data.mixture == {"e": 0.3}


def test_saved_config_loads_unchanged(path, tmp_path):
    odd = ["run_dir=/a b: c # 'd'/\u00e9", "data.mixture={1e3: 0.1, 'null': 0.2, yes: 0.3}", "optimizer.lr=1e-5"]
    config = load_config(path, [*odd, "init.zero_adaln=false", "init.std.hidden=0.02", "optimizer.eps=1e-12"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_from_dict(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", True), ("seed", 1.0), ("seed", "1"), ("run_dir", 3), ("run_dir", None), ("model", []), ("train", None)],
)
def test_values_of_the_wrong_type_in_a_manifest_are_rejected(key, value):
    with pytest.raises(UserError, match=f"the checkpoint's config: {key}"):
        config_from_dict({**small_dict(), key: value})
    for values in (None, [], "x"):
        with pytest.raises(UserError, match="expected a section"):
            config_from_dict(values)


def test_sweep_configs_follow_the_same_rules(path, tmp_path):
    sweep = tmp_path / "sweep.yaml"

    def error_of(text):
        sweep.write_text(f"run_dir: {tmp_path}/s\nbase_config: {path}\n{text}\n")
        with pytest.raises(UserError) as caught:
            load(SweepConfig, sweep)
        return str(caught.value)

    space = "space: {optimizer.lr: {log2: [-9, -8]}}\n"
    assert "space.optimizer.lr=[1e-4, 1e-3]: expected a section" in error_of("space: {optimizer.lr: [1e-4, 1e-3]}")
    assert "final_fraction=nan" in error_of(f"{space}final_fraction: nan")
    assert "seed=010" in error_of(f"{space}seed: 010")
    assert "seed=4096" in error_of(f"{space}seed: 4096")  # the sampler's seed plus the trial number must fit in 32 bits
    assert "concurrent_trials=1e1" in error_of(f"{space}concurrent_trials: 1e1")
    assert "log2" in error_of("space: {optimizer.lr: {log2: [-9, 2000]}}")
    assert "optimizer.beta1=1.5" in error_of(
        "sampler: random\ntrials: 3\nspace: {optimizer.beta1: {uniform: [0.5, 1.5]}}"
    )
    assert "train.dtype=1.0" in error_of("sampler: random\ntrials: 3\nspace: {train.dtype: {uniform: [1.0, 1.5]}}")
    assert "optimizer.warmup_steps=0.5" in error_of(
        "sampler: random\ntrials: 3\nspace: {optimizer.warmup_steps: {uniform: [0.5, 3]}}"
    )
    assert "has the value 0.001 twice" in error_of("space: {optimizer.lr: {choice: [1e-3, 0.001]}}")
    assert "steps=010" in error_of(f"overrides: [train.steps=010]\n{space}")
    assert "given twice" in error_of(f"overrides: [train.steps=2, train.steps=3]\n{space}")
