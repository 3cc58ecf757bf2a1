"""Where a run's weights began is told by its checkpoints, also to a run that starts there."""

import pytest
import yaml

from nemo_like.config.grpo import GRPOTree
from nemo_like.errors import ConfigError
from nemo_like.run.grpo import first_weights

KL = {"reference_policy_kl_penalty": 0.1}


@pytest.fixture
def checkpoint(tmp_path):
    """One of a run that began with weights in a folder."""

    def make(step, weights):
        folder = tmp_path / "run" / f"step_{step}"
        folder.mkdir(parents=True)
        text = yaml.safe_dump({"policy": {"model_name": str(weights)}})
        (folder / "config.yaml").write_text(text)
        return folder

    return make


def tree_of(root, start_from=None):
    checkpointing = {"checkpoint_dir": str(root), "start_from": start_from}
    return GRPOTree(checkpointing=checkpointing, loss_fn=KL)


def test_a_new_run_has_no_first_weights(tmp_path):
    assert first_weights(tree_of(tmp_path / "new")) is None


def test_a_run_that_goes_on_has_those_it_began_with(tmp_path, checkpoint):
    (tmp_path / "weights").mkdir()
    checkpoint(3, tmp_path / "weights")
    assert first_weights(tree_of(tmp_path / "run")) == tmp_path / "weights"


def test_a_run_that_starts_from_a_checkpoint_has_those_that_it_began_with(tmp_path, checkpoint):
    (tmp_path / "weights").mkdir()
    start = checkpoint(3, tmp_path / "weights")
    assert first_weights(tree_of(tmp_path / "new", str(start))) == tmp_path / "weights"


def test_weights_that_are_gone_are_an_error_for_who_measures_a_divergence(tmp_path, checkpoint):
    start = checkpoint(3, tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"gone, and they are gone"):
        first_weights(tree_of(tmp_path / "run"))
    assert first_weights(tree_of(tmp_path / "new", str(start))) is None, (
        "a model, or of another run"
    )
