"""What an engine takes for a whole set of weights, whatever it then does with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from nemo_like.errors import CheckpointError
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
        shapes = {name: tuple(t.shape) for name, t in hf_model.state_dict().items()}  # type: ignore[attr-defined]
        tied = hf_model.all_tied_weights_keys  # type: ignore[attr-defined]
        return cls(hf_model.config.model_type, shapes, dict(tied))  # type: ignore[attr-defined]


class Delivery:
    """One set of weights on its way into an engine: lets through what fits, remembers what not."""

    def __init__(self, expected: ExpectedWeights) -> None:
        self._expected = expected
        self._digests: dict[str, str] = {}
        self._filled: dict[str, str] = {}
        self._faults: list[str] = []

    def fitting(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each weight that the model has, once; of tied ones only the original, by its name."""
        for name, tensor in weights:
            target = self._expected.tied.get(name, name)
            if name in self._digests:
                self._faults.append(f"{name} came twice")
            elif target not in self._expected.shapes:
                self._faults.append(f"{name} is not a weight of this model")
            elif tuple(tensor.shape) != self._expected.shapes[target]:
                found, right = tuple(tensor.shape), self._expected.shapes[target]
                self._faults.append(f"{name} has shape {found}, expected {right}")
            else:
                digest = tensor_digest(tensor)
                is_first = target not in self._filled
                if self._filled.setdefault(target, digest) != digest:
                    self._faults.append(f"{name} differs from the weight it is tied to")
                if is_first:
                    yield target, tensor
                self._digests[name] = digest
                continue
            self._digests.setdefault(name, "")

    def digest(self, version: int) -> str:
        """The digest of the whole set, as it was sent.

        Raises:
            CheckpointError: naming what is missing, unknown, twice there, or of the wrong shape.
        """
        expected = self._expected
        missing = {expected.tied.get(name, name) for name in expected.shapes} - self._filled.keys()
        # One that came, and was refused, is not missing besides.
        missing -= {expected.tied.get(name, name) for name in self._digests}
        faults = [*self._faults, *(f"{name} is missing" for name in sorted(missing))]
        if faults:
            more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise CheckpointError(
                f"the weights offered as version {version} are not those of the rollout engine's "
                f"{expected.model_type}: {'; '.join(faults[:8])}{more}. "
                "Give engine and policy the same policy.model_name and policy.hf_config_overrides."
            )
        return weights_digest(self._digests)
