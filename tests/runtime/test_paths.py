"""User paths: the home folder is expanded, and variables that no shell has expanded are rejected."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.paths import user_path


@pytest.mark.parametrize("path", ["~", "~/x", "~root/x", "a/~b", "-x", "café", "a%20b", "data[1]", "a$", "5$"])
def test_home_folder_is_expanded_as_in_fsspec(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Path(user_path(path, "run_dir")).absolute() == Path(LocalFileSystem._strip_protocol(path))


def test_urls_and_explicit_relative_paths_are_unchanged():
    assert user_path("s3://bucket/~x", "data.path") == "s3://bucket/~x"
    assert user_path("./x", "run_dir") == "./x"


def test_folder_named_with_a_tilde_keeps_its_path_when_expanded_again():
    path = user_path("./~root", "run_dir")
    assert Path(user_path(str(Path(path)), "run_dir")) == Path.cwd() / "~root"


@pytest.mark.parametrize(
    "path", ["$SCRATCH/run", "a/${USER}/b", "s3://b/$NAME", "~nobody-here/x", "a" * 256, "a/" * 2048, "a\0b", "é" * 128]
)
def test_variables_unknown_users_and_invalid_paths_are_rejected(path):
    with pytest.raises(UserError, match="run_dir"):
        user_path(path, "run_dir")
