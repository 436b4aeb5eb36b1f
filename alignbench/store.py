"""Content-addressed artifacts on disk: each is computed once, and is there whole or not at all.

The layout under the root of a store::

    artifacts/<key>/        one immutable artifact with its manifest.json
    building/<key>/out/     the artifact under construction, wiped at each attempt
    building/<key>/work/    checkpoints of the attempt: they survive a kill
    locks/<key>.lock        who may build the key (an flock: the kernel frees it when its holder dies)
    locks/<key>.json        who that is; for messages only, so a stale one never blocks
    damaged/<key>-<n>/      artifacts that failed their checksums, kept for inspection
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from alignbench import __version__
from alignbench.errors import InvariantError, StoreError
from alignbench.jsonio import atomic_write_json, canonical, plain, read_json, read_jsonl, sync, write_json

MANIFEST = "manifest.json"
_FOLDERS = ("artifacts", "building", "locks", "damaged")
_PACKAGES = ("torch", "transformers", "deepspeed")
_DISK_ERRORS = {
    errno.ENOSPC: ("is full", "no space left on device"),
    errno.EDQUOT: ("has used up your quota", "disk quota exceeded"),
    errno.EFBIG: ("refuses a file this large (see `ulimit -f`)", "file too large"),
}
_POLL_S = 0.1
_SHY_HOLDER_S = 2.0  # a holder says who it is just after it has the lock; do not call it unknown before this


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def artifact_key(stage: str, version: int, spec: Any, inputs: Mapping[str, str], seed: int) -> str:
    """The name of what a stage computes: 32 hex digits that change if and only if an argument changes.

    Args:
        stage: Name of the stage.
        version: Version of the stage's code: raise it when the same spec gives other numbers.
        spec: A dataclass or JSON value with everything that changes the numbers, and nothing else.
        inputs: Role of each input artifact (`reference`, `pairs`) -> its key.
        seed: The stage's seed.

    Raises:
        TypeError: `spec` cannot be written as JSON.
    """
    parts = {"stage": stage, "version": version, "spec": spec, "inputs": dict(inputs), "seed": seed}
    return _sha256(canonical(parts))[:32]


def _scan(folder: str | Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Everything below `folder` that is not itself a folder: (posix name relative to it, lstat)."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _scan(entry.path, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name, entry.stat(follow_symlinks=False)


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _disk_error(error: BaseException | None) -> tuple[str, Any] | None:
    """What a full disk said somewhere in the chain of `error`, and the file it said it about, if known."""
    while error is not None:
        for number, (what, text) in _DISK_ERRORS.items():
            # Rust and C++ writers (safetensors, torch) and ranks in other processes pass on the text only.
            if getattr(error, "errno", None) == number or text in str(error).lower():
                return what, getattr(error, "filename", None)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


@contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full disk (or quota) says, in whatever words, into a StoreError; other errors pass through.

    Args:
        folder: Where the enclosed work writes, for errors that do not name their file.
    """
    try:
        yield
    except Exception as error:
        found = None if isinstance(error, StoreError) else _disk_error(error)
        if found is None:
            raise
        place = Path(str(found[1] or folder)).absolute()
        place = next(p for p in (place, *place.parents) if p.is_dir())
        disk = next(p for p in (place, *place.parents) if p.is_mount())
        free, quote = shutil.disk_usage(place).free / 2**20, str(error).strip().partition("\n")[0][:200]
        raise StoreError(
            f"the disk {disk} {found[0]}, {free:.1f} MiB are free now ({quote})",
            where=str(place),
            mend="make space, then run the same command again: nothing complete was lost, finished artifacts "
            "are found and the interrupted stage resumes from its last whole checkpoint",
        ) from error


@dataclass(frozen=True)
class Identity:
    """What an artifact is: the arguments of `artifact_key`, plus its kind (`policy`, `pairs`, ...).

    The kind follows from stage and version, so it is no part of the key.
    """

    stage: str
    version: int
    kind: str
    spec: Any
    inputs: Mapping[str, str]
    seed: int

    @property
    def key(self) -> str:
        """The artifact's key; see `artifact_key`."""
        return artifact_key(self.stage, self.version, self.spec, self.inputs, self.seed)


@dataclass(frozen=True)
class Artifact:
    """A whole artifact. Its folder is immutable: copy a file elsewhere to change it."""

    key: str
    kind: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes in its files, without the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def path(self, name: str) -> Path:
        """The path of a listed file, or of a folder of listed files; raises StoreError for any other name."""
        files = sorted(self.manifest["files"])
        if name in files or any(listed.startswith(name.rstrip("/") + "/") for listed in files):
            return self.folder / name
        what = f"the {self.kind} artifact {self.key} has no file {name!r}"
        raise StoreError(what, where=str(self.folder), mend=f"it has: {', '.join(files)}")

    def require_made_from(self, source: "Artifact", what: str) -> None:
        """Refuse, unless this was computed directly from `source`, or is it.

        Rows of two tables are matched by position alone, and equal lengths do not tell whose they are.

        Raises:
            InvariantError: made from something else; `what` names this artifact in the message.
        """
        if self.key != source.key and source.key not in self.manifest["inputs"].values():
            made = ", ".join(f"{role} {key[:12]}" for role, key in self.manifest["inputs"].items()) or "nothing"
            raise InvariantError(
                f"{what} ({self.kind} {self.key[:12]}) was made from {made}, not from {source.kind} {source.key[:12]}",
                where=what,
                mend="make both from the same artifact",
            )

    def json(self, name: str) -> Any:
        """The content of a JSON file."""
        return read_json(self.path(name))

    def jsonl(self, name: str) -> list[Any]:
        """The rows of a JSON-lines file."""
        return read_jsonl(self.path(name))


@dataclass
class Workspace:
    """What a stage may write to while it builds an artifact.

    Attributes:
        key: Key of the artifact.
        out: Empty folder; what is in it at the end is the artifact. Plain files and folders only.
        work: Folder for checkpoints, possibly filled by a killed attempt. A kill can come at any byte, so
            write under a temporary name and rename. Removed once the artifact is complete.
        cost: Name -> number (tokens, seconds, bytes), filled by the stage, kept in the manifest.
    """

    key: str
    out: Path
    work: Path
    cost: dict[str, float] = field(default_factory=dict)


def _to_stderr(message: str) -> None:
    print(f"[store] {message}", file=sys.stderr, flush=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of Python, this package and the ones that change numbers, of the process that asks."""
    from importlib import metadata  # it reads text files; importing the packages would take seconds

    found: dict[str, str | None] = {"python": sys.version.split()[0], "alignbench": __version__}
    for name in _PACKAGES:
        found[name] = None
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _process_start(pid: int) -> str | None:
    """A mark that tells a process from a later one of the same pid; None if there is no such process."""
    try:
        # The command name in field 2 may hold spaces and brackets, so count from behind it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _manifest(folder: Path) -> dict[str, Any] | str:
    """The manifest in `folder`, or what is wrong with it; raises PermissionError if that cannot be told."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        claimed = manifest.pop("manifest_sha256")
        right = claimed == _sha256(canonical(manifest)) and manifest["key"] == folder.name
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: {'missing' if isinstance(error, FileNotFoundError) else f'unreadable ({error})'}"
    return manifest if right else f"{MANIFEST}: its content differs from its own checksum"


def _faults(folder: Path, files: dict[str, Any], found: dict[str, os.stat_result]) -> Iterator[str]:
    """What is wrong with the `found` files of an artifact, given those that its manifest lists."""
    for name, expected in files.items():
        if name not in found:
            yield f"{name}: missing"
        elif not stat.S_ISREG(found[name].st_mode):
            yield f"{name}: not a plain file"
        elif found[name].st_size != expected["bytes"]:
            yield f"{name}: {found[name].st_size} bytes instead of {expected['bytes']}"
        elif _digest(folder / name) != expected["sha256"]:
            yield f"{name}: sha256 differs from the manifest"
    for name in sorted(set(found) - set(files) - {MANIFEST}):
        yield f"{name}: not listed in the manifest"


class Store:
    """The artifacts of one root folder, safe to share among processes and (where flock works) machines.

    Args:
        root: Folder of the store; made if absent.
        on_message: Receives one line for each thing a user should know (waiting, damage); default stderr.
        remind_every_s: Seconds between reminders while waiting for another process.

    Raises:
        StoreError: `root` cannot be read and written.
    """

    def __init__(
        self, root: Path, on_message: Callable[[str], None] = _to_stderr, *, remind_every_s: float = 30.0
    ) -> None:
        self.root = Path(root).absolute()
        self._say, self._remind_every_s = on_message, remind_every_s
        self._verified: dict[str, tuple[dict[str, tuple[int, int]], Artifact]] = {}
        self._mine: set[tuple[int, str]] = set()
        try:
            for name in ("", *_FOLDERS):
                (self.root / name).mkdir(parents=True, exist_ok=True)
                if not os.access(self.root / name, os.R_OK | os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.root / name))
        except OSError as error:
            mend = "choose a folder that you may write to, or mend its permissions"
            raise StoreError(f"the store cannot be used: {error}", where=str(self.root), mend=mend) from error

    def find(self, key: str) -> Artifact | None:
        """The whole, verified artifact of `key`, or None.

        Every file's size and sha256 is checked at first, later only that size and modification time stay. A
        damaged artifact is reported and set aside, unless another process is already about to replace it.

        Raises:
            StoreError: `key` is no key, or a file may not be read.
        """
        if not re.fullmatch(r"[0-9a-f]{32}", key):
            raise StoreError(f"{key!r} is not an artifact key (32 hex digits)")
        state = self._inspect(key)
        if not isinstance(state, list):
            return state
        # Only the lock's holder may judge and move: without it, a slow reader of the damaged files could move
        # away the good artifact that another process has just put in their place.
        if (lock := self._acquire(key, 0.0)) is None:
            return None
        try:
            return self._find_locked(key)
        finally:
            lock.release()

    def artifacts(self) -> Iterator[Artifact]:
        """All artifacts by key, without checking their files; those with a damaged manifest are left out."""
        for folder in sorted((self.root / "artifacts").iterdir()):
            if isinstance(manifest := _manifest(folder), dict):
                yield Artifact(folder.name, manifest["kind"], folder, manifest)

    def faults(self, key: str) -> list[str]:
        """What is wrong with the files of `key`, every checksum computed anew; empty if it is whole."""
        self._verified.pop(key, None)
        state = self._inspect(key)
        return state if isinstance(state, list) else [] if state else ["it is not in this store"]

    def remove(self, key: str) -> None:
        """Remove an artifact; whoever asks for it later computes it again. Waits while another process builds it."""
        with self._held(key, "remove"):
            self._verified.pop(key, None)
            grave = self.root / "building" / f"{key}-removed"
            os.rename(self.root / "artifacts" / key, grave)  # at once: nobody may find half of it
            shutil.rmtree(grave)

    def being_built(self) -> list[str]:
        """Who builds what now, in words."""
        keys = (path.stem for path in sorted((self.root / "locks").glob("*.json")))
        return [f"{key}: {holder}" for key in keys if (holder := self._holder(key))]

    @property
    def size(self) -> int:
        """Bytes in the files of all artifacts."""
        return sum(artifact.size for artifact in self.artifacts())

    def _inspect(self, key: str) -> Artifact | list[str] | None:
        """The artifact if it is whole, None if there is none, else the list of its faults."""
        folder = self.root / "artifacts" / key
        if not os.path.lexists(folder):
            return None
        try:
            found = dict(_scan(folder))
            signature = {name: (s.st_size, s.st_mtime_ns) for name, s in found.items()}
            known = self._verified.get(key)
            if known is not None and known[0] == signature:
                return known[1]
            manifest = _manifest(folder)
            faults = [manifest] if isinstance(manifest, str) else [*_faults(folder, manifest["files"], found)]
        except PermissionError as error:
            mend = "ask its owner for read permission, or use a store of your own"
            raise StoreError(f"an artifact may not be read: {error}", where=str(folder), mend=mend) from error
        except OSError as error:
            return [str(error)]
        if faults or isinstance(manifest, str):
            return faults
        self._verified[key] = (signature, Artifact(key, manifest["kind"], folder, manifest))
        return self._verified[key][1]

    def _find_locked(self, key: str) -> Artifact | None:
        faults = self._inspect(key)
        if not isinstance(faults, list):
            return faults
        number = 0
        while os.path.lexists(target := self.root / "damaged" / f"{key}-{number}"):
            number += 1
        os.rename(self.root / "artifacts" / key, target)
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        self._say(f"artifact {key} is damaged ({shown}); moved to damaged/{target.name}, it will be rebuilt")
        return None

    def _acquire(self, key: str, seconds: float) -> filelock.BaseFileLock | None:
        # filelock's soft locks are mere files: one left by a killed process would block for ever.
        lock = filelock.FileLock(self.root / "locks" / f"{key}.lock", fallback_to_soft=False)
        try:
            lock.acquire(timeout=seconds, poll_interval=_POLL_S)
        except filelock.Timeout:
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            mend = "put the store where flock works (a local disk, NFS 4, Lustre mounted with -o flock)"
            raise StoreError(f"no file locks here: {error}", where=str(self.root), mend=mend) from error
        return lock

    def _wait(self, key: str) -> filelock.BaseFileLock:
        begun = due = time.monotonic()
        while (lock := self._acquire(key, _POLL_S)) is None:
            now, holder = time.monotonic(), self._holder(key)
            if now >= due and (holder is not None or now - begun >= _SHY_HOLDER_S):
                self._say(f"waiting for artifact {key}: {holder or 'its builder has not said who it is'}")
                due = now + self._remind_every_s
        return lock

    def _holder(self, key: str) -> str | None:
        """Who builds `key`, in words; None if that is unknown or a process that has died."""
        try:
            info = json.loads((self.root / "locks" / f"{key}.json").read_text(encoding="utf-8"))
            if info["host"] == os.uname().nodename and _process_start(info["pid"]) != info["started"]:
                return None
            return "stage {stage!r} is being built by pid {pid} on host {host} since {since}".format(**info)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @contextmanager
    def _held(self, key: str, stage: str) -> Iterator[None]:
        me, info = (threading.get_ident(), key), self.root / "locks" / f"{key}.json"
        if me in self._mine:
            raise StoreError(f"stage {stage!r} asks for its own artifact while building it", where=key)
        lock = self._acquire(key, 0.0) or self._wait(key)
        self._mine.add(me)
        try:
            pid = os.getpid()
            who = {"host": os.uname().nodename, "pid": pid, "started": _process_start(pid), "stage": stage}
            atomic_write_json(info, who | {"since": _now()})
            yield
        finally:
            self._mine.discard(me)
            with suppress(OSError):
                info.unlink()
            lock.release()

    def obtain(self, identity: Identity, produce: Callable[[Workspace], None]) -> tuple[Artifact, bool]:
        """The artifact of `identity`: found, awaited from another process, or built by `produce`.

        An exception in `produce` passes through; its `work` folder stays for the next attempt.

        Returns:
            The artifact, and whether this call built it.

        Raises:
            StoreError: A full disk or quota (from here or from `produce`), or an output that is no artifact.
            TypeError: The spec or the cost cannot be written as JSON.
        """
        key = identity.key
        with explained_disk_errors(self.root):
            artifact, built = self.find(key), False
            if artifact is None:
                with self._held(key, identity.stage):
                    artifact = self._find_locked(key)
                    if artifact is None:
                        artifact, built = self._build(identity, key, produce), True
        if artifact.kind != identity.kind:
            what = f"stage {identity.stage!r} made a {artifact.kind!r}, not a {identity.kind!r}"
            raise StoreError(what, where=key, mend="raise the stage's version")
        return artifact, built

    def _build(self, identity: Identity, key: str, produce: Callable[[Workspace], None]) -> Artifact:
        building, target = self.root / "building" / key, self.root / "artifacts" / key
        workspace = Workspace(key, building / "out", building / "work")
        if workspace.out.exists():
            shutil.rmtree(workspace.out)
        workspace.out.mkdir(parents=True)
        workspace.work.mkdir(exist_ok=True)
        try:
            produce(workspace)
            manifest = self._seal(identity, workspace)
            known = self._put(key, workspace.out, target)
        except BaseException:
            shutil.rmtree(workspace.out, ignore_errors=True)
            raise
        sync(target.parent)
        shutil.rmtree(building, ignore_errors=True)
        if known is not None:
            return known
        signature = {name: (s.st_size, s.st_mtime_ns) for name, s in _scan(target)}
        self._verified[key] = (signature, Artifact(key, identity.kind, target, manifest))
        return self._verified[key][1]

    def _put(self, key: str, out: Path, target: Path) -> Artifact | None:
        """Put a finished artifact in its place; one that is there already is the answer."""
        try:
            os.rename(out, target)
        except OSError as error:
            # a network file system may have gone on saying "absent" here after another machine had put it there
            known = self._inspect(key) if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else None
            if not isinstance(known, Artifact):
                raise
            return known
        return None

    @staticmethod
    def _seal(identity: Identity, workspace: Workspace) -> dict[str, Any]:
        """Check the output, write its manifest and bring all of it to the disk itself."""
        out, found = workspace.out, dict(_scan(workspace.out))
        faults = [f"{name} is a link or no plain file" for name, s in found.items() if not stat.S_ISREG(s.st_mode)]
        faults += [f"it has a {MANIFEST} of its own"] if MANIFEST in found else []
        if faults or not found:
            what = f"the output of stage {identity.stage!r} is no artifact: {(faults or ['it is empty'])[0]}"
            raise StoreError(what, where=workspace.key, mend="write plain files, at least one, to Workspace.out")
        shared = stat.S_IMODE(out.stat().st_mode) & 0o444
        for name, s in found.items():  # safetensors writes files that only their owner may read
            (out / name).chmod(stat.S_IMODE(s.st_mode) | shared)
        files = {name: {"sha256": _digest(out / name), "bytes": s.st_size} for name, s in found.items()}
        manifest = {"key": workspace.key} | {f.name: getattr(identity, f.name) for f in dataclasses.fields(identity)}
        manifest |= {"files": files, "cost": {name: float(value) for name, value in workspace.cost.items()}}
        manifest = plain(manifest | {"versions": versions(), "created": _now()})
        write_json(out / MANIFEST, manifest | {"manifest_sha256": _sha256(canonical(manifest))})
        for name in (*files, MANIFEST):
            sync(out / name)
        for folder, _, _ in os.walk(out):
            sync(Path(folder))
        return manifest
