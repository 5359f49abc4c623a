"""Plot a grid of images with their prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.text import printable


def save_grid(
    images: np.ndarray | Sequence[np.ndarray],
    captions: Sequence[str],
    path: Path,
    colors: Sequence[str] | None = None,
) -> None:
    """Write a grid of (H, W, 3) uint8 images of any sizes, each above its caption, in the format of ``path``'s suffix.

    ``colors`` are the text colors of the captions.
    """
    columns = min(8, math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.7 * columns, 2.0 * rows), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_visible(False)
    for i, (cell, image, caption) in enumerate(zip(cells, images, captions, strict=False)):
        cell.imshow(image, interpolation="nearest")
        color = colors[i] if colors else "black"
        cell.set_xlabel(_wrap(printable(caption)), fontsize=7, color=color, parse_math=False)  # for captions with a $
    with replacing(path) as part:
        figure.savefig(part, dpi=110)


def _wrap(caption: str, width: int = 24) -> str:
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
