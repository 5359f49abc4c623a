"""Loading of encoders in transformers and diffusers format, from a local folder or a hub name, with checks.

A name is a local folder, a hub repository ``owner/name``, a folder inside one ``owner/name/folder``, or a pipeline that
contains the encoder in one of its folders.
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

from megatron_dit.runtime.compat import disable_safetensors_conversion
from megatron_dit.runtime.content import Content, content_of, mismatch
from megatron_dit.runtime.errors import UserError

SHOWN = 3  # number of tensor names that a message shows
# If a library cannot load a file safely, its error message advises loading it unsafely, or training missing weights.
_ADVICE = re.compile(
    r"weights_only|trust_remote_code|allow_pickle|use_safetensors|ignore_mismatched_sizes|low_cpu_mem_usage|force_download"
    r"|from_tf|from_flax|pip install|TRAIN this model|issues"
)


@dataclass(frozen=True)
class Kind:
    """A kind of encoder and the layout of its folders."""

    what: str  # name for messages
    title: str  # the model's name with its article
    key: str  # key in config.json that gives the model type
    value: str  # expected value of ``key``
    stem: str  # file name stem of safetensors weights
    pickled: str  # file name stem of weights written by torch.save
    parts: tuple[str, ...] = ()  # folders of a pipeline that may contain one
    others: tuple[str, ...] = ()  # name prefixes of weights that belong to other parts of the published model


STEM = "diffusion_pytorch_model"  # file name stem of diffusers' weights
T5 = Kind(
    "text encoder", "a T5", "model_type", "t5", "model", "pytorch_model",
    ("text_encoder", "text_encoder_2", "text_encoder_3"), ("decoder.", "lm_head."),
)  # fmt: skip
CLIP = Kind("CLIP model", "a CLIP", "model_type", "clip", "model", "pytorch_model")
DINOV2 = Kind("vision encoder", "a DINOv2", "model_type", "dinov2", "model", "pytorch_model", others=("classifier.",))
MASK2FORMER = Kind("detector", "a Mask2Former", "model_type", "mask2former", "model", "pytorch_model")
VAE = Kind("VAE", "an AutoencoderKL", "_class_name", "AutoencoderKL", STEM, STEM, ("vae",))


@dataclass(frozen=True)
class Source:
    """A local folder (``repo``, with ``folder`` ""), or a folder of a hub repository."""

    repo: str
    local: bool
    folder: str = ""

    @property
    def name(self) -> str:
        """Name that :func:`source_of` resolves to this source: a path, ``owner/name`` or ``owner/name/folder``."""
        return f"{self.repo}/{self.folder}" if self.folder else self.repo

    def part(self, folder: str) -> Source:
        if self.local:
            return Source(str(Path(self.repo, folder)), local=True)
        return Source(self.repo, False, f"{self.folder}/{folder}" if self.folder else folder)

    def sibling(self, folder: str) -> Source:
        """Return the folder of that name in the same parent folder."""
        if self.local:
            return Source(str(_absolute(self.repo).parent / folder), local=True)
        return Source(self.repo, False, "/".join([*self.folder.split("/")[:-1], folder]))

    @property
    def last(self) -> str:
        """Name of the folder."""
        return _absolute(self.repo).name if self.local else self.folder.rpartition("/")[2]

    def file(self, name: str) -> Path | None:
        """Return the path of a file in the folder, downloading it from the hub if needed; None if it does not exist."""
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
    """Return the source that a name refers to, without checking that it exists."""
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(str(path), local=True)
    parts = name.split("/")
    hub = len(parts) > 2 and all(parts) and not name.startswith((".", "~"))
    return Source("/".join(parts[:2]), False, "/".join(parts[2:])) if hub else Source(name, local=False)


def _absolute(path: str) -> Path:
    """Make a path absolute without resolving symbolic links, because siblings are looked up next to the link."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def locate(kind: Kind, name: str) -> Source:
    """Return the folder of an encoder. Raise UserError if ``name`` does not contain one of this kind."""
    with loading(kind, name):
        source = source_of(name)
        if not source.local and (Path(name).expanduser().exists() or name.startswith(("/", "./", "../", "~"))):
            raise UserError(f"{kind.what} {name} is not a folder; give the folder or hub name of {kind.title}")
        config = source.json("config.json")
        if config is None:
            found = {part: source.part(part).json("config.json") for part in kind.parts}
            right = [part for part, settings in found.items() if settings and settings.get(kind.key) == kind.value]
            if not right and any(found.values()):
                right = [part for part, settings in found.items() if settings][:1]  # _check_type rejects it below
            if not right:
                missing = (
                    "it has no config.json"
                    if source.local
                    else ("no such folder exists, and neither the hub nor its cache has a config.json for that name")
                )
                raise UserError(
                    f"{kind.what} {name} cannot be loaded ({missing}); give the folder or hub name of {kind.title}"
                )
            source, config = source.part(right[0]), found[right[0]] or {}
        _check_type(kind, source, config)
        return source


def load(kind: Kind, source: Source, loader: Any, **options: Any) -> Any:
    """Load a model with ``loader`` from a folder.

    Raise UserError unless the files contain exactly the model's weights, all finite. Pickled files are accepted only if
    ``options`` contain ``weights_only``, and are then read as plain tensors.
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
    """Convert any exception of a library that fails to load a file into a one-line UserError."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_safetensors_conversion()
    # These loggers list missing and unexpected weights at length; `_check_names` raises an error for them instead.
    reporters = [logging.getLogger(f"{name}.modeling_utils") for name in ("transformers", "diffusers.models")]
    for reporter in reporters:
        reporter.addFilter(_drop)
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file or a config with wrong types can raise anything
        raise UserError(
            f"{kind.what} {name} cannot be loaded ({reason_of(error)}); give the folder or hub name of {kind.title}"
        ) from error
    finally:
        for reporter in reporters:
            reporter.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False


def reason_of(error: Exception) -> str:
    """Return the first line of a library's error message, without advice to load a file unsafely."""
    text = str(error).strip()
    if not text:
        return type(error).__name__
    if any(advice in text for advice in ("weights_only", "Weights only load failed", "allow_pickle")):
        return "it contains pickled objects, which are not loaded for safety"
    # A line that ends in a colon continues on the next line.
    line = re.sub(r":\s*\n\s*", ": ", text).splitlines()[0]
    kept = [sentence for sentence in re.split(r"(?<=[.!?])\s+", line) if not _ADVICE.search(sentence)]
    return " ".join(" ".join(kept).split()).rstrip(". ")[:300] or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raise UserError for any other content."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        content = content_of(path)
        description = content.description if content.name != "json" else "damaged JSON or JSON of another type"
        raise UserError(f"{path} is {description}, not a JSON object; {content.remedy}")
    return found


def variants(folder: Path, stem: str, ending: str = "safetensors") -> list[str]:
    """Return the variants (such as "fp16") of a folder's weights, in diffusers' and transformers' naming.

    "" stands for weights without a variant.
    """
    single = re.compile(rf"{stem}(?:\.(?P<name>[^.]+))?\.{ending}")
    index = re.compile(rf"{stem}\.{ending}\.index(?:\.(?P<name>[^.]+))?\.json")
    names = (path.name for path in folder.iterdir())
    found = [match for name in names for form in (single, index) if (match := form.fullmatch(name))]
    shard = re.compile(r"-\d{5}-of-\d{5}")
    return sorted({match["name"] or "" for match in found if not shard.search(match[0])})


def weight_files(folder: Path, stem: str, variant: str, ending: str = "safetensors") -> list[Path]:
    """Return the files of one of the ``variants``.

    Raise UserError if a file is missing or its content does not match its extension.
    """
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
    """Return the files listed in an index of sharded weights. They must be in the index's own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map of file names; download or export it again")
    files = sorted(set(weight_map.values()))
    unsafe = next((name for name in files if Path(name).name != name), None)
    if unsafe is not None:
        raise UserError(f"{index} lists {unsafe!r}; expected file names inside its own folder")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index} lists {missing[0]}, which is not in its folder ({len(missing)} of {len(files)} files are "
            "missing); download the missing files"
        )
    return [index.parent / name for name in files]


def _weights_options(kind: Kind, folder: Path, pickled: bool) -> dict[str, Any]:
    """Check the weight files in a local folder and return the ``from_pretrained`` arguments that load them."""
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
        raise UserError(f"{folder} has weights in several variants, {', '.join(found)}; keep only one of them")
    if pickles:
        path = folder / f"{kind.pickled}.bin"
        form = content_of(path) if path.is_file() else Content("torch", "a pickle")
        remedy = form.remedy if form.name == "safetensors" else "save it again with safe_serialization=True"
        raise UserError(f"{folder} has its weights in {path.name} ({form.description}), not in safetensors; {remedy}")
    missing = f"it has no {kind.stem}.safetensors"
    raise UserError(f"{kind.what} {folder} cannot be loaded ({missing}); give the folder or hub name of {kind.title}")


def _check_type(kind: Kind, source: Source, config: dict[str, Any]) -> None:
    """Raise UserError if config.json declares a different model type than ``kind``.

    If it declares none, a wrong model is detected later, when the names of the weights are checked.
    """
    found = config.get(kind.key)
    other = config.get("_class_name") or config.get("model_type")
    if found not in (None, kind.value) or (found is None and other is not None):
        raise UserError(
            f"{kind.what} {source.name} is of type {other or found}; give the folder or hub name of {kind.title}"
        )


def _check_names(kind: Kind, source: Source, info: dict[str, Any]) -> None:
    """Raise UserError if weights are missing, unexpected or of a wrong shape."""
    wrong = [
        (name, f"{list(found)}, but its config.json implies {list(expected)}")
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    if wrong:
        name, shapes = wrong[0]
        raise UserError(
            f"{kind.what} {source.name} has {name} of shape {shapes}; its files do not belong together, download it "
            "again"
        )
    extra = [name for name in info["unexpected_keys"] if not name.startswith(kind.others)]
    for names, problem in ((info["missing_keys"], "lacks the weights"), (extra, "has unexpected weights")):
        if names:
            shown = sorted(names)[:SHOWN]
            more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
            raise UserError(
                f"{kind.what} {source.name} {problem} {', '.join(shown)}{more}; they do not match {kind.title} as "
                "described by its config.json, download it again"
            )


def _check_finite(kind: Kind, source: Source, model: torch.nn.Module) -> None:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        # Parameters sharded by ZeRO-3 are empty here. Their files have the same hash as when the data were encoded, and
        # were checked then.
        if value.is_floating_point() and not value.isfinite().all():
            dtype = str(value.dtype).removeprefix("torch.")
            raise UserError(
                f"{kind.what} {source.name} has NaN or infinite values in {name} ({dtype}); download it again"
            )
