"""Contents that a failed download leaves in place of a file."""

from __future__ import annotations

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
PAGE = "<!DOCTYPE html><html>Sign in</html>"
