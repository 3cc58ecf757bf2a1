"""vLLM's engine in this process: fast rollouts, with the weights it was sent and no others.

Ours is the world around it: which weights it holds, who ends a completion, which random numbers a
sample draws. It is measured against `HFEngine`, and changes its process (threads, environment,
torch.distributed), so it lives in a worker of its own.

Source: vLLM 0.32, whose in-process `LLMEngine` and `reload_weights` are used.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_like.errors import CheckpointError, ConfigError
from nemo_like.rollout.completion import Completion
from nemo_like.rollout.sampling import (
    Decode,
    check_sampling,
    completes_stop_string,
    room_for,
    stream_seed,
)
from nemo_like.rollout.vllm_extension import forget_packed_experts
from nemo_like.rollout.vllm_settings import (
    PREFILL_TOKENS,
    OnCpu,
    OnGpus,
    check_build,
    check_model,
    write_config,
)
from nemo_like.rollout.weights import Delivery, ExpectedWeights, held
from nemo_like.types import Prompt, Rollout, SamplingParams, sample_numbers
from nemo_like.weight_sync.transport import BUCKET_BYTES, buckets

COLDEST = 0.01
"""vLLM takes a lower temperature for this one."""


class VLLMEngine:
    """An engine on vLLM, without weights yet.

    Args:
        model_config: The content of the model's `config.json`.
        decode: Text of a completion's token ids, stop token included; from the tokenizer's owner.
        max_model_len: Most tokens of prompt and completion.
        dtype: Of weights and computation; log-probabilities are fp32 in any case.
        max_num_seqs: Sequences decoded at the same time.
        where: The GPUs that it runs on, or CPUs (None). One that sleeps is born asleep.

    Raises:
        ConfigError: a model that vLLM takes and computes wrongly, or does not take.
    """

    def __init__(
        self,
        model_config: Mapping[str, Any],
        decode: Decode,
        *,
        max_model_len: int,
        dtype: torch.dtype = torch.float32,
        max_num_seqs: int = 256,
        where: OnCpu | OnGpus | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self._llm: Any = None
        self._version: int | None = None
        where = where or OnCpu()
        self._sleeps, self._num_parts = where.sleeps, where.num_parts
        os.environ.update(where.environment)
        self._vllm: Any = import_module("vllm")
        check_build(where)
        check_model(model_config, where)
        config = AutoConfig.for_model(**model_config)
        with torch.device("meta"):
            self._expected = ExpectedWeights.of(AutoModelForCausalLM.from_config(config))
        self._aliases: dict[str, list[str]] = {}
        for alias, original in self._expected.tied.items():
            self._aliases.setdefault(original, []).append(alias)
        self._longest = min(max_model_len, config.max_position_embeddings)
        self._vocab_size = config.vocab_size
        self._decode = decode
        with tempfile.TemporaryDirectory(prefix="nemo_like_vllm_") as folder:
            write_config(config, Path(folder))
            self._llm = self._vllm.LLM(
                model=folder,
                load_format="dummy",  # the weights come by `load_weights`
                skip_tokenizer_init=True,
                generation_config="vllm",  # a model's own advice on sampling is not asked
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=self._longest,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(PREFILL_TOKENS, self._longest, max_num_seqs),
                # A prompt in chunks draws a random number per chunk, and a CPU's stream can not be
                # wound back.
                enable_chunked_prefill=False,
                logprobs_mode="processed_logprobs",  # of the distribution that was drawn from
                seed=0,
                **where.arguments(config, dtype, self._longest, max_num_seqs),
            )
        self.sleep()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> str:
        """Take whole tensors by Hugging Face name, all of the model's; the digest of what came.

        Of tied weights one name is enough; when both come they must be equal. An engine that sleeps
        gets the memory of its weights back first, and that of its KV cache last.

        Raises:
            CheckpointError: naming what is missing, unknown, twice there, or of the wrong shape.
                The engine then holds a mixture, and refuses to generate until a whole set arrives.
        """
        self._version = None
        delivery = Delivery(self._expected)
        source = _Guarded(weights)
        self._wake("weights")
        self._reload(self._with_aliases(delivery.fitting(source)))
        if source.exception is not None:
            raise source.exception
        digest = delivery.digest(version)
        self._wake("kv_cache")
        # Keys and values of prompts under the old weights would be taken for those of the new.
        if not self._llm.llm_engine.reset_prefix_cache():
            raise CheckpointError("vLLM would not forget its prefix cache: is it still generating?")
        self._version = version
        return digest

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        samples: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in the order of the prompts; as `HFEngine.generate`.

        Each has the random stream of (seed, index of the prompt, number of the sample); the numbers
        drawn are vLLM's, so samples (not greedy answers) differ from those of other engines.

        Raises:
            CheckpointError: no whole set of weights was loaded.
            ConfigError: sampling parameters that make no sense, or that vLLM would change.
            DataError: a prompt that is empty, too long, or outside the vocabulary.
            NonFiniteError: the model's logits are not numbers.
        """
        version = held(self._version)
        check_sampling(sampling)
        if 0 < sampling.temperature < COLDEST:
            raise ConfigError(
                f"temperature is {sampling.temperature}, which vLLM takes for {COLDEST}: "
                "set 0 (greedy) or more than that"
            )
        numbers = sample_numbers(prompts) if samples is None else samples
        rows = {
            str(place): Completion(
                prompt=prompt,
                room=room_for(prompt, sampling, longest=self._longest, vocab_size=self._vocab_size),
            )
            for place, prompt in enumerate(prompts)
        }
        try:
            for (request, row), number in zip(rows.items(), numbers, strict=True):
                self._llm.llm_engine.add_request(
                    request,
                    {"prompt_token_ids": list(row.prompt.token_ids)},
                    self._params(row, number, sampling),
                )
            self._complete(rows, sampling)
        except BaseException:
            self._llm.llm_engine.abort_request(list(rows))
            raise
        return [row.rollout(self._decode, version) for row in rows.values()]

    def sleep(self) -> None:
        """Frees the GPU's memory of weights and KV cache; the weights are gone.

        One that was not made to sleep ignores it.
        """
        if self._sleeps:
            self._version = None
            # Level 1 would keep a copy of weights that are old by the time it wakes.
            self._llm.sleep(level=2)

    def close(self) -> None:
        """Ends the engine; safe to call twice."""
        self._version = None
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()

    def _reload(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        if self._num_parts == 1:
            worker = self._llm.llm_engine.model_executor.driver_worker.worker
            forget_packed_experts(worker.model_runner.get_model())
            worker.reload_weights(weights_iterator=weights)
            return
        self._llm.collective_rpc("begin_reload")
        for bucket in buckets(weights, BUCKET_BYTES):
            self._llm.collective_rpc("take_weights", args=(bucket,))
        self._llm.collective_rpc("end_reload")

    def _wake(self, part: str) -> None:
        if self._llm.llm_engine.is_sleeping():
            self._llm.wake_up(tags=[part])

    def _with_aliases(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A tied head by name too: on a CPU vLLM keeps a packed copy of it."""
        for name, tensor in weights:
            for each in (name, *self._aliases.get(name, ())):
                yield each, tensor

    def _params(self, row: Completion, number: int, sampling: SamplingParams) -> Any:
        kinds = import_module("vllm.sampling_params").RequestOutputKind
        return self._vllm.SamplingParams(
            max_tokens=row.room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # what ends a completion is said by `sampling` alone
            seed=stream_seed(sampling.seed, prompt_index=row.prompt.index, sample=number),
            logprobs=0,  # of the token drawn, and no other
            flat_logprobs=True,
            detokenize=False,
            # Stop strings are looked for here, in the text that our tokenizer makes.
            output_kind=kinds.DELTA if sampling.stop_strings else kinds.FINAL_ONLY,
        )

    def _complete(self, rows: Mapping[str, Completion], sampling: SamplingParams) -> None:
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            ended = []
            for output in engine.step():
                (completion,) = output.outputs
                row = rows[output.request_id]
                if _extend(row, completion, self._decode, sampling):
                    ended.append(output.request_id)
            engine.abort_request(ended)


def _extend(row: Completion, completion: Any, decode: Decode, sampling: SamplingParams) -> bool:
    """Writes new tokens down; whether one of them ends a row that vLLM would go on with."""
    logprobs = completion.logprobs.logprobs
    for token, logprob in zip(completion.token_ids, logprobs, strict=True):
        row.add(int(token), float(logprob))
        if completes_stop_string(row.token_ids, decode, sampling):
            row.finish_reason = "stop"
            return True
    if completion.finish_reason is not None:
        row.finish_reason = completion.finish_reason
    return False


class _Guarded:
    """An iteration that ends where its source fails, and remembers why.

    vLLM must come to the end of an update: one that raises half-way leaves layers without memory.
    """

    def __init__(self, source: Iterable[tuple[str, Tensor]]) -> None:
        self._source = source
        self.exception: Exception | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        try:
            yield from self._source
        except Exception as exception:
            self.exception = exception
