"""Generate images with a diffusers pipeline: one that ``checkpoints_tools convert`` exported, or a published one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from megatron_dit.config import Config, SamplingConfig, config_from_dict
from megatron_dit.data.codec import set_tile_size
from megatron_dit.data.hub import STEM, Kind, loading, read_json
from megatron_dit.data.tar import sha256_of
from megatron_dit.parallel.collectives import on_all_ranks
from megatron_dit.parallel.topology import SOLO, Topology, connect
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.image_sampler import Drawing, ImageSampler, generator_of
from megatron_dit.sampling.prompts import Request
from megatron_dit.sampling.solvers import evaluations

PIPELINE = Kind("pipeline", "a diffusers pipeline", "_class_name", "", STEM, STEM)
INDEX = "model_index.json"
EXPORTED = "pipeline_megatron_dit"  # module in a folder that checkpoints_tools exported
FACTS = "transformer/megatron_dit.json"  # in such a folder: the config of its run
LIBRARIES = (None, "diffusers", "transformers")

# The class of exported folders, and diffusers' classes whose initial noise can be given; with the arguments by which
# they use the prompt and the size as they are.
_AS_GIVEN = {"clean_caption": False, "use_resolution_binning": False}
CLASSES: dict[str, dict[str, Any]] = {
    "MegatronDiTPipeline": {},
    "DiTPipeline": {},
    "PixArtAlphaPipeline": _AS_GIVEN,
    "PixArtSigmaPipeline": _AS_GIVEN,
    "StableDiffusion3Pipeline": {},
}


class PipelineSampler(ImageSampler):
    """Generator of images from a diffusers pipeline, in fp32, with the pipeline's own scheduler and guidance.

    Number of steps and guidance scale default to those of the run for an exported folder, else to the pipeline's.
    """

    def __init__(self, folder: str | Path, *, trust_remote_code: bool = False, topology: Topology = SOLO) -> None:
        """Load the pipeline from safetensors files. Collective.

        Raises UserError if its class is not supported, if it cannot be loaded, or if it has code of its own in the
        folder that ``trust_remote_code`` does not allow to run. An exported folder has such code.
        """
        connect()
        self.folder, self.topology = Path(folder), topology
        index = read_json(self.folder / INDEX)
        code = _code_of(self.folder, index)
        if code is not None and not trust_remote_code:
            raise UserError(
                f"{folder} is a pipeline with its own code, {code}, which is not run by default; read it, and add "
                "--trust-remote-code to run it"
            )
        self._run = _run_of(self.folder)
        self._name = str(index.get("_class_name")) if self._run is None else "MegatronDiTPipeline"
        if self._name not in CLASSES:
            raise UserError(
                f"{folder} is a {self._name}, which is not supported; expected one of {', '.join(CLASSES)}, such as "
                "'checkpoints_tools convert --to diffusers --pipeline' writes"
            )
        # Rank 0 first: diffusers copies the folder's code into a cache that the ranks of a host share.
        pipe = on_all_ranks(lambda: self._load(trust_remote_code) if topology.rank == 0 else None)
        self._pipe: Any = on_all_ranks(lambda: pipe or self._load(trust_remote_code))
        self._parameters = inspect.signature(self._pipe.__call__).parameters
        self._transformer = self._pipe.transformer.config
        if self._run is not None:
            self.classes = self._run.model.num_classes
        else:
            self.classes = self._transformer.num_embeds_ada_norm if "class_labels" in self._parameters else 0
        vae = getattr(self._pipe, "vae", None)
        self._scale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        if vae is not None:
            set_tile_size(vae)
            vae.enable_tiling()

    def settings(self, **values: object) -> SamplingConfig:
        if self._run is not None:
            defaults = {"steps": self._run.sampling.steps, "guidance": self._run.sampling.guidance}
        else:
            names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
            defaults = {ours: self._parameters[theirs].default for ours, theirs in names.items()}
        given = {name: value for name, value in values.items() if value is not None}
        return replace(SamplingConfig(), **{**defaults, **given})

    def identity(self) -> dict[str, Any]:
        files = sorted(path for ending in ("json", "safetensors") for path in self.folder.rglob(f"*.{ending}"))
        checkpoint = {"folder": str(self.folder), "class": self._name, "sha256": sha256_of(*files)}
        return {"checkpoint": checkpoint, "dtype": "fp32"}

    def check_size(self, size: tuple[int, int] | None) -> None:
        if size is None:
            return
        fixed = self._run is not None and self._run.model.spec.fixed_size
        if fixed or self.classes or "height" not in self._parameters:
            raise UserError(
                f"--size {size[0]}x{size[1]} is not supported by this pipeline, which generates images of its "
                "training size; omit --size"
            )
        multiple = self._scale * self._transformer.patch_size
        if any(side % multiple for side in size):
            raise UserError(f"--size {size[0]}x{size[1]} is invalid: expected positive multiples of {multiple} pixels")
        patches = self._transformer.get("pos_embed_max_size")  # of SD3
        if patches is not None and max(size) > patches * multiple:
            raise UserError(
                f"--size {size[0]}x{size[1]} is invalid: the pipeline has positions for at most {patches * multiple} "
                "pixels along each side"
            )

    def check(self, drawing: Drawing, prompts: Sequence[str]) -> None:
        super().check(drawing, prompts)
        if drawing.negative is not None and "negative_prompt" not in self._parameters:
            raise UserError(f"--negative-prompt is not supported by a {self._name}; omit it, or sample from its run")

    def evaluations(self, drawing: Drawing) -> int:
        scheduler, steps = self._pipe.scheduler, drawing.sampling.steps
        # Such a scheduler needs the image's size before it can count; it has one evaluation per step.
        return steps if scheduler.config.get("use_dynamic_shifting") else evaluations(scheduler, steps)

    @torch.no_grad()
    def images(self, batch: Sequence[Request], drawing: Drawing, each_step: Callable[[], None]) -> np.ndarray:
        generators = [generator_of(request, drawing.seed) for request in batch]
        arguments: dict[str, Any] = {
            "num_inference_steps": drawing.sampling.steps,
            "guidance_scale": drawing.sampling.guidance,
            "generator": generators,  # DiTPipeline draws the same initial noise from them
            "output_type": "pt",
            **CLASSES[self._name],
        }
        prompts = [request.prompt for request in batch]
        arguments |= {"class_labels": [int(prompt) for prompt in prompts]} if self.classes else {"prompt": prompts}
        height, width = drawing.size or (self._transformer.sample_size * self._scale,) * 2
        if "latents" in self._parameters:
            shape = (self._transformer.in_channels, height // self._scale, width // self._scale)
            arguments["latents"] = torch.stack([torch.randn(shape, generator=each) for each in generators])
        if drawing.size is not None:
            arguments |= {"height": height, "width": width}
        if drawing.negative is not None:
            arguments["negative_prompt"] = [drawing.negative] * len(batch)
        hook = self._pipe.transformer.register_forward_hook(lambda *_: each_step())
        try:
            images = self._pipe(**arguments).images  # (N, 3, H, W) in [0, 1]
        finally:
            hook.remove()
        return (images.float() * 255).round().to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy()

    def _load(self, trust_remote_code: bool) -> Any:
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
        if self._run is not None:
            options["custom_pipeline"] = EXPORTED
        disable_progress_bar()
        with loading(PIPELINE, str(self.folder)):
            pipe = DiffusionPipeline.from_pretrained(self.folder, trust_remote_code=trust_remote_code, **options)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.float()  # transformers' models are in the type of their file
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device())


def _run_of(folder: Path) -> Config | None:
    """Return the config of the run that was exported to the folder; None if the folder is of another origin."""
    if not (folder / f"{EXPORTED}.py").is_file() or not (folder / FACTS).is_file():
        return None
    try:
        return config_from_dict(read_json(folder / FACTS).get("config", {}))
    except UserError as error:
        raise UserError(f"the config in {folder / FACTS} cannot be used by this version: {error}") from None


def _code_of(folder: Path, index: Mapping[str, Any]) -> str | None:
    """Return the name of a module in the folder without which the pipeline cannot be loaded; None if there is none."""
    if (folder / f"{EXPORTED}.py").is_file():
        return f"{EXPORTED}.py"
    for name, value in index.items():
        if isinstance(value, list) and value and (name == "_class_name" or value[0] not in LIBRARIES):
            return f"{value[0]}.py"
    return None
