"""Reference for the engine: train the unsharded model in plain PyTorch, without the engine and DeepSpeed."""

from __future__ import annotations

import mup
import torch

from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.initial_values import initial_value
from megatron_dit.mup.multipliers import forward_multipliers, set_multipliers
from megatron_dit.objectives import OBJECTIVES, NoiseDraw
from megatron_dit.parallel.topology import connect
from tests.helpers.mup_groups import package_groups


class Plain:
    """Model at its initial values with mup.MuAdamW. A training step is ``backward`` followed by ``update``."""

    def __init__(self, config):
        connect()
        self.config, self.params = config, param_specs(config)
        _, self.model = package_groups(config)  # with base shapes set, as the package requires
        self.weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, p in self.weights.items():
                p.copy_(initial_value(self.params[name], config.seed))
        set_multipliers(self.model, forward_multipliers(self.params))
        options = config.optimizer
        self.optimizer = mup.MuAdamW(
            self.model.parameters(),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
            foreach=False,
            fused=False,
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        assert len(set(self.peaks)) == 2, "the model must be wider than its base, otherwise μP scales nothing"

    def backward(self, batch):
        """Accumulate gradients of the mean loss over ``batch``; return the intermediate outputs of the forward pass."""
        intermediates = {}
        options = self.config.objective
        objective = OBJECTIVES[options.name]
        draw = NoiseDraw(objective.sample_t(batch.u, options), batch.noise)
        prediction = self.model(*objective.perturb(batch.latents, draw, options), batch.condition, intermediates)
        objective.loss(prediction, batch.latents, draw, options).mean().backward()
        return intermediates

    def update(self, step):
        """Clip gradients, update with the constant schedule's learning rate at ``step``, and zero the gradients.

        Returns the gradient norm before clipping.
        """
        options = self.config.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.grad_clip)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / options.warmup_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)
