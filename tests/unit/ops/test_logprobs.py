import pytest
import torch

from nemo_like.ops.logprobs import linear_logprobs


def inputs(num_tokens=7, width=5, vocab=11):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=torch.float64, generator=g, requires_grad=True)
    target = torch.randint(0, vocab, (num_tokens,), generator=g)
    return hidden, weight, target


def by_definition(hidden, weight, target):
    return (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None]).squeeze(1)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_change_neither_value_nor_gradient(chunk_size):
    hidden, weight, target = inputs()
    upstream = torch.linspace(-1, 2, len(target), dtype=torch.float64)
    ours = linear_logprobs(hidden, weight, target, chunk_size=chunk_size)
    expected = by_definition(hidden, weight, target)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_gradient_is_that_of_finite_differences():
    hidden, weight, target = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprobs(h, w, target, chunk_size=3), (hidden, weight)
    )


def test_bf16_is_as_close_to_fp64_as_one_large_product():
    hidden, weight, target = inputs(num_tokens=512, width=64, vocab=300)
    exact = torch.autograd.grad(by_definition(hidden, weight, target).sum(), weight)[0]
    low_h, low_w = hidden.detach().bfloat16(), weight.detach().bfloat16().requires_grad_()
    logits = (low_h @ low_w.T).float()
    whole = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    whole_error = (torch.autograd.grad(whole, low_w)[0].double() - exact).norm()
    chunked = linear_logprobs(low_h, low_w, target, chunk_size=32).sum()
    error = (torch.autograd.grad(chunked, low_w)[0].double() - exact).norm()
    assert error < 1.05 * whole_error


def test_logits_of_all_tokens_never_exist_at_once():
    hidden, weight, target = inputs(num_tokens=64, width=4, vocab=50)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        linear_logprobs(hidden, weight, target, chunk_size=8).sum().backward()
    assert largest <= 8 * 50


def test_no_target_gives_no_logprob_and_zero_gradients():
    hidden, weight, _ = inputs()
    result = linear_logprobs(hidden[:0], weight, torch.empty(0, dtype=torch.int64), chunk_size=4)
    result.sum().backward()
    assert result.shape == (0,)
    assert not weight.grad.any()
