"""Read small files that users or other programs wrote, and write result files safely."""

from __future__ import annotations

import stat
from pathlib import Path

from megatron_dit.errors import UserError

TEXT_LIMIT = 4 << 20  # bytes of a YAML file: parsing takes about a second per MiB


def read_text(path: Path, name: str, expected: str = "a file", limit: int = TEXT_LIMIT) -> str:
    """Return the text of a regular UTF-8 file of at most ``limit`` bytes, without a byte-order mark.

    ``name`` is how messages call the file, such as ``config a.yaml``, and ``expected`` what it should be. Raises
    UserError if there is no such file, or if it cannot be read, is too large or is not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UserError(f"{name} is {kind}: expected {expected}")
        if status.st_size > limit:
            raise UserError(f"{name} has {status.st_size:,} bytes, expected at most {limit:,}: it is another file")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{name} is not UTF-8 (byte 0x{byte:02x} at position {error.start}): save it as UTF-8"
        ) from None
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: give the path of {expected}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be read ({error})") from None
