"""Transfer a sweep's best base hyperparameters to a target."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_dit.config import Config, config_from_dict, flatten
from megatron_dit.models.param_specs import param_specs
from megatron_dit.mup.groups import GroupValues, group_values
from megatron_dit.runtime.errors import UserError
from megatron_dit.runtime.io import replacing
from megatron_dit.runtime.text import printable
from megatron_dit.tuning import report
from megatron_dit.tuning.cost import cost_of_results
from megatron_dit.tuning.space import SweepConfig, load_saved
from megatron_dit.tuning.transfer_rules import apply_rules
from megatron_dit.tuning.trial import Result, stored_result

logger = logging.getLogger(__name__)


def transfer(
    folder: Path,
    target: Config,
    target_path: str,
    out: Path,
    rules: Sequence[str] = (),
    critical_batch: float | None = None,
) -> dict[str, Any]:
    """Write ``target`` with the best base hyperparameters of the sweep in ``folder`` to ``out``, below a header.

    ``rules`` are names of ``TRANSFER_RULES``, which convert values to the target's batch size and number of steps. The
    header contains the trials and seeds, the rules, the learning rate and weight decay of every group, and the cost of
    the search. Return the header's lines and values. Raises UserError if ``folder`` is not a sweep or has no completed
    μP trial, or if the target's parametrization differs from the proxies'.
    """
    config, results = read_sweep(folder)
    chosen = report.best(results, config)
    if chosen is None:
        raise UserError(f"{folder} has no completed μP trial to transfer from; run 'megatron-dit sweep' to see why")
    proxy = config.trial_config({**dict(chosen.model), **dict(chosen.hyperparameters)}, 0)
    _check_target(proxy, target, config.space)
    converted, rule_lines = apply_rules(rules, proxy, target, critical_batch)
    tuned = with_values(target, {**dict(chosen.hyperparameters), **converted})
    groups = group_lines(tuned)
    cost = cost_of_results(config, results, tuned)
    values = ", ".join(f"{key} = {report.show(value)}" for key, value in chosen.hyperparameters)
    header = [
        f"{target_path} with base hyperparameters from {folder}: {values}",
        report.provenance(chosen, results),
        *rule_lines,
        *groups,
        *cost.lines(),
    ]
    header = [printable(line) for line in header]  # a line break in a name would end the comment
    text = "".join(f"# {line}\n" for line in header) + yaml.safe_dump(asdict(tuned), sort_keys=False)
    with replacing(out, makes_folder=True) as part:
        part.write_text(text, encoding="utf-8")
    return {
        "header": header,
        "hyperparameters": dict(chosen.hyperparameters) | converted,
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
    """Return a line for every optimizer group: its peak learning rate, weight decay, eps if it differs, and roles."""
    groups: dict[GroupValues, Counter[str]] = {}
    for param in param_specs(config).values():
        groups.setdefault(group_values(param, config.optimizer), Counter())[param.role] += 1
    differ = len({values.eps for values in groups}) > 1

    def line(values: GroupValues, roles: Counter[str]) -> str:
        eps = f", eps {values.eps:.6g}" if differ else ""
        muon = ", Muon" if values.muon else ""
        counts = ", ".join(f"{count} {role}" for role, count in roles.items())
        return f"lr {values.lr:.6g}, weight decay {values.weight_decay:.6g}{eps}{muon}: {counts}"

    return [line(values, roles) for values, roles in groups.items()]


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


def _check_target(proxy: Config, target: Config, searched: Collection[str]) -> None:
    """Raise UserError if base hyperparameters do not transfer: they depend on the parametrization and base width.

    The values of ``searched`` hyperparameters are transferred themselves.
    """
    proxy_values, target_values = flatten(proxy), flatten(target)
    by_role = [key for key in proxy_values if key.startswith("mup.lr_multiplier.")]
    rules = ("mup.enabled", "mup.output_multiplier", "mup.base_depth", "mup.depth_exponent", "mup.scaled_eps")
    muon = ("optimizer.muon_lr", "optimizer.muon_momentum")
    for key in ("model.arch", *rules, *by_role, *muon):
        transferred = key in searched and report.is_hyperparameter(key)
        if not transferred and proxy_values[key] != target_values[key]:
            raise UserError(
                f"{key} is {proxy_values[key]!r} in the sweep and {target_values[key]!r} in the target; make them equal"
            )
    base = [(config.mup.base_heads or 0) * config.model.head_dim for config in (proxy, target)]
    if base[0] != base[1] and not target.mup.base_shapes:
        raise UserError(
            f"mup.base_heads * model.head_dim is {base[0]} in the sweep and {base[1]} in the target; make them "
            "equal, because base hyperparameters depend on the base width"
        )
    if target.mup.base_depth is None and proxy.model.depth != target.model.depth:
        logger.warning(
            "the proxy's depth is %d and the target's %d, but mup.base_depth is not set: the best learning rate may "
            "differ; set it in the sweep's base config and in the target",
            proxy.model.depth,
            target.model.depth,
        )
