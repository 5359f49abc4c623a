"""The baseline of ``bench --diffusers``: the same model from diffusers, trained the way diffusers' scripts do.

The weights are fp32. With ``train.dtype=bf16`` matrix products run in bf16 under autocast. The optimizer is torch's
fused AdamW, the loss is the mean squared error, and there is no EMA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, ModelMixin, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from megatron_dit.config import Config, ModelConfig
from megatron_dit.data.batch import Batch
from megatron_dit.models.common.diffusers import MLP_RATIO, diffusers_settings
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError


def check_baseline(model: ModelConfig) -> None:
    """Raise UserError if diffusers has no counterpart of the model."""
    if model.arch not in MODELS:
        raise UserError(f"--diffusers does not support model.arch={model.arch}; expected one of {', '.join(MODELS)}")
    if model.repa_block:
        raise UserError("--diffusers does not support REPA; set model.repa_block=null model.repa_dim=null")
    if model.mlp_ratio != MLP_RATIO:
        raise UserError(
            f"--diffusers does not support model.mlp_ratio={model.mlp_ratio}; set model.mlp_ratio={MLP_RATIO}, the "
            "only ratio of diffusers' models"
        )


class DiffusersBaseline:
    """Model and optimizer on this process's device. Call ``check_baseline`` on the model's config first."""

    def __init__(self, config: Config) -> None:
        model, optimizer = config.model, config.optimizer
        self._config = config
        build, self._predict = MODELS[model.arch]
        with torch.device(device()):
            self.model = build(model)
        if config.train.recompute == "full":
            self.model.enable_gradient_checkpointing()
        self.model.train()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def step(self, batch: Batch) -> None:
        """Run forward, backward and the optimizer step on the full batch, in the config's micro-batches."""
        train, clip = self._config.train, self._config.optimizer.grad_clip
        micro_batches = batch.split(train.micro_batch)
        for micro in micro_batches:
            on_device = micro.to(device())
            with torch.autocast(device().type, torch.bfloat16, enabled=train.dtype == "bf16"):
                prediction = self._predict(self.model, on_device)
            # With a learned variance only ε is trained here; our loss trains the variance too.
            loss = F.mse_loss(prediction.float()[:, : self._config.model.in_channels], on_device.noise)
            (loss / len(micro_batches)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _build_dit(config: ModelConfig) -> ModelMixin:
    return DiTTransformer2DModel(**diffusers_settings(config))


def _dit(model: nn.Module, batch: Batch) -> Tensor:
    return model(_noised(batch), timestep=_timesteps(batch), class_labels=batch.condition.label).sample


def _build_pixart(config: ModelConfig) -> ModelMixin:
    return PixArtTransformer2DModel(**diffusers_settings(config))


def _pixart(model: nn.Module, batch: Batch) -> Tensor:
    text, mask = batch.condition.text_and_mask()
    return model(
        _noised(batch), encoder_hidden_states=text, timestep=_timesteps(batch), encoder_attention_mask=mask
    ).sample


POOLED_TEXT = 16  # width of SD3's pooled text input, which our MMDiT does not have; small to cost little


def _build_mmdit(config: ModelConfig) -> ModelMixin:
    return SD3Transformer2DModel(**{**diffusers_settings(config), "pooled_projection_dim": POOLED_TEXT})


def _mmdit(model: nn.Module, batch: Batch) -> Tensor:
    text, _ = batch.condition.text_and_mask()
    pooled = text.new_zeros(len(text), POOLED_TEXT)
    return model(
        _noised(batch), encoder_hidden_states=text, pooled_projections=pooled, timestep=_timesteps(batch)
    ).sample


def _noised(batch: Batch) -> Tensor:
    return batch.latents + batch.noise


def _timesteps(batch: Batch) -> Tensor:
    return (1000 * batch.u).long()


MODELS: dict[str, tuple[Callable[[ModelConfig], ModelMixin], Callable[[nn.Module, Batch], Tensor]]] = {
    "dit": (_build_dit, _dit),
    "pixart": (_build_pixart, _pixart),
    "mmdit": (_build_mmdit, _mmdit),
}
