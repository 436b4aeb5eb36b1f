"""The end of a multirun: one table of requested against achieved margins, one picture, and what sharing saved.

Hydra calls `SweepTable` around a multirun (conf/config.yaml, hydra.callbacks). Every job leaves a small file when it
ends, whichever process or machine it ran on; the launching process reads the files of its own multirun, and the records
that they name. A folder of runs from other days is thus never mixed in.

Hydra's basic launcher runs every job of a multirun, also after one has failed, and its sweeper then raises the *first*
failure, so that `on_multirun_end` is not called and later failures are never mentioned. The table of what did finish is
then printed as the process exits, with every failure in a line. An interrupted multirun ends the same way.

A plan ends in the union of its runs' stage graphs, and leaves nothing; a single run leaves and prints nothing. Imports
stay inside the functions: a single run loads this module, too.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

TABLE = "requested_achieved"


class SweepTable(Callback):
    """Hydra's callback; it is pickled into the processes of launchers that use others."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._token = ""
        self._process = 0
        self._kept: list[dict[str, Any]] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Name the multirun; nothing is written before a job has ended."""
        self._folder = Path(str(config.hydra.sweep.dir)).resolve() / _name(config)
        # the same sweep may run twice at a time, and files of one that was killed may lie about
        self._token = secrets.token_hex(4)
        self._process = os.getpid()
        atexit.register(self._at_exit)

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        """Leave a note of one job: which run it was, and how it ended."""
        if self._folder is None:
            return
        from hydra.core.utils import JobStatus

        from alignbench.config import run_id
        from alignbench.jsonio import atomic_write_json

        ok = job_return.status is JobStatus.COMPLETED
        if config.plan and not ok:
            return  # Hydra tells why
        identity = run_id(job_return.cfg)
        # `return_value` raises the job's error again
        error = None if ok else job_return._return_value
        number = OmegaConf.select(config, "hydra.job.num", default=0)
        note = {
            "number": number,
            "run_id": identity,
            "record": str((Path(str(config.output_dir)) / identity / "record.json").resolve()),
            "overrides": list(job_return.overrides or []),
            "ok": ok,
            "error": None if ok else f"{type(error).__name__}: {error}",
            "graph": _graph(job_return.cfg) if config.plan else None,
        }
        notes = self._folder / "jobs"
        try:
            notes.mkdir(parents=True, exist_ok=True)
            atomic_write_json(notes / f"{self._token}-{number}.json", note)
        except OSError:
            if os.getpid() != self._process:
                raise  # Hydra warns of it in that job's log
            self._kept.append(note)  # a job that the disk has no room to mention must not be missing in the end

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print and write the table of this multirun."""
        atexit.unregister(self._at_exit)
        self._finish(complete=True)

    def _at_exit(self) -> None:
        # a forked child inherits the registration
        if os.getpid() == self._process:
            self._finish(complete=False)

    def _finish(self, *, complete: bool) -> None:
        if self._folder is None:
            return
        from alignbench.errors import StoreError
        from alignbench.store import explained_disk_errors

        try:
            with explained_disk_errors(self._folder):
                self._sum_up(self._folder, complete=complete)
        except StoreError as error:
            # Hydra would turn it into a warning and end well
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            if complete:
                sys.exit(2)

    def _sum_up(self, folder: Path, *, complete: bool) -> None:
        notes = self._take_notes(folder / "jobs")
        graphs = [note["graph"] for note in notes if note["graph"]]
        if graphs:
            _report_plan(graphs)
            with suppress(OSError):  # it may be absent, or hold an earlier sweep's files
                folder.rmdir()
        elif notes:
            report(notes, folder, complete=complete)

    def _take_notes(self, folder: Path) -> list[dict[str, Any]]:
        """This multirun's notes, in the order of its jobs; they are removed, for sweep.json says the same."""
        notes, self._kept = self._kept, []
        for path in folder.glob(f"{self._token}-*.json"):
            notes.append(json.loads(path.read_text(encoding="utf-8")))
            path.unlink()
        with suppress(OSError):  # the same sweep, started twice, may have its notes there, or have removed it
            folder.rmdir()
        return sorted(notes, key=lambda note: note["number"])


def _name(config: DictConfig) -> str:
    """The multirun's folder: what `cli.main` calls it, or a hash of its overrides where Hydra was entered otherwise."""
    from alignbench.cli import SWEEP_ENV

    given = os.environ.get(SWEEP_ENV)
    if given:
        return re.sub(r"[^\w.+-]", "_", given)
    words = " ".join(sorted(map(str, config.hydra.overrides.task)))
    return f"sweep-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def _graph(composed: DictConfig) -> dict[str, Any]:
    """The stage graph of one run of the sweep."""
    from alignbench.config import resolve
    from alignbench.plan import graph_of
    from alignbench.run import planned
    from alignbench.store import Store
    from alignbench.tracking import Tracker

    config, settings = resolve(composed)
    tracker = Tracker(config.tracking, run_id="", group="", job_type="", config={}, folder=Path(config.output_dir))
    return graph_of(planned(config, settings, Store(Path(config.store_dir)), tracker))


def _report_plan(graphs: Sequence[Mapping[str, Any]]) -> None:
    """Print what the whole sweep would do."""
    from rich.console import Console

    from alignbench.plan import show_union, union_of

    show_union(union_of(graphs), Console(width=None if Console().is_terminal else 120))


def report(notes: Sequence[Mapping[str, Any]], folder: Path, *, complete: bool) -> None:
    """Print one table for all jobs, what failed and what was shared; write table, picture and sweep.json.

    Args:
        notes: What every job left.
        folder: Where the files go.
        complete: Whether Hydra reached the end of the multirun.
    """
    from rich.console import Console

    from alignbench.errors import AlignbenchError
    from alignbench.jsonio import atomic_write_json, read_json
    from alignbench.report import thresholds

    records: dict[str, dict[str, Any]] = {}
    failed = [dict(note) for note in notes if not note["ok"]]
    for note in notes:
        if note["ok"]:
            try:
                records[note["run_id"]] = read_json(Path(note["record"]))
            except (AlignbenchError, OSError) as error:
                failed.append({**note, "error": f"its record cannot be read: {error}"})
    found = list(records.values())
    used = sharing(found)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(
        folder / "sweep.json",
        {
            "complete": complete,
            "runs": list(records),
            "failed": [{"overrides": note["overrides"], "error": note["error"]} for note in failed],
            "stages": used,
        },
    )
    console = Console(width=None if Console().is_terminal else thresholds.WIDTH)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    written: list[Path] = []
    if thresholds.points_of(found):
        console.print(thresholds.terminal_table(found, f"requested against achieved: {len(found)} run(s)"))
        written = thresholds.write(found, folder / TABLE)
    say(
        f"sweep: {len(found)} run(s) finished, {len(failed)} failed"
        + ("" if complete else "; it did not reach its end")
    )
    for note in failed:
        say(f"failed: {' '.join(note['overrides'])}\n  {note['error']}")
        say(f"  again:  python main.py {shlex.join(note['overrides'])}")
    if found:
        say(sharing_text(used))
    if any(row.get("certificate") for record in found for row in record["rows"].values()):
        say(f"certificates: python -m alignbench.report certificates {folder.parent}")
    for what, path in zip(("table", "picture"), written, strict=False):
        say(f"{what + ':':9}{path}")
    say(f"runs:    {folder / 'sweep.json'}")


def sharing(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often the runs used a stage, and how few of these uses had to be computed.

    Returns:
        uses: Stages of all runs, each run's own counted.
        distinct: Artifacts behind them.
        built: Stages that these runs computed.
        saved: uses - built.
        saved_seconds: What the stored artifacts had cost, once for every use that was saved.
    """
    stages = [stage for record in records for stage in record["stages"]]
    built = sum(bool(stage["built"]) for stage in stages)
    return {
        "uses": len(stages),
        "distinct": len({stage["key"] for stage in stages}),
        "built": built,
        "saved": len(stages) - built,
        "saved_seconds": sum(float(s["cost"].get("seconds") or 0.0) for s in stages if not s["built"]),
    }


def sharing_text(used: Mapping[str, Any]) -> str:
    """The count in one line."""
    return (
        f"stages: {used['uses']} uses of {used['distinct']} artifacts; {used['built']} built now, {used['saved']} "
        f"saved ({used['saved_seconds']:.0f} s of computing that was not repeated)"
    )
