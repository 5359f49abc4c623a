"""Large images are decoded in tiles, one at a time; small ones, and every encoding, are not."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from megatron_dit.data import codec as module
from megatron_dit.data.codec import PixelCodec, VaeCodec, set_tile_size


def tiny_vae(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=1.0,
            **settings,
        ).eval()  # fmt: skip


@pytest.fixture
def codec(tmp_path, monkeypatch):
    """A VAE of two pixels per latent, with tiles of 64 pixels."""
    monkeypatch.setattr(module, "LEAST_TILE", 64)
    tiny_vae().save_pretrained(tmp_path)
    return VaeCodec(str(tmp_path))


@pytest.fixture
def tiled(monkeypatch):
    """Shapes of the latents that were decoded in tiles."""
    shapes, decode = [], AutoencoderKL.tiled_decode
    monkeypatch.setattr(AutoencoderKL, "tiled_decode", lambda vae, z: shapes.append(tuple(z.shape)) or decode(vae, z))
    return shapes


def latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def whole(z):
    return PixelCodec().decode(tiny_vae().decode(z).sample)


@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (3, 4, 8, 32)])
def test_images_up_to_a_tile_are_decoded_as_a_whole(codec, tiled, shape):
    z = latents(*shape)
    assert torch.equal(codec.decode(z), whole(z))
    assert not tiled


@pytest.mark.parametrize("shape", [(2, 4, 48, 80), (2, 4, 8, 33), (1, 4, 97, 20)])
def test_larger_images_are_decoded_in_tiles_and_stay_close_to_the_whole(codec, tiled, shape):
    z = latents(*shape)
    found, expected = codec.decode(z), whole(z)
    assert tiled == [(1, *shape[1:])] * shape[0]
    assert found.shape == expected.shape == (shape[0], 3, 2 * shape[2], 2 * shape[3])
    difference = (found.float() - expected.float()).abs()
    assert expected.float().std() > 30
    assert difference.mean() < 5  # of 255
    # The first quarter of the first tile has no other tile to be blended with, and its content is in place.
    corner = (..., slice(16), slice(16))
    assert torch.corrcoef(torch.stack([found[corner].flatten(), expected[corner].flatten()]).float())[0, 1] > 0.98


def test_encoding_is_not_tiled(codec):
    images = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codec.decode(latents(1, 4, 48, 80))
    with torch.no_grad():
        expected = tiny_vae().encode(images.float() / 127.5 - 1).latent_dist.mean
    assert torch.equal(codec.posterior(images)[0], expected)


@pytest.mark.parametrize(
    ("sample_size", "least", "tile"),
    [(32, 1024, 1024), (256, 1024, 1024), (2048, 1024, 2048), ([512, 1536], 1024, 1536), (1030, 1024, 1024)],
)
def test_tiles_are_as_large_as_the_images_of_the_vaes_training_but_not_smaller_than_1024(sample_size, least, tile):
    assert least == module.LEAST_TILE
    vae = tiny_vae()
    vae.register_to_config(sample_size=sample_size)
    set_tile_size(vae)
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (tile, tile // 2)
