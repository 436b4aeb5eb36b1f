"""The end of a multirun: table and picture of requested against achieved margins, a dashboard, what sharing saved.

Hydra calls `SweepTable` around a multirun (conf/config.yaml, hydra.callbacks). Every job leaves a small file when it
ends, whichever process or machine it ran on; the launching process reads the files of its own multirun, and the records
that they name. A folder of runs from other days is thus never mixed in.

Hydra's basic launcher runs every job of a multirun, also after one has failed, and its sweeper then raises the *first*
failure, so that `on_multirun_end` is not called and later failures are never mentioned. The table of what did finish is
then printed as the process exits, with every failure in a line. An interrupted multirun ends the same way. One command
retries what failed (alignbench.retry); at its end the same table, picture and sweep.json hold the whole sweep.

A plan ends in the union of its runs' stage graphs, and leaves nothing; a single run leaves and prints nothing. Imports
stay inside the functions: a single run loads this module, too.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import os
import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

TABLE = "requested_achieved"
DASHBOARD = "dashboard.html"


class SweepTable(Callback):
    """Hydra's callback; it is pickled into the processes of launchers that use others."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._store: Path | None = None
        self._token = ""
        self._process = 0
        self._jobs: int | None = None
        self._earlier: dict[str, Any] = {}
        self._kept: list[dict[str, Any]] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Name the multirun; nothing is written before a job has ended."""
        self._folder = Path(str(config.hydra.sweep.dir)).resolve() / _name(config)
        self._store = Path(OmegaConf.select(config, "store_dir", default="store")).resolve()
        self._jobs = _expected(config)
        retried = OmegaConf.select(config, "hydra.sweeper.of", default=None)
        if retried is not None and Path(retried).is_file():  # its sweeper refuses what is no sweep.json
            from alignbench.jsonio import read_json

            self._folder, self._earlier = Path(retried).parent, dict(read_json(Path(retried)))
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
        self._finish(ended=True)

    def _at_exit(self) -> None:
        # a forked child inherits the registration
        if os.getpid() == self._process:
            self._finish(ended=False)

    def _finish(self, *, ended: bool) -> None:
        if self._folder is None:
            return
        from alignbench.errors import StoreError
        from alignbench.store import explained_disk_errors

        try:
            with explained_disk_errors(self._folder):
                self._sum_up(self._folder, ended=ended)
        except StoreError as error:
            # Hydra would turn it into a warning and end well
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            if ended:
                sys.exit(2)

    def _sum_up(self, folder: Path, *, ended: bool) -> None:
        notes = self._take_notes(folder / "jobs")
        graphs = [note["graph"] for note in notes if note["graph"]]
        if graphs:
            _report_plan(graphs)
            with suppress(OSError):  # it may be absent, or hold an earlier sweep's files
                folder.rmdir()
        elif notes:
            missing = 0 if ended else None if self._jobs is None else self._jobs - len(notes)
            report(notes, folder, missing=missing, earlier=self._earlier, store=self._store)

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
    from rich.console import Console

    from alignbench.config import resolve
    from alignbench.pins import plan_unpinned
    from alignbench.plan import graph_of
    from alignbench.run import planned, settle_hardware
    from alignbench.store import Store
    from alignbench.tracking import Tracker

    config, settings = resolve(composed)
    plan_unpinned(config, settings)
    settle_hardware(composed, config, settings, Console(quiet=True))
    tracker = Tracker(config.tracking, run_id="", group="", job_type="", config={}, folder=Path(config.output_dir))
    return graph_of(planned(config, settings, Store(Path(config.store_dir)), tracker))


def _report_plan(graphs: Sequence[Mapping[str, Any]]) -> None:
    """Print what the whole sweep would do."""
    from rich.console import Console

    from alignbench.plan import show_union, union_of

    show_union(union_of(graphs), Console(width=None if Console().is_terminal else 120))


def _expected(config: DictConfig) -> int | None:
    """How many jobs this multirun has; None where its sweeper alone knows."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not str(OmegaConf.select(config, "hydra.sweeper._target_")).endswith(".BasicSweeper"):
        return None
    # a preset's grid, unless the command line says otherwise, as Hydra's sweeper merges them
    grid = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*grid, *map(str, config.hydra.overrides.task)])
    last = {override.get_key_element(): override for override in parsed}
    try:
        return math.prod(sum(1 for _ in o.sweep_string_iterator()) for o in last.values() if o.is_sweep_override())
    except HydraException:  # a glob, or an interval that this sweeper refuses
        return None


def report(
    notes: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    missing: int | None,
    earlier: Mapping[str, Any] | None = None,
    store: Path | None = None,
) -> None:
    """Print one table for all jobs, what failed and what was shared; write table, picture, dashboard and sweep.json.

    Args:
        notes: What every job left.
        folder: Where the files go.
        missing: Jobs that never ended; None: nobody knows whether there are such.
        earlier: The sweep.json of the sweep of which these jobs are a retry; its finished runs are kept.
        store: Artifacts that the dashboard links.
    """
    from rich.console import Console

    from alignbench.errors import AlignbenchError
    from alignbench.jsonio import atomic_write_json
    from alignbench.report import dashboard, thresholds

    failed = [dict(note) for note in notes if not note["ok"]]
    ended = [note for note in notes if note["ok"]]
    records: dict[str, dict[str, Any]] = {}
    if earlier:
        missing = earlier.get("missing")
        retried = {note["number"] for note in notes}
        failed += [job for number, job in enumerate(earlier["failed"]) if number not in retried]
        for run in earlier["runs"]:
            record = _record_of({"record": folder.parent / run / "record.json"})
            if isinstance(record, str):
                missing = None if missing is None else missing + 1
            else:
                records[run] = record
    for note in ended:
        found_or_fault = _record_of(note)
        if isinstance(found_or_fault, str):
            failed.append({**note, "error": found_or_fault})
        else:
            records[note["run_id"]] = found_or_fault
    found = list(records.values())
    used = sharing(found)
    folder.mkdir(parents=True, exist_ok=True)
    summary = folder / "sweep.json"
    atomic_write_json(
        summary,
        {
            "complete": not failed and missing == 0,
            "missing": missing,
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
    never = {0: "", None: "; it did not reach its end"}.get(missing, f"; {missing} never ran to an end")
    say(f"sweep: {len(found)} run(s) finished, {len(failed)} failed{never}")
    for note in failed:
        say(f"failed: {' '.join(note['overrides'])}\n  {note['error']}")
    if failed:
        say(f"retry:   python -m alignbench.retry {shlex.quote(str(summary))}")
    if missing != 0:
        say("missing: repeat the sweep's own command; what is finished is found in the store")
    if found:
        say(sharing_text(used))
    if any(row.get("certificate") for record in found for row in record["rows"].values()):
        say(f"certificates: python -m alignbench.report certificates {folder.parent}")
    for what, path in zip(("table", "picture"), written, strict=False):
        say(f"{what + ':':9}{path}")
    if found:
        try:
            say(f"page:    {dashboard.write(folder, folder / DASHBOARD, store)}")
        except AlignbenchError as error:  # what was computed is not lost for the want of a page
            say(f"page:    none ({error})")
    say(f"runs:    {summary}")


def _record_of(note: Mapping[str, Any]) -> dict[str, Any] | str:
    """The record of a job that ended well, or why it cannot be had."""
    from alignbench.errors import AlignbenchError
    from alignbench.jsonio import read_json

    try:
        return dict(read_json(Path(note["record"])))
    except (AlignbenchError, OSError) as error:
        return f"its record cannot be read: {error}"


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
