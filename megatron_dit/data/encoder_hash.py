"""Hash of an encoder's weight files, which identifies the encoder that a dataset was encoded with."""

from __future__ import annotations

from pathlib import Path

from megatron_dit.data.hub import reason_of, source_of
from megatron_dit.data.tar import sha256_of
from megatron_dit.runtime.errors import UserError


def weights_sha256(name: str) -> str:
    """Return the SHA-256 of the weight files in a local folder, or of a hub repository that is already downloaded.

    Raise UserError if there are no weight files.
    """
    folder = local_folder(name)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"encoder {name} has no weights in {folder}; expected *.safetensors")
    return sha256_of(*files)


def local_folder(name: str) -> Path:
    """Return the local folder of an encoder: the folder itself, or the hub cache's copy of a hub name.

    Raise UserError if the hub repository has not been downloaded.
    """
    source = source_of(name)
    if source.local:
        return Path(source.repo)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.repo, local_files_only=True), source.folder)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"encoder {name} is not available locally ({reason_of(error)}); give a local folder, or download it first"
        ) from None
