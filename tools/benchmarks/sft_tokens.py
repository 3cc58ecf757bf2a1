"""Training throughput beside a bare PyTorch loop: the same model, batches, optimizer and loss.

    uv run tools/benchmarks/sft_tokens.py

Both sides train a 3.7M-parameter Qwen3 (width 256, 4 layers, vocabulary 2048) in fp32 with fused
AdamW and clipping at 1.0, on batches of 8 sequences of at most 512 tokens, each token a target.
After 2 warm-up steps, 12 steps are timed, sides taking turns; the losses must agree to 1e-5 before
any speed is printed. The bare loop pads to the longest sequence, computes all logits, and does
nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

from nemo_like.backends.factory import BackendFactory  # noqa: E402
from nemo_like.backends.hf_models import new_hf_model, random_weights  # noqa: E402
from nemo_like.backends.settings import BackendSettings  # noqa: E402
from nemo_like.config.policy import PolicyConfig  # noqa: E402
from nemo_like.data.batching import Batching  # noqa: E402
from nemo_like.losses.nll import NLL  # noqa: E402
from nemo_like.run.local import LocalPolicy  # noqa: E402
from nemo_like.types import Example, TrainBatch  # noqa: E402

CONFIG = transformers.Qwen3Config(
    hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    intermediate_size=768, vocab_size=2048, max_position_embeddings=512, tie_word_embeddings=False,
    architectures=["Qwen3ForCausalLM"],
)  # fmt: skip
OPTIMIZER = {"lr": 3e-4, "weight_decay": 0.01}


def make_batches(count: int, batch_size: int) -> list[list[Example]]:
    """Log-normal lengths of at most 512 tokens."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.empty(count, batch_size).log_normal_(5.5, 0.6, generator=g).clamp(16, 512).int()
    return [
        [
            Example(
                tuple(torch.randint(0, 2048, (n,), generator=g).tolist()),
                (False, *[True] * (n - 1)),
            )
            for n in row
        ]
        for row in lengths.tolist()
    ]


class BareLoop:
    """What one would write by hand."""

    def __init__(self) -> None:
        self.model = new_hf_model(CONFIG, device="cpu")
        self.model.load_state_dict(dict(random_weights(CONFIG, 0)), strict=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **OPTIMIZER)

    def step(self, examples: list[Example]) -> float:
        """One optimizer step on these examples; the loss before it."""
        width = max(len(e.token_ids) for e in examples)
        ids = torch.zeros(len(examples), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, e in enumerate(examples):
            ids[row, : len(e.token_ids)] = torch.tensor(e.token_ids)
            labels[row, 1 : len(e.token_ids)] = ids[row, 1 : len(e.token_ids)]
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Ours:
    """The policy as a run makes it, with `cluster.launcher=local`."""

    def __init__(self, folder: Path) -> None:
        CONFIG.save_pretrained(folder)
        config = PolicyConfig(
            model_name=str(folder), init="random", precision="float32", train_micro_batch_size=8,
            max_total_sequence_length=512, optimizer=OPTIMIZER,
        )  # fmt: skip
        batching = Batching.for_training(config)
        backend = BackendFactory(config, BackendSettings(seed=0))()
        self.policy = LocalPolicy(backend, train=batching, logprob=batching)
        self.policy.begin(1000)

    def step(self, examples: list[Example]) -> float:
        """One optimizer step on these examples; the loss before it."""
        stats = self.policy.train_step(TrainBatch.of(examples), NLL())
        return stats.metrics["loss"].value


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = make_batches(2 + options.steps * options.repeats, 8)
    with tempfile.TemporaryDirectory() as folder:
        sides = {"bare loop": BareLoop(), "nemo_like": Ours(Path(folder))}
        losses: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        tokens: list[int] = []
        for index, batch in enumerate(batches):
            for name in list(sides)[:: 1 if index % 2 else -1]:
                start = time.process_time()
                losses[name].append(sides[name].step(batch))
                if index >= 2:
                    cpu[name].append(time.process_time() - start)
            if index >= 2:
                tokens.append(sum(len(e.token_ids) for e in batch))
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    assert apart < 1e-5, f"the two sides do not train alike: losses differ by {apart}"
    rates = {
        name: [n / s for n, s in zip(tokens, seconds, strict=True)] for name, seconds in cpu.items()
    }
    totals = {name: sum(tokens) / sum(seconds) for name, seconds in cpu.items()}
    ratios = [a / b for a, b in zip(rates["nemo_like"], rates["bare loop"], strict=True)]
    print(
        json.dumps(
            {
                "tokens_per_cpu_s": {name: round(value, 1) for name, value in totals.items()},
                "ratio_of_totals": round(totals["nemo_like"] / totals["bare loop"], 4),
                "median_ratio": round(statistics.median(ratios), 4),
                "min_max_ratio": [round(min(ratios), 4), round(max(ratios), 4)],
                "largest_loss_difference": apart,
                "load_average": os.getloadavg()[0],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
