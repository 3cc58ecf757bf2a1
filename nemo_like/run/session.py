"""What every run has around its algorithm: log folder, checkpoints, terminal, and an end."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import yaml

from nemo_like.checkpoint import layout
from nemo_like.checkpoint.checkpoints import (
    Checkpoints,
    RunIdentity,
    SavedCheckpoint,
    differences,
)
from nemo_like.checkpoint.files import read_json
from nemo_like.checkpoint.hf_export import write_hf
from nemo_like.checkpoint.manifest import RunLayout, verify
from nemo_like.cluster import memory
from nemo_like.config.layers import as_yaml
from nemo_like.config.tree import RunTree
from nemo_like.errors import (
    EXIT_INTERRUPTED,
    CheckpointError,
    NemoLikeError,
    NoSignalError,
    WorkerError,
)
from nemo_like.interfaces import Policy
from nemo_like.observability.console import RunConsole, duration
from nemo_like.observability.curves import read_series
from nemo_like.observability.headlines import headlines
from nemo_like.observability.records import (
    Answer,
    collect_facts,
    outlook_tables,
    ownership_table,
)
from nemo_like.observability.report import write_report
from nemo_like.observability.run_folder import RunFolder
from nemo_like.observability.secrets import redact_tree
from nemo_like.observability.sinks import build_sinks
from nemo_like.observability.timing import StepClock, flops_per_token, peak_flops
from nemo_like.run.commands import suggestion, typed
from nemo_like.run.journal import RunJournal, StopRequest, handling_signals
from nemo_like.run.origin import Origin
from nemo_like.types import PolicyFacts

LOG_FOLDER = "log_folder"
"""Where a checkpoint's position in the data says which log folder the run has."""


class Resumable(Protocol):
    """A position in data that a checkpoint holds."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


class Beside(Protocol):
    """What a checkpoint holds besides the policy and the position in the data."""

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint folder."""
        ...

    def load(self, folder: Path) -> None:
        """Take what `save` wrote."""
        ...


class Session:
    """A run's surroundings.

    A run that continues writes on in the log folder it began in, so its curves stay in one piece.
    One that `is_prelude` to what the user asked for leaves it to that to say what to type next.
    """

    def __init__(self, tree: RunTree, *, is_prelude: bool = False) -> None:
        self._tree = tree
        self._is_prelude = is_prelude
        self._config = redact_tree(tree.model_dump(mode="json"))
        self._began = time.monotonic()
        self._console = RunConsole()
        self._checkpoint_root = Path(tree.checkpointing.checkpoint_dir)
        self._journal: RunJournal | None = None
        self._origin = Origin(self._checkpoint_root, tree.checkpointing.start_from)
        self.folder = self._open_folder()

    def run(self, body: Callable[[Session, ExitStack], int]) -> int:
        """The exit code of `body`; what it entered into the stack is left in any case.

        A signal where no step can be finished (while starting, or the second one) unwinds it.
        """
        try:
            with handling_signals(signal.default_int_handler), ExitStack() as stack:
                stack.callback(self._console.close)
                return body(self, stack)
        except KeyboardInterrupt:
            saved = None if self._journal is None else self._journal.last_saved
            self._console.summary(
                {"stopped by": "a signal, without saving"},
                title="Stopped",
                places={"last good checkpoint": saved},
                next_command=typed(),
            )
            return EXIT_INTERRUPTED
        except NemoLikeError as error:
            # What is wrong with anything but a worker is wrong again next time: its message has the
            # cure.
            again = typed() if isinstance(error, WorkerError) else None
            self._console.error(error, last_checkpoint=self._last_good(), next_command=again)
            return error.exit_code
        except Exception as error:
            # A full disk under a log, a server that metrics go to, memory: whatever it is, the run
            # ends like any other, with the trace above.
            self._console.close()
            traceback.print_exc()
            text = memory.told(error, "this run") or f"{type(error).__name__}: {error}"
            found = NemoLikeError(text)
            self._console.error(found, last_checkpoint=self._last_good(), next_command=typed())
            return found.exit_code

    def say(self, text: str) -> None:
        """One line on the terminal."""
        self._console.say(text)

    def show_answers(self, answers: Iterable[Answer]) -> None:
        """Keep answers for the report, and show the first few."""
        kept = list(answers)
        self.folder.append_answers(kept)
        self._console.answers(kept[: self._tree.logger.num_val_samples_to_print])

    def open_journal(
        self,
        policy: Policy,
        facts: PolicyFacts,
        stack: ExitStack,
        *,
        tokenizer: Any,
        data: Resumable,
        total_steps: int,
        tokens_per_sequence: float,
        beside: Beside | None = None,
    ) -> RunJournal:
        """The journal of this run, which continues from the latest checkpoint, if there is one."""
        checkpoints = self._open_checkpoints(facts, stack)
        saved = checkpoints.latest_good() if checkpoints is not None else None
        done = 0 if saved is None else saved.step
        if saved is not None:
            self._origin.inherit(saved, _routing(facts))
            self._continue(saved, policy, data)
            if beside is not None:
                beside.load(saved.folder)
            if done >= total_steps:
                self.say(
                    f"nothing is left to do: {saved.folder} is of step {done}, and this run has "
                    f"{total_steps}. To train on, raise the number of steps; to begin anew, "
                    "set another checkpointing.checkpoint_dir"
                )
        self._introduce(facts)
        sinks = [*self._sinks(saved), self._console]
        for sink in sinks:
            stack.callback(sink.close)
        journal = RunJournal(
            policy=policy,
            position=lambda: {
                "data": data.state(),
                LOG_FOLDER: str(self.folder.path.absolute()),
                **self._origin.to_json(),
            },
            export=_both(self._exporter(policy, facts, tokenizer), beside),
            checkpoints=checkpoints,
            config=self._tree.checkpointing,
            sinks=sinks,
            clock=self._clock(facts, total_steps, tokens_per_sequence),
            stop=StopRequest(
                must_save_by=self._tree.checkpointing.checkpoint_must_save_by, began=self._began
            ),
            steps=range(done + 1, total_steps + 1),
        )
        if saved is not None:
            journal.last_saved = saved.folder
        self._journal = journal
        stack.callback(journal.close)
        self._console.start(total_steps, done=done)
        return journal

    def _introduce(self, facts: PolicyFacts) -> None:
        """Show and keep what is known before the first step."""
        tables = [
            ownership_table(facts.owners),
            *outlook_tables(facts.outlook),
            *self._origin.tables(),
        ]
        for table in tables:
            self._console.table(table)
        self.folder.write_tables(tables)
        self.folder.write_config(self._config)
        device = f"{facts.world_size} x {facts.device}"
        self.folder.write_facts(
            collect_facts(device=device, parameters=f"{facts.num_parameters:,}")
        )

    def finish(self, journal: RunJournal, total_steps: int) -> int:
        """Write the report, tell how it ended and what to type next; the exit code."""
        report = write_report(self.folder)
        places = {
            "checkpoint": journal.last_saved,
            "log": self.folder.path,
            "report": report,
        }
        if journal.stopped_by is not None and journal.last_step_done < total_steps:
            is_over = journal.given_up is not None  # the same command would come to the same end
            self._console.summary(
                {
                    "stopped by": journal.stopped_by,
                    "at step": f"{journal.last_step_done} of {total_steps}",
                },
                title="Stopped",
                places=places,
                next_command=None if is_over else typed(),
            )
            return NoSignalError.exit_code if is_over else EXIT_INTERRUPTED
        results = headlines(read_series(self.folder.metrics))
        results["wall time"] = duration(time.monotonic() - self._began)
        self._console.summary(
            results,
            places=places,
            next_command=None if self._is_prelude else suggestion(self._tree),
        )
        return 0

    def finish_evaluation(self, found: dict[str, float]) -> int:
        """Write and tell what an evaluation found; the exit code."""
        self.folder.write_config(self._config)
        self.folder.write_facts(collect_facts())
        for sink in self._sinks(None):
            sink.log(0, {f"validation/{name}": value for name, value in found.items()})
            sink.close()
        results = {name: f"{value:.4g}" for name, value in found.items()}
        self._console.summary(
            results | {"wall time": duration(time.monotonic() - self._began)},
            places={"log": self.folder.path, "report": write_report(self.folder)},
            next_command=None,
        )
        return 0

    def _open_folder(self) -> RunFolder:
        """A new log folder, or that of the run to continue, still untouched."""
        log_dir = self._tree.logger.log_dir
        steps = layout.find_steps(self._checkpoint_root)
        if not (self._tree.checkpointing.enabled and steps):
            return RunFolder.create(log_dir)
        newest = layout.step_folder(self._checkpoint_root, steps[-1])
        try:
            before = Path(read_json(newest / layout.DATA)[LOG_FOLDER])
        except (CheckpointError, LookupError, TypeError):  # named in full when it is verified
            return RunFolder.create(log_dir)
        return RunFolder(before) if before.is_dir() else RunFolder.create(log_dir)

    def _last_good(self) -> Path | None:
        """The newest whole checkpoint."""
        if self._journal is not None and self._journal.last_saved is not None:
            return self._journal.last_saved
        for step in reversed(layout.find_steps(self._checkpoint_root)):
            folder = layout.step_folder(self._checkpoint_root, step)
            try:
                verify(folder)
            except CheckpointError:
                continue
            return folder
        return None

    def _open_checkpoints(self, facts: PolicyFacts, stack: ExitStack) -> Checkpoints | None:
        if not self._tree.checkpointing.enabled:
            return None
        identity = RunIdentity(
            model=facts.model,
            routing=_routing(facts),
            config_yaml=as_yaml(self._config),
            layout=RunLayout(facts.world_size, facts.threads, facts.device),
        )
        checkpoints = stack.enter_context(Checkpoints(self._tree.checkpointing, identity))
        for leftover in checkpoints.removed_leftovers:
            self.say(f"removed {leftover}, which an interrupted save had left")
        return checkpoints

    def _continue(self, saved: SavedCheckpoint, policy: Policy, data: Resumable) -> None:
        if saved.data["data"] is not None:  # as where nothing was read yet: an imported one
            data.load_state(saved.data["data"])
        policy.load(saved.folder)
        self.folder = RunFolder.reopen(self.folder.path, step=saved.step)
        self.say(f"continuing from {saved.folder}")
        if changed := _changed_settings(saved.folder / layout.CONFIG, self._config):
            self.say("settings that were others when it was saved: " + "; ".join(changed))
        if saved.differences:
            self.say("not exact to the bit, only to round-off: " + "; ".join(saved.differences))

    def _sinks(self, saved: SavedCheckpoint | None) -> list[Any]:
        return build_sinks(
            self._tree.logger,
            self.folder,
            resolved_config=self._config,
            resume_step=None if saved is None else saved.step,
        )

    def _exporter(
        self, policy: Policy, facts: PolicyFacts, tokenizer: Any
    ) -> Callable[[Path], None]:
        if self._tree.checkpointing.model_save_format is None:
            return lambda folder: None
        import torch

        dtype = getattr(torch, self._tree.policy.precision)

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in policy.export_weights():
                yield name, tensor.to("cpu", dtype)

        return lambda folder: write_hf(
            folder / layout.HF, weights(), config=facts.model, tokenizer=tokenizer
        )

    def _clock(self, facts: PolicyFacts, total_steps: int, tokens_per_sequence: float) -> StepClock:
        model = facts.model
        width = model["num_attention_heads"] * (
            model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
        )
        peak = peak_flops(facts.device, self._tree.policy.precision)
        return StepClock(
            total_steps=total_steps,
            flops_per_token=flops_per_token(
                facts.num_multiplied_parameters,
                num_layers=model["num_hidden_layers"],
                attention_width=width,
                sequence_length=tokens_per_sequence,
            ),
            peak_flops=None if peak is None else peak * facts.world_size,
        )


def _both(export: Callable[[Path], None], beside: Beside | None) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        export(folder)
        if beside is not None:
            beside.save(folder)

    return both


def _routing(facts: PolicyFacts) -> dict[str, str]:
    return {owner["name"]: owner["optimizer"] for owner in facts.owners}


def _changed_settings(saved: Path, now: dict[str, Any]) -> list[str]:
    """The settings of a resumed run that its checkpoint was not trained with."""
    then = yaml.safe_load(saved.read_text(encoding="utf-8"))
    written = yaml.safe_load(as_yaml(now))  # as it would stand in that file, escapes and all
    changed = differences(then, written) if then is not None else []  # an imported one has none
    return [line for line in changed if not line.startswith(("checkpointing.", "logger."))]
