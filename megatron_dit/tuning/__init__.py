"""Search of base hyperparameters on proxies: optuna chooses the values, and each trial is a training run."""
