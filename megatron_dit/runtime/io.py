"""Read small text files from users or other programs, and write result files atomically."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dit.runtime.errors import UserError, writing

TEXT_LIMIT = 4 << 20  # bytes of a YAML file: parsing takes about a second per MiB


def read_text(path: Path, name: str, expected: str = "a file", limit: int = TEXT_LIMIT) -> str:
    """Return the text of a regular UTF-8 file of at most ``limit`` bytes, without a byte-order mark.

    ``name`` identifies the file in messages, such as ``config a.yaml``; ``expected`` describes the expected file.
    Raises UserError if the file does not exist, cannot be read, is too large or is not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UserError(f"{name} is {kind}: expected {expected}")
        if status.st_size > limit:
            raise UserError(f"{name} has {status.st_size:,} bytes, expected at most {limit:,}; check the path")
        return decode(path.read_bytes(), name)
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: pass the path of {expected}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read ({error})") from None


def decode(data: bytes, name: str) -> str:
    """Return UTF-8 text without a byte-order mark. Raises UserError, with the ``name`` of the text, if it is not."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{name} is not UTF-8 (byte 0x{byte:02x} at position {error.start}): save it as UTF-8"
        ) from None


def check_output(path: Path, option: str, *, makes_folder: bool = False) -> None:
    """Raise UserError if a file cannot be created at ``path``, the value of ``option``. No file is left behind.

    Long-running commands call this before they start. ``makes_folder``: the writer will create missing folders.
    """
    try:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder: expected the name of a file")
        folder = path.parent
        while makes_folder and not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist, create it first"
            raise UserError(f"{option} {path} cannot be written: {folder} {what}")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{option} {path} cannot be written: it is read-only; choose another name")
        if not _is_written_in_place(path):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {path} cannot be written ({reason}); choose another folder") from None


@contextmanager
def replacing(path: Path, *, makes_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to ``path`` at the end. On failure the old file stays.

    Devices and pipes, such as /dev/stdout, are written in place. ``makes_folder``: create missing folders.
    Raises UserError if the file cannot be written.
    """
    if _is_written_in_place(path):
        with writing(path):
            yield path
        return
    target = path.resolve()  # replace the target of a symbolic link, not the link
    part = target.with_name(f".{os.getpid()}.part{target.suffix}")
    try:
        with writing(path):
            if makes_folder:
                target.parent.mkdir(parents=True, exist_ok=True)
            yield part
            if target.exists():
                shutil.copymode(target, part)
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _is_written_in_place(path: Path) -> bool:
    return path.is_relative_to("/dev") or (path.exists() and not path.is_file())
