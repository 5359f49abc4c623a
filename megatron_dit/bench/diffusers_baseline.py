"""The baseline of ``bench --diffusers``: the same model from diffusers, trained as in diffusers' training scripts.

The weights are fp32. With ``train.dtype=bf16`` matrix products run in bf16 under autocast. The optimizer is torch's
fused AdamW, the loss is the mean squared error, and there is no EMA.
"""

from __future__ import annotations

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dit.config import Config, ModelConfig
from megatron_dit.data.batch import Batch
from megatron_dit.models.common.diffusers import DiffusersCounterpart
from megatron_dit.models.registry import counterparts
from megatron_dit.runtime.device import device
from megatron_dit.runtime.errors import UserError


def check_baseline(model: ModelConfig) -> DiffusersCounterpart:
    """Return the model's counterpart. Raise UserError if diffusers has none."""
    choices = {arch: each for arch, each in counterparts().items() if each.module == diffusers.__name__}
    counterpart = choices.get(model.arch)
    if counterpart is None:
        raise UserError(f"--diffusers does not support model.arch={model.arch}; expected one of {', '.join(choices)}")
    if model.repa_block:
        raise UserError("--diffusers does not support REPA; set model.repa_block=null model.repa_dim=null")
    key = counterpart.unsupported(model)
    if key is not None:
        raise UserError(
            f"--diffusers does not support model.{key}={getattr(model, key)}; set model.{key}={counterpart.only[key]}, "
            f"the only value of {counterpart.class_name}"
        )
    return counterpart


class DiffusersBaseline:
    """Model and optimizer on this process's device. Raises UserError if diffusers has no counterpart of the model."""

    def __init__(self, config: Config) -> None:
        model, optimizer = config.model, config.optimizer
        self._config = config
        self._counterpart = check_baseline(model)
        with torch.device(device()):
            self.model = self._counterpart.model_class()(**self._counterpart.baseline_settings(model))
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
                prediction = self._predict(on_device)
            # With a learned variance only ε is trained here; our loss trains the variance too.
            loss = F.mse_loss(prediction.float()[:, : self._config.model.in_channels], on_device.noise)
            (loss / len(micro_batches)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _predict(self, batch: Batch) -> Tensor:
        inputs = self._counterpart.inputs(self.model, batch.condition)
        return self.model(batch.latents + batch.noise, timestep=(1000 * batch.u).long(), **inputs).sample
