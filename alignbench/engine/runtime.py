"""The machine a stage runs on: device, dtype, threads, process group, DeepSpeed configuration, memory."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from alignbench import memory
from alignbench.config import HardwareConfig, TrainConfig
from alignbench.engine import group
from alignbench.errors import ConfigError

log = logging.getLogger(__name__)
# Before anything imports DeepSpeed (transformers does): it would announce its own guess on standard output.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device_of(hardware: HardwareConfig) -> torch.device:
    """The torch device, with threads set; a GPU that is asked for and absent is refused."""
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    if hardware.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "hardware asks for a GPU, and torch sees none",
            where="hardware.device",
            mend="choose hardware=cpu, or check nvidia-smi and the CUDA build of torch",
        )
    return torch.device("cuda", torch.cuda.current_device()) if hardware.device == "cuda" else torch.device("cpu")


def dtype_of(hardware: HardwareConfig) -> torch.dtype:
    """Parameter dtype."""
    return DTYPES[hardware.dtype]


def join_process_group(hardware: HardwareConfig) -> None:
    """Make this process a world of one, without a network port, and hand the group to DeepSpeed."""
    import torch.distributed as dist

    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        backend = "gloo" if hardware.device == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # In a world of one the shared-memory collectives have nothing to do, and in a larger one gloo does their work: not
    # building them saves half a minute of compilation, and lets a machine without a C++ compiler train.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
            log.info("no C++ compiler found: DeepSpeed's compiled ops are left out; none is needed")
        deepspeed.init_distributed(dist_init_required=False, verbose=False)


def import_deepspeed() -> Any:
    """Import DeepSpeed with its banner and per-call logging turned down to warnings."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        os.environ.setdefault(name, "1" if name == "WORLD_SIZE" else "0")
    # ZeRO calls torch's old collectives once per micro-batch (DeepSpeed 0.19 with torch 2.13; harmless)
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        warnings.filterwarnings("ignore", message=f".*{name}.*deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def deepspeed_config(hardware: HardwareConfig, *, clip: float = 0.0, trained: int = 0) -> dict[str, Any]:
    """DeepSpeed's configuration for one training stage, or for a model that nobody trains.

    How many micro-batches a step has, and how the loss is scaled, is the training loop's own affair.

    Args:
        hardware: dtype, ZeRO stage, offload, size of a pass.
        clip: Largest norm of a step's gradient; 0: any.
        trained: Weights that get gradients.
    """
    # DeepSpeed 0.19 refuses bf16 with fp32 accumulation and no ZeRO ("unsupported mix"). In a world of one stage 2
    # splits nothing; stage 1 takes another path (BF16_Optimizer), which is slow to set up and prints memory tables
    stage = 2 if hardware.dtype == "bf16" and hardware.zero_stage == 0 else hardware.zero_stage
    zero: dict[str, Any] = {"stage": stage}
    if trained and stage:
        # its own number takes 2 GiB of a GPU for any model; the gradients pass in one bucket either way
        zero["reduce_bucket_size"] = memory.reduce_bucket(trained)
    if hardware.offload != "none":
        place: dict[str, Any] = {"device": hardware.offload, "pin_memory": hardware.device == "cuda"}
        if hardware.offload == "nvme":
            place["nvme_path"] = hardware.nvme_path
        zero["offload_optimizer"] = dict(place)
        # where the accelerator has no fp16 (a CPU) DeepSpeed 0.19 keeps offloaded parameters in bf16, whatever they are
        # (partition_parameters.py, _set_dtype): the losses were off by 1e-3, so parameters stay where they are there
        if hardware.zero_stage == 3 and hardware.device == "cuda":
            zero["offload_param"] = dict(place)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": hardware.micro_batch,
        # only a number above one makes offload's gradients sums over micro-batches; the boundaries are set by the loop
        "gradient_accumulation_steps": 2,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        # torch's AdamW in every ZeRO stage: the same arithmetic on every device, nothing to compile
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if group.any_apart():  # each machine keeps a whole checkpoint of its own ranks
        config["checkpoint"] = {"use_node_local_storage": True}
    if hardware.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def adamw(groups: list[dict[str, Any]], settings: TrainConfig, kind: str) -> torch.optim.Optimizer:
    """AdamW over parameter groups.

    Args:
        groups: Parameters and their weight decay.
        settings: Learning rate, betas and eps.
        kind: "adamw" (torch's fused one: on a CPU several times as fast as its default, and equal up to rounding), or
            one of bitsandbytes's with moments of 8 bits, in memory ("adamw_8bit") or paged ("paged_adamw_8bit").
    """
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_eps,
    }
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    import bitsandbytes

    made = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}[kind]
    optimizer: torch.optim.Optimizer = made(groups, **options)
    return optimizer


def shards(hardware: HardwareConfig) -> bool:
    """Whether no rank holds a whole model, from loading it on: ZeRO-3 of several ranks, or with weights moved off."""
    return hardware.zero_stage == 3 and (group.world() > 1 or hardware.offload != "none")


def frozen_engine(model: Any, hardware: HardwareConfig) -> Any:
    """What computes with `model` without training it.

    The model itself; or, where ranks hold parts of it, DeepSpeed's engine, which gathers each weight where it is used.
    """
    if not shards(hardware):
        return model
    engine, *_ = import_deepspeed().initialize(model=model, config=deepspeed_config(hardware))
    engine.eval()
    return engine


def memory_left(hardware: HardwareConfig, device: torch.device) -> float | None:
    """Bytes that this process may still take on `device`, with a tenth kept back; None where no limit is known.

    Of a GPU the driver says it, `memory_gib` lowers it; on a CPU `memory_gib` is the only limit.
    """
    limits = []
    if device.type == "cuda":
        # what torch's allocator holds and does not use is free to us as well
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limits.append(torch.cuda.mem_get_info(device)[0] + unused)
        used = torch.cuda.memory_allocated(device)
    else:
        used = psutil.Process().memory_info().rss
    if hardware.memory_gib is not None:
        limits.append(max(0, int(hardware.memory_gib * 2**30) - used))
    return 0.9 * min(limits) if limits else None


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, so that side work never moves another purpose's random numbers."""
    import hashlib

    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def peak_memory(cost: dict[str, float], device: torch.device) -> Iterator[None]:
    """Record the peak memory of the enclosed work in `cost` (bytes): resident set, and GPU where there is one."""
    cleared = _reset_resident_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        cost["peak_rss_bytes"] = float(_resident_peak(cleared))
        if device.type == "cuda":
            cost["peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated(device))


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak(cleared: bool) -> int:
    if cleared:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Without Linux's reset the figure is the whole process's peak: an upper bound.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
