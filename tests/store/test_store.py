"""The artifact store under kills, concurrency and damage; processes are real."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_tools import IDENTITY, MANY, PATIENCE_S, SLOW, WORKER, Process, produce, strict, wait_until

from alignbench.errors import StoreError
from alignbench.jsonio import read_json, write_json
from alignbench.store import MANIFEST, Store, Workspace, artifact_key

# building


def test_obtain_builds_once_and_finds_afterwards(store: Store, tmp_path: Path) -> None:
    assert store.find(IDENTITY.key) is None
    artifact, built = store.obtain(IDENTITY, produce)
    again, rebuilt = store.obtain(IDENTITY, lambda space: pytest.fail("built twice"))
    fresh = Store(tmp_path / "store").find(IDENTITY.key)
    assert (built, rebuilt) == (True, False)
    assert artifact == again == fresh
    assert artifact.kind == "scores"
    assert artifact.json("model/config.json") == {"layers": 2}
    assert artifact.jsonl("rows.jsonl") == [{"score": 0.25}, {"score": -1.5}]
    assert artifact.path("model").is_dir()
    assert list(store.artifacts()) == [artifact]
    assert (
        store.size
        == artifact.size
        == sum(p.stat().st_size for p in artifact.folder.rglob("*.json*")) - (artifact.folder / MANIFEST).stat().st_size
    )
    assert not list((tmp_path / "store" / "building").iterdir())


@pytest.mark.parametrize("name", ["absent.json", "mod", "../x", "", "/etc/passwd"])
def test_a_name_the_manifest_does_not_list(store: Store, name: str) -> None:
    artifact, _ = store.obtain(IDENTITY, produce)
    with pytest.raises(StoreError, match=r"rows\.jsonl"):
        artifact.path(name)


def test_manifest_tells_everything_and_no_place(store: Store, tmp_path: Path) -> None:
    artifact, _ = store.obtain(IDENTITY, produce)
    manifest = read_json(artifact.folder / MANIFEST)
    assert {name: manifest[name] for name in ("stage", "version", "kind", "spec", "inputs", "seed")} == vars(IDENTITY)
    assert manifest["key"] == IDENTITY.key == artifact.folder.name
    assert manifest["key"] == artifact_key(*(manifest[n] for n in ("stage", "version", "spec", "inputs", "seed")))
    assert manifest["cost"] == {"scored_tokens": 12.0}
    assert set(manifest["versions"]) == {"python", "torch", "transformers", "deepspeed", "alignbench"}
    for name, entry in manifest["files"].items():
        content = (artifact.folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    text = (artifact.folder / MANIFEST).read_text()
    for place in (str(tmp_path), os.path.expanduser("~"), os.uname().nodename, sys.prefix):
        assert place not in text


def test_an_artifact_is_absent_until_it_is_whole(store: Store, tmp_path: Path) -> None:
    def watch(space: Workspace) -> None:
        produce(space)
        assert store.find(IDENTITY.key) is None
        assert not list(store.artifacts())
        assert not list((tmp_path / "store" / "artifacts").iterdir())

    assert store.obtain(IDENTITY, watch)[1]


@pytest.mark.parametrize("error", [ValueError("bad loss"), KeyboardInterrupt(), OSError(5, "cable")])
def test_an_exception_passes_through_and_work_stays(store: Store, error: BaseException) -> None:
    def fail(space: Workspace) -> None:
        (space.work / "step").write_text("9")
        produce(space)
        raise error

    with pytest.raises(type(error)) as caught:
        store.obtain(IDENTITY, fail)
    assert caught.value is error
    building = store.root / "building" / IDENTITY.key
    assert [p.name for p in building.iterdir()] == ["work"]
    assert store.find(IDENTITY.key) is None

    def resume(space: Workspace) -> None:
        assert (space.work / "step").read_text() == "9"
        produce(space)

    assert store.obtain(IDENTITY, resume)[1]
    assert not building.exists()


def link(space: Workspace) -> None:
    produce(space)
    (space.out / "model" / "link").symlink_to(space.out / "rows.jsonl")


def link_folder(space: Workspace) -> None:
    produce(space)
    (space.out / "linked").symlink_to(space.out / "model")


def own_manifest(space: Workspace) -> None:
    write_json(space.out / MANIFEST, {})


def pipe(space: Workspace) -> None:
    os.mkfifo(space.out / "pipe")


@pytest.mark.parametrize(
    ("stage", "hint"),
    [
        (link, "model/link is a link"),
        (link_folder, "linked is a link"),
        (own_manifest, "manifest"),
        (pipe, "pipe"),
        (lambda space: None, "empty"),
    ],
)
def test_outputs_that_are_no_artifact(store: Store, stage: Callable[[Workspace], None], hint: str) -> None:
    with pytest.raises(StoreError, match=hint):
        store.obtain(IDENTITY, stage)
    assert store.find(IDENTITY.key) is None
    assert store.obtain(IDENTITY, produce)[1]


def test_cost_must_be_finite_numbers(store: Store) -> None:
    def costly(space: Workspace) -> None:
        produce(space)
        space.cost.update(seconds=np.float64(2.5), tokens=np.int64(3))

    assert store.obtain(IDENTITY, costly)[0].manifest["cost"] == {
        "scored_tokens": 12,
        "seconds": 2.5,
        "tokens": 3,
    }

    def infinite(space: Workspace) -> None:
        produce(space)
        space.cost["seconds"] = float("nan")

    with pytest.raises(TypeError, match=r"cost\.seconds"):
        store.obtain(replace(IDENTITY, seed=8), infinite)


def test_nested_stages_and_a_stage_that_asks_for_itself(store: Store) -> None:
    def nested(space: Workspace) -> None:
        inner, _ = store.obtain(IDENTITY, produce)
        shutil.copy(inner.path("rows.jsonl"), space.out)
        store.obtain(SLOW, nested)

    with pytest.raises(StoreError, match="its own artifact"):
        store.obtain(SLOW, nested)
    assert store.find(IDENTITY.key) is not None


def test_another_kind_under_the_same_key_is_refused(store: Store) -> None:
    store.obtain(IDENTITY, produce)
    with pytest.raises(StoreError, match="version"):
        store.obtain(replace(IDENTITY, kind="policy"), produce)


@pytest.mark.parametrize("key", ["", "..", "../" * 3, "A" * 32, "a" * 31, "a" * 32 + "\n"])
def test_what_is_no_key(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="not an artifact key"):
        store.find(key)


def test_threads_of_one_process_build_once(store: Store) -> None:
    calls, results = [], []

    def counted(space: Workspace) -> None:
        calls.append(1)
        time.sleep(0.2)
        produce(space)

    threads = [threading.Thread(target=lambda: results.append(store.obtain(IDENTITY, counted))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(calls) == 1
    assert sorted(built for _, built in results) == [False, False, False, True]


# damage


def flip(path: Path, position: int = -2, mask: int = 1) -> None:
    content, times = bytearray(path.read_bytes()), path.stat()
    content[position] ^= mask
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def rewrite(path: Path) -> None:
    flip(path)
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))


def swap_for_link(folder: Path) -> None:
    shutil.move(folder / "rows.jsonl", folder.parent.parent / "elsewhere")
    (folder / "rows.jsonl").symlink_to(folder.parent.parent / "elsewhere")


def swap_for_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def edit_manifest(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"scored_tokens": 12.0', '"scored_tokens": 10.0'))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / "rows.jsonl").unlink(), "rows.jsonl: missing"),
    "missing nested": (lambda f: shutil.rmtree(f / "model"), "model/config.json: missing"),
    "truncated": (lambda f: os.truncate(f / "rows.jsonl", 3), "rows.jsonl: 3 bytes instead of"),
    "flipped bit": (lambda f: flip(f / "rows.jsonl"), "rows.jsonl: sha256"),
    "rewritten": (lambda f: rewrite(f / "rows.jsonl"), "rows.jsonl: sha256"),
    "flipped nested bit": (lambda f: flip(f / "model" / "config.json"), "model/config.json: sha256"),
    "link": (swap_for_link, "rows.jsonl: not a plain file"),
    "extra": (lambda f: (f / "extra.txt").write_text(""), "extra.txt: not listed"),
    "extra nested": (lambda f: (f / "model" / "x").write_text("x"), "model/x: not listed"),
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), "manifest.json: missing"),
    "manifest truncated": (lambda f: os.truncate(f / MANIFEST, 100), "manifest.json: unreadable"),
    "manifest empty": (lambda f: os.truncate(f / MANIFEST, 0), "manifest.json: unreadable"),
    "manifest binary": (lambda f: (f / MANIFEST).write_bytes(b"\xff\x00"), "manifest.json: unreadable"),
    "manifest a list": (lambda f: (f / MANIFEST).write_text("[1]"), "manifest.json: unreadable"),
    "manifest without checksum": (lambda f: (f / MANIFEST).write_text("{}"), "manifest.json: unreadable"),
    "manifest edited": (edit_manifest, "manifest.json: its content differs"),
    "no folder": (swap_for_file, "Not a directory"),
    "empty folder": (lambda f: [shutil.rmtree(f), f.mkdir()], "manifest.json: missing"),
}


@pytest.mark.parametrize(
    ("damage", "reopen"),
    # One store object trusts size and modification time after its first look; `flip` keeps both.
    [(name, reopen) for name in DAMAGES for reopen in (True, False) if reopen or "flipped" not in name],
)
def test_damage_is_reported_and_rebuilt(store: Store, said: list[str], damage: str, reopen: bool) -> None:
    artifact, _ = store.obtain(IDENTITY, produce)
    harm, words = DAMAGES[damage]
    harm(artifact.folder)
    second = Store(store.root, said.append) if reopen else store
    assert second.find(IDENTITY.key) is None
    assert len(said) == 1
    for word in (IDENTITY.key, words, "rebuilt", "damaged/"):
        assert word in said[0]
    assert [p.name for p in (store.root / "damaged").iterdir()] == [f"{IDENTITY.key}-0"]
    rebuilt, built = second.obtain(IDENTITY, produce)
    assert built
    assert rebuilt.jsonl("rows.jsonl") == [{"score": 0.25}, {"score": -1.5}]
    assert Store(store.root).find(IDENTITY.key) == rebuilt
    (rebuilt.folder / "rows.jsonl").unlink()
    assert second.obtain(IDENTITY, produce)[1]
    assert sorted(p.name for p in (store.root / "damaged").iterdir()) == [f"{IDENTITY.key}-{n}" for n in (0, 1)]


def test_a_renamed_artifact_is_damaged(store: Store, said: list[str]) -> None:
    artifact, _ = store.obtain(IDENTITY, produce)
    artifact.folder.rename(artifact.folder.with_name("b" * 32))
    assert store.find("b" * 32) is None
    assert "manifest.json" in said[0]


def test_listing_leaves_a_damaged_manifest_out(store: Store) -> None:
    artifact, _ = store.obtain(IDENTITY, produce)
    other, _ = store.obtain(replace(IDENTITY, seed=8), produce)
    os.truncate(artifact.folder / MANIFEST, 10)
    assert list(store.artifacts()) == [other]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_bit_of_an_artifact_can_flip_unseen(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        artifact, _ = Store(Path(folder)).obtain(IDENTITY, produce)
        path = artifact.folder / data.draw(st.sampled_from([MANIFEST, MANIFEST, *artifact.manifest["files"]]))
        flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), 1 << data.draw(st.integers(0, 7)))
        found = Store(Path(folder), lambda message: None).find(IDENTITY.key)
        # White space between the manifest's values may change: then every value is still the written one.
        assert found is None or (path.name == MANIFEST and strict(found.manifest) == strict(artifact.manifest))


def test_damage_is_left_to_the_process_that_holds_the_lock(store: Store, said: list[str]) -> None:
    artifact, _ = store.obtain(IDENTITY, produce)
    (artifact.folder / "rows.jsonl").unlink()
    with filelock.FileLock(store.root / "locks" / f"{IDENTITY.key}.lock"):
        assert store.find(IDENTITY.key) is None
        assert artifact.folder.exists()
        assert not said
    assert store.find(IDENTITY.key) is None
    assert not artifact.folder.exists()
    assert said


# processes


def test_a_killed_build_resumes_from_its_work(store: Store, tmp_path: Path, start: Callable[..., Process]) -> None:
    first = start("build")
    first.wait_for("HALF")
    first.kill()
    building = store.root / "building" / SLOW.key
    assert (building / "work" / "checkpoint").read_text() == "half"
    assert store.find(SLOW.key) is None
    assert not list(store.artifacts())
    (tmp_path / "store.go").touch()
    text = start("build").finish()
    assert "BUILDING out=[] resumed=True" in text
    assert "DONE built=True answer=42" in text
    assert "waiting" not in text
    assert not building.exists()
    artifact = store.find(SLOW.key)
    assert artifact is not None
    assert artifact.json("result.json") == {"answer": 42}


@pytest.mark.parametrize("count", [2, 8])
def test_processes_that_want_the_same_build_it_once(
    store: Store, tmp_path: Path, start: Callable[..., Process], count: int
) -> None:
    processes = [start("build") for _ in range(count)]
    for process in processes:
        process.wait_for("HALF", "waiting for")
    builders = [process for process in processes if "BUILDING" in process.text]
    assert len(builders) == 1
    waiters = [process for process in processes if process not in builders]
    for waiter in waiters:  # the second message is the reminder
        wait_until(lambda waiter=waiter: waiter.text.count("waiting for") >= 2, waiter)
    (tmp_path / "store.go").touch()
    assert "DONE built=True answer=42" in builders[0].finish()
    for waiter in waiters:
        text = waiter.finish()
        assert "DONE built=False answer=42" in text
        for word in ("stage 'sample'", f"pid {builders[0].pid} ", os.uname().nodename, "since 20", SLOW.key):
            assert word in text.splitlines()[0]
    assert (tmp_path / "store.calls").read_text().split() == [str(builders[0].pid)]
    assert not list((store.root / "locks").glob("*.json"))


def test_a_waiter_takes_over_from_a_killed_holder(tmp_path: Path, start: Callable[..., Process]) -> None:
    holder = start("build")
    holder.wait_for("HALF")
    waiters = [start("build") for _ in range(2)]
    for waiter in waiters:
        waiter.wait_for(f"pid {holder.pid} ")
    holder.kill()
    wait_until(lambda: any("HALF" in waiter.text for waiter in waiters))
    heir = next(waiter for waiter in waiters if "HALF" in waiter.text)
    other = next(waiter for waiter in waiters if waiter is not heir)
    other.wait_for(f"pid {heir.pid} ")
    (tmp_path / "store.go").touch()
    assert "BUILDING out=[] resumed=True" in heir.finish()
    assert "DONE built=True answer=42" in heir.text
    assert "DONE built=False answer=42" in other.finish()
    assert (tmp_path / "store.calls").read_text().split() == [str(holder.pid), str(heir.pid)]


def test_a_kill_at_any_moment_leaves_all_or_nothing(tmp_path: Path, start: Callable[..., Process]) -> None:
    dice, root = random.Random(0), tmp_path / "store"
    for _ in range(8):
        process = start("storm")
        process.wait_for("START")
        time.sleep(dice.uniform(0.0, 0.06))
        process.kill()
        said: list[str] = []
        artifact = Store(root, said.append).find(MANY.key)
        assert not said
        if artifact is not None:
            assert [artifact.path(f"{n}.txt").read_text() for n in range(100)] == [str(n) * 100 for n in range(100)]
            shutil.rmtree(artifact.folder)
    assert "DONE" in start("storm").finish()


@pytest.mark.parametrize("pid", [2**22 - 1, os.getpid()], ids=["dead", "pid reused"])
def test_stale_holder_info_never_blocks(store: Store, said: list[str], pid: int) -> None:
    locks = store.root / "locks"
    holder = {"host": os.uname().nodename, "pid": pid, "started": "1", "stage": "x", "since": "2020"}
    write_json(locks / f"{IDENTITY.key}.json", holder)
    (locks / f"{IDENTITY.key}.lock").touch()
    assert store.obtain(IDENTITY, produce)[1]
    assert not said


@pytest.mark.parametrize("info", ['{"pid": "x"}', None, "stale"])
def test_an_unknown_holder_is_waited_for(store: Store, said: list[str], info: str | None) -> None:
    path = store.root / "locks" / f"{IDENTITY.key}.json"
    if info == "stale":
        info = json.dumps({"host": os.uname().nodename, "pid": 2**22 - 1, "started": "1", "stage": "x", "since": "2"})
    if info is not None:
        path.write_text(info)
    lock = filelock.FileLock(path.with_suffix(".lock"))
    lock.acquire()
    thread = threading.Thread(target=store.obtain, args=(IDENTITY, produce))
    thread.start()
    wait_until(lambda: bool(said))
    lock.release()
    thread.join(PATIENCE_S)
    assert "has not said who it is" in said[0]
    assert store.find(IDENTITY.key) is not None


def test_an_artifact_that_another_machine_put_there_unseen_is_taken(store: Store, tmp_path: Path) -> None:
    # as on a network file system that goes on saying "absent" for a while
    other = Store(tmp_path / "other")
    theirs, _ = other.obtain(IDENTITY, produce)

    def late(space: Workspace) -> None:
        produce(space)
        shutil.copytree(theirs.folder, store.root / "artifacts" / IDENTITY.key)

    artifact, _ = store.obtain(IDENTITY, late)
    assert artifact.manifest == theirs.manifest
    assert not list((store.root / "building").iterdir())


def test_files_are_readable_to_whom_the_folder_is(store: Store) -> None:
    def secretive(space: Workspace) -> None:
        (space.out / "model.safetensors").write_bytes(b"weights")
        (space.out / "model.safetensors").chmod(0o600)

    before = os.umask(0o027)  # a group's store
    try:
        artifact, _ = store.obtain(IDENTITY, secretive)
    finally:
        os.umask(before)
    assert artifact.path("model.safetensors").stat().st_mode & 0o777 == 0o640


def test_import_is_light() -> None:
    code = "import sys, alignbench.store; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(WORKER.parent.parent)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "[]"
