"""A supervised fine-tuning run, from the validated configuration to the summary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from nemo_like.algorithms.evaluate import evaluate
from nemo_like.algorithms.sft import train, validation_loss
from nemo_like.backends.settings import BackendSettings
from nemo_like.config.environments import EnvConfig
from nemo_like.config.sft import SFTTree
from nemo_like.data.batching import Batching
from nemo_like.data.chat import ChatEncoder
from nemo_like.data.datasets import Data, Limits, load_data
from nemo_like.data.loader import Loader
from nemo_like.data.tokenizer import load_tokenizer
from nemo_like.errors import ConfigError, DataError
from nemo_like.observability.metrics import reduce
from nemo_like.observability.records import Answer
from nemo_like.ops.rewards import is_solved
from nemo_like.run.build import Batchings, Machines, machines, policy_factory
from nemo_like.run.environments import build_environment
from nemo_like.run.model_config import read_model_config
from nemo_like.run.session import Session
from nemo_like.types import Example, Metrics, SamplingParams, TrainBatch


@dataclass(frozen=True)
class SFTData:
    """The data of a run, ready to be drawn from."""

    loader: Loader[Example]
    validation: list[TrainBatch]
    data: Data
    tokenizer: Any


def run_sft(tree: SFTTree, *, is_prelude: bool = False) -> int:
    """Train as configured, perhaps as a prelude to another run; the exit code."""
    return Session(tree, is_prelude=is_prelude).run(
        lambda session, stack: _train(tree, session, stack)
    )


def _train(tree: SFTTree, session: Session, stack: ExitStack) -> int:
    world = stack.enter_context(_machines(tree, session))
    session.say("data: reading and tokenising")
    data = load_sft_data(tree)
    if data.data.warning:
        session.say(data.data.warning)
    total_steps = num_steps(tree, data.loader)
    facts = world.policy.begin(total_steps)
    journal = session.open_journal(
        world.policy,
        facts,
        stack,
        tokenizer=data.tokenizer,
        data=data.loader,
        total_steps=total_steps,
        tokens_per_sequence=_mean_length(data),
    )
    train(
        world.policy,
        data.loader,
        _validator(tree, world, data, session, stack),
        journal,
        sft=tree.sft,
        batch_size=tree.policy.train_global_batch_size,
    )
    return session.finish(journal, total_steps)


def _machines(tree: SFTTree, session: Session) -> Any:
    sft, policy = tree.sft, tree.policy
    settings = BackendSettings(
        seed=sft.seed,
        skip_budget=sft.skip_non_finite_steps,
        asynchronous_save=tree.checkpointing.is_async,
        convert_optimizer=tree.checkpointing.optimizer_state == "convert",
        collective_timeout_s=tree.cluster.collective_timeout_s,
    )
    logprob = Batching.for_logprobs(policy, sft.val_micro_batch_size)
    return machines(
        policy,
        tree.cluster,
        policy_factory(policy, settings),
        Batchings(train=Batching.for_training(policy), logprob=logprob),
        log_folder=session.folder.path,
        with_generator=sft.val_num_answers > 0,
        say=session.say,
    )


def load_sft_data(tree: SFTTree) -> SFTData:
    """The tokenised data of a run.

    Raises:
        DataError: bad rows, or fewer rows than one batch.
        ConfigError: a source, tokenizer or template that does not exist.
    """
    policy, sft = tree.policy, tree.sft
    tokenizer = load_tokenizer(policy.tokenizer, policy.model_name)
    encoder = ChatEncoder(
        tokenizer,
        template_kwargs=policy.tokenizer.chat_template_kwargs or {},
        add_bos=tree.data.add_bos,
        add_eos=tree.data.add_eos,
        add_generation_prompt=tree.data.add_generation_prompt,
        only_unmask_final=sft.only_unmask_final,
    )
    model = read_model_config(policy)
    longest = model.get("max_position_embeddings")
    if longest is not None and policy.max_total_sequence_length > longest:
        raise ConfigError(
            f"policy.max_total_sequence_length={policy.max_total_sequence_length} is more than the "
            f"{longest} positions of {policy.model_name}: lower it, or raise "
            "policy.hf_config_overrides.max_position_embeddings"
        )
    limits = Limits(policy.max_total_sequence_length, model["vocab_size"])
    data = load_data(tree.data, encoder, limits, seed=sft.seed, num_prompts=sft.val_num_answers)
    loader = Loader(
        [source.corpus for source in data.train],
        weights=[source.weight for source in data.train],
        seed=sft.seed,
        shuffle=tree.data.shuffle,
    )
    return SFTData(loader, _validation_batches(tree, data), data, tokenizer)


def _validation_batches(tree: SFTTree, data: Data) -> list[TrainBatch]:
    """The held-out batches of every validation, from all sources in proportion to their rows."""
    corpora = [source.corpus for source in data.validation]
    if not corpora:
        return []
    sft, rows = tree.sft, sum(map(len, corpora))
    weights = [float(len(corpus)) for corpus in corpora]
    wanted = min(rows, sft.val_batches * sft.val_global_batch_size or rows)
    examples = Loader(corpora, weights=weights, seed=sft.seed).take(wanted)
    size = sft.val_global_batch_size
    return [TrainBatch.of(examples[at : at + size]) for at in range(0, wanted, size)]


def num_steps(tree: SFTTree, loader: Loader[Example]) -> int:
    """The optimizer steps of the run: the smaller of epochs and steps.

    Raises:
        DataError: all epochs together are less than one batch.
    """
    batch_size = tree.policy.train_global_batch_size
    in_epochs = tree.sft.max_num_epochs * loader.epoch_size // batch_size
    if in_epochs == 0:
        raise DataError(
            f"{loader.epoch_size} training rows in sft.max_num_epochs={tree.sft.max_num_epochs} "
            f"epochs are less than one batch of policy.train_global_batch_size={batch_size}; "
            "lower the batch size"
        )
    return min(tree.sft.max_num_steps, in_epochs)


def _mean_length(data: SFTData) -> float:
    lengths = [source.corpus.lengths_B for source in data.data.train]
    return float(sum(part.sum() for part in lengths) / sum(map(len, lengths)))


def _validator(
    tree: SFTTree, world: Machines, data: SFTData, session: Session, stack: ExitStack
) -> Callable[[int], Metrics]:
    """What a validation does: the loss on held-out batches, and greedy answers to held-out prompts.

    Answers are not asked of a policy that has not learned yet: step 0 has the loss alone.
    """
    asked = [
        (source.prompts, build_environment(source.env_name, EnvConfig(), say=session.say))
        for source in data.data.validation
        if source.prompts
    ]
    for _, environment in asked:
        stack.callback(environment.close)
    sampling = SamplingParams(
        max_new_tokens=tree.sft.val_max_new_tokens,
        temperature=0.0,
        stop_token_ids=(data.tokenizer.eos_token_id,),
        seed=tree.sft.seed,
    )

    def validate(step: int) -> Metrics:
        metrics = validation_loss(world.policy, data.validation) if data.validation else {}
        if world.generator is None or step == 0:
            return metrics
        for prompts, environment in asked:
            found = evaluate(world.policy, world.generator, environment, prompts, sampling)
            session.show_answers(
                Answer.of(rollout, step, is_right=is_solved(reward))
                for rollout, reward in zip(found.rollouts, found.rewards, strict=True)
            )
            metrics = reduce([metrics, found.metrics()])
        return metrics

    return validate
