"""Compute the cost of a dataset: bytes, files and GPU-hours of encoding. Prints the table in docs/data.md.

    python benchmarks/data_costs.py        # seconds, no GPU

Bytes: the size of a sample as written by `data_prep encode`, including padding to tar's 512-byte blocks and the index
of the shard, for Stable Diffusion's VAE (4 channels, an eighth of the image's side) and T5-XXL (4,096 features).
FLOPs: counted by torch for the real architectures on the meta device. Hours: FLOPs / (fraction of peak * peak) for an
H100 SXM in bf16. The fraction is an assumption, not a measurement. Decoding and resizing of images run on the CPU in
the background and are not included.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

PEAK, UTILIZATION = 989e12, 0.35  # peak in FLOP/s; fraction of it that dense inference is assumed to reach
PER_SHARD = 10_000
BLOCK = 512
TABLE_ROW = 12 + 9 * 16  # bytes per sample in the index of a shard
PEOPLE = 300  # bytes of each of the human-readable members, txt and json
LENGTHS = {"alt text": 30, "dense captions": 110}


def member(size: int) -> int:
    """Return the bytes of a tar member: its header, and its data padded to blocks."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def sample_bytes(side: int, tokens: int, features: bool) -> int:
    """Return the bytes of a sample: an image of ``side`` x ``side`` pixels with one caption of ``tokens`` tokens."""
    array = 128  # an npy header
    latent = member(array + 4 * (side // 8) ** 2 * 2)
    text = member(array + tokens * 4096 * 2) if features else 0
    return 2 * latent + text + member(array + 4 * tokens) + member(array + 16) + 2 * member(PEOPLE) + TABLE_ROW


def vae_flops(side: int) -> int:
    """Return the FLOPs of encoding one image with Stable Diffusion's VAE."""
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        AutoencoderKL(**sizes, **blocks).encode(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def text_flops(tokens: int) -> int:
    """Return the FLOPs of encoding one caption with T5-XXL's encoder."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    return counter.get_total_flops()


def main() -> None:
    texts = {name: text_flops(tokens) for name, tokens in LENGTHS.items()}
    for side in (256, 512, 1024):
        print(f"VAE at {side}: {vae_flops(side) / 1e12:.2f} TFLOP per image")
    for name, flops in texts.items():
        print(f"T5-XXL, {LENGTHS[name]} tokens ({name}): {flops / 1e12:.2f} TFLOP per caption")
    print(
        "| side | captions | KB per sample | TB per 100M | TB with token ids only | shards | VAE H100-hours "
        "| T5-XXL H100-hours |"
    )
    for side in (256, 512, 1024):
        vae = vae_flops(side)
        for name, tokens in LENGTHS.items():
            full, lean = (sample_bytes(side, tokens, features) for features in (True, False))
            hours = [1e8 * flops / (UTILIZATION * PEAK) / 3600 for flops in (vae, texts[name])]
            print(
                f"| {side} | {name} | {full / 1e3:.0f} | {full / 1e4:.0f} | {lean / 1e4:.1f} | "
                f"{1e8 / PER_SHARD:,.0f} | {hours[0]:,.0f} | {hours[1]:,.0f} |"
            )


if __name__ == "__main__":
    main()
