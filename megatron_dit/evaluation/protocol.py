"""Protocols: how generated images are judged. Results are comparable only if they have the same protocol."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from megatron_dit.config import Solver
from megatron_dit.config.keys import Count, FilePath, Interval, Section, check, check_choice, key


@dataclass(frozen=True)
class Needs:
    """What a metric is computed from."""

    feature: str
    moments: bool = False  # only the feature's mean and covariance, so that the features need not be kept
    reference: bool = True  # also those of real images


METRICS = {
    "fid": Needs("inception", moments=True),
    "sfid": Needs("spatial", moments=True),
    "inception_score": Needs("logits", reference=False),
    "precision": Needs("inception"),
    "recall": Needs("inception"),
    "kid": Needs("inception"),
    "fdd": Needs("dinov2", moments=True),
    "cmmd": Needs("clip"),
    "clip_score": Needs("clip", reference=False),
}
EXTRACTOR_OF = {
    "inception": "inception", "spatial": "inception", "logits": "inception", "dinov2": "dinov2", "clip": "clip",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Section):
    """Weights of the feature extractors."""

    prefix = "weights."

    inception: FilePath | None = key("torch-fidelity's file of InceptionV3", None)
    dinov2: FilePath | None = key("folder or hub name of a DINOv2", None)
    clip: FilePath | None = key("folder or hub name of a CLIP", None)


@dataclass(frozen=True, kw_only=True)
class Protocol(Section):
    """A protocol. The numbers that it gives depend on every key."""

    name: str = key("name, printed with each result")
    metrics: list[str] = key(f"metrics to compute: {', '.join(METRICS)}")
    images: Count = key("number of generated images")
    labels: Literal["equal", "random"] | None = key(
        "images of classes: as many of each, or drawn at random; FID differs by about 0.1", None
    )
    prompts: FilePath | None = key("images of prompts: a file as for 'megatron-dit sample --prompts'", None)
    seed: Annotated[int, Interval("[0, 2^63)")] = key("seed of labels and noise", 0)
    solver: Solver = key("solver", "auto")
    steps: Annotated[int, Interval("[1, 10000]")] = key("solver steps")
    guidance: Annotated[float, Interval("[1, 1000]")] = key("classifier-free guidance scale; 1: no guidance")
    reference: FilePath | None = key("statistics of real images: ADM's .npz, or one written by --write-reference", None)
    weights: WeightsConfig = key("weights of the feature extractors")

    def check(self) -> None:
        check(bool(self.metrics), f"metrics is empty: expected some of {', '.join(METRICS)}")
        for metric in self.metrics:
            check_choice("metrics", metric, tuple(METRICS))
        twice = next((each for each in self.metrics if self.metrics.count(each) > 1), None)
        check(twice is None, f"metrics has {twice} twice; remove one")
        missing = next((each for each in self.extractors if getattr(self.weights, each) is None), None)
        check(missing is None, f"weights.{missing} is not set, but the metrics {', '.join(self.metrics)} need it")
        needs = [metric for metric in self.metrics if METRICS[metric].reference]
        check(self.reference is not None or not needs, f"reference is not set, but {', '.join(needs)} need it")
        check(
            (self.labels is None) != (self.prompts is None),
            f"labels={self.labels} and prompts={self.prompts}: expected exactly one of them",
        )
        check("clip_score" not in self.metrics or self.labels is None, "clip_score needs prompts, not labels")

    @property
    def extractors(self) -> list[str]:
        """Names of the extractors of the features that the metrics need."""
        return list(dict.fromkeys(EXTRACTOR_OF[METRICS[metric].feature] for metric in self.metrics))

    def features(self, *, moments: bool, of_reference: bool) -> list[str]:
        """Names of the features of which the metrics need moments, or every one, of generated or of real images."""
        needs = [METRICS[metric] for metric in self.metrics]
        found = [each for each in needs if each.moments == moments and (each.reference or not of_reference)]
        return list(dict.fromkeys(each.feature for each in found))


def fingerprint(protocol: Protocol, hashes: dict[str, str]) -> str:
    """Return 8 hexadecimal digits of the protocol's values, with the SHA-256 of its files instead of their paths."""
    values: dict[str, Any] = asdict(protocol)
    values |= {"weights": None, "reference": None, "prompts": None, "hashes": hashes}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
