"""One stage on two machines: two network namespaces, with the store in common or with storage of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from pair_chain import Chain
from rank_runs import Made, assert_same_training, training
from tiny_runs import PATIENCE_S, environment

from alignbench import nodes
from alignbench.agent import free_port
from alignbench.errors import ConfigError, RankError
from alignbench.hardware import HardwareConfig
from alignbench.jsonio import read_json

pytestmark = pytest.mark.slow
# of this process alone: a killed test's cable may still lie about
HERE, THERE = (f"10.{64 + os.getpid() // 250 % 64}.{os.getpid() % 250}.{host}" for host in (1, 2))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("nodes") / "store")


@dataclass
class Cable:
    """Two machines: this one, and a network namespace at the other end of a virtual cable."""

    name: str
    helpers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def here(self) -> str:
        return f"{self.name}a"

    def helper(self, address: str, scratch: Path, log: Path, *, hide: Path | None = None) -> subprocess.Popen[bytes]:
        """A helper on the other machine; it does not see what is under `hide`."""
        command = [sys.executable, "-m", "alignbench.nodes", address, "--scratch", str(scratch)]
        if hide is not None:
            mount = f'mount -t tmpfs tmpfs "{hide}" && exec "$@"'
            command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh", *command]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env=environment(GLOO_SOCKET_IFNAME=f"{self.name}b"),
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self.helpers.append(process)
        return process


@pytest.fixture
def cable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cable]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    made = Cable(f"ab{os.getpid() % 100000}")
    lay = (
        f"netns add {made.name}",
        f"link add {made.name}a type veth peer name {made.name}b",
        f"link set {made.name}b netns {made.name}",
        f"addr add {HERE}/24 dev {made.name}a",
        f"link set {made.name}a up",
        f"-n {made.name} addr add {THERE}/24 dev {made.name}b",
        f"-n {made.name} link set {made.name}b up",
        f"-n {made.name} link set lo up",
    )
    try:
        for words in lay:
            done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network namespace can be made here: {done.stderr.strip()}")
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", made.here)
        yield made
    finally:
        for process in made.helpers:
            process.kill()
            process.wait()
        subprocess.run(["ip", "netns", "del", made.name], capture_output=True, check=False)


@contextlib.contextmanager
def meeting() -> Iterator[str]:
    """An address; the mailbox there is closed at the end, which sends the helpers home."""
    address = f"{HERE}:{free_port()}"
    try:
        yield address
    finally:
        head = nodes._heads.pop(address, None)
        if head is not None:
            head.close()


def machines(address: str, **more: object) -> dict[str, object]:
    return {"processes": 2, "nodes": 2, "rendezvous": address, "micro_batch": 2, "zero_stage": 2, **more}


def gone(process: subprocess.Popen[bytes]) -> int:
    return process.wait(PATIENCE_S)


def test_two_machines_with_a_shared_folder_train_as_one_process_does(
    chain: Chain, cable: Cable, tmp_path: Path
) -> None:
    job = training(chain)
    one = Made(tmp_path / "one", *job, micro_batch=2)
    with meeting() as address:
        helper = cable.helper(address, tmp_path / "scratch", tmp_path / "helper.log")
        two = Made(tmp_path / "two", *job, **machines(address))
    assert_same_training(one, two)
    assert gone(helper) == 0
    assert not (tmp_path / "scratch").exists()  # all it needed lies in the common folder
    logs = {path.name for path in (tmp_path / "two/work/ranks").glob("rank_*.log")}
    assert logs == {"rank_0.log", "rank_1.log"}


class AskOnce:
    """Asks a stage to save after some steps, as a batch system would, and leaves when it has."""

    def __init__(self, made: list[int], after: int) -> None:
        self._seen, self._after = made, after

    def heard(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def pending(self) -> bool:
        return len(self._seen) >= self._after

    def done(self) -> None:
        raise KeyboardInterrupt


def test_machines_with_storage_of_their_own_get_inputs_and_keep_checkpoints(
    chain: Chain, cable: Cable, tmp_path: Path
) -> None:
    # everything of this test but the helper's scratch lies under a folder that the helper does not see
    common = Path(os.path.commonpath([tmp_path, chain.store.root]))
    job = training(chain)
    one = Made(tmp_path / "one", *job, micro_batch=2)
    scratch = Path(tempfile.mkdtemp(prefix="alignbench-test-node-"))
    seen: list[int] = []
    try:
        with meeting() as address:
            helper = cable.helper(address, scratch, tmp_path / "helper.log", hide=common)
            machine = machines(address, checkpoint_every=100)
            with pytest.raises(KeyboardInterrupt):
                Made(tmp_path / "two", *job, requests=AskOnce(seen, 7), seen=seen, **machine)
            saved = read_json(tmp_path / "two/work/checkpoints/COMPLETE.json")
            (own,) = scratch.glob("work/*/checkpoints/COMPLETE.json")
            assert read_json(own)["tag"] == saved["tag"]
            assert set(read_json(own)["files"]) != set(saved["files"])  # each machine has its own ranks' parts
            two = Made(tmp_path / "two", *job, **machine)
        assert gone(helper) == 0
        assert {path.name for path in (scratch / "inputs").iterdir()} >= {chain.policy.key, chain.pairs.key}
    finally:
        shutil.rmtree(scratch)
    assert_same_training(one, two)
    # it went on: the parent heard of no step twice
    assert two.metrics[0][0] == saved["step"] + 1 > 7


def test_a_rank_killed_on_another_machine_is_named(chain: Chain, cable: Cable, tmp_path: Path) -> None:
    stage, spec, inputs = training(chain)

    class Kill(AskOnce):
        """Once it trains, the other machine's rank is killed."""

        def pending(self) -> bool:
            if super().pending():
                for process in psutil.Process(helper.pid).children(recursive=True):
                    if "alignbench.worker" in process.cmdline():
                        process.send_signal(signal.SIGKILL)
                self._after = 10**9
            return False

    seen: list[int] = []
    with meeting() as address:
        helper = cable.helper(address, tmp_path / "scratch", tmp_path / "helper.log")
        endless = replace(spec, train=replace(spec.train, epochs=4000.0))
        with pytest.raises(RankError, match=r"rank 1 was killed.*SIGKILL"):
            Made(tmp_path / "two", stage, endless, inputs, requests=Kill(seen, 3), seen=seen, **machines(address))
    assert gone(helper) == 0


def test_a_helper_whose_run_vanishes_ends(cable: Cable, tmp_path: Path) -> None:
    address = f"{HERE}:{free_port()}"
    script = f"import sys, time; from alignbench import nodes; h = nodes.Head({address!r}); print('up', flush=True); "
    run = subprocess.Popen(
        [sys.executable, "-c", script + "time.sleep(600)"], stdout=subprocess.PIPE, env=environment()
    )
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == b"up\n"
        log = tmp_path / "helper.log"
        helper = cable.helper(address, tmp_path / "scratch", log)
        until = time.monotonic() + PATIENCE_S
        while "taking part" not in log.read_text():
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        run.kill()
        run.wait()
    assert gone(helper) == 1
    assert "is gone" in log.read_text()


def test_where_machines_meet_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match="nothing says where the machines meet"):
        nodes.rendezvous(HardwareConfig(nodes=2))
    with pytest.raises(ConfigError, match="cannot meet"):
        nodes.head_for(HardwareConfig(nodes=2, rendezvous="192.0.2.1:1"))


@pytest.fixture
def ssh_to_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An ssh server of this test's own on every loopback address, and an `ssh` that knows its key and port."""
    missing = [name for name in ("ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None]
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if missing or server is None or os.geteuid() != 0:
        pytest.skip("DeepSpeed's launcher reaches machines by ssh and pdsh; this test needs both, sshd and root")
    folder = tmp_path / "ssh"
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    options = {
        "AuthorizedKeysFile": folder / "user.pub",
        "ListenAddress": "0.0.0.0",
        "PermitRootLogin": "prohibit-password",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
    }
    Path("/run/sshd").mkdir(exist_ok=True)
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    running = subprocess.Popen([server, "-D", "-f", "/dev/null", "-h", str(folder / "host"), "-p", str(port), *words])
    (folder / "config").write_text(
        f"Host *\n Port {port}\n IdentityFile {folder}/user\n StrictHostKeyChecking no\n"
        " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    until = time.monotonic() + 30
    while subprocess.run(["ssh", "127.0.0.2", "true"], capture_output=True, check=False).returncode:
        if running.poll() is not None or time.monotonic() > until:
            running.kill()
            pytest.skip("an ssh server cannot be run here")
        time.sleep(0.2)
    yield
    running.kill()
    running.wait()


@pytest.mark.usefixtures("ssh_to_self")
def test_deepspeed_s_launcher_reaches_the_machines_of_a_hostfile(chain: Chain, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    job = training(chain)
    one = Made(tmp_path / "one", *job, micro_batch=2)
    launcher = {"launcher": "deepspeed", "hostfile": str(hosts)}
    two = Made(tmp_path / "two", *job, processes=2, nodes=2, micro_batch=2, zero_stage=2, **launcher)
    assert_same_training(one, two)
