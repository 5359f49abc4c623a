"""Evaluate images by a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.tar import sha256_of
from megatron_dit.evaluation import metrics
from megatron_dit.evaluation.collect import Collected, collect
from megatron_dit.evaluation.features import EXTRACTORS, check_weights
from megatron_dit.evaluation.geneval.colors import ColorClassifier
from megatron_dit.evaluation.geneval.detector import Detector
from megatron_dit.evaluation.geneval.score import geneval, read_metadata
from megatron_dit.evaluation.images import Images, content_sha256
from megatron_dit.evaluation.protocol import METRICS, LossProtocol, Protocol, fingerprint
from megatron_dit.evaluation.reference import check_reference, load_reference, reference_files, write_reference
from megatron_dit.evaluation.scenes import scene_score
from megatron_dit.parallel.collectives import on_all_ranks, on_rank0
from megatron_dit.parallel.topology import connect
from megatron_dit.runtime.errors import UserError


@dataclass(frozen=True)
class Result:
    """The metrics of images, or of a checkpoint, by a protocol. They are comparable if the fingerprints are equal."""

    protocol: Protocol | LossProtocol
    fingerprint: str
    hashes: dict[str, str]  # SHA-256 of the models' weights, the reference, the prompts and the dataset
    source: str  # what was evaluated
    metrics: dict[str, float]
    step: int | None = None  # of the checkpoint
    checkpoint: str | None = None  # SHA-256 of the checkpoint's manifest

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(images: Images, protocol: Protocol, source: str, batch: int = 32) -> Result:
    """Return the metrics of images by a protocol. Collective.

    Raises UserError if the number of images is not the protocol's, or a file that it names is missing.
    """
    connect()
    check_files(protocol)
    if len(images) != protocol.images:
        raise UserError(
            f"{source} has {len(images)} images, but the protocol {protocol.name} is for {protocol.images}; generate "
            f"{protocol.images}, or set images={len(images)}: such results are comparable only among themselves"
        )
    of_prompts = next((metric for metric in protocol.metrics if METRICS[metric].prompts), None)
    if of_prompts is not None and not images.prompts:
        raise UserError(f"{of_prompts} needs the prompts of the images, but {source} has no manifest.jsonl")
    hashes = on_rank0(lambda: hashes_of(protocol))
    extractors = open_extractors(protocol)
    reference: list[Path] = []
    if protocol.reference is not None:
        names, kept = (protocol.features(moments=moments, of_reference=True) for moments in (True, False))
        content = "".join(sha256 for name, sha256 in sorted(hashes.items()) if name != "prompts")
        reference = reference_files(Path(protocol.reference), content, list(extractors.values()), names, kept, batch)
    names, kept = (protocol.features(moments=moments, of_reference=False) for moments in (True, False))
    generated = collect(images, list(extractors.values()), names, kept, batch) if extractors else Collected()
    of_geneval = _geneval(images, protocol, batch) if "geneval" in protocol.metrics else {}

    def values() -> dict[str, float]:
        found = _values(protocol.metrics, generated, load_reference(reference))
        if "clip_score" in protocol.metrics:
            groups = [images.prompts[i : i + batch] for i in range(0, len(images), batch)]
            texts = np.concatenate([extractors["clip"].texts(group) for group in groups])
            found["clip_score"] = metrics.clip_score(generated.features["clip"], texts)
        if "scene_score" in protocol.metrics:
            found["scene_score"] = scene_score(images, source)
        return found | of_geneval

    return Result(protocol, fingerprint(protocol, hashes), hashes, source, on_rank0(values))


def _geneval(images: Images, protocol: Protocol, batch: int) -> dict[str, float]:
    """Return GenEval's scores, whose metadata are in the file of prompts. Collective."""
    prompts, mask2former, clip = protocol.prompts, protocol.weights.mask2former, protocol.weights.clip
    assert prompts is not None
    assert mask2former is not None
    assert clip is not None
    specs, detector, colors = on_all_ranks(
        lambda: (read_metadata(prompts), Detector(mask2former), ColorClassifier(clip))
    )
    return geneval(images, specs, detector, colors, batch)


def write_reference_of(images: Images, protocol: Protocol, path: Path, batch: int = 32) -> None:
    """Write the statistics of real images that a protocol needs. Collective."""
    connect()
    names, kept = (protocol.features(moments=moments, of_reference=True) for moments in (True, False))
    write_reference(path, collect(images, list(open_extractors(protocol).values()), names, kept, batch))


def check_files(protocol: Protocol, *, reference: bool = True) -> None:
    """Raise UserError, which says where to get it, for the first file that a protocol names and that does not exist.

    ``reference``: the reference has to exist.
    """
    for name in protocol.models:
        check_weights(name, getattr(protocol.weights, name))
    if protocol.reference is not None and reference:
        check_reference(Path(protocol.reference))
    if protocol.prompts is not None and not Path(protocol.prompts).is_file():
        raise UserError(f"the prompts {protocol.prompts} do not exist; set prompts in the protocol to their path")
    if protocol.prompts is not None and "geneval" in protocol.metrics:
        read_metadata(protocol.prompts)


def open_extractors(protocol: Protocol) -> dict[str, Any]:
    """Load the extractors that a protocol needs. Collective."""
    weights = {name: getattr(protocol.weights, name) for name in protocol.extractors}
    return {name: on_all_ranks(lambda name=name: EXTRACTORS[name](weights[name])) for name in weights}


def hashes_of(protocol: Protocol) -> dict[str, str]:
    """Return the SHA-256 of the files that a protocol names."""
    weights = {name: getattr(protocol.weights, name) for name in protocol.models}
    found = {
        name: sha256_of(Path(path)) if name == "inception" else weights_sha256(path) for name, path in weights.items()
    }
    if protocol.reference is not None:
        found["reference"] = content_sha256(Path(protocol.reference))
    if protocol.prompts is not None:
        found["prompts"] = sha256_of(Path(protocol.prompts))
    return found


def _values(names: Sequence[str], generated: Collected, reference: Collected) -> dict[str, float]:
    """Return the metrics of images, without their prompts."""

    def distance(feature: str) -> float:
        return metrics.frechet_distance(generated.moments[feature], reference.moments[feature])

    def pair(feature: str) -> tuple[np.ndarray, np.ndarray]:
        return generated.features[feature], reference.features[feature]

    found: dict[str, float] = {}
    for name in names:
        feature = METRICS[name].feature
        if METRICS[name].moments and feature is not None:
            found[name] = distance(feature)
    if "inception_score" in names:
        found["inception_score"] = metrics.inception_score(generated.features["logits"])
    if "precision" in names or "recall" in names:
        both = dict(zip(("precision", "recall"), metrics.precision_recall(*pair("inception")), strict=True))
        found |= {name: value for name, value in both.items() if name in names}
    if "kid" in names:
        found["kid"] = metrics.kernel_distance(*pair("inception"))
    if "cmmd" in names:
        found["cmmd"] = metrics.cmmd(*pair("clip"))
    return found
