"""Errors that a user can mend: each says what is wrong, where, and how to put it right."""


class AlignbenchError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        what: The fault, in one sentence, with the offending value.
        where: The place: a config key, a file and row, an artifact key.
        mend: What the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if mend:
            lines.append(f"  mend:  {mend}")
        super().__init__("\n".join(lines))


class ConfigError(AlignbenchError):
    """The configuration is incomplete, contradictory or unknown; raised before anything loads."""


class DataError(AlignbenchError):
    """Rows of a data set break the documented schema."""


class ModelError(AlignbenchError):
    """A model folder cannot be used as asked."""


class StoreError(AlignbenchError):
    """The artifact store cannot be read or written."""


class JudgeError(AlignbenchError):
    """A judge cannot be asked, or no further: its server does not answer, refuses, or has cost what it may."""


class TrackingError(AlignbenchError):
    """Weights & Biases refused something that was asked of it by name, or could not be reached."""


class RankError(AlignbenchError):
    """A process of a stage that runs on several failed with an error that is none of these, or died."""


class InvariantError(AlignbenchError):
    """A run-time invariant does not hold (for instance a step-0 DPO loss that is not ln 2)."""
