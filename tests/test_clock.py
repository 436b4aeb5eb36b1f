"""The wall clock jumps an hour back and a year forward, again and again: nothing hangs, and no number depends on it."""

from __future__ import annotations

import itertools
import mmap
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import STATED, Process, Run, command, environment, only_record, science, shared_tiny, started

from alignbench import inventory
from alignbench.store import Store

HOUR, YEAR = 3600, 365 * 24 * 3600
#: More than any of these runs takes.
PATIENCE_S = 600.0


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_tiny(tmp_path_factory)


class Clock:
    """The wall clock of the commands that get `environment`."""

    def __init__(self, library: Path, file: Path) -> None:
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(file)}
        file.write_bytes(bytes(8))
        with file.open("r+b") as stream:
            self._memory = mmap.mmap(stream.fileno(), 8)
        self.jumps = 0

    def set(self, offset: int) -> None:
        """Let it be wrong by so many seconds from now on."""
        self._memory[:] = struct.pack("=q", offset)

    def jump_until_the_end(self, process: Process, every: float = 0.4) -> str:
        """Jump while a command runs; its output, once it has ended well."""
        until = time.monotonic() + PATIENCE_S
        for offset in itertools.cycle((-HOUR, YEAR, 0)):
            self.set(offset)
            self.jumps += 1
            try:
                process.popen.wait(every)
            except subprocess.TimeoutExpired:
                assert time.monotonic() < until, f"it hangs:\n{process.output}"
            else:
                self.set(0)
                return process.finish()
        raise AssertionError


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("a clock of one's own needs Linux and a C compiler")
    made = tmp_path_factory.mktemp("clock") / "clock_jump.so"
    source = Path(__file__).with_name("clock_jump.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    return made


@pytest.fixture
def clock(library: Path, tmp_path: Path) -> Clock:
    clock = Clock(library, tmp_path / "offset")
    clock.set(YEAR)
    told = subprocess.run(
        [sys.executable, "-c", "import time; time.sleep(0.01); print(time.time())"],
        env=os.environ | clock.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(told.stdout) - time.time() > YEAR - 100
    clock.set(0)
    return clock


def durations(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record that is a time that something took."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if "seconds" in name and isinstance(inner, (int, float)):
                yield f"{place}.{name}", inner
            yield from durations(inner, f"{place}.{name}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from durations(inner, f"{place}[{number}]")


def plausible(record: dict[str, Any]) -> bool:
    found = dict(durations(record))
    return len(found) > 3 and all(0 <= seconds < PATIENCE_S for seconds in found.values())


def test_a_run_under_a_jumping_clock_has_the_same_numbers(tiny: Run, tmp_path: Path, clock: Clock) -> None:
    argv = command(tmp_path / "store", tmp_path / "out", STATED, "hardware.checkpoint_every=1")
    with started(argv, tmp_path / "log", **clock.environment) as process:
        clock.jump_until_the_end(process, every=0.1)
    assert clock.jumps > 10
    record = only_record(tmp_path / "out")
    kept, expected = science(record), science(tiny.record)
    assert kept["config"].pop("hardware") != expected["config"].pop("hardware")  # how often a checkpoint is written
    assert kept == expected
    assert plausible(record)
    # artifacts of all three times lie in the store, and each is whole
    store = Store(tmp_path / "store")
    dates = sorted(artifact.manifest["created"] for artifact in store.artifacts())
    assert int(dates[-1][:4]) > int(dates[0][:4])
    assert not any(store.faults(artifact.key) for artifact in store.artifacts())


@pytest.mark.slow
def test_two_ranks_under_a_jumping_clock_have_the_same_numbers(tmp_path: Path, clock: Clock) -> None:
    def argv(name: str) -> list[str]:
        settings = ("hardware=cpu_2", "hardware.threads=1", "method=sft", "model.sft.epochs=60")
        return command(tmp_path / name / "store", tmp_path / name / "out", *settings)

    (tmp_path / "calm").mkdir()
    with started(argv("calm"), tmp_path / "calm.log") as process:
        assert process.popen.wait(PATIENCE_S) == 0, process.output
    (tmp_path / "jumps").mkdir()
    with started(argv("jumps"), tmp_path / "jumps.log", **clock.environment) as process:
        clock.jump_until_the_end(process)
    calm, jumps = (only_record(tmp_path / name / "out") for name in ("calm", "jumps"))
    assert science(jumps) == science(calm)
    assert plausible(jumps)


def test_artifacts_from_the_future_are_listed_and_kept(
    tiny: Run, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.set(YEAR)
    store = tmp_path / "store"
    done = subprocess.run(
        command(store, tmp_path / "out", "method=sft", "seed=1"),
        env=environment(**clock.environment),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert inventory.main(["list", str(store)]) == 0
    told = capsys.readouterr().out
    assert told.count("in the future") == len(list(Store(store).artifacts()))
    # no record of `tiny` needs what only this run made, and its date says nothing about its age
    assert inventory.main(["prune", str(store), "--records", str(tiny.folder), "--older-than", "0", "--yes"]) == 0
    told = capsys.readouterr().out
    assert "removed: 0 (0 B with leftovers)" in told
    assert "dated in the future" in told
    assert inventory.main(["verify", str(store)]) == 0
