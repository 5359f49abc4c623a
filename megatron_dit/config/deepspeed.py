"""DeepSpeed's JSON, made from the config."""

from __future__ import annotations

from typing import Any

from megatron_dit.config.schema import Config


def deepspeed_config(config: Config, data_parallel: int) -> dict[str, Any]:
    """DeepSpeed's JSON. Stage 0 clips in ``engine`` (DeepSpeed's own norm there is blind to sharding)."""
    stage, bf16 = config.parallel.zero_stage, config.train.dtype == "bf16"
    micro = config.train.micro_batch
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.train.global_batch // (micro * data_parallel),
        "gradient_clipping": config.optimizer.grad_clip if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        # memory_efficient_linear would replace torch.nn.functional.linear for the whole process.
        "zero_optimization": {
            "stage": stage,
            "memory_efficient_linear": False,
            # At stage 1 gradients are reduced once a step, after the last backward pass.
            "overlap_comm": config.parallel.overlap and stage >= 2,
            "reduce_bucket_size": config.parallel.bucket,
            "allgather_bucket_size": config.parallel.bucket,
            "stage3_prefetch_bucket_size": config.parallel.prefetch,
        },
        "steps_per_print": 2**31 - 1,
    }
    if config.optimizer.offload:
        result["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        result["zero_force_ds_cpu_optimizer"] = False  # ours holds a DeepSpeedCPUAdam and is none itself
    if bf16:
        # Each gradient goes to fp32 as it is ready: a pipeline's micro-batches would else add up in bf16.
        result["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
        if stage:
            result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
