"""Encoders in the formats of transformers and diffusers, from a local folder or a hub name, checked before use.

A name is a folder, a hub repository ``owner/name``, a folder in one ``owner/name/folder``, or a pipeline that holds the
encoder in one of its folders.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dit.errors import UserError
from megatron_dit.runtime.content import Content, content_of, mismatch

SHOWN = 3  # names of tensors in a message
# A library that cannot load a file safely advises to load it unsafely, or to train what is missing.
_ADVICE = re.compile(
    r"weights_only|trust_remote_code|allow_pickle|use_safetensors|ignore_mismatched_sizes|low_cpu_mem_usage|force_download"
    r"|from_tf|from_flax|pip install|TRAIN this model|issues"
)


@dataclass(frozen=True)
class Kind:
    """A kind of encoder, and how its folders look."""

    what: str  # in messages
    title: str  # with its article
    key: str  # of config.json that says what the model is
    value: str  # of ``key``
    stem: str  # of the files of weights in safetensors
    pickled: str  # of those that torch.save wrote
    parts: tuple[str, ...] = ()  # folders of a pipeline that may hold one
    others: tuple[str, ...] = ()  # beginnings of names of weights that belong to other parts of the published model


STEM = "diffusion_pytorch_model"  # of diffusers' files of weights
T5 = Kind(
    "text encoder", "a T5", "model_type", "t5", "model", "pytorch_model",
    ("text_encoder", "text_encoder_2", "text_encoder_3"), ("decoder.", "lm_head."),
)  # fmt: skip
DINOV2 = Kind("vision encoder", "a DINOv2", "model_type", "dinov2", "model", "pytorch_model", others=("classifier.",))
VAE = Kind("VAE", "an AutoencoderKL", "_class_name", "AutoencoderKL", STEM, STEM, ("vae",))


@dataclass(frozen=True)
class Source:
    """A local folder (``repo``; ``folder`` is ""), or a folder of a hub repository."""

    repo: str
    local: bool
    folder: str = ""

    @property
    def name(self) -> str:
        """What finds this again: a path, ``owner/name`` or ``owner/name/folder``."""
        return f"{self.repo}/{self.folder}" if self.folder else self.repo

    def part(self, folder: str) -> Source:
        if self.local:
            return Source(str(Path(self.repo, folder)), local=True)
        return Source(self.repo, False, f"{self.folder}/{folder}" if self.folder else folder)

    def sibling(self, folder: str) -> Source:
        """The folder beside this one."""
        if self.local:
            return Source(str(_absolute(self.repo).parent / folder), local=True)
        return Source(self.repo, False, "/".join([*self.folder.split("/")[:-1], folder]))

    @property
    def last(self) -> str:
        """Name of the folder."""
        return _absolute(self.repo).name if self.local else self.folder.rpartition("/")[2]

    def file(self, name: str) -> Path | None:
        """A file of the folder, downloaded if it is on the hub; None if there is none."""
        if self.local:
            path = Path(self.repo, name)
            return path if path.is_file() else None
        from transformers.utils import cached_file

        found = cached_file(self.repo, name, subfolder=self.folder, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    def json(self, name: str) -> dict[str, Any] | None:
        path = self.file(name)
        return None if path is None else read_json(path)


def source_of(name: str) -> Source:
    """The source that a name means; that it exists is not checked."""
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(str(path), local=True)
    parts = name.split("/")
    hub = len(parts) > 2 and all(parts) and not name.startswith((".", "~"))
    return Source("/".join(parts[:2]), False, "/".join(parts[2:])) if hub else Source(name, local=False)


def _absolute(path: str) -> Path:
    """Without "." and "..", but with symbolic links as they are: their folder has other files beside it."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def locate(kind: Kind, name: str) -> Source:
    """The folder of an encoder. Raises UserError if ``name`` has none of this kind."""
    with loading(kind, name):
        source = source_of(name)
        if not source.local and (Path(name).expanduser().exists() or name.startswith(("/", "./", "../", "~"))):
            raise UserError(f"{kind.what} {name} is not a folder: give the folder or hub name of {kind.title}")
        config = source.json("config.json")
        if config is None:
            found = {part: source.part(part).json("config.json") for part in kind.parts}
            right = [part for part, settings in found.items() if settings and settings.get(kind.key) == kind.value]
            if not right and any(found.values()):
                right = [part for part, settings in found.items() if settings][:1]  # refused below, by its type
            if not right:
                missing = (
                    "it has no config.json"
                    if source.local
                    else ("there is no such folder, and no config.json of that name on the hub or in its cache")
                )
                raise UserError(
                    f"{kind.what} {name} cannot be loaded ({missing}): give the folder or hub name of {kind.title}"
                )
            source, config = source.part(right[0]), found[right[0]] or {}
        _check_type(kind, source, config)
        return source


def load(kind: Kind, source: Source, loader: Any, **options: Any) -> Any:
    """The model that ``loader`` makes of a folder. Raises UserError unless all of its weights are in the files, finite.

    Pickled files are read as plain tensors only if ``options`` ask for ``weights_only``.
    """
    with loading(kind, source.name):
        if source.local:
            options |= _weights_options(kind, Path(source.repo), pickled="weights_only" in options)
        elif source.folder:
            options["subfolder"] = source.folder
        model, info = loader.from_pretrained(source.repo, output_loading_info=True, **options)
    _check_names(kind, source, info)
    _check_finite(kind, source, model)
    return model


@contextlib.contextmanager
def loading(kind: Kind, name: str) -> Iterator[None]:
    """Turn whatever a library raises for files that it cannot load into a UserError of one line."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # If a repository has no safetensors, transformers would ask a service of the hub to convert its weights and load
    # what it proposes, which is not the repository's and has another hash.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    # They report missing and unexpected weights at length; `_check_names` makes an error of these.
    reporters = [logging.getLogger(f"{name}.modeling_utils") for name in ("transformers", "diffusers.models")]
    for reporter in reporters:
        reporter.addFilter(_drop)
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file or a config of other types can raise anything
        raise UserError(
            f"{kind.what} {name} cannot be loaded ({reason_of(error)}): give the folder or hub name of {kind.title}"
        ) from error
    finally:
        for reporter in reporters:
            reporter.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False


def reason_of(error: Exception) -> str:
    """The first line of a library's message, without its advice to load a file unsafely."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    if any(advice in text for advice in ("weights_only", "Weights only load failed", "allow_pickle")):
        return "it holds objects that are not plain numbers, and those are not read"
    # A line that ends in a colon promises the next.
    line = re.sub(r":\s*\n\s*", ": ", text).splitlines()[0]
    kept = [sentence for sentence in re.split(r"(?<=[.!?])\s+", line) if not _ADVICE.search(sentence)]
    return " ".join(" ".join(kept).split()).rstrip(". ")[:300] or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for any other content."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        content = content_of(path)
        description = content.description if content.name != "json" else "damaged JSON, or JSON that is no object"
        raise UserError(f"{path} is {description}, not a JSON object: {content.remedy}")
    return found


def variants(folder: Path, stem: str, ending: str = "safetensors") -> list[str]:
    """Variants (such as "fp16") of a folder's weights, as diffusers and transformers name them; "" is the plain one."""
    single = re.compile(rf"{stem}(?:\.(?P<name>[^.]+))?\.{ending}")
    index = re.compile(rf"{stem}\.{ending}\.index(?:\.(?P<name>[^.]+))?\.json")
    names = (path.name for path in folder.iterdir())
    found = [match for name in names for form in (single, index) if (match := form.fullmatch(name))]
    shard = re.compile(r"-\d{5}-of-\d{5}")
    return sorted({match["name"] or "" for match in found if not shard.search(match[0])})


def weight_files(folder: Path, stem: str, variant: str, ending: str = "safetensors") -> list[Path]:
    """The files of a variant of ``variants``. Raises UserError unless all are there and are what their ending says."""
    inner = f".{variant}" if variant else ""
    single = folder / f"{stem}{inner}.{ending}"
    files = [single] if single.is_file() else _index_files(folder / f"{stem}.{ending}.index{inner}.json")
    for path in files:
        require(path, *(("safetensors",) if ending == "safetensors" else ("torch", "pickle")))
    return files


def require(path: Path, *names: str) -> None:
    """Raise UserError unless the content of ``path`` is one of ``names`` (see ``runtime.content``)."""
    wrong = mismatch(path, *names)
    if wrong is not None:
        raise UserError(wrong)


def _index_files(index: Path) -> list[Path]:
    """The files that an index of sharded weights names, which must be in its own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map of names of files: download or export it again")
    files = sorted(set(weight_map.values()))
    unsafe = next((name for name in files if Path(name).name != name), None)
    if unsafe is not None:
        raise UserError(f"{index} names {unsafe!r}: expected the names of files in its own folder")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index} names {missing[0]}, which is not in its folder ({len(missing)} of {len(files)} files are "
            "missing): download them"
        )
    return [index.parent / name for name in files]


def _weights_options(kind: Kind, folder: Path, pickled: bool) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for the weights that are in a local folder, whose files are checked here."""
    found = variants(folder, kind.stem)
    pickles = [] if "" in found else variants(folder, kind.pickled, "bin")
    if pickled and "" in pickles:
        weight_files(folder, kind.pickled, "", "bin")
        return {"use_safetensors": False}
    chosen = "" if "" in found else found[0] if len(found) == 1 else None
    if chosen is not None:
        weight_files(folder, kind.stem, chosen)
        return {"use_safetensors": True, **({"variant": chosen} if chosen else {})}
    if found:
        raise UserError(f"{folder} has its weights in the variants {', '.join(found)}: leave only one of them there")
    if pickles:
        path = folder / f"{kind.pickled}.bin"
        form = content_of(path) if path.is_file() else Content("torch", "a pickle")
        remedy = form.remedy if form.name == "safetensors" else "save it again with safe_serialization=True"
        raise UserError(f"{folder} has its weights in {path.name}, {form.description}, not in safetensors: {remedy}")
    missing = f"it has no {kind.stem}.safetensors"
    raise UserError(f"{kind.what} {folder} cannot be loaded ({missing}): give the folder or hub name of {kind.title}")


def _check_type(kind: Kind, source: Source, config: dict[str, Any]) -> None:
    """A model of another type is refused. Without a type the names of its weights will show what it is."""
    found = config.get(kind.key)
    other = config.get("_class_name") or config.get("model_type")
    if found not in (None, kind.value) or (found is None and other is not None):
        raise UserError(
            f"{kind.what} {source.name} is of type {other or found}: give the folder or hub name of {kind.title}"
        )


def _check_names(kind: Kind, source: Source, info: dict[str, Any]) -> None:
    """Raises UserError for weights that are missing, left over or of another shape."""
    wrong = [
        (name, f"{list(found)}, not {list(expected)}") for name, found, expected in sorted(info["mismatched_keys"])
    ]
    if wrong:
        name, shapes = wrong[0]
        raise UserError(
            f"{kind.what} {source.name} has {name} of shape {shapes} as its config.json says: its files do not belong "
            "together, download it again"
        )
    extra = [name for name in info["unexpected_keys"] if not name.startswith(kind.others)]
    for names, problem in ((info["missing_keys"], "lacks"), (extra, "has unknown weights")):
        if names:
            shown = sorted(names)[:SHOWN]
            more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
            raise UserError(
                f"{kind.what} {source.name} {problem} {', '.join(shown)}{more}: its weights are not those of "
                f"{kind.title} as its config.json describes it, download it again"
            )


def _check_finite(kind: Kind, source: Source, model: torch.nn.Module) -> None:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        # A parameter that ZeRO-3 shards is empty here; its files' hash is that of files that were checked at encoding.
        if value.is_floating_point() and not value.isfinite().all():
            dtype = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{kind.what} {source.name} has NaN or infinite numbers in {name} ({dtype}): download it again"
            )
