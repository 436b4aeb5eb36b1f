"""What is in an artifact store, and what may go.

python -m alignbench.inventory list STORE [--by age|size|stage]
    every artifact with stage, size, age and how many others were made from it; what killed runs left behind

python -m alignbench.inventory show STORE KEY
    one artifact: what it is, what it was made from and what from it, its files and cost (a key's beginning will do)

python -m alignbench.inventory verify STORE [KEY ...]
    the checksums of all files (or of some artifacts); exit status 1 if any is damaged; nothing is changed

python -m alignbench.inventory prune STORE --records OUTPUTS [OUTPUTS ...] [--older-than DAYS] [--leftovers] [--yes]
    what no record below OUTPUTS needs, directly or as an input of something needed; without --yes it is only listed
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from alignbench.errors import AlignbenchError, DataError, StoreError
from alignbench.record import read_records
from alignbench.store import Artifact, Store

ORDERS = ("age", "size", "stage")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m alignbench.inventory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    runs = {"list": _list, "show": _show, "verify": _verify, "prune": _prune}
    command = {name: commands.add_parser(name) for name in runs}
    for name, run in runs.items():
        command[name].set_defaults(run=run)
        command[name].add_argument("store", type=Path)
    command["list"].add_argument("--by", choices=ORDERS, default="age")
    command["show"].add_argument("key")
    command["verify"].add_argument("keys", nargs="*")
    command["prune"].add_argument("--records", nargs="+", type=Path, required=True)
    command["prune"].add_argument("--older-than", type=float, default=1.0, metavar="DAYS", help="default: 1")
    command["prune"].add_argument("--leftovers", action="store_true", help="also what killed runs left behind")
    command["prune"].add_argument("--yes", action="store_true", help="do it")
    given = parser.parse_args(arguments)
    try:
        if not (given.store / "artifacts").is_dir():
            raise StoreError("there is no store here", where=str(given.store), mend="name a folder that a run made")
        return int(given.run(Store(given.store), given))
    except AlignbenchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


# ---------------------------------------------------------------- list, show, verify


def _list(store: Store, given: argparse.Namespace) -> int:
    artifacts = {artifact.key: artifact for artifact in store.artifacts()}
    users = users_of(artifacts)
    order: dict[str, Any] = {
        "age": lambda a: a.manifest["created"],
        "size": lambda a: -a.size,
        "stage": lambda a: (a.manifest["stage"], a.manifest["created"]),
    }
    table = Table(title=f"{store.root}: {len(artifacts)} artifacts, {_bytes(sum(a.size for a in artifacts.values()))}")
    for heading in ("key", "stage", "size", "age", "used"):
        table.add_column(heading, justify="left" if heading in ("key", "stage") else "right")
    for artifact in sorted(artifacts.values(), key=order[given.by]):
        age, used = _age(artifact), str(len(users[artifact.key]))
        table.add_row(artifact.key[:12], artifact.manifest["stage"], _bytes(artifact.size), age, used)
    _console().print(table)
    for what, size in leftovers(store).items():
        print(f"left behind: {what.relative_to(store.root)} ({_bytes(size)})")
    return 0


def _show(store: Store, given: argparse.Namespace) -> int:
    artifacts = {artifact.key: artifact for artifact in store.artifacts()}
    artifact = _one(artifacts, given.key)
    manifest = artifact.manifest

    def named(key: str) -> str:
        return f"{key[:12]} ({artifacts[key].manifest['stage'] if key in artifacts else 'not in this store'})"

    lines = {
        "key": artifact.key,
        "stage": f"{manifest['stage']}, version {manifest['version']}, seed {manifest['seed']}",
        "kind": artifact.kind,
        "created": f"{manifest['created']} ({_age(artifact)} ago)",
        "folder": str(artifact.folder),
        "made from": "; ".join(f"{role} {named(key)}" for role, key in manifest["inputs"].items()) or "nothing",
        "used by": "; ".join(map(named, sorted(users_of(artifacts)[artifact.key]))) or "nothing in this store",
        "files": "; ".join(f"{name} {_bytes(file['bytes'])}" for name, file in manifest["files"].items()),
        "cost": "; ".join(f"{name} {value:g}" for name, value in manifest["cost"].items()) or "none",
        "versions": "; ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "spec": json.dumps(manifest["spec"], indent=2),
    }
    for name, text in lines.items():
        print(f"{name + ':':11} {text}")
    return 0


def _verify(store: Store, given: argparse.Namespace) -> int:
    artifacts = {artifact.key: artifact for artifact in store.artifacts()}
    keys = [_one(artifacts, key).key for key in given.keys] or sorted(
        path.name for path in (store.root / "artifacts").iterdir()
    )
    damaged = 0
    for key in tqdm(keys, desc="verify", unit="artifact", disable=None, leave=False):
        faults = store.faults(key)
        damaged += bool(faults)
        for fault in faults:
            print(f"{key[:12]}: {fault}")
    print(
        f"{len(keys)} artifacts checked, {damaged} damaged" + ("; a run that needs one rebuilds it" if damaged else "")
    )
    return int(damaged > 0)


def _one(artifacts: Mapping[str, Artifact], start: str) -> Artifact:
    found = [artifact for key, artifact in artifacts.items() if key.startswith(start)]
    if len(found) != 1:
        raise StoreError(
            f"{len(found)} artifacts have a key that begins with {start!r}",
            where="KEY",
            mend="python -m alignbench.inventory list STORE shows them",
        )
    return found[0]


def users_of(artifacts: Mapping[str, Artifact]) -> dict[str, set[str]]:
    """Of each artifact the keys of those made directly from it."""
    users: dict[str, set[str]] = {key: set() for key in artifacts}
    for key, artifact in artifacts.items():
        for used in artifact.manifest["inputs"].values():
            users.setdefault(used, set()).add(key)
    return users


# ---------------------------------------------------------------- prune


def _prune(store: Store, given: argparse.Namespace) -> int:
    records = []
    for folder in given.records:
        found = read_records(folder)
        if not found:  # a typing error here would call everything superfluous
            raise DataError(f"no record.json below {folder}", where="--records", mend="name the folder of the runs")
        records += found
    busy = store.being_built()
    if busy:
        raise StoreError(
            f"{len(busy)} artifact(s) are being built",
            where="; ".join(busy[:3]),
            mend="wait until no run uses this store: one that has just found an artifact must not lose it",
        )
    artifacts = {artifact.key: artifact for artifact in store.artifacts()}
    kept = needed(artifacts, records)
    going = [a for key, a in artifacts.items() if key not in kept and _days(a) >= given.older_than]
    young = [a for key, a in artifacts.items() if key not in kept and _days(a) < given.older_than]
    future = sum(_days(artifact) < 0 for artifact in young)
    left = leftovers(store) if given.leftovers else {}
    verb = "removed" if given.yes else "would go"
    for artifact in sorted(going, key=lambda a: -a.size):
        print(f"{verb}: {artifact.key[:12]} {artifact.manifest['stage']} {_bytes(artifact.size)}, {_age(artifact)} old")
        if given.yes:
            store.remove(artifact.key)
    for folder, size in left.items():
        print(f"{verb}: {folder.relative_to(store.root)} {_bytes(size)}")
        if given.yes:
            shutil.rmtree(folder)
    freed = sum(a.size for a in going) + sum(left.values())
    print(
        f"{len(records)} record(s) need {len(kept & artifacts.keys())} of {len(artifacts)} artifacts; {verb}: "
        f"{len(going)} ({_bytes(freed)} with leftovers); too young to go: {len(young)}"
        + (f", {future} of them dated in the future (was a clock wrong? --older-than=-DAYS)" if future else "")
        + ("" if given.yes else "; nothing was changed, --yes does it")
    )
    return 0


def needed(artifacts: Mapping[str, Artifact], records: Iterable[Mapping[str, Any]]) -> set[str]:
    """Keys that records list, and whatever those were made from, at any depth."""
    waiting = [stage["key"] for record in records for stage in record["stages"]]
    found: set[str] = set()
    while waiting:
        key = waiting.pop()
        if key not in found:
            found.add(key)
            waiting += artifacts[key].manifest["inputs"].values() if key in artifacts else []
    return found


def leftovers(store: Store) -> dict[Path, int]:
    """Folders of killed builds (their checkpoints let the same command continue) and of damaged artifacts, in bytes."""
    folders = [path for name in ("building", "damaged") for path in sorted((store.root / name).iterdir())]
    return {path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in folders}


# ---------------------------------------------------------------- words


def _days(artifact: Artifact) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(artifact.manifest["created"])).total_seconds() / 86400


def _age(artifact: Artifact) -> str:
    minutes = _days(artifact) * 1440
    if minutes < -1:
        return "in the future"  # a clock was, or is, wrong
    for unit, size in (("d", 1440), ("h", 60)):
        if minutes >= size:
            return f"{minutes / size:.1f} {unit}"
    return f"{minutes:.0f} min"


def _bytes(count: float) -> str:
    power = 0
    while count >= 1024 and power < 4:
        count, power = count / 1024, power + 1
    return f"{count:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 120)


if __name__ == "__main__":
    sys.exit(main())
