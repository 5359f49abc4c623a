"""Search of base hyperparameters on proxies: optuna asks, trials are runs of ``megatron-dit train``."""
