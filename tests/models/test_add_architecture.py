"""The example of docs/add-an-architecture.md, one folder and one line, trains, verifies and plans."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.configs import small_dict

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "add-an-architecture.md"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with the folder that the page shows and its one line."""
    root = tmp_path_factory.mktemp("fifth")
    shutil.copytree(ROOT / "megatron_dit", root / "megatron_dit", ignore=shutil.ignore_patterns("__pycache__"))
    page = PAGE.read_text()
    files = re.findall(r"```python\n# (megatron_dit/models/\w+/\w+\.py)\n(.*?)```", page, re.DOTALL)
    assert [Path(name).name for name, _ in files] == ["spec.py", "model.py"]
    for name, code in files:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(code)
    (root / files[0][0]).with_name("__init__.py").touch()
    (line,) = re.findall(r"^ARCHITECTURES = .*$", page, re.MULTILINE)
    registry = root / "megatron_dit" / "models" / "registry.py"
    text, count = re.subn(r"(?m)^ARCHITECTURES = .*$", line, registry.read_text())
    assert count == 1
    registry.write_text(text)
    return root


def run(package, *arguments):
    env = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, "-m", "megatron_dit", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False, cwd=package)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def config(tmp_path, dataset):
    values = small_dict("dit", **{"data.path": str(dataset), "run_dir": str(tmp_path / "run"), "train.steps": 3})
    values["model"] |= {"arch": "plain", "learn_sigma": False, "depth": 4}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_example_architecture_trains_and_plans(package, config, tmp_path):
    assert "3/3" in run(package, "train", config)
    assert (tmp_path / "run" / "checkpoints" / "step_00000003").is_dir()
    assert "predicted" in run(package, "plan", config, "parallel.tensor=2", "--gpus", "4", "--build", "1")


def test_layouts_of_the_example_architecture_equal_one_process(package, config):
    out = run(package, "verify", config, "--layouts", "tp2-sp,pp2-interleaved", "--steps", "2")
    assert len(re.findall(r"\bok\b", out)) == 2, out
