"""What a rank writes and reads: weights, optimizer and progress, by Hugging Face name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_like.backends.settings import BackendSettings
from nemo_like.checkpoint import rng
from nemo_like.checkpoint.files import read_json
from nemo_like.checkpoint.layout import MODEL, OPTIMIZER, ROUTING
from nemo_like.checkpoint.store import StateWriter, load_state
from nemo_like.errors import CheckpointError
from nemo_like.optim.combined import CombinedOptimizer
from nemo_like.optim.convert import convert, template_for
from nemo_like.optim.routing import Routing


class StoredState(ABC):
    """The state of one rank, and how it gets to disk and back.

    A subclass says where its weights are, and, if its parameters have names or shapes of their own,
    which Hugging Face tensors these are.
    """

    def __init__(
        self, *, optimizer: CombinedOptimizer, routing: Routing, settings: BackendSettings
    ) -> None:
        self.optimizer = optimizer
        self.routing = routing
        self.settings = settings
        self.step = 0
        self.skipped_steps = 0
        self._writer = StateWriter(asynchronous=settings.asynchronous_save)

    @abstractmethod
    def _weights(self) -> dict[str, Tensor]:
        """This rank's blocks of the weights in full precision, live, by the optimizer's names."""

    def _weights_changed(self) -> None:  # noqa: B027 - most need not
        """Bring what `_weights` gave, and was changed, to where the model computes with it."""

    def _stored(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Tensors laid out like the weights of these names, live, by Hugging Face name."""
        return tensors

    def _stored_names(self, name: str) -> Sequence[str]:
        """The Hugging Face tensors that a parameter of the optimizer is made of."""
        return (name,)

    @property
    def _rank(self) -> int:
        return dist.get_rank()

    @property
    def _world_size(self) -> int:
        return dist.get_world_size()

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        """Write this rank's part of the state; returns when it is written or, async, copied."""
        state = self._state()
        if not with_optimizer:
            del state[OPTIMIZER]
        self._writer.save(folder, state)
        rng.save(folder, rank=self._rank, world_size=self._world_size)

    def save_finished(self) -> bool:
        """Whether this rank's part of the last save is written; raises what went wrong."""
        finished = self._writer.done()
        if finished:
            self._writer.wait()
        return finished

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take this rank's part of what `save` wrote, in whatever layout it was written.

        Raises:
            CheckpointError: it is of another model; or other optimizers own the parameters, unless
                `convert_optimizer` allows that.
        """
        own, owners = self.optimizer.state_tree(), self.routing.owners()
        saved = owners
        if self.settings.convert_optimizer:
            saved = self._saved_owners(read_json(folder / ROUTING))
        wanted = template_for(own, saved, owners)
        progress = load_state(folder / MODEL, self._state()[MODEL])["progress"]
        state = load_state(folder / OPTIMIZER, self._stored_tree(wanted))
        # Tensors were filled in place; what else was read is handed back.
        self.step, self.skipped_steps = progress["step"], progress["skipped_steps"]
        steps = {name: state["steps"][self._stored_names(name)[0]] for name in wanted["steps"]}
        loaded = {"state": wanted["state"], "steps": steps}
        self.optimizer.load_state_tree(convert(loaded, own, saved, owners))
        self._weights_changed()
        rng.load(folder, rank=self._rank, world_size=self._world_size)

    def _state(self) -> dict[str, dict[str, Any]]:
        """What a resumed run needs, by sub-folder of a checkpoint."""
        progress = {"step": self.step, "skipped_steps": self.skipped_steps}
        return {
            MODEL: {"weights": self._stored(self._weights()), "progress": progress},
            OPTIMIZER: self._stored_tree(self.optimizer.state_tree()),
        }

    def _stored_tree(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """What `CombinedOptimizer.state_tree` gives, by Hugging Face name."""
        keys = dict.fromkeys(key for tensors in tree["state"].values() for key in tensors)
        state: dict[str, dict[str, Any]] = {}
        for key in keys:
            own = {name: t[key] for name, t in tree["state"].items() if key in t}
            for name, tensor in self._stored(own).items():
                state.setdefault(name, {})[key] = tensor
        steps = {
            n: count for name, count in tree["steps"].items() for n in self._stored_names(name)
        }
        return {"state": state, "steps": steps}

    def _saved_owners(self, saved: Mapping[str, str]) -> dict[str, str]:
        """The optimizers that a checkpoint's parameters had, by the names of this run's.

        Raises:
            CheckpointError: they had several, where this run has one parameter.
        """
        owners: dict[str, str] = {}
        for name in self.routing.owners():
            found = {saved[stored] for stored in self._stored_names(name) if stored in saved}
            if len(found) > 1:
                raise CheckpointError(
                    f"{name} is made of {', '.join(self._stored_names(name))}, which "
                    f"{' and '.join(sorted(found))} updated in the checkpoint, expected one of "
                    "them for all: name all or none of them in muon_include and muon_exclude there"
                )
            owners |= dict.fromkeys([name], *found) if found else {}
        return owners

    def close(self) -> None:
        """Finish what is being written; safe to call twice."""
        self._writer.close()
