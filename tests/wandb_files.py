"""What W&B's own offline files hold: `from wandb_files import mirrors`."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_runs import PATIENCE_S
from wandb.proto import wandb_internal_pb2 as proto


def records_of(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the block's rest
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = proto.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@dataclass
class Mirror:
    """What one W&B run was told."""

    folder: Path
    group: str = ""
    job_type: str = ""
    project: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def curve(self, name: str) -> list[float]:
        return [row[name] for row in self.history if name in row]


def mirrors(out: Path) -> list[Mirror]:
    """Every W&B run below a folder of runs, once W&B's own service has written the end of each."""
    until = time.monotonic() + PATIENCE_S
    while True:
        found = _read(out)
        if all(mirror.exit_code is not None for mirror in found):
            return found
        assert time.monotonic() < until, "a W&B run was never finished"
        time.sleep(0.05)


def _read(out: Path) -> list[Mirror]:
    found = []
    for path in sorted(out.rglob("*.wandb")):
        mirror = Mirror(path.parent)
        for record in records_of(path):
            if record.HasField("run"):
                mirror.group, mirror.job_type = record.run.run_group, record.run.job_type
                mirror.project, mirror.tags = record.run.project, tuple(record.run.tags)
                mirror.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                mirror.history.append(row)
            elif record.HasField("summary"):
                mirror.summary |= {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update
                }
            elif record.HasField("exit"):
                mirror.exit_code = record.exit.exit_code
        found.append(mirror)
    return found
