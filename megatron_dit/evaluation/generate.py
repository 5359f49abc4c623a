"""Generate the images of a protocol with a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_dit.config import SamplingConfig
from megatron_dit.evaluation.protocol import Protocol
from megatron_dit.runtime.errors import UserError
from megatron_dit.sampling.folder import write_images
from megatron_dit.sampling.prompts import labels, read_prompts, requests
from megatron_dit.sampling.sampler import Drawing, Sampler
from megatron_dit.training.evaluations import result_file


def images_folder(run: Path, protocol: Protocol, sampler: Sampler) -> Path:
    """Return the folder for a protocol's images, beside the file of the result."""
    return result_file(run, protocol.name, sampler.step, ema=sampler.ema).with_suffix("")


def generate(sampler: Sampler, protocol: Protocol, run: Path, batch: int) -> Path:
    """Generate a protocol's images into the folder beside its result, and return that folder. Collective.

    Images that are already there are kept. Raises UserError if the model cannot generate what the protocol asks for.
    """
    classes = sampler.config.model.num_classes
    if bool(classes) != (protocol.labels is not None):
        kind, given = ("classes", "prompts") if classes else ("text", "labels")
        raise UserError(
            f"the protocol {protocol.name} generates images of {given}, but {sampler.folder} is conditioned on {kind}"
        )
    if protocol.labels is not None:
        prompts = labels(protocol.labels, protocol.images, classes, protocol.seed)
    else:
        assert protocol.prompts is not None
        prompts = read_prompts(protocol.prompts)
        needed = protocol.images // protocol.per_prompt
        if len(prompts) < needed:
            raise UserError(f"{protocol.prompts} has {len(prompts)} prompts, but the protocol needs {needed}")
    sampling = SamplingConfig(solver=protocol.solver, steps=protocol.steps, guidance=protocol.guidance)
    drawing = Drawing(replace(sampler.config, sampling=sampling).sampling, protocol.seed)  # validates the solver
    folder = images_folder(run, protocol, sampler)
    wanted = requests(prompts, protocol.per_prompt)[: protocol.images]
    write_images(sampler, wanted, drawing, folder, batch)
    return folder
