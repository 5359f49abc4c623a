"""The parts of tiny pipelines: VAEs, a T5, and datasets that refer to them."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import AutoencoderKL

from data_prep.tiny_t5 import build_tiny_t5
from megatron_dit.data.encoder_hash import weights_sha256
from megatron_dit.data.index import write_index
from tests.helpers.datasets import TEXT, make_folder

OPTIONS = {
    "model.base_head_dim": 4,
    "model.sample_size": 8,
    "model.patch_size": 2,
    "sampling.steps": 4,
    "sampling.guidance": 2.0,
}


def save_parts(folder, prompts):
    """Save ``vae`` and ``shifted`` (two pixels per latent), ``t5``, and datasets ``data-vae`` and ``data-shifted``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, norm_num_groups=4, scaling_factor=0.7,
        )  # fmt: skip
        vae.save_pretrained(folder / "vae")
        vae.register_to_config(shift_factor=0.1)
        vae.save_pretrained(folder / "shifted")
    build_tiny_t5(folder / "t5", prompts, seed=0)
    text = {**TEXT, "encoder": str(folder / "t5"), "sha256": weights_sha256(str(folder / "t5"))}
    index = make_folder(folder / "pixels", [((8, 8), 4)], text=text)
    for name in ("vae", "shifted"):
        codec = {"kind": "vae", "path": str(folder / name), "sha256": "v", "dtype": "fp32"}
        (folder / f"data-{name}").mkdir()
        write_index(replace(index, folder=str(folder / f"data-{name}"), codec=codec))
    return folder
