"""Which encoder made the features: the hash of its weights' files."""

from __future__ import annotations

from pathlib import Path

from megatron_dit.data.tar import sha256_of
from megatron_dit.errors import UserError


def weights_sha256(name: str) -> str:
    """SHA-256 of the weights of a local folder, or of a hub name that has been loaded before.

    Raises UserError where there are none.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"encoder {name} has no weights here ({reason}): give its folder or hub name") from None
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"encoder {name} has no weights in {folder}: expected *.safetensors")
    return sha256_of(*files)
