"""The settings that every preference step of a recipe shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from alignbench.config import TrainConfig, check_train
from alignbench.errors import ConfigError
from alignbench.lab import PreferSettings
from alignbench.losses import pair_loss


@dataclass
class StepSettings:
    """One preference step as a YAML states it.

    Attributes:
        loss: "dpo", "ipo" or "kto".
        kto_labels: "preferred" or "is_safe" (KTO only).
        kto_balance: Weight undesirable responses by n_desirable / n_undesirable (KTO only).
        train: Optimiser settings.
    """

    loss: str = "dpo"
    kto_labels: str = "preferred"
    kto_balance: bool = True
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self, where: str) -> None:
        """Refuse what cannot train; `where` is the step's configuration key."""
        pair_loss(self.loss)
        check_train(self.train, f"{where}.train")
        if self.kto_labels not in ("preferred", "is_safe"):
            raise ConfigError(
                f"kto_labels = {self.kto_labels!r}", where=f"{where}.kto_labels", mend="preferred or is_safe"
            )

    def prefer(self) -> PreferSettings:
        """The lab's form of these settings."""
        return PreferSettings(self.loss, self.train, self.kto_labels, self.kto_balance)
