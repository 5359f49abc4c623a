"""Export a complete pipeline: the transformer, scheduler, VAE, T5, and model_index.json."""

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
from megatron_dit.data.encoder_hash import local_folder
from megatron_dit.data.hub import T5, VAE, Kind, locate, read_json, variants, weight_files
from megatron_dit.data.index import Index, read_index
from megatron_dit.data.tokenizer import open_tokenizer
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.solvers import scheduler_for

OURS = ["pipeline_megatron_dit", "MegatronDiTPipeline"]


@dataclass(frozen=True)
class Parts:
    """Paths of the models that the run was trained with; None if the run does not use one."""

    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None  # a file in the text encoder's folder or in a folder next to it


def find_index(config: Config) -> Index | None:
    """Return the index of the run's data, or None if the data are no longer available."""
    try:
        return read_index(config.data.path)
    except UserError:
        return None


def find_parts(config: Config, index: Index | None, vae: str | None, text_encoder: str | None) -> Parts:
    """Locate the parts of a pipeline.

    ``vae`` and ``text_encoder``, folders or hub names, default to those that the run's data were encoded with.
    Raise UserError if a part is given that the run does not use, or if neither the part nor the data are available.
    """
    text = config.model.text_tokens > 0
    if text_encoder is not None and not text:
        raise UserError(f"--text-encoder {text_encoder} has no effect on a run trained with class labels; leave it out")
    if vae is not None and index is not None and index.codec["kind"] == "pixels":
        raise UserError(f"--vae {vae} has no effect on a run trained on pixels; leave it out")
    if index is None and (vae is None or (text and text_encoder is None)):
        flags = "--vae and --text-encoder" if text else "--vae"
        raise UserError(f"the run's data {config.data.path} are not available; give {flags}, or restore the folder")
    if vae is None and index is not None and index.codec["kind"] == "vae":
        vae = index.codec["path"]
    if text and text_encoder is None and index is not None:
        text_encoder = config.data.text_encoder or index.text_encoder
    encoder = tokenizer = None
    if text and text_encoder:
        source = locate(T5, text_encoder)
        encoder, tokenizer = local_folder(source.name), open_tokenizer(source, tokens_of(config, index)).path
    return Parts(local_folder(locate(VAE, vae).name) if vae else None, encoder, tokenizer)


def tokens_of(config: Config, index: Index | None) -> int:
    """Return the number of tokens to which captions were truncated: that of the data if known, else the model's."""
    return index.text["tokens"] if index is not None and index.text else config.model.text_tokens


def write_pipeline(export: Export, out: Path, parts: Parts, link: bool) -> list[str]:
    """Write the pipeline's folder, with copies of the parts or, if ``link``, symbolic links to them.

    Return lines to print.
    """
    counterpart = export.counterpart
    transformer = out / "transformer"
    transformer.mkdir()
    notes = write_model(export, transformer)
    scheduler = scheduler_for(export.config, export.config.sampling.solver)
    scheduler.save_pretrained(out / "scheduler")
    index: dict[str, Any] = {
        "_class_name": stock_class(export, parts) or OURS,
        "_diffusers_version": diffusers.__version__,
        "transformer": [counterpart.module, counterpart.class_name],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    if parts.vae is not None:
        _write_vae(parts.vae, export.config.model.in_channels, out / "vae", link)
        index["vae"] = ["diffusers", "AutoencoderKL"]
    if parts.text_encoder is not None and parts.tokenizer is not None:
        suffix = counterpart.text_suffix
        _write_text(parts.text_encoder, export.config.model.text_dim, out / f"text_encoder{suffix}", link)
        _write_tokenizer(parts.tokenizer, out / f"tokenizer{suffix}", link)
        index[f"text_encoder{suffix}"] = ["transformers", "T5EncoderModel"]
        index[f"tokenizer{suffix}"] = ["transformers", "T5Tokenizer"]
    shutil.copy(EXPORTED / f"{OURS[0]}.py", out)
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if parts.vae is None:
        notes.append("the run was trained on pixels: the folder has no VAE and works only with its own pipeline class")
    return notes


def stock_class(export: Export, parts: Parts) -> str | None:
    """Return the class of diffusers' pipeline that samples as the run does, or None if there is none.

    There is none for runs on pixels, for objectives that the architecture's original does not have, and if the VAE's
    config.json has a mean, std or shift of the latents that the class would ignore.
    """
    if parts.vae is None:
        return None
    vae, counterpart = read_json(parts.vae / "config.json"), export.counterpart
    ignored = any(vae.get(name) for name in counterpart.ignored_by_stock)
    return None if ignored else counterpart.stock_pipelines.get(export.config.objective_name)


def _write_vae(source: Path, channels: int, target: Path, link: bool) -> None:
    config = read_json(source / "config.json")
    vae_factors(config, str(source))
    if config.get("latent_channels") != channels:
        raise UserError(
            f"VAE {source} has {config.get('latent_channels')} latent channels, but the model has {channels}; give "
            "the VAE that the run's data were encoded with"
        )
    _copy_weights(VAE, source, target, link)
    # Some VAEs' config.json has no shift_factor, but SD3's pipeline always adds it.
    (target / "config.json").write_text(json.dumps({**config, "shift_factor": config.get("shift_factor") or 0.0}))


def _write_text(source: Path, dim: int, target: Path, link: bool) -> None:
    found = read_json(source / "config.json").get("d_model")
    if found != dim:
        raise UserError(
            f"text encoder {source} has {found} features, but the model has model.text_dim={dim}; give the encoder "
            "that the run's data were encoded with"
        )
    _copy_weights(T5, source, target, link)
    _copy_or_link([source / "config.json"], target, link)


def _write_tokenizer(source: Path, target: Path, link: bool) -> None:
    """Copy the tokenizer's file and the other files of its folder, except those of a text encoder."""
    target.mkdir()
    encoders = ("config.json", "generation_config.json", "model.safetensors.index")
    candidates = [
        path for path in source.parent.iterdir() if path.is_file() and path.suffix in (".json", ".model", ".txt")
    ]
    _copy_or_link([path for path in candidates if not path.name.startswith(encoders)], target, link)


def _copy_weights(kind: Kind, source: Path, target: Path, link: bool) -> None:
    """Copy weights in safetensors, of any variant, under the names without variant that loaders look for."""
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
    _copy_or_link(files, target, link, plain)


def _copy_or_link(files: Iterable[Path], target: Path, link: bool, names: Mapping[str, str] | None = None) -> None:
    """Copy or link files to the folder ``target``. ``names`` maps file names to the names to use instead."""
    for file in files:
        place = target / (names or {}).get(file.name, file.name)
        if link:
            place.symlink_to(file.resolve())
        else:
            shutil.copy(file, place)
