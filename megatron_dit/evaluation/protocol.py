"""Protocols: how generated images are judged. Results are comparable only if they have the same protocol."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_dit.config import Solver
from megatron_dit.config.keys import Count, FilePath, Interval, Section, check, check_choice, key
from megatron_dit.config.load import load
from megatron_dit.config.tree import read_tree
from megatron_dit.runtime.paths import user_path


@dataclass(frozen=True)
class Needs:
    """What a metric is computed from."""

    feature: str | None
    moments: bool = False  # only the feature's mean and covariance, so that the features need not be kept
    reference: bool = True  # also those of real images
    prompts: bool = False  # also the prompts of the images


METRICS = {
    "fid": Needs("inception", moments=True),
    "sfid": Needs("spatial", moments=True),
    "inception_score": Needs("logits", reference=False),
    "precision": Needs("inception"),
    "recall": Needs("inception"),
    "kid": Needs("inception"),
    "fdd": Needs("dinov2", moments=True),
    "cmmd": Needs("clip"),
    "clip_score": Needs("clip", reference=False, prompts=True),
    "geneval": Needs(None, reference=False, prompts=True),
    "scene_score": Needs(None, reference=False, prompts=True),
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
    mask2former: FilePath | None = key("folder or hub name of a Mask2Former for instances of COCO's classes", None)


@dataclass(frozen=True, kw_only=True)
class Protocol(Section):
    """How generated images are judged. The numbers that it gives depend on every key."""

    kind: Literal["images"] = key("what is judged: generated images", "images")
    name: str = key("name, printed with each result")
    metrics: list[str] = key(f"metrics to compute: {', '.join(METRICS)}")
    images: Count = key("number of generated images")
    labels: Literal["equal", "random"] | None = key(
        "images of classes: as many of each, or drawn at random; FID differs by about 0.1", None
    )
    prompts: FilePath | None = key("images of prompts: a file as for 'megatron-dit sample --prompts'", None)
    per_prompt: Count = key("images of each prompt", 1)
    seed: Annotated[int, Interval("[0, 2^63)")] = key("seed of labels and noise", 0)
    solver: Solver = key("solver", "auto")
    steps: Annotated[int, Interval("[1, 10000]")] = key("solver steps")
    guidance: Annotated[float, Interval("[1, 1000]")] = key("classifier-free guidance scale; 1: no guidance")
    reference: FilePath | None = key("statistics of real images: ADM's .npz, or one written by --write-reference", None)
    weights: WeightsConfig = key("weights of the feature extractors", factory=WeightsConfig)

    def check(self) -> None:
        _check_name(self.name)
        check(bool(self.metrics), f"metrics is empty: expected some of {', '.join(METRICS)}")
        for metric in self.metrics:
            check_choice("metrics", metric, tuple(METRICS))
        twice = next((each for each in self.metrics if self.metrics.count(each) > 1), None)
        check(twice is None, f"metrics has {twice} twice; remove one")
        missing = next((each for each in self.models if getattr(self.weights, each) is None), None)
        check(missing is None, f"weights.{missing} is not set, but the metrics {', '.join(self.metrics)} need it")
        needs = [metric for metric in self.metrics if METRICS[metric].reference]
        check(self.reference is not None or not needs, f"reference is not set, but {', '.join(needs)} need it")
        check(
            (self.labels is None) != (self.prompts is None),
            f"labels={self.labels} and prompts={self.prompts}: expected exactly one of them",
        )
        of_prompts = next((metric for metric in self.metrics if METRICS[metric].prompts), None)
        check(of_prompts is None or self.labels is None, f"{of_prompts} needs prompts, not labels")
        check(self.labels is None or self.per_prompt == 1, f"per_prompt={self.per_prompt}: expected 1 with labels")
        check(
            self.images % self.per_prompt == 0,
            f"images={self.images}: expected a multiple of per_prompt={self.per_prompt}",
        )

    @property
    def extractors(self) -> list[str]:
        """Names of the extractors of the features that the metrics need."""
        features = [METRICS[metric].feature for metric in self.metrics]
        return list(dict.fromkeys(EXTRACTOR_OF[feature] for feature in features if feature is not None))

    @property
    def models(self) -> list[str]:
        """Names of the models whose weights the metrics need: the extractors, and those of GenEval."""
        geneval = ["mask2former", "clip"] if "geneval" in self.metrics else []
        return list(dict.fromkeys([*self.extractors, *geneval]))

    def features(self, *, moments: bool, of_reference: bool) -> list[str]:
        """Names of the features of which the metrics need moments, or every one, of generated or of real images."""
        needs = [METRICS[metric] for metric in self.metrics]
        found = [each for each in needs if each.moments == moments and (each.reference or not of_reference)]
        return list(dict.fromkeys(each.feature for each in found if each.feature is not None))


@dataclass(frozen=True, kw_only=True)
class LossProtocol(Section):
    """How the validation loss of a checkpoint is measured: at the timesteps i / ``timesteps``, as in MLPerf."""

    kind: Literal["validation_loss"] = key("what is judged: the loss of a checkpoint")
    name: str = key("name, printed with each result")
    data: FilePath | None = key("dataset, encoded like the run's, whose first samples are used; null: the run's", None)
    samples: Count = key("number of samples")
    timesteps: Count = key("number of timesteps; sample n has the timestep (n mod timesteps) / timesteps", 8)
    seed: Annotated[int, Interval("[0, 2^63)")] = key("seed of the noise", 0)

    def check(self) -> None:
        _check_name(self.name)
        check(
            self.samples % self.timesteps == 0,
            f"samples={self.samples}: expected a multiple of timesteps={self.timesteps}",
        )


def _check_name(name: str) -> None:
    """Check that results can be written to a folder of this name."""
    check(bool(re.fullmatch(r"\w[\w.-]*", name)), f"name={name!r}: expected letters, digits, '-', '_' and '.' only")


def load_protocol(path: str | Path, overrides: Sequence[str] = ()) -> Protocol | LossProtocol:
    """Read a protocol, whose key ``kind`` says which one. Raises UserError if it is invalid."""
    tree = read_tree(Path(user_path(str(path), "protocol")), f"protocol {path}")
    kind = str(tree.get("kind", "images")) if isinstance(tree, dict) else "images"
    check(kind in KINDS, f"protocol {path}: kind={kind!r}: expected {' or '.join(KINDS)}")
    return load(KINDS[kind], path, overrides)


KINDS: dict[str, type[Protocol] | type[LossProtocol]] = {"images": Protocol, "validation_loss": LossProtocol}


def fingerprint(protocol: Protocol | LossProtocol, hashes: dict[str, str]) -> str:
    """Return 8 hexadecimal digits of the protocol's values, with the SHA-256 of its files instead of their paths."""
    values: dict[str, Any] = asdict(protocol)
    values |= {"weights": None, "reference": None, "prompts": None, "data": None, "hashes": hashes}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
