"""A whole pipeline's folder around an exported transformer: scheduler, VAE and T5, and the index of it all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from checkpoints_tools.convert.export import EXPORTED, Export, write_model
from megatron_dit.config import Config
from megatron_dit.data.shards import Index, read_index
from megatron_dit.errors import UserError
from megatron_dit.sampling.solvers import scheduler_for

OURS = ["pipeline_megatron_dit", "MegatronDiTPipeline"]
# Classes of diffusers that draw what we draw, told what the card says. They need a VAE.
STOCK = {"pixart": "PixArtAlphaPipeline", "mmdit": "StableDiffusion3Pipeline"}


@dataclass(frozen=True)
class Parts:
    """Folders of what the run was trained with; None: it has none."""

    vae: Path | None
    text_encoder: Path | None
    text_tokens: int  # at which captions are cut before they are encoded


def find_index(config: Config) -> Index | None:
    """The index of the run's data, where the data are still there."""
    try:
        return read_index(config.data.path)
    except UserError:
        return None


def find_parts(config: Config, index: Index | None, vae: str | None, text_encoder: str | None) -> Parts:
    """``vae`` and ``text_encoder``, folders or hub names, or else what the data were made with."""
    text = config.model.text_tokens > 0
    if index is None and (vae is None or (text and text_encoder is None)):
        flags = "--vae and --text-encoder" if text else "--vae"
        raise UserError(f"{config.data.path} with the run's data is not here: give {flags}, or restore it")
    if vae is None and index is not None and index.codec["kind"] == "vae":
        vae = index.codec["path"]
    if text and text_encoder is None and index is not None:
        text_encoder = config.data.text_encoder or index.text_encoder
    return Parts(
        vae=_local(vae) if vae else None,
        text_encoder=_local(text_encoder) if text and text_encoder else None,
        text_tokens=tokens_of(config, index),
    )


def tokens_of(config: Config, index: Index | None) -> int:
    """Tokens at which captions were cut: those of the data, or where these are not known those of the model."""
    return index.text["tokens"] if index is not None and index.text else config.model.text_tokens


def write_pipeline(export: Export, out: Path, parts: Parts, link: bool) -> list[str]:
    """The folder, with copies of the parts or ``link``s to them. Returns lines to say."""
    arch = export.config.model.arch
    transformer = out / "transformer"
    transformer.mkdir()
    notes = write_model(export, transformer)
    scheduler = scheduler_for(export.config, export.config.sampling.solver)
    scheduler.save_pretrained(out / "scheduler")
    source = "uvit_transformer_2d" if arch == "uvit" else "diffusers"
    index: dict[str, Any] = {
        "_class_name": stock_class(export, parts) or OURS,
        "_diffusers_version": diffusers.__version__,
        "transformer": [source, export.counterpart.class_name],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    if parts.vae is not None:
        _write_vae(parts.vae, out / "vae", link)
        index["vae"] = ["diffusers", "AutoencoderKL"]
    if parts.text_encoder is not None:
        suffix = "_3" if arch == "mmdit" else ""
        _write_text(parts.text_encoder, out / f"text_encoder{suffix}", out / f"tokenizer{suffix}", link)
        index[f"text_encoder{suffix}"] = ["transformers", "T5EncoderModel"]
        index[f"tokenizer{suffix}"] = ["transformers", "T5Tokenizer"]
    shutil.copy(EXPORTED / f"{OURS[0]}.py", out)
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if parts.vae is None:
        notes.append("the run was trained on pixels: the folder has no VAE, and only its own pipeline draws with it")
    return notes


def stock_class(export: Export, parts: Parts) -> str | None:
    return STOCK.get(export.config.model.arch) if parts.vae is not None else None


def _write_vae(source: Path, target: Path, link: bool) -> None:
    config = json.loads((source / "config.json").read_text()) if (source / "config.json").is_file() else {}
    if config.get("_class_name") != "AutoencoderKL":
        raise UserError(f"VAE {source} is a {config.get('_class_name')}: expected a folder of an AutoencoderKL")
    _bring(_weights(source, "VAE"), target, link)
    # Some VAEs say nothing of their shift; SD3's pipeline adds it all the same.
    (target / "config.json").write_text(json.dumps({**config, "shift_factor": config.get("shift_factor") or 0.0}))


def _write_text(source: Path, encoder: Path, tokenizer: Path, link: bool) -> None:
    weights = [*_weights(source, "text encoder"), source / "config.json"]
    _bring(weights, encoder, link)
    rest = [path for path in source.iterdir() if path.is_file() and path.suffix in (".json", ".model", ".txt")]
    own = {path.name for path in weights} | {"generation_config.json"}
    _bring([path for path in rest if path.name not in own], tokenizer, link)


def _weights(source: Path, what: str) -> list[Path]:
    files = sorted(source.glob("*.safetensors")) + sorted(source.glob("*.safetensors.index.json"))
    if not files:
        raise UserError(f"{what} {source} has no *.safetensors: save it again with safe_serialization=True")
    return files


def _bring(files: Iterable[Path], target: Path, link: bool) -> None:
    target.mkdir()
    for file in files:
        if link:
            (target / file.name).symlink_to(file.resolve())
        else:
            shutil.copy(file, target)


def _local(name: str) -> Path:
    """The folder, or what was downloaded of a hub name."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is not here ({reason}): give its folder, or download it first") from None
