"""What a sampler of any model offers, and the noise of an image."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dit.config import SamplingConfig
from megatron_dit.parallel.topology import Topology
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.progress import ProgressBar
from megatron_dit.sampling.prompts import Request


def generator_of(request: Request, seed: int) -> torch.Generator:
    """Return the generator of an image's initial noise, and then of the noise that an ancestral solver adds."""
    digest = hashlib.sha256(f"{seed}/{request.copy}/{request.prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Drawing:
    """How images are drawn. Together with a request, it determines an image."""

    sampling: SamplingConfig
    seed: int = 0
    size: tuple[int, int] | None = None  # height and width in pixels; None: the training size
    negative: str | None = None  # prompt to move away from, instead of the empty condition


class ImageSampler(ABC):
    """Generator of images from one model. All methods but :meth:`draw` take what has passed :meth:`check`."""

    folder: Path  # of the checkpoint or pipeline
    topology: Topology  # its tensor-parallel ranks share the model and have to make the same calls
    classes: int  # number of classes; 0: the model is conditioned on text

    @abstractmethod
    def settings(self, **values: object) -> SamplingConfig:
        """Return the model's default settings with the values that are not None. Raises UserError for invalid ones."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return values for JSON that determine the model: its folder and hash under ``checkpoint``, and others."""

    @abstractmethod
    def check_size(self, size: tuple[int, int] | None) -> None:
        """Raise UserError if the model cannot generate images of this height and width in pixels."""

    @abstractmethod
    def evaluations(self, drawing: Drawing) -> int:
        """Return how many times the model is evaluated for a batch."""

    @abstractmethod
    def images(self, batch: Sequence[Request], drawing: Drawing, each_step: Callable[[], None]) -> np.ndarray:
        """Return the images (N, H, W, 3) uint8 of a batch. ``each_step`` is called after each evaluation."""

    def check(self, drawing: Drawing, prompts: Sequence[str]) -> None:
        """Raise UserError if the model cannot generate images of these prompts, or of the drawing's size.

        A prompt is a caption, or the number of a class if the model has classes.
        """
        self.check_size(drawing.size)
        wrong = next((p for p in prompts if not (p.isdecimal() and int(p) < self.classes)), None)
        if self.classes and wrong is not None:
            raise UserError(f"prompt {wrong!r} is invalid; expected the number of a class, 0 to {self.classes - 1}")
        if self.classes and drawing.negative is not None:
            raise UserError("--negative-prompt: the checkpoint's model is conditioned on classes, not on text; omit it")

    def draw(self, images: Sequence[Request], drawing: Drawing, *, batch: int = 64, show: bool = True) -> np.ndarray:
        """Return the images (N, H, W, 3) uint8, generated ``batch`` at a time."""
        self.check(drawing, [image.prompt for image in images])
        groups = [images[i : i + batch] for i in range(0, len(images), batch)]
        with ProgressBar("sample", len(groups) * self.evaluations(drawing), show=show) as bar:
            return np.concatenate([self.images(group, drawing, bar.advance) for group in groups])
