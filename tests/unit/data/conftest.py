import json

import pytest

from nemo_like.config.policy import TokenizerConfig
from nemo_like.data.chat import ChatEncoder
from nemo_like.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TokenizerConfig(), "tiny-qwen3")


@pytest.fixture(scope="session")
def encoder(tokenizer):
    return ChatEncoder(tokenizer)


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows (objects, or lines as bytes) to a file and gives its path."""

    def write(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write
