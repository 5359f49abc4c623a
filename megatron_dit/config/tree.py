"""Parse YAML into a tree of strings, so that the declared type of a key decides how its scalar is converted.

YAML 1.1's own rules read ``010`` as 8, ``1:30`` as 90, ``no`` as false and ``1e-4`` as text, regardless of the key.
There is no interpolation, and tags and duplicate keys are errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, Union

import yaml

from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import read_text

MAX_NODES = 100_000  # values per file after alias expansion (guards against YAML bombs)
MAX_DEPTH = 20

_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")}  # tags of nodes without an explicit tag


@dataclass(frozen=True)
class Scalar:
    """Text of a YAML scalar; ``plain`` if it was written without quotes."""

    text: str
    plain: bool = True

    def __str__(self) -> str:
        return (self.text or "null") if self.plain else repr(self.text)


Tree: TypeAlias = Union["dict[str, Tree]", "list[Tree]", Scalar]


def read_tree(path: Path, name: str) -> Tree:
    """Parse a YAML file. Raises UserError that refers to the file as ``name``."""
    return parse_tree(read_text(path, name, "a YAML file, such as configs/quickstart.yaml"), name)


def parse_tree(text: str, source: str) -> Tree:
    """Parse YAML text. Raises UserError that names ``source`` if it is not exactly one valid document."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        if node is None:
            raise UserError(f"{source} is empty: expected keys and their values")
        return _Builder(source).build(node, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source} is not valid YAML{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # control characters
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply: expected at most {MAX_DEPTH} levels") from None


class _Builder:
    def __init__(self, source: str) -> None:
        self._source, self._nodes = source, 0

    def build(self, node: yaml.Node, depth: int) -> Tree:
        """Convert a node to a tree, expanding aliases up to MAX_NODES and MAX_DEPTH."""
        self._nodes += 1
        line = node.start_mark.line + 1
        if self._nodes > MAX_NODES:
            raise UserError(f"{self._source} has more than {MAX_NODES:,} values; check the path")
        if depth > MAX_DEPTH:
            raise UserError(f"{self._source} is nested too deeply: expected at most {MAX_DEPTH} levels")
        if node.tag not in _TAGS:
            raise UserError(f"{self._source}, line {line}: the tag {node.tag!r} is not supported; remove it")
        if isinstance(node, yaml.ScalarNode):
            return Scalar(node.value, plain=node.style is None)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, depth + 1) for item in node.value]
        assert isinstance(node, yaml.MappingNode)
        found: dict[str, Tree] = {}
        for key, value in node.value:
            name = self.build(key, depth + 1)
            if not isinstance(name, Scalar):
                raise UserError(f"{self._source}, line {line}: a key must be text, not {type(name).__name__}")
            if name.text in found:
                raise UserError(
                    f"{self._source}, line {key.start_mark.line + 1}: {name.text!r} is given twice, remove one"
                )
            found[name.text] = self.build(value, depth + 1)
        return found
