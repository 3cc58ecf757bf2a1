"""Conversations to tokens and loss masks, for any chat template.

What is learned is what a model has to produce itself: all that follows the generation prompt, up to
and with the end of the turn. Positions are found as characters of the rendered text, then carried
to tokens by the tokenizer's own offsets. Where that can not be done for certain the row is refused.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_like.data.faults import RowError, shorten
from nemo_like.data.messages import Message
from nemo_like.errors import ConfigError
from nemo_like.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]
"""First character, and the one after the last."""
_MARK = "\ue000\ue001\ue002"
"""Stands in for an assistant's words while they are located: private characters, in no template."""

_NO_REPLIES = (
    "policy.tokenizer.chat_template can not render an environment's reply as the message after the "
    "assistant's, as grpo.max_rollout_turns needs it"
)


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes the conversations of one run; picklable.

    `add_generation_prompt` renders what precedes the last turn as it is rendered for generation,
    which differs in templates that only then add, say, an opening think tag.
    """

    tokenizer: PreTrainedTokenizerFast
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    add_bos: bool = True
    add_eos: bool = True
    add_generation_prompt: bool = False
    only_unmask_final: bool = False

    def encode(self, messages: Sequence[Message]) -> Example:
        """The conversation up to the end of its last assistant turn, assistant tokens as targets.

        Raises:
            RowError: if there is nothing to learn, or turns and tokens do not agree for certain.
        """
        text, spans = self._locate(list(messages))
        text, spans = self._with_ends(text, spans)
        token_ids, is_target = self._tokenise(text[: spans[-1][1]], spans)
        is_target[:1] = [False] * len(is_target[:1])  # nothing predicts a first token
        if not any(is_target):
            raise RowError("nothing to learn", found=f"{len(token_ids)} tokens, all masked")
        return Example(tuple(token_ids), tuple(is_target))

    def prompt(self, messages: Sequence[Message], index: int) -> Prompt:
        """What an engine completes: all before the last assistant turn, which is the answer."""
        last = _assistant_turns(messages)[-1]
        text = self._bos(self._render(messages[:last], generation=True) if last else "")
        ids = self._ids(text)
        if not ids:
            raise RowError("empty prompt")
        return Prompt(index, tuple(ids), text, messages[last]["content"])

    def reply_ids(self, text: str, *, ended_by: int | None) -> list[int]:
        """The tokens of an environment's reply, to stand between two answers of the model.

        After a message that the model ended with the token `ended_by` it is the next message, of
        role `user`, with all that the template puts around it; else it goes on where the model
        stopped, with nothing around it. Special tokens in it are text of this reply, and are taken
        for what they are.

        Raises:
            ConfigError: the template has no place for a message after the assistant's.
        """
        if ended_by is None or self.tokenizer.chat_template is None:
            return self._ids(text)
        before = [Message(role="user", content=""), Message(role="assistant", content=_MARK)]
        try:
            rendered = self._render([*before, Message(role="user", content=text)], generation=True)
        except RowError as error:
            raise ConfigError(f"{_NO_REPLIES}: {error}") from error
        _, mark, after = rendered.partition(_MARK)
        if not mark:
            raise ConfigError(f"{_NO_REPLIES}: it leaves out what the assistant said before")
        # The model has written the end of its message itself.
        return self._ids(after.removeprefix(str(self.tokenizer.convert_ids_to_tokens(ended_by))))

    def _render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            return "".join(message["content"] for message in messages)
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=generation,
                **self.template_kwargs,
            )
        except (
            Exception
        ) as exc:  # a template may fail in any way, and it is the row that is refused
            raise RowError("chat template fails", found=shorten(str(exc))) from exc
        return str(text)

    def _locate(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The rendered text, and the characters to learn."""
        turns = _assistant_turns(messages)
        if self.tokenizer.chat_template is None:
            text, spans = self._render(messages), self._concatenated(messages, turns)
        elif "endgeneration" in self.tokenizer.chat_template:
            text, spans = self._marked(messages)
        else:
            text = self._render(messages)
            spans = [self._turn(messages, turn, text) for turn in turns]
        if self.only_unmask_final:
            spans = spans[-1:]
        if self.add_generation_prompt and messages[-1]["role"] == "assistant":
            return self._prompted(messages, text, spans)
        return text, spans

    @staticmethod
    def _concatenated(messages: list[Message], turns: list[int]) -> list[Span]:
        ends, end = [], 0
        for message in messages:
            end += len(message["content"])
            ends.append(end)
        return [(ends[i] - len(messages[i]["content"]), ends[i]) for i in turns]

    def _marked(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """What the template itself marks with `{% generation %}`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.template_kwargs},
            )
        except Exception as exc:  # as in `_render`
            raise RowError("chat template fails", found=shorten(str(exc))) from exc
        texts, spans = rendered
        found = [(start, end) for start, end in spans[0] if end > start]
        if not found:
            raise RowError("template marks nothing to learn")
        return str(texts[0]), found

    def _turn(self, messages: list[Message], turn: int, text: str) -> Span:
        """The characters of one turn, from the end of its generation prompt to the end of the turn.

        The words are located by rendering the conversation again with a mark in their place: what
        follows the mark is what follows the words, whatever the template does to either.
        """
        marked = [*messages]
        marked[turn] = {**messages[turn], "content": _MARK}
        before, _, after = self._render(marked).partition(_MARK)
        _, _, tail = self._render(marked[: turn + 1]).partition(_MARK)
        tail = tail.rstrip()  # the end of the turn; line breaks after it are the template's
        if not after.startswith(tail) or not text.endswith(after) or _MARK in after:
            raise RowError("turn not found in the rendered conversation", field=f"turn {turn}")
        end = len(text) - len(after) + len(tail)
        head = self._render(messages[:turn], generation=True) if turn else before
        for prefix in (head, before):
            if text.startswith(prefix) and len(prefix) < end:
                return len(prefix), end
        raise RowError("turn not found in the rendered conversation", field=f"turn {turn}")

    def _prompted(
        self, messages: list[Message], text: str, spans: list[Span]
    ) -> tuple[str, list[Span]]:
        """The same with the last turn's head replaced by the generation prompt."""
        head = self._render(messages[:-1], generation=True) if len(messages) > 1 else ""
        start, end = spans[-1]
        if text.startswith(head):
            return text, [*spans[:-1], (max(start, len(head)), end)]
        earlier = text[: spans[-2][1]] if len(spans) > 1 else ""
        if not head.startswith(earlier):
            raise RowError("generation prompt rewrites an earlier turn")
        return head + text[start:end], [*spans[:-1], (len(head), len(head) + end - start)]

    def _bos(self, text: str) -> str:
        bos = self.tokenizer.bos_token
        return bos + text if self.add_bos and bos and not text.startswith(bos) else text

    def _with_ends(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """The text with those beginning- and end-of-sequence tokens that are missing."""
        eos = self.tokenizer.eos_token
        start, end = spans[-1]
        if self.add_eos and eos and eos not in text[start:]:
            text, spans = text[:end] + eos, [*spans[:-1], (start, end + len(eos))]
        whole = self._bos(text)
        shift = len(whole) - len(text)
        return whole, [(a + shift, b + shift) for a, b in spans]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _tokenise(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        mask = _mask(encoding.offsets, spans)
        return (encoding.ids, mask) if mask else self._piecewise(text, spans)

    def _piecewise(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        """Each turn tokenised by itself, as an engine does with a prompt.

        For where a token of the whole text would straddle a border, as in a prompt that ends with a
        space.
        """
        ids: list[int] = []
        mask: list[bool] = []
        end = 0
        for span in spans:
            for start, stop, is_target in ((end, span[0], False), (*span, True)):
                piece = self._ids(text[start:stop])
                ids += piece
                mask += [is_target] * len(piece)
            end = span[1]
        again = self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        if again != text:  # this tokenizer adds something to the start of each text
            raise RowError("a token straddles the start or end of a turn")
        return ids, mask


def _assistant_turns(messages: Sequence[Message]) -> list[int]:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise RowError("no assistant turn")
    return turns


def _mask(offsets: list[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens lie in a span; empty if one lies across the border of a span."""
    mask = [False] * len(offsets)
    for start, end in spans:
        first, after = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
        for token, border in ((first, start), (after, end)):
            if token and offsets[token - 1][1] > border:
                return []
        mask[first:after] = [True] * (after - first)
    return mask
