"""Sample from an exported transformer as the training code does; requires only diffusers and its dependencies."""

from __future__ import annotations

import inspect
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor

Inputs = dict[str, Tensor]  # a transformer's inputs in addition to the latents and the timestep


class MegatronDiTPipeline(DiffusionPipeline):
    """Pipeline for DiT, PixArt-α, MMDiT (as SD3's class) and U-ViT, with T5 as the only text encoder.

    Without a VAE the latents are pixels in [-1, 1]. With SD3's transformer T5 is registered as ``text_encoder_3``, as
    in diffusers' own pipeline.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_3->transformer->vae"
    _optional_components = ["vae", "tokenizer", "text_encoder", "tokenizer_3", "text_encoder_3"]

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        tokenizer_3: Any = None,
        text_encoder_3: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_3=tokenizer_3,
            text_encoder_3=text_encoder_3,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        if self._kind == "DiTTransformer2DModel":
            for block in transformer.transformer_blocks:
                # As in the original DiT; diffusers hard-codes 1, which gives different frequencies.
                block.norm1.emb.time_proj.downscale_freq_shift = 0

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: list[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images from prompts, or from class labels if the model was trained with labels.

        ``height`` and ``width`` are in pixels. ``num_inference_steps`` and ``guidance_scale`` default to the run's
        values. ``latents`` (B, C, H, W) is the initial noise.
        """
        if (prompt is None) == (class_labels is None):
            raise ValueError("give either prompt or class_labels")
        sampling = self.facts["config"]["sampling"]
        guidance = sampling["guidance"] if guidance_scale is None else guidance_scale
        device, dtype = self._execution_device, self.transformer.dtype
        inputs, null = self._labels(class_labels) if class_labels is not None else self._text(prompt)
        batch = len(next(iter(inputs.values())))
        channels, side = self.transformer.config.in_channels, self.transformer.config.sample_size
        sides = (side if pixels is None else pixels // self.vae_scale_factor for pixels in (height, width))
        if latents is None:
            latents = randn_tensor((batch, channels, *sides), generator=generator, device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps or sampling["steps"], device=device)
        x = latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        # A stochastic scheduler draws its noise from the caller's generator.
        seeded = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if seeded else {}
        both = {name: torch.cat([value, null[name]]) for name, value in inputs.items()}
        bar: Any = self.progress_bar
        for t in bar(self.scheduler.timesteps):
            if guidance == 1:
                prediction = self._predict(x, t, inputs)[:, :channels]
            else:
                conditional, unconditional = self._predict(torch.cat([x, x]), t, both)[:, :channels].chunk(2)
                prediction = unconditional + guidance * (conditional - unconditional)
            x = self.scheduler.step(prediction, t, x, return_dict=False, **options)[0]
        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Facts about the run that the export recorded: its config, and the length to which captions are truncated."""
        return json.loads(self._file("megatron_dit.json").read_text())

    @property
    def _kind(self) -> str:
        return type(self.transformer).__name__

    def _predict(self, x: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        return self.transformer(x, timestep=t.expand(len(x)).to(x.device), return_dict=False, **inputs)[0]

    def _labels(self, class_labels: list[int]) -> tuple[Inputs, Inputs]:
        settings = self.transformer.config
        classes = settings.num_embeds_ada_norm if self._kind == "DiTTransformer2DModel" else settings.num_classes
        labels = torch.tensor(class_labels, device=self._execution_device)
        return {"class_labels": labels}, {"class_labels": torch.full_like(labels, classes)}

    def _text(self, prompt: str | list[str] | None) -> tuple[Inputs, Inputs]:
        text, mask = self._encode([prompt] if isinstance(prompt, str) else prompt or [])
        if self._kind == "PixArtTransformer2DModel":
            null = load_file(self._file("null_caption.safetensors"))["null_caption"].to(text)
            names = ("encoder_hidden_states", "encoder_attention_mask")
            values = (text, mask), (null.expand_as(text), mask)
            return dict(zip(names, values[0], strict=True)), dict(zip(names, values[1], strict=True))
        inputs = {"encoder_hidden_states": text * mask[..., None]}  # padding is not masked in attention, but zero
        if self._kind == "SD3Transformer2DModel":
            inputs["pooled_projections"] = text.new_zeros(len(text), self.transformer.config.pooled_projection_dim)
        return inputs, {name: torch.zeros_like(value) for name, value in inputs.items()}

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return T5's features (B, T, dim), zero-padded to the model's training length, and their mask (B, T)."""
        encoder = self.text_encoder or self.text_encoder_3
        tokenizer = self.tokenizer or self.tokenizer_3
        max_tokens, length = self.facts["text_tokens"], self.facts["config"]["model"]["text_tokens"]
        tokens = tokenizer(prompts, padding="longest", truncation=True, max_length=max_tokens, return_tensors="pt")
        tokens = tokens.to(self._execution_device)
        features = encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask[:, :length].to(self.transformer.dtype)
        text = features[:, :length].to(self.transformer.dtype) * mask[..., None]
        missing = length - text.shape[1]
        pad = torch.nn.functional.pad
        return pad(text, (0, 0, 0, missing)), pad(mask, (0, missing))

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        if self.vae is not None:
            settings = self.vae.config
            x = x / settings.scaling_factor
            if settings.latents_std is not None:
                mean, std = (
                    x.new_tensor(each)[:, None, None] for each in (settings.latents_mean, settings.latents_std)
                )
                x = x * std + mean
            x = (x + (settings.shift_factor or 0.0)).to(self.vae.dtype)
            x = self.vae.decode(x, return_dict=False)[0]
        return self.image_processor.postprocess(x.float(), output_type=output_type)

    def _file(self, name: str) -> Path:
        """Return the path of a file next to the transformer's weights, in a local folder or a repository on the hub."""
        settings: Any = self.config
        source = settings._name_or_path
        local = Path(source, "transformer", name)
        return local if local.is_file() else Path(hf_hub_download(source, f"transformer/{name}"))
