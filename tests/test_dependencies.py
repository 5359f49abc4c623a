"""pyproject.toml declares every package that the code imports, and no others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PRODUCT = ("megatron_dit", "data_prep", "checkpoints_tools")
OURS = {*PRODUCT, "tests", "benchmarks"}
# Distributions that other packages import on our behalf: distribution -> the module of ours that needs it.
INDIRECT = {"accelerate": "diffusers", "tensorboard": "torch.utils.tensorboard"}
NOT_ON_PYPI = {"apex"}  # NVIDIA Apex is installed from source


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras):
    """Return the names of the distributions that pyproject.toml declares, with those of the ``extras``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements} - {"megatron-dit"}


def imported(*folders):
    """Return the modules that the files in ``folders`` import, with the file of each.

    Includes calls such as ``import_module("apex.optimizers")``.
    """
    found = {}
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update({alias.name: path for alias in node.names})
            elif isinstance(node, ast.ImportFrom) and node.module:
                found[node.module] = path
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if function.startswith("import"):
                    found[node.args[0].value] = path
    return found


def undeclared(modules, known):
    """Return the third-party modules, with a file that imports each, whose distribution is not among ``known``."""
    distributions = packages_distributions()
    tops = {module.split(".")[0]: path for module, path in modules.items()}
    return {
        top: str(path.relative_to(ROOT))
        for top, path in tops.items()
        if top not in {*sys.stdlib_module_names, *OURS, *NOT_ON_PYPI}
        and not {normal(name) for name in distributions.get(top, [top])} & known
    }


def test_every_import_of_the_packages_is_a_declared_dependency():
    assert not undeclared(imported(*PRODUCT), declared("te", "prep", "eval"))


def test_every_import_of_tests_and_benchmarks_is_a_declared_dependency():
    assert not undeclared(imported("tests", "benchmarks"), declared("te", "prep", "eval", "dev"))


@pytest.mark.parametrize("extras", [(), ("prep",)])
def test_every_declared_dependency_is_imported(extras):
    modules = imported(*PRODUCT)
    distributions = packages_distributions()
    used = {normal(name) for module in modules for name in distributions.get(module.split(".")[0], [])}
    used |= {distribution for distribution, module in INDIRECT.items() if module in modules}
    assert not declared(*extras) - used


def test_undeclared_imports_are_detected():
    modules = {"yaml": ROOT / "x.py", "json": ROOT / "x.py", "not_installed.part": ROOT / "y.py"}
    assert undeclared(modules, {"pyyaml"}) == {"not_installed": "y.py"}
    assert undeclared(modules, set()) == {"yaml": "x.py", "not_installed": "y.py"}


def test_training_starts_without_torchs_compiler():
    """Its import takes 1.5 seconds in every process, and a run needs it only with train.compile."""
    code = (
        "import sys, torch, megatron_dit.training.trainer\n"
        "print(torch.compile.__module__, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["torch", "False"]
