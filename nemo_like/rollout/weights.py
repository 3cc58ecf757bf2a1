"""What an engine takes for a whole set of weights, whatever it then does with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from nemo_like.errors import CheckpointError
from nemo_like.ops.experts import apart
from nemo_like.weight_sync.digest import tensor_digest, weights_digest

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpectedWeights:
    """The weights of a causal LM by Hugging Face name; `tied` leads from a name to its original."""

    model_type: str
    shapes: Mapping[str, Shape]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, hf_model: object) -> ExpectedWeights:
        """Those of a model of `transformers`, which may be on `meta`."""
        state = hf_model.state_dict()  # type: ignore[attr-defined]
        shapes = {name: tuple(tensor.shape) for name, tensor in apart(state.items())}
        tied = hf_model.all_tied_weights_keys  # type: ignore[attr-defined]
        return cls(hf_model.config.model_type, shapes, dict(tied))  # type: ignore[attr-defined]


def held(version: int | None) -> int:
    """The version of the weights that an engine holds.

    Raises:
        CheckpointError: it holds none, or a mixture.
    """
    if version is None:
        raise CheckpointError(
            "the rollout engine holds no complete weights: load_weights or sync comes first"
        )
    return version


class Delivery:
    """One set of weights on its way into an engine: lets through what fits, remembers what not."""

    def __init__(self, expected: ExpectedWeights) -> None:
        self._expected = expected
        self._named: set[str] = set()
        self._filled: dict[str, str] = {}
        self._faults: list[str] = []

    def fitting(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each weight that the model has, once; of tied ones only the original, by its name."""
        for name, tensor in weights:
            target = self._expected.tied.get(name, name)
            fault = self._fault(name, target, tensor)
            self._named.add(name)
            if fault is not None:
                self._faults.append(fault)
                continue
            digest = tensor_digest(tensor)
            if target not in self._filled:
                yield target, tensor
            elif self._filled[target] != digest:
                self._faults.append(f"{name} differs from the weight it is tied to")
            self._filled[target] = digest

    def _fault(self, name: str, target: str, tensor: Tensor) -> str | None:
        expected = self._expected.shapes.get(target)
        if name in self._named:
            return f"{name} came twice"
        if expected is None:
            return f"{name} is not a weight of this model"
        if tuple(tensor.shape) != expected:
            return f"{name} has shape {tuple(tensor.shape)}, expected {expected}"
        return None

    def digest(self, version: int) -> str:
        """The digest of the whole set, as it was sent, with tied weights once.

        Raises:
            CheckpointError: naming what is missing, unknown, twice there, or of the wrong shape.
        """
        expected = self._expected

        def originals(names: Iterable[str]) -> set[str]:
            return {expected.tied.get(name, name) for name in names}

        # One that came, and was refused, is not missing besides.
        missing = originals(expected.shapes) - originals(self._named)
        faults = [*self._faults, *(f"{name} is missing" for name in sorted(missing))]
        if faults:
            more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise CheckpointError(
                f"the weights offered as version {version} are not those of the rollout engine's "
                f"{expected.model_type}: {'; '.join(faults[:8])}{more}. "
                "Give engine and policy the same policy.model_name and policy.hf_config_overrides."
            )
        return weights_digest(self._filled)
