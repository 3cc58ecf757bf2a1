"""The sides of `grpo.py`: TRL's trainer, and what a run of ours does, on one workload.

Ours is the page `algorithms/grpo.py` on the machines of `run/build.py` with the journal of
`run/journal.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES, NEW_TOKENS, VOCABULARY = 4, 8, 64, 2048
STEPS_AT_MOST = 1000
LEARNING_RATE = 1e-4
END_TOKEN = VOCABULARY
"""The tokenizer knows one word more than the model, so nothing ever ends before its limit."""


def reward(token_ids: Sequence[int]) -> float:
    """The share of tokens from the lower half of the vocabulary."""
    return sum(token < VOCABULARY // 2 for token in token_ids) / len(token_ids)


def prompt_tokens(count: int) -> list[list[int]]:
    """Random tokens; the same for every side."""
    dice = random.Random(0)
    return [
        [dice.randrange(VOCABULARY) for _ in range(dice.randint(64, 160))] for _ in range(count)
    ]


def as_text(token_ids: Sequence[int]) -> str:
    """What the tokenizer reads as these tokens."""
    return " ".join(f"w{token}" for token in token_ids)


def write_model(folder: Path) -> None:
    """A newborn model and a tokenizer with one word per token."""
    import tokenizers
    import torch
    import transformers

    config = transformers.Qwen2Config(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=768, vocab_size=VOCABULARY, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {f"w{token}": token for token in range(VOCABULARY)} | {"end": END_TOKEN}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="end", pad_token="w0"
    ).save_pretrained(folder)


class Turn:
    """A side's end of the line: it waits here between two steps."""

    def __init__(self, line: Connection) -> None:
        self._line = line

    def done(self, **found: Any) -> None:
        """Report a step, and wait until the next one is wanted; the process ends here."""
        self._line.send(found)
        if not self._line.recv():
            raise SystemExit


def run_trl(folder: Path, line: Connection, rows: int) -> None:
    """TRL's trainer, left as it is but for the settings of the protocol."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    turn, drawn = Turn(line), []

    def share(prompts: Any, completion_ids: list[list[int]], **_: Any) -> list[float]:
        if not drawn:
            drawn.extend(completion_ids)
        return [reward(tokens) for tokens in completion_ids]

    class Wait(TrainerCallback):
        """Between two steps, after the metrics of the one before."""

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            first = {}
            if state.global_step == 1:
                weights = {k: v.detach().clone() for k, v in more["model"].named_parameters()}
                torch.save(weights, folder / "trl_weights.pt")
                first = {"drawn": drawn}
            logged = {k: float(v) for k, v in state.log_history[-1].items()}
            turn.done(metrics=logged, **first)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = [as_text(tokens) for tokens in prompt_tokens(PROMPTS * STEPS_AT_MOST)]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=share,
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        train_dataset=Dataset.from_dict({"prompt": texts}),
        callbacks=[Wait()],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=PROMPTS * SAMPLES // rows,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            max_steps=STEPS_AT_MOST,
            beta=0.0,
            scale_rewards="none",
            loss_type="dapo",
            optim="adamw_torch_fused",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            shuffle_dataset=False,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()


def tree(folder: Path, backend: str, rows: int) -> Any:
    """The configuration of our side."""
    from nemo_like.config.grpo import GRPOConfig, GRPOTree
    from nemo_like.config.loss import ClippedPGConfig
    from nemo_like.config.optimizer import OptimizerConfig
    from nemo_like.config.run import ClusterConfig

    policy = {
        "model_name": str(folder),
        "tokenizer": {"chat_template": None},
        "precision": "float32",
        "train_global_batch_size": PROMPTS * SAMPLES,
        "train_micro_batch_size": rows,
        "max_total_sequence_length": 256,
        "optimizer": OptimizerConfig(lr=LEARNING_RATE, weight_decay=0.0),
        "generation": {"backend": backend, "max_new_tokens": NEW_TOKENS},
    }
    launcher = "local" if backend == "hf" else "ray"
    return GRPOTree(
        policy=policy,
        cluster=ClusterConfig(launcher=launcher, gpus_per_node=0),
        loss_fn=ClippedPGConfig(reference_policy_kl_penalty=0.0),
        grpo=GRPOConfig(
            num_prompts_per_step=PROMPTS,
            num_generations_per_prompt=SAMPLES,
            normalize_rewards=False,
            use_leave_one_out_baseline=False,
            val_period=0,
            val_at_start=False,
            val_at_end=False,
        ),
    )


class Prompts:
    """The prompts in their order."""

    def __init__(self) -> None:
        from nemo_like.types import Prompt

        rows = enumerate(prompt_tokens(PROMPTS * STEPS_AT_MOST))
        self._left = iter([Prompt(i, tuple(ids), as_text(ids), "") for i, ids in rows])

    def take(self, n: int) -> list[Any]:
        """The next n prompts."""
        return [next(self._left) for _ in range(n)]


class Judge:
    """The reward as an `Environment`."""

    def score(self, rollouts: Sequence[Any]) -> list[float]:
        """One reward per rollout."""
        return [reward(rollout.token_ids) for rollout in rollouts]

    def close(self) -> None:
        """There is nothing to release."""


@contextmanager
def our_machines(config: Any, folder: Path) -> Iterator[Any]:
    """Policy and engine as `run_grpo` makes them."""
    from nemo_like.backends.settings import BackendSettings
    from nemo_like.data.batching import Batching
    from nemo_like.run.build import Batchings, machines, policy_factory

    batching = Batching.for_training(config.policy)
    with machines(
        config.policy,
        config.cluster,
        policy_factory(config.policy, BackendSettings(seed=0)),
        Batchings(train=batching, logprob=batching),
        log_folder=folder / "logs",
        with_generator=True,
        say=print,
    ) as world:
        world.policy.begin(STEPS_AT_MOST)
        yield world


def run_ours(folder: Path, line: Connection, rows: int, backend: str) -> None:
    """The page of GRPO; it waits where the metrics of a step are written."""
    from nemo_like.algorithms import grpo
    from nemo_like.losses.clipped_pg import ClippedPG
    from nemo_like.observability.sinks import JsonlSink
    from nemo_like.observability.timing import StepClock
    from nemo_like.rollout.source import Drawing, RolloutsOnTime
    from nemo_like.run.journal import RunJournal, StopRequest
    from nemo_like.types import SamplingParams

    turn = Turn(line)

    class Wait:
        """The sink after the one that writes."""

        def log(self, step: int, values: dict[str, float]) -> None:
            """Between two steps."""
            turn.done(metrics=values)

        def close(self) -> None:
            """Nothing is buffered."""

    config = tree(folder, backend, rows)
    with our_machines(config, folder) as world:
        journal = RunJournal(
            policy=world.policy,
            position=dict,
            export=lambda where: None,
            checkpoints=None,
            config=config.checkpointing,
            sinks=[JsonlSink(folder / f"metrics_{backend}.jsonl"), Wait()],
            clock=StepClock(total_steps=STEPS_AT_MOST),
            stop=StopRequest(must_save_by=None, began=time.monotonic()),
            steps=range(1, STEPS_AT_MOST + 1),
        )
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS)
        drawing = Drawing(Prompts(), world.generator, Judge(), sampling, PROMPTS, SAMPLES)
        grpo.train(
            world.policy, RolloutsOnTime(drawing, world.policy), lambda step: {}, journal,
            lambda step, stats: None, grpo=config.grpo, loss=ClippedPG(config.loss_fn),
            num_updates=1,
        )  # fmt: skip


def train_on(folder: Path, line: Connection, rows: int, drawn: list[list[int]]) -> None:
    """What our first step makes of the tokens that TRL drew in its own."""
    import torch

    from nemo_like.algorithms.policy_gradient import advantages
    from nemo_like.losses.clipped_pg import ClippedPG
    from nemo_like.rollout.collect import rewards_of, rollout_batch
    from nemo_like.types import Group, Rollout

    config = tree(folder, "hf", rows)
    groups = []
    for place, prompt in enumerate(Prompts().take(PROMPTS)):
        rollouts = tuple(
            Rollout(prompt, tuple(ids), (0.0,) * len(ids), "", "length", 1)
            for ids in drawn[place * SAMPLES : (place + 1) * SAMPLES]
        )
        groups.append(Group(prompt, rollouts, tuple(Judge().score(rollouts))))
    batch = rollout_batch(groups, advantages(rewards_of(groups), None, config.grpo))
    theirs = torch.load(folder / "trl_weights.pt")
    with our_machines(config, folder) as world:
        before = {name: weight.clone() for name, weight in world.policy.export_weights()}
        metrics = world.policy.train_step(batch, ClippedPG(config.loss_fn)).metrics
        apart = total = 0.0
        for name, ours in world.policy.export_weights():
            apart += float((ours - theirs[name]).square().sum())
            total += float((ours - before[name]).square().sum())
    line.send(
        {
            "loss": metrics["loss"].value,
            "grad_norm": metrics["grad_norm"].value,
            "updates_apart": (apart / total) ** 0.5,
        }
    )
