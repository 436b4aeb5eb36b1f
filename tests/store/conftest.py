"""Fixtures of the store tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_tools import Process

from alignbench.store import Store


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Store:
    return Store(tmp_path / "store", said.append)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def launch(mode: str, root: Path | None = None) -> Process:
        log = tmp_path / f"log{len(processes)}"
        processes.append(Process(mode, root or tmp_path / "store", log))
        return processes[-1]

    yield launch
    for process in processes:
        if process.popen.poll() is None:
            process.kill()
