"""Generate DeepSpeed's JSON config from the run config."""

from __future__ import annotations

from typing import Any

from megatron_dit.config.schema import Config

MAX_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default


def uses_deepspeed(config: Config) -> bool:
    """Return whether DeepSpeed runs the optimizer step; otherwise parallel/flat.py does."""
    return config.parallel.zero_stage >= 2 or config.optimizer.offload


def deepspeed_config(config: Config, data_parallel: int, block_numel: int) -> dict[str, Any]:
    """Return DeepSpeed's JSON config as a dictionary, for configs with :func:`uses_deepspeed`.

    ``block_numel`` is the number of elements of the largest block's weights on one tensor-parallel rank.
    """
    ahead = config.parallel.prefetch_bucket_size
    ahead = block_numel if ahead is None else ahead
    stage, bf16 = config.parallel.zero_stage, config.train.dtype == "bf16"
    micro = config.train.micro_batch
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.train.global_batch // (micro * data_parallel),
        "gradient_clipping": config.optimizer.grad_clip or 0.0,
        "zero_allow_untested_optimizer": True,
        # memory_efficient_linear would replace torch.nn.functional.linear in the entire process.
        "zero_optimization": {
            "stage": stage,
            "memory_efficient_linear": False,
            "overlap_comm": config.parallel.overlap_comm and stage >= 2,
            # By default, stage 2 all-reduces whole buckets, twice the bytes of reducing each slice to its rank.
            "use_multi_rank_bucket_allreduce": False,
            "reduce_bucket_size": config.parallel.reduce_bucket_size,
            "allgather_bucket_size": config.parallel.reduce_bucket_size,
            "stage3_prefetch_bucket_size": ahead,
            # Upper limit of gathered weights. DeepSpeed prefetches whenever a module starts, until this limit is
            # reached: we allow the current block and two prefetches. Its default is one MMDiT block of width 5120.
            "stage3_max_live_parameters": max(MAX_LIVE_PARAMETERS, block_numel + 2 * ahead),
        },
        "communication_data_type": config.parallel.reduce_dtype,  # DeepSpeed's default is that of the weights
        "steps_per_print": 2**31 - 1,
        # The throughput timer, enabled by default, waits for the GPU before every forward pass and step.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.optimizer.offload:
        result["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        result["zero_force_ds_cpu_optimizer"] = False  # our optimizer wraps DeepSpeedCPUAdam
    if bf16:
        # Add each gradient to its fp32 copy as soon as it is ready. Otherwise, the gradients of a pipeline's
        # micro-batches are accumulated in bf16.
        result["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
