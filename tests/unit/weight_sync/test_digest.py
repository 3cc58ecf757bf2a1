import pytest
import torch

from nemo_like.weight_sync.digest import tensor_digest, weights_digest


@pytest.mark.parametrize(
    "other",
    [
        torch.arange(6.0).reshape(3, 2),
        torch.arange(6).reshape(2, 3),
        -torch.arange(6.0).reshape(2, 3),
    ],
    ids=["shape", "type", "values"],
)
def test_another_shape_type_or_value_is_another_digest(other):
    tensor = torch.arange(6.0).reshape(2, 3)
    assert tensor_digest(other) != tensor_digest(tensor)
    assert tensor_digest(tensor.T.contiguous().T) == tensor_digest(tensor), "not of the layout"


def test_bf16_and_scalars_and_nothing_have_a_digest_too():
    tensors = torch.ones(2).bfloat16(), torch.tensor(1.0), torch.empty(0, 3)
    assert len({tensor_digest(tensor) for tensor in tensors}) == 3


def test_the_digest_of_weights_is_of_names_and_tensors_in_any_order():
    digest = weights_digest({"a": "1", "b": "2"})
    assert weights_digest({"b": "2", "a": "1"}) == digest
    assert digest not in {weights_digest({"a": "2", "b": "1"}), weights_digest({"a": "1"})}
