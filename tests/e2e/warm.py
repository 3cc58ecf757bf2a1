"""What the fork server imports once, so that its forks need not."""

import torch

import nemo_like.backends.dtensor.backend
import nemo_like.rollout.hf
import nemo_like.run.grpo
import nemo_like.run.sft  # noqa: F401

torch.set_num_threads(1)
