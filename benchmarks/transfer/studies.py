"""The studies of transfer: which sweeps each one runs, and over what."""

from __future__ import annotations

from dataclasses import dataclass

CONFIGS = {"mmdit": "quickstart", "dit": "quickstart-dit", "pixart": "quickstart-pixart", "uvit": "quickstart-uvit"}
ROLES = ("mup.lr_multiplier.input", "mup.lr_multiplier.vector")


@dataclass(frozen=True)
class Study:
    """Sweeps over one scale, for several architectures."""

    title: str
    sweeps: tuple[str, ...]  # in benchmarks/transfer: NAME-ARCH.yaml, or else NAME.yaml
    scale: str
    column: str  # name of the scale
    architectures: tuple[str, ...] = ("mmdit", "dit")
    parametrization: str = "mup.enabled"
    names: tuple[str, str] = ("standard", "μP")  # of the parametrization, if its value is false or null, and otherwise
    fewest_seeds: int = 2  # settings with fewer seeds cannot be an optimum
    lr_key: str = "optimizer.lr"
    more: tuple[tuple[str, str], ...] = ()  # (architecture, sweep) of sweeps for one architecture
    against_standard: bool = False  # search at the base size, transfer, and search again under standard parametrization
    largest: tuple[tuple[str, int], ...] = ()  # (architecture, largest size), if not all of those in the sweeps
    fresh_seeds: tuple[int, ...] = ()  # seeds for the settings that study "width" chose, instead of a search

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys whose values are stored for each trial."""
        return (self.scale, self.parametrization, self.lr_key, *ROLES, "seed")


STUDIES = {
    "width": Study(
        title="Transfer of base hyperparameters across widths",
        sweeps=("width-proxy", "width-mup", "width-standard"),
        scale="model.heads",
        column="width",
        fewest_seeds=3,
        against_standard=True,
    ),
    "linear": Study(
        title="Transfer of base hyperparameters across widths, with a learning rate that falls linearly to zero",
        sweeps=("linear-proxy", "linear-mup", "linear-standard"),
        scale="model.heads",
        column="width",
        architectures=("dit", "pixart", "uvit"),
        fewest_seeds=3,
        against_standard=True,
        more=(("uvit", "linear-lower"),),
        largest=(("pixart", 8), ("uvit", 8)),
    ),
    "seeds": Study(
        title="The settings that the study of widths chose, with seeds that the choice did not use",
        sweeps=("width-mup", "width-standard"),
        scale="model.heads",
        column="width",
        fresh_seeds=(3, 4, 5),
    ),
    "depth": Study(
        title="Transfer of the base learning rate across depths",
        sweeps=("depth",),
        scale="model.depth",
        column="depth",
        architectures=("mmdit", "dit", "pixart", "uvit"),
        parametrization="mup.base_depth",
        names=("without the rule", "with the rule"),
        fewest_seeds=1,
        more=(("uvit", "depth-none"),),
    ),
    "muon": Study(
        title="Transfer of Muon's base learning rate across widths",
        sweeps=("muon",),
        scale="model.heads",
        column="width",
        fewest_seeds=1,
        lr_key="optimizer.muon_lr",
        more=(("mmdit", "muon-wide"),),
    ),
    "images-width": Study(
        title="Transfer across widths on real images",
        sweeps=("images-width",),
        scale="model.heads",
        column="width",
        architectures=("mmdit",),
        fewest_seeds=1,
    ),
    "images-depth": Study(
        title="Transfer across depths on real images",
        sweeps=("images-depth",),
        scale="model.depth",
        column="depth",
        architectures=("mmdit",),
        parametrization="mup.base_depth",
        names=("without the rule", "with the rule"),
        fewest_seeds=1,
    ),
    "longer": Study(
        title="AdamW in the time of 150 steps of Muon",
        sweeps=("longer",),
        scale="model.heads",
        column="width",
        fewest_seeds=1,
    ),
    "batch": Study(
        title="The best base learning rate at different batch sizes",
        sweeps=("batch",),
        scale="train.global_batch",
        column="batch",
    ),
    "batch-rule": Study(
        title="The best base learning rate at eight times the batch, with the betas and eps of rule batch",
        sweeps=("batch-rule",),
        scale="train.global_batch",
        column="batch",
        architectures=("mmdit",),
    ),
    "duration": Study(
        title="The best base learning rate for different numbers of steps",
        sweeps=("duration",),
        scale="train.steps",
        column="steps",
    ),
}
