"""Rows for a model from ragged sequences, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_like.types import MicroBatch, TrainBatch


@dataclass(frozen=True)
class Rows:
    """A model's input, and where its targets are.

    Several sequences may share a row; `position_ids` restart with each of them, which is what keeps
    attention inside a sequence. Padding stands at the end of a row, after everything that could
    attend to it.

    Shapes: R rows of T tokens; M targets.
        input_ids_RT, position_ids_RT: the model's input.
        predictor_M: flat position in R x T of the token *before* each target.
        target_M: the target's token id.
        source_M: the target's position in the micro-batch's own N.
        num_tokens_R: the tokens of each row; what follows them is padding.
    """

    input_ids_RT: Tensor
    position_ids_RT: Tensor
    predictor_M: Tensor
    target_M: Tensor
    source_M: Tensor
    num_tokens_R: Tensor

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        return Rows(*(t.to(device, non_blocking=True) for t in vars(self).values()))

    def aligned(self, logprobs_M: Tensor, num_tokens: int) -> Tensor:
        """What was found for the targets, where these are among the tokens; 0 elsewhere.

        Shapes: [M] -> [N], with N = `num_tokens`.
        """
        zeros_N = logprobs_M.new_zeros(num_tokens)
        return zeros_N.index_put((self.source_M.to(logprobs_M.device),), logprobs_M)


def rows_of(batch: TrainBatch, micro_batch: MicroBatch, *, multiple: int = 1) -> Rows:
    """The rows of one micro-batch, all padded to the longest, rounded up to `multiple` tokens.

    `batch` holds the sequences of the micro-batch alone, in the order in which its rows name them.
    An empty micro-batch gives one row of padding without targets, so that its rank can take part in
    collectives.
    """
    lengths = batch.lengths_B
    ends = lengths.cumsum(0)
    starts = ends - lengths
    row_of_sequence = torch.tensor(
        [r for r, row in enumerate(micro_batch) for _ in row], dtype=torch.int64
    )
    num_rows = max(1, len(micro_batch))
    row_tokens = torch.zeros(num_rows, dtype=torch.int64).index_add_(0, row_of_sequence, lengths)
    width = max(1, int(row_tokens.max()))
    width = -(-width // multiple) * multiple

    # A row's tokens lie end to end in N too, so a token's column is its distance from its row's
    # first token.
    token_N = torch.arange(len(batch.token_ids_N))
    row_N = row_of_sequence.repeat_interleave(lengths)
    column_N = token_N - (row_tokens.cumsum(0) - row_tokens)[row_N]
    flat_N = row_N * width + column_N

    input_ids = torch.zeros(num_rows * width, dtype=torch.int64)
    input_ids[flat_N] = batch.token_ids_N
    # Padding continues the last sequence's positions: a restart would look like one more sequence.
    position_ids = torch.arange(width).repeat(num_rows, 1)
    position_ids.view(-1)[flat_N] = token_N - starts.repeat_interleave(lengths)
    last_start = _last_start(row_of_sequence, starts, row_tokens)
    padding = torch.arange(width) >= row_tokens[:, None]
    position_ids = torch.where(padding, position_ids - last_start[:, None], position_ids)

    source_M = batch.loss_mask_N.nonzero().squeeze(1)
    return Rows(
        input_ids_RT=input_ids.view(num_rows, width),
        position_ids_RT=position_ids,
        predictor_M=flat_N[source_M] - 1,
        target_M=batch.token_ids_N[source_M],
        source_M=source_M,
        num_tokens_R=row_tokens,
    )


def _last_start(row_of_sequence: Tensor, starts: Tensor, row_tokens: Tensor) -> Tensor:
    """The column at which the last sequence of each row begins. Shapes: [R]."""
    row_starts = row_tokens.cumsum(0) - row_tokens
    columns = starts - row_starts[row_of_sequence]
    return torch.zeros_like(row_tokens).scatter_reduce_(0, row_of_sequence, columns, "amax")
