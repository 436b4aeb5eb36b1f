"""Full, read-only and foreign disks under the store."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_tools import IDENTITY, SLOW, Process, produce

from alignbench.errors import StoreError
from alignbench.store import MANIFEST, Artifact, Store, Workspace

# disks


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def overflow(space: Workspace) -> None:
    (space.work / "step").write_text("9")
    (space.out / "big").write_bytes(b"x" * 2_000_000)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"x" * 4096)


def fill_exactly(space: Workspace) -> None:
    """Leaves no room for the manifest."""
    (space.work / "step").write_text("9")
    fill(space.out / "big")


def overflow_in_rust(space: Workspace) -> None:
    (space.work / "step").write_text("9")
    try:
        (space.out / "big").write_bytes(b"x" * 2_000_000)
    except OSError:
        raise RuntimeError("rank 1 failed\nI/O error: No space left on device (os error 28)") from None


@pytest.mark.parametrize("stage", [overflow, fill_exactly, overflow_in_rust])
def test_a_full_disk(tiny_disk: Path, stage: Callable[[Workspace], None]) -> None:
    store = Store(tiny_disk / "store")
    earlier, _ = store.obtain(IDENTITY, produce)
    with pytest.raises(StoreError, match="free") as caught:
        store.obtain(SLOW, stage)
    for word in (f"the disk {tiny_disk} is full", "MiB", "nothing complete was lost", "same command"):
        assert word in str(caught.value)
    assert [p.name for p in (store.root / "building" / SLOW.key).iterdir()] == ["work"]
    assert (store.root / "building" / SLOW.key / "work" / "step").read_text() == "9"
    assert list(Store(store.root).artifacts()) == [earlier]
    assert Store(store.root).find(IDENTITY.key) == earlier
    subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)
    artifact, built = store.obtain(SLOW, overflow)
    assert built
    assert artifact.path("big").stat().st_size == 2_000_000


def test_a_disk_full_before_anything_starts(tiny_disk: Path) -> None:
    store = Store(tiny_disk / "store")
    filler = tiny_disk / "filler"
    fill(filler)
    with pytest.raises(StoreError, match="is full"):
        store.obtain(IDENTITY, produce)
    filler.unlink()
    assert store.obtain(IDENTITY, produce)[1]


def test_a_read_only_disk(tiny_disk: Path) -> None:
    Store(tiny_disk / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    for root in (tiny_disk / "store", tiny_disk / "other"):
        with pytest.raises(StoreError, match="mend"):
            Store(root)


def test_a_file_size_limit(store: Store, start: Callable[..., Process]) -> None:
    text = start("limited").finish()
    for word in ("refuses a file this large", "ulimit", "MiB are free", "nothing complete was lost"):
        assert word in text
    assert [p.name for p in (store.root / "building" / SLOW.key).iterdir()] == ["work"]
    assert not list(store.artifacts())


def test_a_store_error_in_produce_is_not_dressed_up(store: Store) -> None:
    def fail(space: Workspace) -> None:
        raise StoreError("no space left on device, says the stage")

    with pytest.raises(StoreError, match=r"says the stage$"):
        store.obtain(IDENTITY, fail)


@pytest.mark.parametrize("inside", ["", "store"])
def test_a_root_that_cannot_be_a_folder(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="mend"):
        Store(tmp_path / "file" / inside)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def test_a_root_of_someone_else(open_folder: Path, start: Callable[..., Process]) -> None:
    root = open_folder / "store"
    Store(root)
    root.chmod(0o500)
    text = start("nobody", root).finish()
    root.chmod(0o700)
    assert "the store cannot be used" in text
    assert "mend:" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("name", ["rows.jsonl", MANIFEST])
def test_unreadable_is_not_damaged(open_folder: Path, start: Callable[..., Process], name: str) -> None:
    root = open_folder / "store"
    artifact: Artifact = Store(root).obtain(SLOW, produce)[0]
    for folder in (root, *root.rglob("*")):
        if folder.is_dir():
            folder.chmod(0o777)
    (artifact.folder / name).chmod(0)
    text = start("nobody", root).finish()
    (artifact.folder / name).chmod(0o600)
    assert "may not be read" in text
    assert "Traceback" not in text
    assert Store(root).find(SLOW.key) == artifact
