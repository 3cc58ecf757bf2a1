"""A GRPO or DAPO run, from the validated configuration to the summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nemo_like.algorithms import dapo, grpo
from nemo_like.algorithms.evaluate import Evaluation, evaluate
from nemo_like.backends.settings import BackendSettings
from nemo_like.checkpoint import layout
from nemo_like.config.command_line import parse
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.sft import SFTTree
from nemo_like.data.batching import Batching
from nemo_like.data.chat import ChatEncoder
from nemo_like.data.datasets import Limits, PromptSource, load_prompts
from nemo_like.data.loader import Loader
from nemo_like.data.tokenizer import load_tokenizer
from nemo_like.errors import ConfigError, DataError, NemoLikeError
from nemo_like.interfaces import Environment, Generator, WeightSource
from nemo_like.losses.clipped_pg import ClippedPG
from nemo_like.observability.console import RunConsole
from nemo_like.observability.records import Answer
from nemo_like.ops.rewards import is_solved
from nemo_like.run.build import Batchings, machines, policy_factory
from nemo_like.run.environments import build_environments, with_turns
from nemo_like.run.model_config import read_model_config
from nemo_like.run.rollouts import agreement_check, build_rollouts, sampling_of
from nemo_like.run.session import Session
from nemo_like.run.sft import run_sft
from nemo_like.run.vllm_flavour import ensure_vllm, flavour_for
from nemo_like.types import Metric, Metrics, Prompt, SamplingParams


@dataclass(frozen=True)
class RolloutData:
    """What a run asks, what ends the answers, and what encodes replies to them."""

    loader: Loader[Prompt]
    validation: list[Prompt]
    tokenizer: Any
    encoder: ChatEncoder
    warning: str | None
    tokens_per_prompt: float


def run_grpo(tree: GRPOTree) -> int:
    """Train as configured, from a supervised run's weights where they are asked for; exit code."""
    console = RunConsole()
    try:
        install_engine(tree, console.say)
        if file := tree.policy.sft_config:
            weights = first_weights(tree)
            if weights is None:
                supervised = _supervised(file)
                if not _is_done(supervised):
                    console.say(
                        f"the run begins with the weights of {file}, which has not been run to its "
                        "end yet: that comes first"
                    )
                    if code := run_sft(supervised, is_prelude=True):
                        return code
                weights = _last_weights(supervised)
            tree = begun_with(tree, weights)
    except NemoLikeError as error:
        console.error(error, last_checkpoint=None, next_command=None)
        return error.exit_code
    return Session(tree).run(lambda session, stack: _train(tree, session, stack))


def install_engine(tree: GRPOTree, say: Callable[[str], object]) -> None:
    """Nothing comes back; afterwards the build of vLLM that the run needs here is there.

    Raises:
        ConfigError: it can not be installed.
    """
    if tree.policy.generation.backend == "vllm":
        ensure_vllm(flavour_for(tree.cluster.gpus_per_node), say)


def _supervised(file: str) -> SFTTree:
    return parse(["--config", file], tree=SFTTree, default_config=Path(file)).tree


def first_weights(tree: GRPOTree) -> Path | None:
    """Where a run that goes on once began; a supervised run may have gone on since.

    Raises:
        ConfigError: these weights are gone, and divergence from them is measured.
    """
    root = Path(tree.checkpointing.checkpoint_dir)
    steps = layout.find_steps(root) if tree.checkpointing.enabled else []
    began_from = tree.checkpointing.start_from
    if not steps and began_from is None:
        return None
    folder = layout.step_folder(root, steps[-1]) if steps else Path(str(began_from))
    saved = folder / layout.CONFIG
    try:
        weights = Path(yaml.safe_load(saved.read_text(encoding="utf-8"))["policy"]["model_name"])
    except (OSError, yaml.YAMLError, LookupError, TypeError):  # named in full when it is verified
        return None
    if weights.is_dir():
        return weights
    if steps and tree.loss_fn.needs_reference:
        raise ConfigError(
            f"the run in {root} began with the weights in {weights}, and they are gone: without "
            "them loss_fn.reference_policy_kl_penalty can not go on. Restore them, or set another "
            "checkpointing.checkpoint_dir"
        )
    return None


def _is_done(tree: SFTTree) -> bool:
    steps = layout.find_steps(Path(tree.checkpointing.checkpoint_dir))
    return bool(steps) and steps[-1] >= tree.sft.max_num_steps


def _last_weights(tree: SFTTree) -> Path:
    """The Hugging Face folder of a finished run's last checkpoint.

    Raises:
        ConfigError: it was saved without one.
    """
    root = Path(tree.checkpointing.checkpoint_dir)
    folder = layout.step_folder(root, layout.find_steps(root)[-1]) / layout.HF
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not there, and it would be the model to begin with: the supervised run "
            "needs checkpointing.model_save_format=safetensors"
        )
    return folder


def begun_with(tree: GRPOTree, weights: Path) -> GRPOTree:
    """The same with this Hugging Face folder as its model."""
    policy = tree.policy.model_copy(update={"model_name": str(weights), "sft_config": None})
    return tree.model_copy(update={"policy": policy})


def _train(tree: GRPOTree, session: Session, stack: ExitStack) -> int:
    environment = build_environments(tree.env, tree.data.judges, say=session.say)
    stack.callback(environment.close)
    world = stack.enter_context(_machines(tree, session))
    session.say("data: reading and tokenising")
    data = load_rollout_data(tree)
    if data.warning:
        session.say(data.warning)
    total_steps = num_steps(tree, data.loader)
    facts = world.policy.begin(total_steps)
    assert world.generator is not None
    generator = with_turns(world.generator, environment, data.encoder, tree)
    rollouts = build_rollouts(
        tree,
        world.policy,
        generator,
        environment,
        data.loader,
        sampling_of(tree, data.tokenizer),
        stack,
    )
    journal = session.open_journal(
        world.policy,
        facts,
        stack,
        tokenizer=data.tokenizer,
        data=data.loader,
        beside=rollouts,
        total_steps=total_steps,
        tokens_per_sequence=data.tokens_per_prompt + tree.max_response_tokens / 2,
    )
    validate = validator(tree, world.policy, generator, environment, data, session)

    def validate_apart(step: int) -> Metrics:
        rollouts.settle()  # a validation has the engines to itself
        return validate(step)

    page = dapo if tree.grpo.is_dapo else grpo
    page.train(
        world.policy,
        rollouts.source,
        validate_apart,
        journal,
        agreement_check(tree.policy.generation.mismatch, rollouts.agreement, session.say),
        grpo=_with_response_length(tree),
        loss=ClippedPG(tree.loss_fn),
        num_updates=tree.updates_per_step,
    )
    return session.finish(journal, total_steps)


def _machines(tree: GRPOTree, session: Session) -> Any:
    policy = tree.policy
    settings = BackendSettings(
        seed=tree.grpo.seed,
        skip_budget=tree.grpo.skip_non_finite_steps,
        asynchronous_save=tree.checkpointing.is_async,
        convert_optimizer=tree.checkpointing.optimizer_state == "convert",
        keep_reference=tree.loss_fn.needs_reference,
        temperature=policy.generation.temperature,
        collective_timeout_s=tree.cluster.collective_timeout_s,
        # What was drawn ahead differs because the policy has learned since: there a probe judges.
        mismatch_limit=None if tree.grpo.async_grpo.enabled else policy.generation.mismatch.limit,
    )
    return machines(
        policy,
        tree.cluster,
        policy_factory(policy, settings),
        Batchings(train=Batching.for_training(policy), logprob=Batching.for_logprobs(policy)),
        log_folder=session.folder.path,
        with_generator=True,
        say=session.say,
    )


def load_rollout_data(tree: GRPOTree) -> RolloutData:
    """The prompts of a run.

    Raises:
        DataError: bad rows, or fewer rows than one step.
        ConfigError: a source, tokenizer or template that does not exist.
    """
    policy = tree.policy
    tokenizer = load_tokenizer(policy.tokenizer, policy.model_name)
    encoder = ChatEncoder(
        tokenizer,
        template_kwargs=policy.tokenizer.chat_template_kwargs or {},
        add_bos=tree.data.add_bos,
        add_generation_prompt=True,
    )
    # A prompt must leave room for one token at least.
    limits = Limits(policy.max_model_len - 1, read_model_config(policy)["vocab_size"])
    found = load_prompts(tree.data, encoder, limits, seed=tree.grpo.seed)
    loader = Loader(
        [source.prompts for source in found.train],
        weights=[source.weight for source in found.train],
        seed=tree.grpo.seed,
        shuffle=tree.data.shuffle,
    )
    lengths = [len(prompt.token_ids) for source in found.train for prompt in source.prompts.prompts]
    return RolloutData(
        loader,
        _held_out(found.validation, tree.grpo.max_val_samples),
        tokenizer,
        encoder,
        found.warning,
        sum(lengths) / len(lengths),
    )


def _held_out(sources: Sequence[PromptSource], limit: int) -> list[Prompt]:
    """The first prompts of all sources, in proportion to their rows."""
    rows = sum(len(source.prompts) for source in sources)
    shares = [len(source.prompts) * min(1.0, limit / rows) for source in sources]
    return [
        prompt
        for source, share in zip(sources, shares, strict=True)
        for prompt in source.prompts.prompts[: max(1, round(share))]
    ]


def num_steps(tree: GRPOTree, loader: Loader[Prompt]) -> int:
    """The steps of the run: the smaller of epochs and steps, were each step to draw one batch.

    Raises:
        DataError: all epochs together are less than one step.
    """
    grpo_config = tree.grpo
    per_step = round(grpo_config.num_prompts_per_step * grpo_config.batch_multiplier)
    in_epochs = grpo_config.max_num_epochs * loader.epoch_size // per_step
    if in_epochs == 0:
        raise DataError(
            f"{loader.epoch_size} prompts in grpo.max_num_epochs={grpo_config.max_num_epochs} "
            f"epochs are less than the {per_step} of one step: lower grpo.num_prompts_per_step"
        )
    return min(grpo_config.max_num_steps, in_epochs)


def _with_response_length(tree: GRPOTree) -> Any:
    """The algorithm's block, with the length at which a response has its full penalty."""
    shaping = tree.grpo.reward_shaping
    longest = shaping.max_response_length or tree.max_response_tokens
    shaping = shaping.model_copy(update={"max_response_length": longest})
    return tree.grpo.model_copy(update={"reward_shaping": shaping})


def validator(
    tree: GRPOTree,
    policy: WeightSource,
    generator: Generator,
    environment: Environment,
    data: RolloutData,
    session: Session,
) -> Callable[[int], Metrics]:
    """What a validation does: greedy answers to held-out prompts, and samples for pass@k."""
    drawn = sampling_of(tree, data.tokenizer)
    greedy = replace(drawn, temperature=0.0, top_p=1.0, top_k=None)
    num_samples = tree.grpo.val_num_generations_per_prompt

    def ask(sampling: SamplingParams, count: int = 1) -> Evaluation:
        return evaluate(
            policy,
            generator,
            environment,
            data.validation,
            sampling,
            num_samples=count,
            batch_size=tree.grpo.val_batch_size,
        )

    def validate(step: int) -> Metrics:
        if not data.validation:
            return {}
        found = ask(greedy)
        session.show_answers(
            Answer.of(rollout, step, is_right=is_solved(reward))
            for rollout, reward in zip(found.rollouts, found.rewards, strict=True)
        )
        metrics = found.metrics()
        if num_samples > 1:
            metrics |= pass_at_k(ask(drawn, num_samples).rewards, num_samples)
        return metrics

    return validate


def pass_at_k(rewards: Sequence[float], k: int) -> Metrics:
    """The share of prompts of whose `k` samples one is right, and of all samples that are.

    Samples of a prompt follow each other.
    """
    groups = [rewards[at : at + k] for at in range(0, len(rewards), k)]
    solved = sum(is_solved(max(group)) for group in groups)
    return {
        f"pass@{k}": Metric(solved / len(groups), "mean", weight=len(groups)),
        "sampled_accuracy": Metric(sum(rewards) / len(rewards), "mean", weight=len(rewards)),
    }
