"""A whole pipeline's folder around an exported transformer: scheduler, VAE and T5, and the index of it all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from checkpoints_tools.convert.export import EXPORTED, Export, write_model
from megatron_dit.config import Config
from megatron_dit.data.codec import vae_factors
from megatron_dit.data.identity import local_folder
from megatron_dit.data.pretrained import T5, VAE, Kind, locate, read_json, variants, weight_files
from megatron_dit.data.shards import Index, read_index
from megatron_dit.data.tokenizer import open_tokenizer
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
    tokenizer: Path | None  # a file in the text encoder's folder or beside it
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
    if text_encoder is not None and not text:
        raise UserError(f"--text-encoder {text_encoder} has no effect on a run of class labels: leave it out")
    if vae is not None and index is not None and index.codec["kind"] == "pixels":
        raise UserError(f"--vae {vae} has no effect on a run that was trained on pixels: leave it out")
    if index is None and (vae is None or (text and text_encoder is None)):
        flags = "--vae and --text-encoder" if text else "--vae"
        raise UserError(f"{config.data.path} with the run's data is not here: give {flags}, or restore it")
    if vae is None and index is not None and index.codec["kind"] == "vae":
        vae = index.codec["path"]
    if text and text_encoder is None and index is not None:
        text_encoder = config.data.text_encoder or index.text_encoder
    tokens = tokens_of(config, index)
    encoder = tokenizer = None
    if text and text_encoder:
        source = locate(T5, text_encoder)
        encoder, tokenizer = local_folder(source.name), open_tokenizer(source, tokens).path
    return Parts(local_folder(locate(VAE, vae).name) if vae else None, encoder, tokenizer, tokens)


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
        _write_vae(parts.vae, export.config.model.in_channels, out / "vae", link)
        index["vae"] = ["diffusers", "AutoencoderKL"]
    if parts.text_encoder is not None and parts.tokenizer is not None:
        suffix = "_3" if arch == "mmdit" else ""
        _write_text(parts.text_encoder, export.config.model.text_dim, out / f"text_encoder{suffix}", link)
        _write_tokenizer(parts.tokenizer, out / f"tokenizer{suffix}", link)
        index[f"text_encoder{suffix}"] = ["transformers", "T5EncoderModel"]
        index[f"tokenizer{suffix}"] = ["transformers", "T5Tokenizer"]
    shutil.copy(EXPORTED / f"{OURS[0]}.py", out)
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if parts.vae is None:
        notes.append("the run was trained on pixels: the folder has no VAE, and only its own pipeline draws with it")
    return notes


def stock_class(export: Export, parts: Parts) -> str | None:
    """diffusers' own pipeline that draws what the run draws, if one decodes latents as the VAE's config.json says."""
    if parts.vae is None:
        return None
    arch, config = export.config.model.arch, read_json(parts.vae / "config.json")
    ignored = ["latents_mean", "latents_std", *(["shift_factor"] if arch == "pixart" else [])]
    return None if any(config.get(name) for name in ignored) else STOCK.get(arch)


def _write_vae(source: Path, channels: int, target: Path, link: bool) -> None:
    config = read_json(source / "config.json")
    vae_factors(config, str(source))
    if config.get("latent_channels") != channels:
        raise UserError(
            f"VAE {source} has latents of {config.get('latent_channels')} channels, but the model has {channels}: give "
            "the VAE that the run's data were made with"
        )
    _bring_weights(VAE, source, target, link)
    # Some VAEs say nothing of their shift; SD3's pipeline adds it all the same.
    (target / "config.json").write_text(json.dumps({**config, "shift_factor": config.get("shift_factor") or 0.0}))


def _write_text(source: Path, dim: int, target: Path, link: bool) -> None:
    found = read_json(source / "config.json").get("d_model")
    if found != dim:
        raise UserError(
            f"text encoder {source} has {found} features, but the model has {dim}: give the encoder that the run's "
            "data were made with"
        )
    _bring_weights(T5, source, target, link)
    _bring([source / "config.json"], target, link)


def _write_tokenizer(source: Path, target: Path, link: bool) -> None:
    """The tokenizer's file and what lies beside it, but nothing of an encoder in the same folder."""
    target.mkdir()
    encoders = ("config.json", "generation_config.json", "model.safetensors.index")
    rest = [path for path in source.parent.iterdir() if path.is_file() and path.suffix in (".json", ".model", ".txt")]
    _bring([path for path in rest if not path.name.startswith(encoders)], target, link)


def _bring_weights(kind: Kind, source: Path, target: Path, link: bool) -> None:
    """Weights in safetensors, under the plain names that loaders look for, whatever variant they are."""
    target.mkdir()
    found = variants(source, kind.stem)
    if not found:
        raise UserError(
            f"{kind.what} {source} has no {kind.stem}.safetensors: save it again with safe_serialization=True"
        )
    files, inner = weight_files(source, kind.stem, found[0]), f".{found[0]}" if found[0] else ""
    index = source / f"{kind.stem}.safetensors.index{inner}.json"
    plain = {f"{kind.stem}{inner}.safetensors": f"{kind.stem}.safetensors"}
    if files[0].name not in plain:
        files, plain = [*files, index], {index.name: f"{kind.stem}.safetensors.index.json"}
    _bring(files, target, link, plain)


def _bring(files: Iterable[Path], target: Path, link: bool, names: Mapping[str, str] | None = None) -> None:
    """Copy or link files, under other ``names`` if they are given."""
    for file in files:
        place = target / (names or {}).get(file.name, file.name)
        if link:
            place.symlink_to(file.resolve())
        else:
            shutil.copy(file, place)
