"""Which encoder made the features: the hash of its weights' files."""

from __future__ import annotations

from pathlib import Path

from megatron_dit.data.pretrained import reason_of, source_of
from megatron_dit.data.tar import sha256_of
from megatron_dit.errors import UserError


def weights_sha256(name: str) -> str:
    """SHA-256 of the weights of a local folder, or of a hub name that has been loaded before.

    Raises UserError if there are none.
    """
    folder = local_folder(name)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"encoder {name} has no weights in {folder}: expected *.safetensors")
    return sha256_of(*files)


def local_folder(name: str) -> Path:
    """The folder of a local name, or of what has been downloaded of a hub name. Raises UserError if it is not here."""
    source = source_of(name)
    if source.local:
        return Path(source.repo)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.repo, local_files_only=True), source.folder)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"encoder {name} is not on this machine ({reason_of(error)}): give its folder, or download it first"
        ) from None
