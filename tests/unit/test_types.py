import torch

from nemo_like.types import TrainBatch

BATCH = TrainBatch(
    token_ids_N=torch.tensor([5, 6, 7, 8, 9]),
    loss_mask_N=torch.tensor([False, True, True, False, True]),
    lengths_B=torch.tensor([3, 2]),
    num_loss_tokens=3,
    num_sequences=2,
    advantages_N=torch.tensor([0.0, 1.0, 1.0, 0.0, -1.0]),
    sampled_logprobs_N=torch.tensor([0.0, -0.1, -0.2, 0.0, -0.3]),
)


def test_selected_sequences_take_their_tokens_advantages_and_logprobs_with_them():
    part = BATCH.select([1])
    assert part.token_ids_N.tolist() == [8, 9]
    assert part.advantages_N.tolist() == [0.0, -1.0]
    assert part.sampled_logprobs_N.tolist() == [0.0, BATCH.sampled_logprobs_N[4].item()]
    assert part.old_logprobs_N is None and part.ref_logprobs_N is None
    assert (part.num_loss_tokens, part.num_sequences) == (3, 2)


def test_every_tensor_moves_and_what_is_absent_stays_absent():
    moved = BATCH.to(torch.device("meta"))
    assert moved.advantages_N.device.type == moved.sampled_logprobs_N.device.type == "meta"
    assert moved.lengths_B.device.type == "meta"
    assert moved.old_logprobs_N is None
