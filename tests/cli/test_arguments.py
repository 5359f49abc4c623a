"""Command-line arguments: ranges of numbers, unabbreviated flags, writable outputs, escaped control characters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints_tools.__main__ import main as checkpoints_tools
from data_prep.__main__ import main as data_prep
from megatron_dit.cli import run
from megatron_dit.sampling.grid import save_grid
from tests.helpers.configs import write_config

NOT_NUMBERS = ["nan", "inf", "010", "0x10", "1_000", "1e2.", "\u0663", "", " 3x", "true"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(write_config(tmp_path))


def refused(capsys, words, command=run):
    """Return the one-line error for an invalid command line; assert that nothing is printed to standard output."""
    assert command([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    return err


@pytest.mark.parametrize(
    ("words", "flag", "wrong"),
    [
        (["sample", "run", "--prompt", "a"], "--steps", ["2.5"]),
        (["sample", "run", "--prompt", "a"], "--guidance", ["1,5"]),
        (["sample", "run", "--prompt", "a"], "--seed", ["-1", str(2**63), "1.5"]),
        (["sample", "run", "--prompt", "a"], "--size", ["0x0", "16", "16x", "x16", "16x16x16", "-16x16", "1e1x16"]),
        (["evaluate", "run"], "--prompts", ["0", "-1"]),
        (["evaluate", "run"], "--min-score", ["-0.1", "1.1"]),
        (["train", "CONFIG"], "--procs", ["0", "-1"]),
        (["plan", "CONFIG", "--build", "0"], "--gpus", ["0", "-1"]),
        (["plan", "CONFIG", "--gpus", "2"], "--build", ["-1"]),
        (["config", "CONFIG"], "--procs", ["0"]),
        (["verify", "CONFIG"], "--steps", ["0"]),
        (["bench", "CONFIG"], "--steps", ["1"]),
        (["bench", "CONFIG"], "--warmup", ["0"]),
        (["coord-check", "CONFIG"], "--seeds", ["0"]),
        (["coord-check", "CONFIG"], "--steps", ["0"]),
        (["coord-check", "CONFIG"], "--heads", ["2", "2,2", "2,010", "2,", "0,2"]),
        (["sweep", "CONFIG"], "--trial", ["-1"]),
    ],
)
def test_invalid_numbers_are_rejected(config, capsys, words, flag, wrong):
    words = [config if word == "CONFIG" else word for word in words]
    for value in [*NOT_NUMBERS, *wrong]:
        assert flag in refused(capsys, [*words, f"{flag}={value}"])


def test_abbreviated_flags_are_rejected(config, capsys):
    assert "--pro" in refused(capsys, ["train", config, "--pro", "2"])
    assert "--kee" in refused(capsys, ["prune", "run", "--keep", "1", "--kee", "2"], checkpoints_tools)
    assert "--ima" in refused(capsys, ["toy", "out", "--ima", "3"], data_prep)


def test_options_without_effect_are_rejected(config, tmp_path, capsys):
    assert "--json and --procs have no effect without a config" in refused(capsys, ["config", "--procs", "2"])
    assert "required: --build" in refused(capsys, ["plan", config, "--gpus", "2"])
    assert "seed is given twice" in refused(capsys, ["train", config, "seed=3", "--procs", "1", "seed=4"])
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"run_dir: {tmp_path}/s\nbase_config: {config}\nspace: {{seed: {{choice: [0]}}}}\n")
    assert "--trial 0 has no effect" in refused(capsys, ["sweep", sweep, "--cost", "--trial", "0"])
    assert "layout ''" in refused(capsys, ["verify", config, "--layouts", ""])


def test_error_for_a_value_starting_with_a_dash_explains_the_syntax(config, capsys):
    assert "write --prompt=VALUE" in refused(capsys, ["sample", "run", "--prompt", "-a"])
    assert "checkpoint run does not exist" in refused(capsys, ["sample", "run", "--prompt=-a"])
    Path("-x.yaml").write_text(Path(config).read_text())
    assert run(["mup", "--", "-x.yaml"]) == 0


def test_special_characters_in_file_names_are_literal(config, capsys):
    name = "a b[1] [red] 50% :x: {y}.yaml"
    Path(name).write_text(Path(config).read_text())
    assert run(["mup", name, "--json", "[x] 100%.json"]) == 0
    assert "role" in json.loads(Path("[x] 100%.json").read_text())[0]
    assert run(["config", name, "run_dir=a\nb: [x] % \x1b[2J"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["train", "\x1b[2J\nx.yaml"], run),
        (["train", "CONFIG", "--\x1b[2J\n"], run),
        (["train", "CONFIG", "\x1b[2J=\n1"], run),
        (["\x1b[2J\n"], run),
        (["sample", "\x1b[2J\nx", "--prompt", "a"], run),
        (["check", "\x1b[2J\nx"], data_prep),
        (["toy", "x", "--images", "\x1b[2J\n"], data_prep),
        (["inspect", "\x1b[2J\nx"], checkpoints_tools),
        (["\x1b[2J\n"], checkpoints_tools),
    ],
)
def test_error_messages_escape_control_characters_of_arguments(config, capsys, words, command):
    err = refused(capsys, [config if word == "CONFIG" else word for word in words], command)
    assert r"\x1b[2J" in err
    assert "\x1b" not in err


OUTPUTS = [
    (["train", "CONFIG"], "--json", run),
    (["config", "CONFIG"], "--json", run),
    (["plan", "CONFIG", "--gpus", "2", "--build", "0"], "--json", run),
    (["verify", "CONFIG"], "--json", run),
    (["bench", "CONFIG"], "--json", run),
    (["mup", "CONFIG"], "--json", run),
    (["mup", "CONFIG"], "--save", run),
    (["coord-check", "CONFIG"], "--json", run),
    (["coord-check", "CONFIG"], "--out", run),
    (["sweep", "CONFIG"], "--json", run),
    (["transfer", "run", "CONFIG", "--out", "x.yaml"], "--json", run),
    (["transfer", "run", "CONFIG"], "--out", run),
    (["sample", "run", "--prompt", "a"], "--json", run),
    (["sample", "run", "--prompt", "a"], "--out", run),
    (["evaluate", "run"], "--json", run),
    (["evaluate", "run"], "--out", run),
    (["toy", "scenes"], "--json", data_prep),
    (["check", "scenes"], "--json", data_prep),
    (["stats", "scenes"], "--json", data_prep),
    (["stats", "scenes"], "--out", data_prep),
    (["inspect", "run"], "--json", checkpoints_tools),
    (["prune", "run", "--keep", "1"], "--json", checkpoints_tools),
]


@pytest.mark.parametrize(("words", "flag", "command"), OUTPUTS)
def test_unwritable_outputs_are_rejected_before_any_work(config, capsys, words, flag, command):
    words = [config if word == "CONFIG" else word for word in words]
    before = sorted(Path().rglob("*"))
    for path in ("/proc/x.png", "config.yaml/x.png", "$HOME/x.png"):
        assert flag in refused(capsys, [*words, flag, path], command)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message", "command"),
    [
        (["mup", "CONFIG", "--json", "CONFIG"], "--json CONFIG is also the config", run),
        (["config", "CONFIG", "--json", "./config.yaml"], "is also the config", run),
        (["mup", "CONFIG", "--save", "a", "--json", "a"], "--json a is also --save", run),
        (["transfer", "run", "CONFIG", "--out", "CONFIG"], "--out CONFIG is also the config", run),
        (["sample", "run", "--prompt", "a", "--out", "a.png", "--json", "a.png"], "--json a.png is also --out", run),
        (["reshard", "run", "moved", "--json", "moved"], "--json moved is also --out", checkpoints_tools),
        (["toy", "scenes", "--json", "scenes"], "--json scenes is also the folder", data_prep),
    ],
)
def test_output_equal_to_an_input_or_another_output_is_rejected(config, capsys, words, message, command):
    before = Path(config).read_bytes()
    err = refused(capsys, [config if word == "CONFIG" else word for word in words], command)
    assert message.replace("CONFIG", config) in err
    assert Path(config).read_bytes() == before
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "PATH"],
        ["prune", "PATH", "--keep", "1"],
        ["average", "PATH", "--sigma-rel", "0.1", "--out", "x"],
        ["average", "run", "--sigma-rel", "0.1", "--out", "PATH"],
        ["reshard", "PATH", "x"],
        ["reshard", "run", "PATH"],
        ["convert", "PATH", "x", "--to", "diffusers"],
        ["convert", "run", "PATH", "--to", "diffusers"],
        ["convert", "run", "x", "--to", "diffusers", "--pipeline", "--vae", "PATH"],
        ["convert", "run", "x", "--to", "diffusers", "--pipeline", "--text-encoder", "PATH"],
        ["convert", "run", "x", "--from", "dit-mup", "--base-shapes", "PATH"],
    ],
)
def test_paths_of_checkpoints_tools_are_validated_like_config_paths(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    for path, reason in (
        ("$SCRATCH/x", "is not expanded"),
        ("~nobody-here/x", "no home folder"),
        ("", "is empty"),
    ):
        assert reason in refused(capsys, [path if word == "PATH" else word for word in words], checkpoints_tools)
    assert not list(tmp_path.iterdir())


def test_error_for_an_empty_path_names_the_argument(config, capsys):
    assert "config is empty" in refused(capsys, ["train", ""])
    assert "checkpoint is empty" in refused(capsys, ["sample", "", "--prompt", "a"])


def test_tilde_in_output_paths_is_expanded(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run(["mup", config, "--json", "~/x.json", "--save", "~/x.bsh"]) == 0
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"x.json", "x.bsh"}
    assert run(["mup", config, "mup.base_heads=null", "mup.base_shapes=~/x.bsh"]) == 0
    assert not Path("~").exists()
    assert run(["mup", config, "--json", "/dev/null"]) == 0
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("given", "written"),
    [("grid1", "grid1.png"), ("images", "images/grid.png"), ("images/", "images/grid.png"), ("a.jpg", "a.jpg")],
)
def test_image_is_written_to_the_resolved_path_in_the_format_of_its_extension(config, capsys, given, written):
    from megatron_dit.cli.arguments import output_image

    Path("images").mkdir()
    path = output_image("--out", "grid.png")(given)
    assert str(path) == written
    save_grid([np.zeros((8, 8, 3), np.uint8)], ["a\x1b[2J red $\\frac$ circle"], path)
    kind = "JPEG" if written.endswith("jpg") else "PNG"
    assert Image.open(written).format == kind
    assert ".xyz" in refused(capsys, ["sample", "run", "--prompt", "a", "--out", "grid.xyz"])
    assert "none does not exist" in refused(capsys, ["sample", "run", "--prompt", "a", "--out", "none/"])
