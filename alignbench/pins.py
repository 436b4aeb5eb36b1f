"""Revisions of what comes from the hub: a run needs each, a plan does not."""

from __future__ import annotations

from typing import Any

from alignbench.config import Config
from alignbench.models.policy import is_hub_id
from alignbench.scoring import used_scorers

UNPINNED = "not-pinned"


def plan_unpinned(config: Config, settings: Any) -> list[str]:
    """Let a plan name hub content whose revision is not given yet; what is planned with it is in no store.

    Returns:
        The keys to be given before a run, filled in here with a revision that does not exist.
    """
    found = []
    for key, source in _sources(config, settings).items():
        if source.path is not None and "*" not in source.path and is_hub_id(source.path) and not source.revision:
            source.revision = UNPINNED
            found.append(f"{key}.revision")
    return found


def _sources(config: Config, settings: Any) -> dict[str, Any]:
    sources: dict[str, Any] = {"model": config.model}
    if config.dataset.files is not None:
        sources |= {f"dataset.files.{name}": source for name, _, source in config.dataset.files.sources()}
    for name in dict.fromkeys(used_scorers(config, settings).values()):
        columns = config.scorers[name].columns if name in config.scorers else {}
        sources |= {f"scorers.{name}.columns.{column}": source for column, source in columns.items()}
    return sources
