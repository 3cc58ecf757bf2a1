"""An evaluation: saved weights, engines, held-out problems, and nothing that trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_like.assets import model_folder
from nemo_like.checkpoint import layout
from nemo_like.checkpoint.hf_import import read_hf
from nemo_like.config.command_line import PLAIN, Asked
from nemo_like.config.generation import RolloutPolicyConfig
from nemo_like.config.grpo import GRPOTree
from nemo_like.errors import ConfigError
from nemo_like.observability.console import RunConsole
from nemo_like.observability.metrics import flatten
from nemo_like.observability.records import Table
from nemo_like.run.build import engines_alone
from nemo_like.run.environments import build_environments, with_turns
from nemo_like.run.grpo import begun_with, install_engine, load_rollout_data, validator
from nemo_like.run.session import Session


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a Hugging Face folder, in the type that the configuration computes in."""

    policy: RolloutPolicyConfig

    weights_version = 0

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by name; raises before the first one if they are not the model's."""
        import torch

        from nemo_like.backends.hf_models import FirstModel, hub_shapes

        first = FirstModel.of(self.policy, seed=0)
        shapes, tied = hub_shapes(first.hf_config), first.hf_config.tie_word_embeddings
        for name, tensor in read_hf(first.folder, shapes, tied=tied):
            yield name, tensor.to(getattr(torch, self.policy.precision))


def run_evaluate(tree: GRPOTree) -> int:
    """Ask the model's engine the held-out problems, and tell how many it solves; the exit code."""
    try:
        tree = prepared(tree)
        install_engine(tree, RunConsole().say)
    except ConfigError as error:
        RunConsole().error(error, last_checkpoint=None, next_command=None)
        return error.exit_code
    return Session(tree).run(lambda session, stack: _evaluate(tree, session, stack))


def dry_run_evaluate(tree: GRPOTree, asked: Asked = PLAIN) -> int:
    """Print what `run_evaluate` would do with this configuration; the exit code."""
    console = RunConsole()
    try:
        if asked != PLAIN:
            raise ConfigError("--device and --json are for a run that trains: leave them out")
        tree = prepared(tree)
        folder = model_folder(tree.policy.model_name, with_weights=False)
    except ConfigError as error:
        console.error(error, last_checkpoint=None, next_command=None)
        return error.exit_code
    generation, count = tree.policy.generation, tree.grpo.val_num_generations_per_prompt
    sampled = f"{count} at temperature {generation.temperature:g} for pass@{count}"
    facts = {
        "model": str(folder),
        "engines": f"{generation.backend}, at most {tree.policy.max_new_tokens} tokens"
        f" in each of at most {tree.grpo.max_rollout_turns} turn(s)",
        "problems": f"at most {tree.grpo.max_val_samples} of {', '.join(tree.data.held_out())}",
        "answers": "1, greedy" if count == 1 else f"1, greedy, and {sampled}",
        "logs": tree.logger.log_dir,
    }
    console.table(Table("What would be done", ("", ""), tuple(facts.items())))
    console.say("dry run: nothing was started")
    return 0


def prepared(tree: GRPOTree) -> GRPOTree:
    """The same without checkpoints of its own, and with the export of a checkpoint as its model.

    Raises:
        ConfigError: nothing is held out to be asked, the checkpoint has no export, or weights are
            asked for that are not those of `policy.model_name`.
    """
    if tree.policy.sft_config is not None or tree.policy.init == "random":
        raise ConfigError(
            "an evaluation is of policy.model_name: leave policy.sft_config and policy.init out"
        )
    if not tree.data.held_out():
        raise ConfigError("data.validation is not set, and there is nothing else to ask")
    off = tree.checkpointing.model_copy(update={"enabled": False})
    tree = tree.model_copy(update={"checkpointing": off})
    folder = Path(tree.policy.model_name)
    if not (folder / layout.MANIFEST).is_file():
        return tree
    if not (folder / layout.HF).is_dir():
        raise ConfigError(
            f"policy.model_name={folder} is a checkpoint without an export for Hugging Face: it "
            "was saved with checkpointing.model_save_format=null. Make one: uv run "
            f"tools/convert.py {folder} {folder}_hf, and set policy.model_name={folder}_hf"
        )
    return begun_with(tree, folder / layout.HF)


def _evaluate(tree: GRPOTree, session: Session, stack: ExitStack) -> int:
    judges = {tree.data.judge(source) for source in tree.data.held_out().values()}
    environment = build_environments(tree.env, judges, say=session.say)
    stack.callback(environment.close)
    generator: Any = stack.enter_context(
        engines_alone(tree.policy, tree.cluster, log_folder=session.folder.path, say=session.say)
    )
    session.say("data: reading and tokenising")
    data = load_rollout_data(tree)
    weights = SavedWeights(tree.policy)
    generator = with_turns(generator, environment, data.encoder, tree)
    metrics = validator(tree, weights, generator, environment, data, session)(0)
    return session.finish_evaluation(flatten(metrics))
