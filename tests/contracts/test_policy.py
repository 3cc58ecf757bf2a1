"""Every `Policy` is the same policy: in this process, and over Ray workers of either backend."""

import json
import sys
import time

import pytest
import torch

from nemo_like.backends.settings import BackendSettings
from nemo_like.cluster.group import GroupConfig, WorkerGroup
from nemo_like.cluster.placement import place
from nemo_like.cluster.policy import RemotePolicy
from nemo_like.cluster.runtime import RayCluster, import_ray
from nemo_like.config.policy import PolicyConfig
from nemo_like.config.run import ClusterConfig
from nemo_like.data.batching import Batching
from nemo_like.errors import CheckpointError, NonFiniteError
from nemo_like.losses.nll import NLL
from nemo_like.run.build import parallel_sizes, policy_factory
from nemo_like.run.local import LocalPolicy
from nemo_like.types import Example, TrainBatch

STEPS = 3
KINDS = (
    "in this process",
    "1 worker",
    "2 workers",
    "2 workers, tensor parallel",
    "1 worker, Megatron",
    "2 workers, Megatron, pipeline",
)
each_kind = pytest.mark.parametrize("kind", KINDS)


def batch_of(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (8,), generator=g).tolist()
    return TrainBatch.of(
        [
            Example(
                tuple(torch.randint(0, 60, (n,), generator=g).tolist()),
                tuple(t > 1 for t in range(n)),
            )
            for n in lengths
        ]
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 60,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "initializer_range": 0.1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def config_of(model, kind):
    num_tensor = 2 if "tensor" in kind else 1
    backend: dict = {"dtensor_cfg": {"tensor_parallel_size": num_tensor}}
    if "Megatron" in kind:
        sizes = {
            "tensor_model_parallel_size": num_tensor,
            "pipeline_model_parallel_size": 2 if "pipeline" in kind else 1,
        }
        backend = {"megatron_cfg": {"enabled": True} | sizes, "dtensor_cfg": {"enabled": False}}
    return PolicyConfig(
        model_name=model, init="random", precision="float32", max_total_sequence_length=64,
        train_micro_batch_size=2, optimizer={"optimizer": "muon", "lr": 3e-4},
        scheduler={"lr_decay_style": "linear"}, **backend,
    )  # fmt: skip


class World:
    """One of each kind, all with the same newborn weights, which every test starts from."""

    def __init__(self, model, folder):
        import_ray().cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.cluster = RayCluster(ClusterConfig(gpus_per_node=0, cpu_workers_per_node=2))
        self.cluster.start()
        self.policies = {kind: self._make(kind, model, folder) for kind in KINDS[1:]}
        self.policies[KINDS[0]] = self._make(KINDS[0], model, folder)
        for policy in self.policies.values():
            policy.begin(10)
        self.newborn = saved(self.policies[KINDS[0]], folder / "newborn")

    def _make(self, kind, model, folder):
        config = config_of(model, kind)
        factory = policy_factory(
            config, BackendSettings(seed=1, asynchronous_save=True, keep_reference=True)
        )
        cuts = {
            "train": Batching.for_training(config), "logprob": Batching.for_logprobs(config)
        }  # fmt: skip
        if kind == KINDS[0]:
            return LocalPolicy(factory(), **cuts)
        cluster = ClusterConfig(gpus_per_node=0, cpu_workers_per_node=int(kind[0]))
        where = place(cluster, parallel_sizes(config), gpus_found=0)
        group = WorkerGroup(
            self.cluster,
            GroupConfig(kind.replace(" ", "_"), where, factory, folder / "logs", timeout_s=120.0),
        )
        group.start()
        return RemotePolicy(group, where, **cuts)

    def newborn_policy(self, kind):
        policy = self.policies[kind]
        policy.load(self.newborn)
        return policy

    def close(self):
        for policy in self.policies.values():
            policy.close()
            policy.close()
        self.cluster.close()


@pytest.fixture(scope="module")
def world(model, tmp_path_factory):
    world = World(model, tmp_path_factory.mktemp("world"))
    yield world
    world.close()


def trained(policy, steps=range(STEPS)):
    """Losses and gradient norms of some steps."""
    all_stats = [policy.train_step(batch_of(step), NLL()) for step in steps]
    return [
        stats.metrics[name].value for stats in all_stats for name in ("loss", "grad_norm", "lr")
    ]


def saved(policy, folder, **options):
    folder.mkdir()
    policy.save(folder, **options)
    deadline = time.monotonic() + 30
    while not policy.save_finished():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return folder


def same_weights(policy, other, *, atol):
    mine, theirs = dict(policy.export_weights()), dict(other.export_weights())
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert weight.shape == theirs[name].shape and weight.dtype == torch.float32
        assert torch.allclose(weight, theirs[name], rtol=0, atol=atol), name


@pytest.fixture(scope="module")
def expected(world):
    """What the policy of this process finds, from its birth."""
    policy = world.newborn_policy(KINDS[0])
    logprobs_N = policy.logprobs(batch_of(9))
    found = trained(policy)
    return {
        "before": logprobs_N,
        "found": found,
        "weights": {name: w.clone() for name, w in policy.export_weights()},
        "after": policy.logprobs(batch_of(9)),
    }


@each_kind
def test_it_is_born_from_the_seed_alone(world, kind):
    same_weights(world.newborn_policy(kind), world.newborn_policy(KINDS[0]), atol=0)


@each_kind
def test_it_takes_the_same_steps(world, expected, kind):
    policy = world.newborn_policy(kind)
    assert torch.allclose(policy.logprobs(batch_of(9)), expected["before"], rtol=0, atol=1e-5)
    assert trained(policy) == pytest.approx(expected["found"], abs=1e-5)
    assert torch.allclose(policy.logprobs(batch_of(9)), expected["after"], rtol=0, atol=1e-4)
    exported = dict(policy.export_weights())
    assert exported.keys() == expected["weights"].keys()
    assert all(
        torch.allclose(exported[name], weight, rtol=0, atol=1e-5)
        for name, weight in expected["weights"].items()
    )


@each_kind
def test_log_probabilities_come_in_the_order_of_the_batch(world, kind):
    policy, batch = world.newborn_policy(kind), batch_of(9)
    backwards = list(reversed(range(len(batch))))
    turned = policy.logprobs(batch.select(backwards))
    in_order = policy.logprobs(batch)
    assert torch.allclose(turned, in_order[batch.token_index(backwards)], rtol=0, atol=1e-5)
    assert in_order[~batch.loss_mask_N].abs().max() == 0 and in_order.dtype == torch.float32


@each_kind
def test_log_probabilities_of_the_start_stay_what_they_were_and_disturb_nothing(
    world, expected, kind
):
    policy, batch = world.newborn_policy(kind), batch_of(9)
    found = []
    for step in range(STEPS):
        assert torch.allclose(policy.logprobs(batch, True), expected["before"], rtol=0, atol=1e-5)
        found += trained(policy, [step])
    assert found == pytest.approx(expected["found"], abs=1e-5)
    own = policy.logprobs(batch)
    assert torch.allclose(policy.logprobs(batch, True), expected["before"], rtol=0, atol=1e-5)
    assert torch.equal(policy.logprobs(batch), own)
    assert torch.allclose(own, expected["after"], rtol=0, atol=1e-4)


@each_kind
def test_it_tells_the_same_facts(world, kind):
    facts, other = (world.policies[k].begin(10) for k in (kind, KINDS[0]))
    assert facts.model == other.model
    # Of the reasons some are a backend's own: Megatron's q, k and v come out of one matrix.
    assert [owner | {"reason": ""} for owner in facts.owners] == [
        owner | {"reason": ""} for owner in other.owners
    ]
    assert facts.num_parameters == other.num_parameters
    assert facts.world_size == (2 if kind.startswith("2") else 1)
    assert (facts.device, facts.threads) == ("cpu", 1)


@each_kind
def test_phases_of_a_step_are_its_wall_time_at_most(world, kind):
    policy = world.newborn_policy(kind)
    began = time.perf_counter()
    phases = policy.train_step(batch_of(0), NLL()).phases
    assert {"forward_backward", "optimizer"} <= set(phases)
    assert 0 < sum(phases.values()) <= time.perf_counter() - began


CHAINS = [
    (KINDS[0], KINDS[2], KINDS[0]),
    (KINDS[1], KINDS[3], KINDS[1]),
    (KINDS[2], KINDS[3], KINDS[2]),
    (KINDS[4], KINDS[0], KINDS[5]),
    (KINDS[5], KINDS[3], KINDS[4]),
]


@pytest.mark.parametrize("chain", CHAINS, ids=" -> ".join)
def test_what_one_saves_another_continues(world, expected, chain, tmp_path):
    found, folder = [], world.newborn
    for step, kind in enumerate(chain):
        policy = world.policies[kind]
        policy.load(folder)
        found += trained(policy, [step])
        folder = saved(policy, tmp_path / f"after_{step}")
    assert found == pytest.approx(expected["found"], abs=1e-5)


@each_kind
def test_what_it_saved_it_continues_to_the_bit(world, kind, tmp_path):
    policy = world.newborn_policy(kind)
    trained(policy, [0, 1])
    folder = saved(policy, tmp_path / "saved")
    straight = trained(policy, [2])
    weights = dict(policy.export_weights())
    policy.load(folder)
    assert trained(policy, [2]) == straight
    assert all(torch.equal(w, weights[name]) for name, w in policy.export_weights())


@each_kind
def test_training_goes_on_while_a_save_is_written(world, kind, tmp_path):
    """What is saved is the state of the moment it was asked for."""
    policy = world.newborn_policy(kind)
    (tmp_path / "saved").mkdir()
    policy.save(tmp_path / "saved")
    trained(policy)
    while not policy.save_finished():
        time.sleep(0.01)
    policy.load(tmp_path / "saved")
    same_weights(policy, world.newborn_policy(KINDS[0]), atol=0)


@each_kind
def test_without_the_optimizer_none_is_written_and_none_can_be_continued(world, kind, tmp_path):
    policy = world.newborn_policy(kind)
    folder = saved(policy, tmp_path / "weights", with_optimizer=False)
    assert (folder / "model").is_dir() and not (folder / "optimizer").exists()
    with pytest.raises(CheckpointError, match="optimizer"):
        policy.load(folder)


class NaNOnce:
    """NLL that is NaN where a micro-batch holds this token as a target."""

    def __init__(self, token):
        self.token = token

    def __call__(self, logprobs_N, batch):
        share, metrics = NLL()(logprobs_N, batch)
        hit = (batch.token_ids_N[batch.loss_mask_N] == self.token).any()
        return torch.where(hit, share * float("nan"), share), metrics


@each_kind
def test_a_nan_on_one_rank_reaches_the_weights_of_none(world, kind):
    """A token that one micro-batch of one rank alone has."""
    policy, batch = world.newborn_policy(kind), batch_of(0)
    targets = batch.token_ids_N[batch.loss_mask_N].tolist()
    token = next(t for t in targets if targets.count(t) == 1)
    with pytest.raises(NonFiniteError, match=r"rank \d, micro-batch \d: loss nan"):
        policy.train_step(batch, NaNOnce(token))
    same_weights(policy, world.newborn_policy(KINDS[0]), atol=0)


@each_kind
def test_a_checkpoint_that_is_not_there_is_refused(world, kind, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        world.policies[kind].load(tmp_path / "nowhere")


def test_the_ranks_are_processes_of_their_own(world):
    """Otherwise none of the above says anything about workers."""
    assert isinstance(world.policies[KINDS[2]], RemotePolicy)
    logs = world.newborn.parent / "logs"
    assert sorted(file.name for file in logs.iterdir()) == sorted(
        f"{kind.replace(' ', '_')}_rank{rank}.log"
        for kind in KINDS[1:]
        for rank in range(int(kind[0]))
    )
