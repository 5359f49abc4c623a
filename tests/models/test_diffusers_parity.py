"""Outputs and all parameter gradients equal diffusers' to 1e-5 (relative, fp32) with mapped random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

from megatron_dit.config import ModelConfig
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.common.condition import Condition
from megatron_dit.parallel.topology import connect
from tests.helpers import diffusers_weights, plain_uvit

TOLERANCE = 1e-5


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = 1.0 if name.endswith("gain") else 0.0
            p.copy_(gain + torch.randn(p.shape, generator=generator) * (0.1 if p.ndim == 1 else p.shape[-1] ** -0.5))


def compare(ours, theirs, weights, our_out, their_out):
    """Compare outputs and gradients of a random linear functional of them; return the unmapped parameters."""
    assert relative(our_out, their_out) <= TOLERANCE
    direction = torch.randn(our_out.shape, generator=torch.Generator().manual_seed(7))
    (our_out * direction).sum().backward()
    (their_out * direction).sum().backward()
    # The map only splits, swaps and reshapes, so it applies to gradients as it does to weights.
    gradients = weights({name: p.grad for name, p in ours.named_parameters()}, ours.config)
    their_params = dict(theirs.named_parameters())
    assert set(gradients) <= set(their_params)
    for name, gradient in gradients.items():
        expected = their_params[name].grad
        # softmax ignores a constant added to all keys, so without QK-norm the gradient of the key bias is only
        # rounding error, which is compared with the gradient of the value bias.
        key_bias = name.endswith("to_k.bias")
        scale = their_params[name.replace("to_k", "to_v")].grad if key_bias else expected
        assert (gradient - expected).norm() <= TOLERANCE * scale.norm(), name
    return set(their_params) - set(gradients)


def inputs(config, batch, height, width):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, config.in_channels, height, width, generator=generator)
    t = torch.rand(batch, generator=generator) * 1000
    text = torch.randn(batch, config.text_tokens, config.text_dim, generator=generator)
    return x, t, text


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (12, 6)])
def test_mmdit_equals_sd3(height, width):
    connect()
    config = ModelConfig(
        arch="mmdit", depth=3, heads=4, head_dim=8, patch_size=2, in_channels=4, sample_size=8, position_size=6,
        text_dim=12, text_tokens=5,
    )  # fmt: skip
    ours = build_unsharded(config)
    randomize(ours, seed=1)
    theirs = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=12, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=6, qk_norm="rms_norm",
    )  # fmt: skip
    with torch.no_grad():
        for p in theirs.time_text_embed.text_embedder.parameters():
            p.zero_()
    state = {name: value.detach() for name, value in ours.named_parameters()}
    theirs.load_state_dict(diffusers_weights.weights(state, config), strict=False)
    x, t, text = inputs(config, 2, height, width)
    everything = torch.ones(2, 5, dtype=torch.bool)
    our_out = ours(x, t, Condition(torch.zeros(2, dtype=torch.bool), text, everything))
    pooled = torch.zeros(2, 16)
    their_out = theirs(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
    unmapped = compare(ours, theirs, diffusers_weights.weights, our_out, their_out)
    assert all("text_embedder" in name for name in unmapped)


def test_mmdit_zeroes_masked_and_dropped_text():
    connect()
    config = ModelConfig(
        arch="mmdit", depth=2, heads=2, head_dim=8, patch_size=2, in_channels=4, sample_size=8, text_dim=12,
        text_tokens=5,
    )  # fmt: skip
    model = build_unsharded(config)
    randomize(model, seed=2)
    x, t, text = inputs(config, 2, 8, 8)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    dropped = torch.tensor([False, True])
    zeroed = text.clone()
    zeroed[0, 2:] = 0
    zeroed[1] = 0
    keep = torch.zeros(2, dtype=torch.bool)
    masked = model(x, t, Condition(dropped, text, mask))
    assert torch.equal(masked, model(x, t, Condition(keep, zeroed, torch.ones_like(mask))))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (16, 12)])
def test_pixart_equals_diffusers(height, width, masked):
    connect()
    config = ModelConfig(
        arch="pixart", learn_sigma=True, depth=3, heads=4, head_dim=8, patch_size=2, in_channels=4, sample_size=8,
        text_dim=12, text_tokens=5, interpolation_scale=2.0, train_null_caption=masked,
    )  # fmt: skip
    ours = build_unsharded(config)
    randomize(ours, seed=1)
    theirs = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=32, sample_size=8, patch_size=2, interpolation_scale=2, caption_channels=12,
        use_additional_conditions=False,
    )  # fmt: skip
    state = {name: value.detach() for name, value in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(diffusers_weights.weights(state, config), strict=False)
    assert not missing
    assert not unexpected
    x, t, text = inputs(config, 3, height, width)
    mask = torch.ones(3, 5, dtype=torch.bool)
    if masked:
        mask[0, 2:] = False
        mask[2, 3:] = False
    # The third image's caption is dropped: diffusers receives the null caption instead, with the caption's mask.
    dropped = torch.tensor([False, False, True])
    their_text = torch.where(dropped[:, None, None], state["null_caption.table"], text)
    our_out = ours(x, t, Condition(dropped, text, mask))
    their_out = theirs(x, encoder_hidden_states=their_text, timestep=t, encoder_attention_mask=mask).sample
    assert not compare(ours, theirs, diffusers_weights.weights, our_out, their_out)
    gradient = ours.null_caption.table.grad
    assert bool(gradient.any()) if masked else gradient is None


def test_dit_equals_diffusers():
    connect()
    config = ModelConfig(
        arch="dit", learn_sigma=True, depth=3, heads=4, head_dim=8, patch_size=2, in_channels=4, sample_size=8,
        num_classes=10,
    )  # fmt: skip
    ours = build_unsharded(config)
    randomize(ours, seed=1)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the original; diffusers hard-codes 1
    # diffusers repeats the embedders in every block and its head uses the first block's, so tie them all.
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb = theirs.transformer_blocks[0].norm1.emb
    state = {name: value.detach() for name, value in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(diffusers_weights.weights(state, config), strict=False)
    assert not unexpected
    assert all(".norm1.emb." in name and "blocks.0." not in name for name in missing)
    x, t, _ = inputs(config, 3, 8, 8)
    label, dropped = torch.tensor([3, 9, 5]), torch.tensor([False, False, True])
    our_out = ours(x, t, Condition(dropped, label=label))
    their_out = theirs(x, timestep=t, class_labels=torch.where(dropped, 10, label)).sample
    assert not compare(ours, theirs, diffusers_weights.weights, our_out, their_out)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_uvit_equals_plain_pytorch(kind):
    connect()
    condition = {"num_classes": 10} if kind == "class" else {"text_dim": 12, "text_tokens": 5}
    config = ModelConfig(
        arch="uvit", depth=5, heads=4, head_dim=8, patch_size=2, in_channels=4, sample_size=8, **condition
    )
    ours = build_unsharded(config)
    randomize(ours, seed=1)
    sizes = {"classes": 10} if kind == "class" else condition
    theirs = plain_uvit.PlainUViT(32, 5, 4, 2, 4, 8, **sizes)
    state = {name: value.detach() for name, value in ours.named_parameters()}
    theirs.load_state_dict(plain_uvit.weights(state, config))
    x, t, text = inputs(config, 3, 8, 8)
    dropped = torch.tensor([False, True, False])
    if kind == "class":
        label = torch.tensor([3, 9, 5])
        our_out = ours(x, t, Condition(dropped, label=label))
        their_out = theirs(x, t + 1, torch.where(dropped, 10, label))
    else:
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
        our_out = ours(x, t, Condition(dropped, text, mask))
        their_out = theirs(x, t + 1, text * (mask & ~dropped[:, None])[..., None])
    assert not compare(ours, theirs, plain_uvit.weights, our_out, their_out)


@pytest.mark.parametrize("arch", ["mmdit", "pixart"])
def test_taps_receive_intermediates_by_name(arch):
    connect()
    config = ModelConfig(
        arch=arch, depth=2, heads=2, head_dim=8, patch_size=2, in_channels=4, sample_size=8, text_dim=12, text_tokens=5,
    )  # fmt: skip
    model = build_unsharded(config)
    randomize(model, seed=2)
    x, t, text = inputs(config, 2, 8, 8)
    intermediates = {}
    keep, mask = torch.zeros(2, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    condition = Condition(keep, text, mask)
    out = model(x, t, condition, intermediates)
    assert torch.equal(intermediates["output"], out[:, : config.in_channels])  # only ε, without the learned variance
    assert intermediates["image"].shape == (16, 2, 16)
    blocks = [name for name in intermediates if name.startswith("blocks.")]
    assert len(blocks) == (4 if arch == "mmdit" else 2)
    assert torch.equal(out, model(x, t, condition))
