"""What NeMo-RL configs say differently: keys that are absent here on purpose, and other spellings.

Nothing else in the package knows these. A key that is absent but says "off" (as NeMo-RL's own files
do for most features) asks for what happens anyway, and is dropped; any other value is refused with
the reason. `IGNORED` keys tune something that does not exist here: they are dropped and noted.
"""

from __future__ import annotations

from typing import Any

from nemo_like.config.absent import ABSENT, AS_IT_IS, FALSE_IS_A_CHOICE, IGNORED, WITHOUT_VALUE
from nemo_like.config.draft import Draft, walk
from nemo_like.config.optimizer import NO_WARM_UP
from nemo_like.config.torch_optimizers import translate_optimizer, translate_scheduler

_MEGATRON, _DTENSOR = "policy.megatron_cfg", "policy.dtensor_cfg"
_GENERATION, _VLLM = "policy.generation", "policy.generation.vllm_cfg"

RENAMED: dict[str, str] = {
    "policy.optimizer.muon_nesterov": "policy.optimizer.muon_use_nesterov",
    f"{_MEGATRON}.optimizer.muon_nesterov": f"{_MEGATRON}.optimizer.muon_use_nesterov",
    f"{_MEGATRON}.moe_aux_loss_coeff": f"{_MEGATRON}.model_overrides.moe_aux_loss_coeff",
    f"{_GENERATION}.vllm_kwargs.max_num_seqs": f"{_GENERATION}.max_num_seqs",
    "data.prompt_file": "data.default.prompt_file",
    "data.system_prompt_file": "data.default.system_prompt_file",
    "grpo.num_val_generations_per_prompt": "grpo.val_num_generations_per_prompt",
    "grpo.adv_estimator.normalize_rewards": "grpo.normalize_rewards",
    "grpo.adv_estimator.use_leave_one_out_baseline": "grpo.use_leave_one_out_baseline",
}
"""Two spellings of one key."""

RENAMED_SECTION = ("policy.automodel_cfg", _DTENSOR)
"""NeMo-RL's newer name of the block, and the one that it has here."""

NULL_IS_DEFAULT = (
    "policy.optimizer",
    "policy.scheduler",
    f"{_DTENSOR}.env_vars",
    f"{_MEGATRON}.env_vars",
    f"{_MEGATRON}.optimizer",
    f"{_MEGATRON}.scheduler",
    "policy.hf_config_overrides",
    "policy.logprob_chunk_size",
    f"{_GENERATION}.stop_strings",
    f"{_GENERATION}.colocated.resources",
)
"""Sections and lists that NeMo-RL files leave null."""

MOVED: dict[str, str] = {
    "sft.lr": "policy.optimizer.lr",
    "sft.learning_rate": "policy.optimizer.lr",
    "policy.lr": "policy.optimizer.lr",
    "policy.learning_rate": "policy.optimizer.lr",
    "policy.optimizer.learning_rate": "policy.optimizer.lr",
    "policy.optimizer.betas": "policy.optimizer.adam_beta1",
    "policy.optimizer.eps": "policy.optimizer.adam_eps",
    "policy.optimizer.warmup_steps": "policy.scheduler.lr_warmup_iters",
    "policy.scheduler.warmup_ratio": "policy.scheduler.lr_warmup_fraction",
    "policy.fsdp_offload_enabled": "policy.dtensor_cfg.cpu_offload",
    "policy.activation_checkpointing_enabled": "policy.dtensor_cfg.activation_checkpointing",
    "policy.tensor_parallel_size": "policy.dtensor_cfg.tensor_parallel_size",
    f"{_MEGATRON}.tensor_parallel_size": f"{_MEGATRON}.tensor_model_parallel_size",
    f"{_DTENSOR}.tensor_model_parallel_size": "policy.dtensor_cfg.tensor_parallel_size",
    "data.dataset_name": "data.train.dataset_name",
    "checkpointing.async_save": "checkpointing.is_async",
    "sft.checkpoint_dir": "checkpointing.checkpoint_dir",
    "grpo.lr": "policy.optimizer.lr",
    "grpo.learning_rate": "policy.optimizer.lr",
    "grpo.num_generations": "grpo.num_generations_per_prompt",
    "grpo.kl_coef": "loss_fn.reference_policy_kl_penalty",
    "grpo.beta": "loss_fn.reference_policy_kl_penalty",
    "grpo.epsilon": "loss_fn.ratio_clip_min",
    "grpo.epsilon_high": "loss_fn.ratio_clip_max",
    "grpo.temperature": "policy.generation.temperature",
    "grpo.checkpoint_dir": "checkpointing.checkpoint_dir",
    "loss_fn.kl_coef": "loss_fn.reference_policy_kl_penalty",
    f"{_GENERATION}.max_tokens": f"{_GENERATION}.max_new_tokens",
    f"{_GENERATION}.tensor_parallel_size": f"{_VLLM}.tensor_parallel_size",
    f"{_GENERATION}.gpu_memory_utilization": f"{_VLLM}.gpu_memory_utilization",
    f"{_VLLM}.max_num_seqs": f"{_GENERATION}.max_num_seqs",
}
"""Where users look for a key, and where it is: for suggestions only."""

_DAPO = {"input_key": "prompt.0.content", "output_key": "reward_model.ground_truth"}
_PROBLEM = {"input_key": "problem", "output_key": "answer"}
_GSM8K = {
    "dataset_name": "openai/gsm8k",
    "subset": "main",
    "input_key": "question",
    "output_key": "answer",
}
_DAPO_17K = {"dataset_name": "BytedTsinghua-SIA/DAPO-Math-17k"} | _DAPO
DATASETS: dict[str, dict[str, str]] = {
    "OpenMathInstruct-2": {
        "dataset_name": "nvidia/OpenMathInstruct-2",
        "split": "train_1M",
        "input_key": "problem",
        "output_key": "expected_answer",
    },
    "DAPOMath17K": _DAPO_17K,
    "DAPO-Math-17k": _DAPO_17K,
    "DAPOMathAIME2024": {"dataset_name": "BytedTsinghua-SIA/AIME-2024"} | _DAPO,
    "AIME2024": {"dataset_name": "HuggingFaceH4/aime_2024"} | _PROBLEM,
    "MATH-500": {"dataset_name": "HuggingFaceH4/MATH-500", "split": "test"} | _PROBLEM,
    "math500": {"dataset_name": "HuggingFaceH4/MATH-500", "split": "test"} | _PROBLEM,
    "DeepScaler": {"dataset_name": "agentica-org/DeepScaleR-Preview-Dataset"} | _PROBLEM,
    "tulu3_sft_mixture": {
        "dataset_name": "allenai/tulu-3-sft-mixture",
        "messages_key": "messages",
    },
    "GSM8K": _GSM8K,
    "gsm8k": _GSM8K,
}
"""Short names of data sets (NeMo-RL's, and what people say), and what its loaders read."""


LOCAL_FILES = ("ResponseDataset", "openai_format")
"""NeMo-RL's names of its readers of `data_path`; the second one's rows are conversations."""
OF_CONVERSATIONS = {
    "system_key": "a system message is the first of a row's messages",
    "system_prompt": "name a text file: system_prompt_file",
    "tool_key": "chat templates are not given tools",
    "use_preserving_dataset": "rows are read as they are",
}
"""Keys of such a reader that are absent here, and why; off they ask for what happens anyway."""


def translate(draft: Draft) -> None:
    """Rewrite a draft in place into the schema's language; what can not be said is a problem."""
    _rename_section(draft, *RENAMED_SECTION)
    for path, target in RENAMED.items():
        draft.move(path, target)
    for path in NULL_IS_DEFAULT:
        if draft.find(path) == (True, None):
            draft.take(path)
    translate_optimizer(draft)
    translate_scheduler(draft)
    _one_warm_up(draft)
    _tis_is_implied(draft)
    _zero_is_off(draft)
    _translate_sources(draft)
    for path, reason in ABSENT.items():
        for place in places(draft, path):
            _drop(draft, place, path, reason)
    for path, reason in IGNORED.items():
        for place in places(draft, path):
            origin = draft.origin(place)
            if draft.take(place) not in ({}, None):
                draft.notes.append(f"{place} is ignored: {reason} ({origin.text})")
    for (path, value), reason in WITHOUT_VALUE.items():
        found, given = draft.find(path)
        if found and given == value and type(given) is type(value):
            draft.refuse(path, reason)


def places(draft: Draft, path: str) -> list[str]:
    """Where the key of a table is written: once, or in each of a list of data sources."""
    section, _, key = path.rpartition(".")
    sources = draft.find(section)[1]
    several = range(len(sources)) if isinstance(sources, list) else None
    candidates = [path] if several is None else [f"{section}.{n}.{key}" for n in several]
    return [place for place in candidates if draft.find(place)[0]]


def _drop(draft: Draft, place: str, path: str, reason: str) -> None:
    value = draft.find(place)[1]
    is_off = value is None if path in FALSE_IS_A_CHOICE else _is_off(value)
    if is_off or value == AS_IT_IS.get(path):
        draft.take(place)
    else:
        draft.refuse(place, f"absent on purpose: {reason}")


def _rename_section(draft: Draft, source: str, target: str) -> None:
    """Move a section key by key, on top of what is written under the other name."""
    section = draft.find(source)[1]
    if not isinstance(section, dict):
        return
    for path, value in list(walk(section)):
        if not isinstance(value, dict) or not value:
            draft.move(".".join((source, *path)), ".".join((target, *path)))
    draft.take(source)


def _is_off(value: Any) -> bool:
    if isinstance(value, dict) and "enabled" in value:
        return not value["enabled"]
    if isinstance(value, dict):
        return all(map(_is_off, value.values()))
    return value in (None, False, 0, "none", "None", "", {}, [])


def _one_warm_up(draft: Draft) -> None:
    """Of the two keys for the length of a warm-up, the one that a later layer wrote counts."""
    for block in ("policy.scheduler", f"{_MEGATRON}.scheduler"):
        paths = [f"{block}.{key}" for key in NO_WARM_UP]
        if any(draft.find(path)[1] is None for path in paths):
            continue
        first, last = sorted(paths, key=draft.origin)
        if draft.origin(first).layer < draft.origin(last).layer:
            draft.take(first)


def _tis_is_implied(draft: Draft) -> None:
    """A bound of importance weights alone means `tis`, the first kind that there was."""
    bound, kind = (f"loss_fn.truncated_importance_sampling_{name}" for name in ("ratio", "type"))
    if draft.find(bound)[1] is not None and not draft.find(kind)[0]:
        draft.put(kind, "tis", draft.origin(bound))


def _zero_is_off(draft: Draft) -> None:
    """NeMo-RL says "off" or "all" by numbers below one, where the schema has null or 0."""
    for path, instead in (
        ("policy.max_grad_norm", None),
        ("sft.val_period", 0),
        ("sft.val_batches", 0),
        ("grpo.val_period", 0),
        (f"{_GENERATION}.top_k", None),
    ):
        found, value = draft.find(path)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if found and number and value <= 0 and value != instead:
            _replace(draft, path, instead)


def _translate_sources(draft: Draft) -> None:
    """Short names of data sets become hub names; names of readers mean "the local file"."""
    for path, source in sources(draft):
        name = source.get("dataset_name")
        if source.get("data_path") and name in LOCAL_FILES:
            del source["dataset_name"]
            if name == "openai_format":
                _translate_conversations(draft, path, source)
        known = DATASETS.get(str(name))
        if known is not None and not source.get("data_path"):
            source |= {k: v for k, v in known.items() if k == "dataset_name" or k not in source}


def sources(draft: Draft) -> list[tuple[str, dict[str, Any]]]:
    """Every data source that is written, with its path."""
    found = []
    for path in ("data.train", "data.validation"):
        value = draft.find(path)[1]
        each = enumerate(value) if isinstance(value, list) else ()
        named = [(f"{path}.{n}", one) for n, one in each] or [(path, value)]
        found += [(name, one) for name, one in named if isinstance(one, dict)]
    return found


def _translate_conversations(draft: Draft, path: str, source: dict[str, Any]) -> None:
    source.setdefault("messages_key", source.pop("chat_key", None) or "messages")
    for key, reason in OF_CONVERSATIONS.items():
        if key in source and _is_off(source[key]):
            del source[key]
        elif key in source:
            draft.refuse(f"{path}.{key}", f"absent on purpose: {reason}")


def _replace(draft: Draft, path: str, value: Any) -> None:
    origin = draft.origin(path)
    draft.take(path)
    draft.put(path, value, origin)
