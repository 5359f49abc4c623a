"""Properties of an architecture that the rest of the package can read without importing torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_dit.mup.init_rules import InitRule
from megatron_dit.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron_dit.config import ModelConfig

# Keys of ModelConfig that only some architectures have, with the value that means "not set".
OPTIONAL_KEYS = {"train_null_caption": False, "position_size": None, "interpolation_scale": 1.0}

InitPreset = Mapping[str, InitRule]  # parameter name pattern -> rule; the first match decides


@dataclass(frozen=True)
class TokenSequence:
    """One of the token sequences that the blocks process, for one sample."""

    tokens: int
    sharded: bool = True  # whether sequence parallelism shards it


class ArchitectureSpec(ABC):
    """Properties and config checks of one architecture. Each ``models/<name>/spec.py`` defines its ``SPEC``."""

    name: ClassVar[str]  # value of model.arch, and name of the folder
    title: ClassVar[str]  # as papers write it
    objectives: ClassVar[tuple[str, ...]]  # supported values of objective.name; the first is the default
    optional_keys: ClassVar[tuple[str, ...]] = ()  # keys of OPTIONAL_KEYS that this architecture has
    init_presets: ClassVar[Mapping[str, InitPreset]] = {}  # values of init.preset that it adds
    fixed_size: ClassVar[bool] = False  # positions are learned for square latents of side sample_size

    @abstractmethod
    def uses_labels(self, config: ModelConfig) -> bool:
        """Return whether the condition is a class label; otherwise it is text."""

    @abstractmethod
    def sequences(self, config: ModelConfig, patches: int) -> dict[str, TokenSequence]:
        """Return the sequences that the blocks process for an image of ``patches`` tokens, by name."""

    def check(self, config: ModelConfig) -> None:
        """Raise UserError if ``config`` has keys or values that this architecture does not support."""
        for name, unset in OPTIONAL_KEYS.items():
            value = getattr(config, name)
            if name not in self.optional_keys and value != unset:
                raise UserError(f"model.{name}={value}: {self.name} has no such option; remove the key")

    def bucket_error(self, config: ModelConfig, height: int, width: int) -> str | None:
        """Return why latents of this size cannot be trained on, as the end of a sentence; None if they can."""
        side = config.sample_size
        if self.fixed_size and (height, width) != (side, side):
            return f"is not model.sample_size={side} squared: {self.title} learns the positions of one size"
        return None
