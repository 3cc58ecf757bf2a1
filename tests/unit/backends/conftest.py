"""Tiny models of each family, and a backend of one process on them."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist

from nemo_like.backends.dtensor.backend import DTensorBackend
from nemo_like.backends.settings import BackendSettings
from nemo_like.config.policy import PolicyConfig
from nemo_like.types import Example, TrainBatch

VOCAB = 61
SETTINGS = {field.name for field in dataclasses.fields(BackendSettings)} - {"seed"}


@pytest.fixture(autouse=True)
def one_thread_and_no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders that `transformers` saved: untied llama, tied qwen3, and qwen2 with its biases."""
    import transformers

    root = tmp_path_factory.mktemp("models")
    shared = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }  # fmt: skip
    families = {
        "llama": ("Llama", {"head_dim": 16, "tie_word_embeddings": False}),
        "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
        "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    }
    for name, (family, own) in families.items():
        torch.manual_seed(7)
        config = getattr(transformers, f"{family}Config")(**shared, **own)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():  # biases and norms must matter too
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
    return root


@pytest.fixture
def make_backend(models):
    """`make_backend(family, **policy)` with `steps` and further `BackendSettings` of its own."""
    made = []

    def make(family="qwen3", *, seed=0, steps=10, begun=True, **options):
        told = {name: options.pop(name) for name in SETTINGS & options.keys()}
        settings = {
            "model_name": str(models / family), "init": "random", "precision": "float32",
            "max_total_sequence_length": 64, "train_micro_batch_size": 2,
            "optimizer": {"lr": 1e-2},
        }  # fmt: skip
        backend = DTensorBackend(
            PolicyConfig(**(settings | options)), BackendSettings(seed, **told)
        )
        made.append(backend)
        if begun:
            backend.begin(steps)
        return backend

    yield make
    for backend in reversed(made):
        backend.close()
    if dist.is_initialized():  # by one that was refused
        dist.destroy_process_group()


@pytest.fixture
def batch_of():
    """`batch_of(seed)`: eight sequences of unequal lengths, a third of each is prompt."""

    def make(seed, num=8):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 24, (num,), generator=g).tolist()
        return TrainBatch.of(
            [
                Example(
                    tuple(torch.randint(0, VOCAB, (n,), generator=g).tolist()),
                    tuple(t > n // 3 for t in range(n)),
                )
                for n in lengths
            ]
        )

    return make
