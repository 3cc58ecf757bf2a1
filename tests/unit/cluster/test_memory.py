"""Texts as torch, numpy, CUDA and vLLM write them."""

import re

import numpy as np
import pytest
import torch

from nemo_like.cluster.failures import Failure, WorkerIdentity
from nemo_like.cluster.memory import ADVICE, Host, advice, of_the_dead, told
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.schema import known_paths

OF_TODAY = (
    "CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total capacity of 31.47 GiB of "
    "which 12.73 GiB is free. Including non-PyTorch memory, this process has 18.73 GiB memory in "
    "use. Of the allocated memory 9.08 GiB is allocated by PyTorch, and 9.35 GiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
OF_TORCH_2_1 = OF_TODAY.replace("capacity", "capacty")
OF_TORCH_1 = (
    "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 1.96 GiB total capacity; 1.24 GiB "
    "already allocated; 2.88 MiB free; 1.25 GiB reserved in total by PyTorch)"
)


@pytest.mark.parametrize("text", [OF_TODAY, OF_TORCH_2_1])
def test_a_gpu_without_memory_is_told_with_phase_amounts_and_keys(text):
    said = told(torch.OutOfMemoryError(text), "logprobs")
    assert said.startswith(
        "out of GPU memory in logprobs: needed 22.78 GiB, free 12.73 GiB of 31.47 GiB, 9.08 GiB in "
        "tensors, 9.35 GiB kept by torch and in no tensor. To take less: lower "
        "policy.logprob_batch_size"
    )


def test_older_and_shorter_texts_are_told_as_far_as_they_go():
    said = told(RuntimeError(OF_TORCH_1), "logprobs")
    assert "needed 20.00 MiB, free 2.88 MiB of 1.96 GiB. To" in said
    for text in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED in",
    ):
        assert "out of GPU memory in logprobs: needed, free and total: not told" in told(
            RuntimeError(text), "logprobs"
        )


def raised_by(function):
    try:
        function()
    except Exception as exception:
        return exception


def test_a_host_without_memory_is_told_with_what_it_has():
    of_torch = raised_by(lambda: torch.empty(1 << 50))
    amounts = r"free \d+\.\d\d GiB of \d+\.\d\d GiB\. To take less: share the state"
    assert re.search(rf"in load: needed 4194304.00 GiB, {amounts}", told(of_torch, "load"))
    of_numpy = raised_by(lambda: np.empty(1 << 50))
    assert "in load: needed 8.00 PiB, free" in told(of_numpy, "load")
    of_python = raised_by(lambda: bytearray(1 << 60))
    assert re.search(rf"in load: needed not known, {amounts}", told(of_python, "load"))


def test_an_engine_that_lacks_room_names_our_keys_and_the_direction():
    no_cache = ValueError("No available memory for the cache blocks. Try increasing")
    assert "Raise policy.generation.vllm_cfg.gpu_memory_utilization" in told(no_cache, "start")
    no_share = ValueError(
        "Free memory on device cuda:0 (20.00/79.00 GiB) on startup is less than desired GPU memory "
        "utilization (0.6, 47.40 GiB)."
    )
    assert "Lower policy.generation.vllm_cfg.gpu_memory_utilization" in told(no_share, "start")


def test_other_errors_are_no_lack_of_memory():
    for exception in (ValueError("shapes"), RuntimeError("out of range"), KeyError("memory")):
        assert told(exception, "save") is None


def test_a_note_says_more_exactly_where_it_was_and_a_failure_carries_all_that(tmp_path):
    exception = torch.OutOfMemoryError(OF_TODAY)
    exception.add_note("optimizer")
    worker = WorkerIdentity("policy", 1, 4, tmp_path / "log")
    assert Failure.of(exception, worker, "train_step").message.startswith(
        "out of GPU memory in optimizer: "
    )


def test_the_end_of_a_process_is_put_down_to_memory_where_somebody_says_so():
    calm = Host(2.0, 24.0, kills=3)
    found = of_the_dead("generate", "engine_0", said="", before=calm, now=calm)
    assert found.startswith(
        "If it was memory (here free 2.00 GiB of 24.00 GiB). To take less: lower"
    )
    killed = of_the_dead("save", "policy", said="", before=calm, now=Host(2.0, 24.0, kills=4))
    assert killed.startswith("This machine's kernel has ended a process for want of memory")
    ray = "Task was killed due to the node running low on memory."
    assert of_the_dead("save", "policy", said=ray, before=calm, now=calm).startswith("Ray ended it")


def test_what_a_machine_says_of_its_memory_is_read(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 2097152 kB\nMemAvailable:    1048576 kB\n")
    (tmp_path / "vmstat").write_text("nr_free_pages 7\noom_kill 5\n")
    assert Host.now(tmp_path) == Host(1.0, 2.0, kills=5)
    assert str(Host.now(tmp_path / "absent")) == "free: not known"


def test_every_key_that_is_advised_is_there():
    texts = [
        advice(phase, group) for phase in (*ADVICE, "other") for group in ("policy", "engine_0")
    ]
    keys = {
        key
        for text in texts
        for key in re.findall(r"(?:policy|cluster|checkpointing)\.[a-z_.]*[a-z_]", text)
    }
    assert len(keys) > 10 and keys <= set(known_paths(GRPOTree))
