"""Object detection for GenEval with the Mask2Former (arXiv 2112.01527) of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dit.data.hub import MASK2FORMER, load, locate
from megatron_dit.data.vision import MEAN, STD
from megatron_dit.evaluation.geneval.rules import MIN_SCORE, OBJECTS, Detection
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError

# mmdet 2.27's test pipeline of mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco
SHORT_SIDE, LONG_SIDE = 800, 1333  # limits of the resized image
DIVISOR, PADDING = 32, 128  # padded to a multiple, with this gray
CANDIDATES = 100  # pairs of a query and a class with the highest probability, per image
# Labels of COCO, and of the published models for transformers, that differ from GenEval's names
NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip


class Detector:
    """Mask2Former for instances of COCO's classes, in the arithmetic of mmdet, which GenEval uses.

    The pre- and postprocessing of transformers are not used, because they differ. Its image processor stretches images
    to multiples of 32 pixels, with the published configurations to 384 x 384, and its
    ``post_process_instance_segmentation`` computes scores and masks at 384 x 384 pixels, and enlarges the masks by
    repeating pixels. mmdet resizes images to a short side of 800 pixels, pads them, and interpolates the mask logits to
    the size of the image before it computes scores, masks and boxes. The candidates and the formula of the score are
    the same in both.

    GenEval's published results are from the weights of Mask2Former with Swin-S that mmdet trained. The corresponding
    model for transformers, facebook/mask2former-swin-small-coco-instance, was trained by Mask2Former's authors, so the
    detections of the two are not identical.
    """

    def __init__(self, name: str) -> None:
        """Load the model from a local folder or hub name, from safetensors only.

        Raises UserError if it is not a Mask2Former, or lacks one of GenEval's classes.
        """
        self._model: Any = load(MASK2FORMER, locate(MASK2FORMER, name), _model_class(), use_safetensors=True)
        self._model.to(device()).eval()
        labels: dict[int, str] = self._model.config.id2label
        self._names = {number: NAMES.get(label, label) for number, label in labels.items()}
        missing = [each for each in OBJECTS if each not in self._names.values()]
        if missing:
            raise UserError(
                f"detector {name} has no class for {len(missing)} of GenEval's {len(OBJECTS)} objects, such as "
                f"{missing[0]}; expected a Mask2Former for COCO's instances, such as "
                "facebook/mask2former-swin-small-coco-instance"
            )

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Detection]]:
        """Return the detections with a score above MIN_SCORE in each of the images (H, W, 3) uint8."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(images):
            places.setdefault(image.shape, []).append(place)
        found: list[list[Detection]] = [[] for _ in images]
        for (height, width, _), group in places.items():
            inner = resized(height, width)
            x = _pixels(np.stack([images[place] for place in group]), inner)
            outputs = self._model(pixel_values=x)
            pairs = zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
            for place, (classes, masks) in zip(group, pairs, strict=True):
                masks = F.interpolate(masks[None], x.shape[2:], mode="bilinear")[..., : inner[0], : inner[1]]
                masks = F.interpolate(masks, (height, width), mode="bilinear")[0]
                found[place] = self._detections(classes, masks)
        return found

    def _detections(self, classes: Tensor, masks: Tensor) -> list[Detection]:
        """Return the detections from the logits of the classes (Q, C + 1) and of the masks (Q, H, W) of an image.

        The score is the probability of the class times the mean probability of the mask where it exceeds one half.
        """
        probabilities = classes.softmax(-1)[:, :-1]  # the last class is "no object"
        best, order = probabilities.flatten().topk(CANDIDATES)
        queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
        inside = masks > 0
        means = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)  # (Q,); 0 if a mask is empty
        scores = best * means[queries]
        found = []
        for score, query, label in zip(scores.tolist(), queries.tolist(), labels.tolist(), strict=True):
            if score > MIN_SCORE and self._names[label] in OBJECTS:
                mask = inside[query].cpu().numpy()
                found.append(Detection(self._names[label], box_of(mask), score, mask))
        return found


def resized(height: int, width: int) -> tuple[int, int]:
    """Return the height and width to which mmdet resizes an image, in the limits of SHORT_SIDE and LONG_SIDE."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box x0, y0, x1, y1 of a mask (H, W) that is not empty; x1 and y1 are exclusive, as in mmdet."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _pixels(images: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Return the model's input (N, 3, H', W') of images (N, H, W, 3) uint8, resized to ``size`` and padded."""
    x = torch.from_numpy(images).to(device()).permute(0, 3, 1, 2).float()
    # OpenCV's bilinear filter, which mmdet uses, is not antialiased and rounds to 8 bits.
    x = F.interpolate(x, size, mode="bilinear").round()
    x = F.pad(x, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR), value=PADDING)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
    return (x / 255 - mean) / std


def _model_class() -> Any:
    from transformers import Mask2FormerForUniversalSegmentation

    class Mask2Former(Mask2FormerForUniversalSegmentation):
        # The published files were written by transformers 4.26. They contain an index that is now computed, and lack a
        # norm that Mask2Former does not use. transformers 5.24 accepts this only for a Swin that is not inside another
        # model.
        _keys_to_ignore_on_load_unexpected = [r"relative_position_index$"]
        _keys_to_ignore_on_load_missing = [r"encoder\.swin\.layernorm\."]

    return Mask2Former
