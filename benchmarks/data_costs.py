"""What a dataset takes: bytes, files and GPU-hours of encoding, by arithmetic; the table of docs/data.md.

    python benchmarks/data_costs.py        # seconds, no GPU

Bytes: what `data_prep encode` writes of a sample, members padded to tar's blocks of 512 bytes and its table, with
SD's VAE (4 channels, an eighth of the side) and T5-XXL (4,096 wide). FLOPs: counted by torch on the real
architectures, on the meta device. Hours: FLOPs / (share of the peak * peak), H100 SXM in bf16, an assumption and no
measurement; decoding and resizing pictures go on on the CPU meanwhile.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

PEAK, SHARE = 989e12, 0.35  # FLOP/s; what dense inference reaches in practice
PER_SHARD = 10_000
BLOCK = 512
TABLE_ROW = 12 + 9 * 16  # bytes of a sample in its shard's table
PEOPLE = 300  # bytes of txt and json
LENGTHS = {"alt text": 30, "dense captions": 110}


def member(size: int) -> int:
    """A tar member's bytes: header, and data padded to blocks."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def sample_bytes(side: int, tokens: int, features: bool) -> int:
    """Of a picture of ``side`` pixels with one caption of ``tokens``."""
    array = 128  # an npy header
    latent = member(array + 4 * (side // 8) ** 2 * 2)
    text = member(array + tokens * 4096 * 2) if features else 0
    return 2 * latent + text + member(array + 4 * tokens) + member(array + 16) + 2 * member(PEOPLE) + TABLE_ROW


def vae_flops(side: int) -> int:
    """Of encoding one picture with the VAE of Stable Diffusion."""
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        AutoencoderKL(**sizes, **blocks).encode(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def text_flops(tokens: int) -> int:
    """Of encoding one caption with T5-XXL's encoder."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    return counter.get_total_flops()


def main() -> None:
    texts = {name: text_flops(tokens) for name, tokens in LENGTHS.items()}
    for side in (256, 512, 1024):
        print(f"VAE at {side}: {vae_flops(side) / 1e12:.2f} TFLOP a picture")
    for name, flops in texts.items():
        print(f"T5-XXL, {LENGTHS[name]} tokens ({name}): {flops / 1e12:.2f} TFLOP a caption")
    print("| side | captions | KB a sample | 100M: TB | with ids alone | shards | H100-hours, VAE | T5-XXL |")
    for side in (256, 512, 1024):
        vae = vae_flops(side)
        for name, tokens in LENGTHS.items():
            whole, lean = (sample_bytes(side, tokens, features) for features in (True, False))
            hours = [1e8 * flops / (SHARE * PEAK) / 3600 for flops in (vae, texts[name])]
            print(
                f"| {side} | {name} | {whole / 1e3:.0f} | {whole / 1e4:.0f} | {lean / 1e4:.1f} | "
                f"{1e8 / PER_SHARD:,.0f} | {hours[0]:,.0f} | {hours[1]:,.0f} |"
            )


if __name__ == "__main__":
    main()
