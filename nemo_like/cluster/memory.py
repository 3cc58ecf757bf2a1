"""Out of memory, in words: in which phase, what was asked for, what there is, what takes less."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BATCH = (
    "lower policy.train_micro_batch_size (of packed or sorted batches train_mb_tokens of "
    "policy.sequence_packing or policy.dynamic_batching)",
    "set activation_checkpointing=true of the backend (policy.dtensor_cfg, policy.megatron_cfg)",
    "lower policy.logprob_chunk_size or policy.max_total_sequence_length",
)
_STATE = (
    "share the state among more ranks (cluster.num_nodes, cluster.gpus_per_node) or raise "
    "policy.dtensor_cfg.tensor_parallel_size (policy.megatron_cfg.tensor_model_parallel_size)",
    "on GPUs set policy.dtensor_cfg.cpu_offload=true, if that is the backend",
)
_LOGPROBS = (
    "lower policy.logprob_batch_size (of packed or sorted batches logprob_mb_tokens of "
    "policy.sequence_packing or policy.dynamic_batching)",
    "lower policy.logprob_chunk_size",
)
_ENGINE = (
    "lower policy.generation.max_num_seqs, policy.generation.vllm_cfg.max_model_len or "
    "policy.generation.vllm_cfg.gpu_memory_utilization",
    "on GPUs raise policy.generation.vllm_cfg.tensor_parallel_size, on CPUs lower "
    "policy.generation.num_cpu_engines",
)
_SYNC = (
    "lower policy.generation.vllm_cfg.gpu_memory_utilization",
    "on CPUs lower policy.generation.num_cpu_engines",
)
_SAVE = ("set checkpointing.is_async=false, which copies no state", *_STATE)

ADVICE = {
    "forward_backward": _BATCH,
    "optimizer": ("lower policy.optimizer.muon_bucket_mb, if it is Muon", *_STATE),
    "train_step": (*_BATCH, *_STATE),
    "logprobs": _LOGPROBS,
    "generate": _ENGINE,
    "export_weights": _SYNC,
    "load_weights": _SYNC,
    "save": _SAVE,
    "load": _STATE,
    "start": _STATE,
}
"""What takes less memory, by the phase that had too little: a worker's call, or a part of it."""

_GPU = re.compile(
    r"Tried to allocate (?P<needed>[\d.]+ \w+).*?(?:total capac\w+ of (?P<total>[\d.]+ \w+) of "
    r"which (?P<free>[\d.]+ \w+) is free|(?P<total1>[\d.]+ \w+) total capacity;.*?"
    r"(?P<free1>[\d.]+ \w+) free)",
    re.DOTALL,
)
_OUT_OF_GPU = re.compile(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_BYTES = re.compile(r"you tried to allocate (\d+) bytes|Unable to allocate ([\d.]+ \w+)")
_OUT_OF_HOST = re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory")
_NO_CACHE = re.compile(
    r"No available memory for the cache blocks|larger than the available KV cache memory"
)
_NO_SHARE = re.compile(
    r"Free memory on device.*is less than desired GPU memory utilization", re.DOTALL
)
_BY_RAY = "running low on memory"


@dataclass(frozen=True)
class Host:
    """Memory of this machine: GiB now, and how many processes its kernel has ended for want of it.

    Linux only; elsewhere nothing is known.
    """

    free: float | None = None
    total: float | None = None
    kills: int = 0

    @classmethod
    def now(cls, proc: Path = Path("/proc")) -> Host:
        """What Linux says at this moment."""
        if not (proc / "meminfo").is_file():
            return cls()
        kib = _numbers(proc / "meminfo")
        kills = _numbers(proc / "vmstat").get("oom_kill", 0)
        return cls(kib["MemAvailable"] / 2**20, kib["MemTotal"] / 2**20, kills)

    def __str__(self) -> str:
        if self.free is None:
            return "free: not known"
        return f"free {self.free:.2f} GiB of {self.total:.2f} GiB"


def told(exception: BaseException, phase: str, group: str = "policy") -> str | None:
    """What to say of an exception that is for want of memory; None of any other.

    A note on the exception that is itself a phase says more exactly where it was.
    """
    notes: list[str] = getattr(exception, "__notes__", [])
    phase = next((note for note in notes if note in ADVICE), phase)
    text = str(exception)
    if _NO_CACHE.search(text):
        return (
            f"{_first(text)} Raise policy.generation.vllm_cfg.gpu_memory_utilization, or lower "
            "policy.generation.vllm_cfg.max_model_len"
        )
    if _NO_SHARE.search(text):
        return f"{_first(text)} Lower policy.generation.vllm_cfg.gpu_memory_utilization"
    if _OUT_OF_GPU.search(text):
        return f"out of GPU memory in {phase}: {_gpu_amounts(text)}. {advice(phase, group)}"
    if isinstance(exception, MemoryError) or _OUT_OF_HOST.search(text):
        found = _BYTES.search(text)
        needed = "not known"
        if found is not None:
            needed = found[2] or f"{int(found[1]) / 2**30:.2f} GiB"
        return (
            f"out of host memory in {phase}: needed {needed}, {Host.now()}. {advice(phase, group)}"
        )
    return None


def of_the_dead(phase: str, group: str, *, said: str, before: Host, now: Host) -> str:
    """What memory had to do with the end of a process, as far as anybody can tell."""
    if _BY_RAY in said:
        cause = f"Ray ended it, because its machine was {_BY_RAY}"
    elif now.kills > before.kills:
        cause = "This machine's kernel has ended a process for want of memory since the run began"
    else:
        cause = "If it was memory"
    return f"{cause} (here {now}). {advice(phase, group)}"


def advice(phase: str, group: str) -> str:
    """What takes less memory in this phase of a group's workers."""
    is_engine = group.startswith("engine")
    ways = _ENGINE if is_engine and phase == "start" else ADVICE.get(phase)
    return "To take less: " + "; ".join(ways or (_ENGINE if is_engine else (*_BATCH, *_STATE)))


def _gpu_amounts(text: str) -> str:
    found = _GPU.search(text)
    if found is None:
        return "needed, free and total: not told"
    total, free = found["total"] or found["total1"], found["free"] or found["free1"]
    mine = re.search(r"([\d.]+ \w+) is allocated by PyTorch", text)
    kept = re.search(r"([\d.]+ \w+) is reserved by PyTorch but unallocated", text)
    own = f", {mine[1]} in tensors" if mine else ""
    own += f", {kept[1]} kept by torch and in no tensor" if kept else ""
    return f"needed {found['needed']}, free {free} of {total}{own}"


def _numbers(file: Path) -> dict[str, int]:
    """The numbers of a file of lines `name: number ...`."""
    words = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _first(text: str) -> str:
    return text.strip().splitlines()[0]
