"""Generate many images into a folder, on any number of ranks, so that an interrupted job can be resumed.

The folder has ``sample.json``, which says how the images are drawn, ``manifest.jsonl`` with the file, prompt and copy
of each image, and the images as ``images/000/000042.png``. File names are numbers, because prompts may be equal, long,
or contain any character.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image

from megatron_dit.parallel.collectives import on_rank0
from megatron_dit.runtime.errors import UserError, writing
from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.sampling.image_sampler import Drawing, ImageSampler
from megatron_dit.sampling.prompts import Request

SETTINGS, MANIFEST = "sample.json", "manifest.jsonl"
PER_FOLDER = 1000  # images per folder: file systems and people are slow with more


@dataclass(frozen=True)
class Entry:
    """A line of the manifest: the image of a prompt. ``file`` is relative to the folder."""

    file: str
    prompt: str
    copy: int


def file_of(request: Request) -> str:
    return f"images/{request.index // PER_FOLDER:03d}/{request.index:06d}.png"


def write_images(
    sampler: ImageSampler, requests: Sequence[Request], drawing: Drawing, folder: Path, batch: int, *, show: bool = True
) -> int:
    """Generate the images that ``folder`` does not have yet, and return their number. Collective.

    Batches are the same for any number of ranks, and each is generated as a whole, so that resuming changes no image.
    Raises UserError if the folder has images of other settings or prompts.
    """
    sampler.check(drawing, [request.prompt for request in requests])
    topology = sampler.topology
    batches = [requests[i : i + batch] for i in range(0, len(requests), batch)]
    todo = on_rank0(lambda: _start(sampler, batches, drawing, folder, batch))
    own = todo[topology.replica :: topology.replicas]
    with ProgressBar("sample", len(own) * sampler.evaluations(drawing), show=show and topology.rank == 0) as bar:
        for number in own:
            images = sampler.images(batches[number], drawing, bar.advance)
            if topology.tensor_rank != 0:  # the others have the same images
                continue
            for request, image in zip(batches[number], images, strict=True):
                with replacing(folder / file_of(request), makes_folder=True) as part:
                    Image.fromarray(image).save(part)
    dist.barrier()
    return sum(len(batches[number]) for number in todo)


def read_manifest(folder: Path) -> list[Entry]:
    """Return the entries of a folder of generated images, all of which must exist. Raises UserError otherwise."""
    path = folder / MANIFEST
    try:
        entries = [Entry(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a folder that 'megatron-dit sample --folder' wrote") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is corrupt ({error}); generate the images into a new folder") from None
    missing = [entry.file for entry in entries if not (folder / entry.file).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(entries)} images, such as {missing[0]}; run the same "
            "'megatron-dit sample' again to finish it"
        )
    return entries


def _start(
    sampler: ImageSampler, batches: Sequence[Sequence[Request]], drawing: Drawing, folder: Path, batch: int
) -> list[int]:
    """Write the settings and the manifest, or compare them, and return the numbers of the batches to generate."""
    lines = [
        json.dumps(asdict(Entry(file_of(request), request.prompt, request.copy))) + "\n"
        for requests in batches
        for request in requests
    ]
    settings = _settings(sampler, drawing, batch)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if (folder / SETTINGS).exists():
        _check_same(folder, settings, "".join(lines))
    else:
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and has no {SETTINGS}; use another folder")
        for name, text in ((MANIFEST, "".join(lines)), (SETTINGS, json.dumps(settings, indent=1) + "\n")):
            with replacing(folder / name) as part:
                part.write_text(text, encoding="utf-8")
    return [
        number
        for number, requests in enumerate(batches)
        if not all((folder / file_of(request)).is_file() for request in requests)
    ]


def _settings(sampler: ImageSampler, drawing: Drawing, batch: int) -> dict[str, Any]:
    drawn = json.loads(json.dumps(asdict(drawing)))  # lists instead of tuples, as read back
    return {**sampler.identity(), "batch": batch, **drawn}


def _check_same(folder: Path, settings: dict[str, Any], manifest: str) -> None:
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        same_prompts = (folder / MANIFEST).read_text(encoding="utf-8") == manifest
        found["checkpoint"]["folder"] = settings["checkpoint"]["folder"]  # a run may have moved
        differs = next((key for key in settings if found.get(key) != settings[key]), None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} has a corrupt {SETTINGS} ({error!r}); delete it, or use another folder") from None
    if differs is not None:
        raise UserError(
            f"{folder} has images with {differs}={found.get(differs)}, not {settings[differs]}; "
            "delete it, or use another folder"
        )
    if not same_prompts:
        raise UserError(f"{folder} has images of other prompts; delete it, or use another folder")
