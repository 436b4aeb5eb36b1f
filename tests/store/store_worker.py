"""What tests/test_store.py runs in processes of its own: python store_worker.py MODE ROOT.

The process appends a line to ROOT.calls at each call of produce, and goes on once the file ROOT.go exists.
"""

import itertools
import os
import resource
import sys
import time
from pathlib import Path

from alignbench.errors import StoreError
from alignbench.jsonio import atomic_write_json, write_json
from alignbench.store import Identity, Store, Workspace

IDENTITY = Identity("sample", 1, "responses", {"n": 3}, {}, 0)
MANY = Identity("many", 1, "responses", {}, {}, 0)


def say(text: str) -> None:
    print(text, flush=True)


def slow(root: str, space: Workspace) -> None:
    with open(root + ".calls", "a") as calls:
        calls.write(f"{os.getpid()}\n")
    left = [p.name for p in space.out.iterdir()]
    checkpoint = space.work / "checkpoint"
    say(f"BUILDING out={left} resumed={checkpoint.exists()}")
    checkpoint.write_text("half")
    (space.out / "part").write_text("half")
    say("HALF")
    while not Path(root + ".go").exists():
        time.sleep(0.02)
    write_json(space.out / "result.json", {"answer": 42})


def many(space: Workspace) -> None:
    for number in range(100):
        (space.out / f"{number}.txt").write_text(str(number) * 100)


def build(root: str) -> None:
    store = Store(Path(root), remind_every_s=0.5)
    artifact, built = store.obtain(IDENTITY, lambda space: slow(root, space))
    say(f"DONE built={built} answer={artifact.json('result.json')['answer']}")


def storm(root: str) -> None:
    store = Store(Path(root))
    say("START")
    store.obtain(MANY, many)
    say("DONE")


def limited(root: str) -> None:
    store = Store(Path(root))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        store.obtain(IDENTITY, lambda space: (space.out / "big").write_bytes(b"x" * 1_000_000) and None)
    except StoreError as error:
        say(str(error))


def nobody(root: str) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        Store(Path(root)).find(IDENTITY.key)
    except StoreError as error:
        say(str(error))


def records(root: str) -> None:
    for number in itertools.count():
        atomic_write_json(Path(root) / "record.json", {"n": number, "pad": [number] * 2000})


if __name__ == "__main__":
    {f.__name__: f for f in (build, storm, limited, nobody, records)}[sys.argv[1]](sys.argv[2])
