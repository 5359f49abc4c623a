"""Transfer a sweep's best base hyperparameters to a target, and report the cost of the search.

The cost is defined as in arXiv 2505.15270: trials * proxy size * proxy epochs / (target size * target epochs). Size
times samples equals the training FLOPs up to the factor 6 * tokens, which is the same for proxy and target.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_dit.config import Config, ModelConfig, config_from_dict, flatten, load_config
from megatron_dit.models.build import build_unsharded
from megatron_dit.models.param_specs import param_specs
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.text import printable
from megatron_dit.tuning import report
from megatron_dit.tuning.space import SweepConfig, load_saved
from megatron_dit.tuning.trial import Result, stored_result

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """Cost of a search relative to its target's training.

    ``runs`` has the (parameters, samples seen) of each trial, ``target`` those of the target.
    """

    runs: tuple[tuple[int, int], ...]
    target: tuple[int, int]

    @property
    def fraction(self) -> float:
        """Cost of the search as a fraction of the target's training."""
        return sum(size * samples for size, samples in self.runs) / math.prod(self.target)

    @property
    def rounded_fraction(self) -> float | None:
        """The same fraction with sizes rounded to 0.01B, as in the paper; None if one of them rounds to zero."""
        sizes = [round(size / 1e9, 2) for size, _ in (*self.runs, self.target)]
        if not all(sizes):
            return None
        spent = sum(size * samples for size, (_, samples) in zip(sizes, self.runs, strict=False))
        return spent / (sizes[-1] * self.target[1])

    def lines(self) -> list[str]:
        """Return the calculation as lines of text."""
        size, samples = self.target
        text = [f"search cost: {len(self.runs)} trials * size * samples / (target size * target samples)"]
        text.append(f"  = {self._spent(exact=True)} / ({size:,} * {samples:,}) = {100 * self.fraction:.2f}%")
        if self.rounded_fraction is not None:
            text.append(
                f"  with sizes rounded to 0.01B, as in the paper: {self._spent(exact=False)}"
                f" / ({size / 1e9:.2f}B * {samples:,}) = {100 * self.rounded_fraction:.2f}%"
            )
        return text

    def _spent(self, exact: bool) -> str:
        terms = [
            f"{count} * {f'{size:,}' if exact else f'{size / 1e9:.2f}B'} * {samples:,}"
            for (size, samples), count in Counter(self.runs).items()
        ]
        return terms[0] if len(terms) == 1 else "(" + " + ".join(terms) + ")"


@functools.cache
def parameters(model: ModelConfig) -> int:
    """Return the number of parameters of a model."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_unsharded(model).parameters())


def samples(config: Config) -> int:
    """Return the number of samples that a run sees."""
    return config.train.steps * config.train.global_batch


def transfer(folder: Path, target: Config, target_path: str, out: Path) -> dict[str, Any]:
    """Write ``target`` with the best base hyperparameters of the sweep in ``folder`` to ``out``, below a header.

    The header contains the trials and seeds, the learning rate and weight decay of every group, and the cost of the
    search. Return the header's lines and values. Raises UserError if ``folder`` is not a sweep or has no completed μP
    trial, or if the target's parametrization differs from the proxies'.
    """
    config, results = read_sweep(folder)
    chosen = report.best(results, config)
    if chosen is None:
        raise UserError(f"{folder} has no completed μP trial to transfer from; run 'megatron-dit sweep' to see why")
    proxy = config.trial_config(dict(chosen.model), 0)
    _check_target(proxy, target)
    tuned = with_values(target, dict(chosen.hyperparameters))
    groups = group_lines(tuned)
    cost = Cost(tuple(_run(config, result) for result in results), (parameters(tuned.model), samples(tuned)))
    values = ", ".join(f"{key} = {report.show(value)}" for key, value in chosen.hyperparameters)
    header = [
        f"{target_path} with base hyperparameters from {folder}: {values}",
        report.provenance(chosen, results),
        *groups,
        *cost.lines(),
    ]
    header = [printable(line) for line in header]  # a line break in a name would end the comment
    text = "".join(f"# {line}\n" for line in header) + yaml.safe_dump(asdict(tuned), sort_keys=False)
    with replacing(out, makes_folder=True) as part:
        part.write_text(text, encoding="utf-8")
    return {
        "header": header,
        "hyperparameters": dict(chosen.hyperparameters),
        "trials": [trial.number for trial in chosen.trials],
        "loss": chosen.loss,
        "groups": groups,
        "cost": cost.fraction,
        "cost_rounded": cost.rounded_fraction,
    }


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """Return ``config`` with dotted ``values`` set, validated."""
    tree = asdict(config)
    for key, value in values.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = value
    return config_from_dict(tree)


def group_lines(config: Config) -> list[str]:
    """Return a line for every optimizer group: its peak learning rate, weight decay and roles."""
    groups: dict[tuple[float, float], Counter[str]] = {}
    for param in param_specs(config).values():
        key = (config.optimizer.lr * param.lr_multiplier, config.optimizer.weight_decay * param.weight_decay_multiplier)
        groups.setdefault(key, Counter())[param.role] += 1
    return [
        f"lr {lr:.6g}, weight decay {decay:.6g}: {', '.join(f'{count} {role}' for role, count in roles.items())}"
        for (lr, decay), roles in groups.items()
    ]


def read_sweep(folder: Path) -> tuple[SweepConfig, list[Result]]:
    """Return the sweep's config and the results so far, sorted by trial number."""
    path = folder / "sweep.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a sweep folder (it has no sweep.yaml); give the run_dir of a 'megatron-dit sweep'"
        )
    config = load_saved(folder)
    results = []
    for number in range(config.count):
        try:
            results.append(stored_result(config, number))
        except UserError as error:
            logger.warning("%s; ignoring this trial, 'megatron-dit sweep' will run it again", error)
    return config, [result for result in results if result is not None]


def print_plan(config: SweepConfig, target: str | None) -> dict[str, Any]:
    """Print the search space, and the cost relative to ``target``'s training if every trial completes."""
    print(
        f"{config.count} trials ({config.sampler}) of {printable(config.base_config)}, "
        f"{config.concurrent_trials} at a time:"
    )
    for key, dimension in config.space.items():
        kind = next(name for name in ("log2", "choice", "uniform", "log_uniform") if getattr(dimension, name))
        print(printable(f"  {key}: {kind} {getattr(dimension, kind)}"))
    plan: dict[str, Any] = {"trials": config.count}
    if target is not None:
        target_config = load_config(target)
        cost = Cost(_planned(config), (parameters(target_config.model), samples(target_config)))
        print("\n".join(cost.lines()))
        plan |= {"cost": cost.fraction, "cost_rounded": cost.rounded_fraction}
    return plan


def _planned(config: SweepConfig) -> tuple[tuple[int, int], ...]:
    """Return (parameters, samples) of every trial, assuming that all searched widths occur equally often."""
    widths = config.space["model.heads"].finite if "model.heads" in config.space else [config.base.model.heads]
    proxies = [config.trial_config({"model.heads": heads}, 0) for heads in widths]
    runs = [(parameters(proxy.model), samples(proxy)) for proxy in proxies]
    return tuple(runs[number % len(runs)] for number in range(config.count))


def _run(config: SweepConfig, result: Result) -> tuple[int, int]:
    return parameters(config.trial_config(result.params, result.number).model), result.samples


def _check_target(proxy: Config, target: Config) -> None:
    """Raise UserError if base hyperparameters do not transfer: they depend on the parametrization and base width."""
    proxy_values, target_values = flatten(proxy), flatten(target)
    for key in ("model.arch", "mup.enabled", "mup.output_multiplier"):
        if proxy_values[key] != target_values[key]:
            raise UserError(
                f"{key} is {proxy_values[key]!r} in the sweep and {target_values[key]!r} in the target; make them equal"
            )
    base = [(config.mup.base_heads or 0) * config.model.head_dim for config in (proxy, target)]
    if base[0] != base[1] and not target.mup.base_shapes:
        raise UserError(
            f"mup.base_heads * model.head_dim is {base[0]} in the sweep and {base[1]} in the target; make them "
            "equal, because base hyperparameters depend on the base width"
        )
