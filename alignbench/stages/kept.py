"""What stages made of the same inputs before, kept in the process: a sweep asks for it again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass
class Kept(Generic[Value]):
    """Values by what they are a function of; those that were not asked for the longest go first.

    Attributes:
        most: What all of them together may measure.
        measure: The size of one; `most` is in its units.
    """

    most: int
    measure: Callable[[Value], int]
    _values: dict[Hashable, tuple[Value, int]] = field(default_factory=dict)  # what was asked for last at the end

    def get(self, of: Hashable, make: Callable[[], Value]) -> Value:
        """The value of `of`, made if it is not here. Who gets it must not change it. What `make` raises passes."""
        if of in self._values:
            value, size = self._values.pop(of)
        else:
            value = make()
            size = self.measure(value)
        self._values[of] = value, size
        while sum(each for _, each in self._values.values()) > self.most:
            del self._values[next(iter(self._values))]
        return value
