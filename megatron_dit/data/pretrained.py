"""transformers' encoders from a local folder or a hub name."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator

from megatron_dit.errors import UserError


@contextlib.contextmanager
def loading(what: str, kind: str, name: str) -> Iterator[None]:
    """Keeps transformers quiet; what it cannot load is the user's mistake. Ask it for ``weights_only``."""
    from transformers import logging
    from transformers.utils.logging import disable_progress_bar

    logging.set_verbosity_error()
    disable_progress_bar()
    # Where a repository has no safetensors transformers would ask a service of the hub to convert its weights and load
    # what it proposes, which is not the repository's and has another hash.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        yield
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{what} {name} cannot be loaded ({reason}): give a {kind} folder or hub name") from None
