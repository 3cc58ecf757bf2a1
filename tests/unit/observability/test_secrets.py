import time

import pytest

from nemo_like.observability.secrets import REDACTED, is_secret_name, redact, redact_tree


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "api_key",
        "apikey",
        "x-api-key",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "password",
        "db.password",
        "clientSecret",
        "accessToken",
        "GOOGLE_CREDENTIALS",
    ],
)
def test_names_of_secrets_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "num_loss_tokens",
        "tokenizer",
        "eos_token",
        "pad_token",
        "tokens_per_s",
        "monkey",
        "input_key",
        "output_key",
        "secretary",
        "stop_token_ids",
        "data_path",
        "muon_tp_mode",
    ],
)
def test_ordinary_names_are_not(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "found hf_QqWwEeRrTtYyUuIiOoPpAaSs in the cache",
        "key sk-proj-0123456789abcdefghij0123",
        "wandb_v1_0123456789abcdefghij",
        "ghp_0123456789abcdefghijABCDEFGHIJ012345",
        "AKIAABCDEFGHIJKLMNOP",
        "nvapi-0123456789abcdefghijABCD",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcDEF",
        "-----BEGIN RSA PRIVATE KEY-----\nAbC+/=\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_shapes_of_secrets_are_known_anywhere_in_a_text(text):
    cleaned = redact(text)
    assert REDACTED in cleaned
    assert not any(word in cleaned for word in text.split() if len(word) > 15)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("++env.api_key=abc123 sft.seed=1", f"++env.api_key={REDACTED} sft.seed=1"),
        ('{"password": "two words", "a": 1}', f'{{"password": {REDACTED}, "a": 1}}'),
        ("password=12345678", f"password={REDACTED}"),
        ("hf_token: abc123\nlr: 0.1", f"hf_token: {REDACTED}\nlr: 0.1"),
        ("https://h/x?token=abc123&a=b", f"https://h/x?token={REDACTED}&a=b"),
        ("https://me:pa@ss@host:5000/x", f"https://{REDACTED}@host:5000/x"),
        ("Authorization: Bearer abcdef123456", f"Authorization: Bearer {REDACTED}"),
    ],
)
def test_what_stands_under_a_secret_name_goes_and_the_rest_stays(text, cleaned):
    assert redact(text) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "loss of the last token: 2.31, 1,234 tokens/s",
        "basic arithmetic, bearer certificates",
        "policy.model_name=Qwen/Qwen3-235B-A22B data.train.input_key=question",
        "eos_token: <|im_end|>",
        "token: null",
        "see https://example.org/a@b and me@example.org",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "task-completion-rate-of-the-model",
    ],
)
def test_ordinary_text_is_not_touched(text):
    assert redact(text) == text


def test_long_monotonous_answers_are_searched_in_linear_time():
    for piece in ("a", "a-", "a:", "token=", "http://", "x ", "-----BEGIN "):
        began = time.process_time()
        redact(piece * 20_000)
        assert time.process_time() - began < 1.0, piece


def test_values_of_secret_environment_variables_go_from_any_text(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain-looking-words")
    monkeypatch.setenv("OTHER_API_KEY", "x")  # too short to search for
    assert redact("at plain-looking-words, x") == f"at {REDACTED}, x"


def test_a_tree_keeps_its_shape_and_loses_its_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "value-of-the-token")
    tree = {
        "policy": {"dtensor_cfg": {"env_vars": {"HF_TOKEN": "other", "OMP_NUM_THREADS": "1"}}},
        "urls": ("http://a:b@c", "http://c"),
        "password": 12345678,
        "token": None,
        "api_key": "",
        "credentials": {"user": "me", "pass": "word"},
        "note": "uses value-of-the-token",
        "lr": 0.1,
    }
    assert redact_tree(tree) == {
        "policy": {"dtensor_cfg": {"env_vars": {"HF_TOKEN": REDACTED, "OMP_NUM_THREADS": "1"}}},
        "urls": [f"http://{REDACTED}@c", "http://c"],
        "password": REDACTED,
        "token": None,
        "api_key": "",
        "credentials": REDACTED,
        "note": f"uses {REDACTED}",
        "lr": 0.1,
    }
    assert tree["password"] == 12345678
