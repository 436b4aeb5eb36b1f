"""Fixtures of the methods' tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import method_runs
import pytest
from tiny_runs import Run


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """once(*overrides): the run of that configuration, made at its first use in the session."""
    return partial(method_runs.once, tmp_path_factory)
