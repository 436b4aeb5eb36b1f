"""What a method is: a settings schema and a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignbench.errors import ConfigError
from alignbench.problem import Problem

if TYPE_CHECKING:
    from alignbench.lab import Lab, Node


@dataclass
class Outcome:
    """What a recipe returns.

    Attributes:
        policies: Every policy worth a row in the table, by its row's name, in the order of making.
        reported: Name of the row that is the method's result.
        multipliers: lambda of each utility, where the settings state it.
        duals: Multipliers of a row's policy, where they are an artifact (solved, or stepped to).
        predictions: What the reference's bank predicted for a row before its policy was trained.
        trajectory: One entry per iteration, for iterative methods.
        diagnostics: Anything else that belongs in the record.
        models: The distinct models that the method needs trained besides pi_ref, for the cost table.
    """

    policies: dict[str, Node]
    reported: str
    multipliers: dict[str, float] = field(default_factory=dict)
    duals: dict[str, Node] = field(default_factory=dict)
    predictions: dict[str, Node] = field(default_factory=dict)
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()


Recipe = Callable[["Lab", Problem, Any], Outcome]


@dataclass(frozen=True)
class Method:
    """A registered method: its name, its settings dataclass and its recipe."""

    name: str
    settings: type
    recipe: Recipe


METHODS: dict[str, Method] = {}


def method(name: str, settings: type) -> Callable[[Recipe], Recipe]:
    """Decorator that registers a recipe; a second one of the same name is refused.

    Args:
        name: The method's name, equal to its YAML's in conf/method.
        settings: Dataclass of its settings (the schema of that YAML). An optional method
            `check(config)` raises ConfigError for settings that contradict the rest of the configuration.
    """

    def add(recipe: Recipe) -> Recipe:
        if name in METHODS:
            raise ConfigError(f"method {name!r} is registered twice", where="alignbench.methods", mend="rename one")
        METHODS[name] = Method(name, settings, recipe)
        return recipe

    return add


def find_method(name: str) -> Method:
    """The method of that name; an unknown one raises ConfigError with the known names."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}", where="method.name", mend=f"known: {', '.join(sorted(METHODS))}")
    return METHODS[name]
