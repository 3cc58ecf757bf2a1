"""Writes the tokenizer of the bundled tiny model: `python tools/make_tokenizer.py`.

A byte-level BPE of 320 ids: 256 bytes, 61 merges chosen by hand, 3 special tokens. No merge touches
a digit or an operator, so that a number is always the sequence of its digits; `Answer: ` and the
two chat headers are one token each, so that an arithmetic problem takes about 40 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

FOLDER = Path(__file__).parent.parent / "nemo_like" / "assets" / "models" / "tiny-qwen3"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_IDS = 320
CONTEXT = 2048
STRINGS = (
    *(
        "Answer: ",
        "user\n",
        "assistant\n",
        " t",
        " th",
        " the",
        " a",
        " an",
        " and",
        " s",
        " w",
        " o",
    ),
    *(
        " b",
        " c",
        " f",
        " m",
        " p",
        " h",
        " d",
        "in",
        "ing",
        "er",
        "re",
        "on",
        "an",
        "en",
        "at",
        "es",
    ),
    *(
        "ou",
        "or",
        "it",
        "is",
        "ed",
        "al",
        "st",
        "ll",
        "le",
        " l",
        " n",
        " g",
        "ic",
        "om",
        "ch",
        "ay",
    ),
)
"""What is one token. The first ones win where two overlap."""


def byte_symbols() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def build_tokenizer() -> Tokenizer:
    """The tokenizer: bytes, then one merge per further character of each string, then specials."""
    symbols = byte_symbols()
    vocabulary = {symbols[b]: b for b in range(256)}
    merges: list[tuple[str, str]] = []
    for string in STRINGS:
        written = "".join(symbols[b] for b in string.encode())
        for end in range(2, len(written) + 1):
            if written[:end] not in vocabulary:
                merges.append((written[: end - 1], written[end - 1]))
                vocabulary[written[:end]] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    # Without the usual splitting into words: "Answer: " has a space at its end.
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    if tokenizer.get_vocab_size() != NUM_IDS:
        raise SystemExit(f"{tokenizer.get_vocab_size()} ids, expected {NUM_IDS}: change STRINGS")
    return tokenizer


def main() -> None:
    """Write tokenizer.json and tokenizer_config.json beside the bundled model's config.json."""
    build_tokenizer().save(str(FOLDER / "tokenizer.json"), pretty=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "clean_up_tokenization_spaces": False,
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
