"""Random valid values survive saving and loading, and mean the same in overrides as in the file."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from megatron_dit.config import Config, config_from_dict, flatten, load_config, save_config
from megatron_dit.config.keys import Interval, hints_of
from megatron_dit.runtime.errors import UserError
from tests.helpers.configs import ARCHITECTURES, small_dict

# Characters with a meaning in YAML, overrides or paths. Users' paths may not contain variables, and "~" is expanded.
TEXT = st.text("aZ0 é_-./:#'\"[]{}=,*&!|>%@", min_size=1, max_size=12).filter(lambda text: "://" not in text)


def leaves(schema, prefix=""):
    """Return the type of each key of a section and of the sections in it."""
    found = {}
    for name, kind in hints_of(schema).items():
        is_section = is_dataclass(kind) and isinstance(kind, type)
        found |= leaves(kind, f"{prefix}{name}.") if is_section else {prefix + name: kind}
    return found


def values_of(kind):
    """Return a strategy for the values of a key's type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if origin is Annotated:
        interval = next((item for item in arguments[1:] if isinstance(item, Interval)), None)
        return numbers(arguments[0], interval) if interval else values_of(arguments[0])
    return {bool: st.booleans(), str: TEXT, int: st.integers(), type(None): st.none(), float: st.floats()}[kind]


def numbers(kind, interval):
    low, high = interval.bounds
    if kind is int:
        values = st.integers(int(low), int(high))
    else:
        values = st.floats(low, None if high == float("inf") else high, allow_nan=False, allow_infinity=False)
    return values.filter(interval.holds)


KINDS = leaves(Config)
# The strategies would rarely draw sizes that fit together; they are part of small_dict.
FIXED = {key for key in KINDS if key.startswith(("model.", "parallel."))} | {
    "train.global_batch", "train.micro_batch", "mup.base_heads", "mup.base_shapes", "init.preset",
}  # fmt: skip


@st.composite
def overrides(draw):
    """Return values of up to six keys by dotted key."""
    keys = draw(st.lists(st.sampled_from(sorted(KINDS.keys() - FIXED)), min_size=1, max_size=6, unique=True))
    return {key: draw(values_of(KINDS[key])) for key in keys}


def as_override(key, value):
    style = '"' if isinstance(value, str) else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**6, allow_unicode=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(values=overrides())
def test_random_values_survive_saving_and_are_equal_as_overrides(tmp_path, arch, values):
    file, base = tmp_path / "file.yaml", tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(small_dict(arch, **values)))
    base.write_text(yaml.safe_dump(small_dict(arch)))
    try:
        config = load_config(file)
    except UserError:  # values that contradict each other
        assume(False)
    found = flatten(config)
    given_values = {
        key: value for key, value in values.items() if value is not None
    }  # null: the architecture's default
    assert {key: found[key] for key in given_values} == given_values
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config_from_dict(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == config
    assert load_config(base, [as_override(key, value) for key, value in values.items()]) == config
