import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_like.config.data import DataConfig, DatasetConfig
from nemo_like.data import rows as rows_module
from nemo_like.data.chat import ChatEncoder
from nemo_like.data.datasets import Limits, load_data
from nemo_like.data.rows import RawRow, _parse
from nemo_like.errors import ConfigError, DataError

GOOD = {"input": "7+5=?", "output": "Answer: 12"}
LIMITS = Limits(max_length=64, vocab_size=320)
CALL = {"id": "1", "function": {"name": "add", "arguments": "{}"}}
USER = {"role": "user", "content": "7+5=?"}
REPLY = {"role": "assistant", "content": "Answer: 12"}


def load(encoder, *, limits=LIMITS, num_prompts=0, bad_rows="refuse", max_bad_rows=0.01, **source):
    validation = source.pop("validation", None)
    num_workers = source.pop("num_workers", 1)
    config = DataConfig(
        train=source,
        validation=validation,
        bad_rows=bad_rows,
        max_bad_rows=max_bad_rows,
        num_workers=num_workers,
    )
    return load_data(config, encoder, limits, seed=1, num_prompts=num_prompts)


def texts(encoder, corpus):
    return [encoder.tokenizer.decode(list(example.token_ids)) for example in corpus]


def chat(*messages):
    return {"messages": list(messages)}


BAD_LINES = {
    "half a line": (b'{"input": "7+5', "not JSON"),
    "single quotes": (b"{'input': '7', 'output': '8'}", "not JSON"),
    "two objects": (b'{"input": "7", "output": "8"} {}', "not JSON"),
    "trailing comma": (b'{"input": "7", "output": "8",}', "not JSON"),
    "NaN": (b'{"input": "7", "output": "8", "score": NaN}', "not JSON"),
    "deep nesting": (b'{"input": ' + b"[" * 200_000, "not JSON"),
    "endless number": (b'{"input": ' + b"1" * 5000 + b"}", "not JSON"),
    "control character": (b'{"input": "a\x01", "output": "8"}', "not JSON"),
    "a list": (b'["7", "8"]', "not an object"),
    "a string": (b'"7+5"', "not an object"),
    "null row": (b"null", "not an object"),
    "Latin-1": ('{"input": "é", "output": "8"}'.encode("latin-1"), "wrong encoding"),
    "a byte cut from a character": (b'{"input": "\xe2\x82", "output": "8"}', "wrong encoding"),
    "encoded surrogate": (b'{"input": "\xed\xa0\x80", "output": "8"}', "wrong encoding"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "byte order mark"),
    "escaped surrogate": (b'{"input": "\\ud800", "output": "8"}', "half a surrogate pair"),
    "key twice": (b'{"input": "7", "input": "8", "output": "9"}', "key given twice"),
    "empty object": (b"{}", "missing column"),
    "missing input": (b'{"output": "8"}', "missing column"),
    "missing output": (b'{"input": "7", "Output": "8"}', "missing column"),
    "null input": (b'{"input": null, "output": "8"}', "null"),
    "null output": (b'{"input": "7", "output": null}', "null"),
    "a number": (b'{"input": "7", "output": 8}', "not text"),
    "a nested object": (b'{"input": {"text": "7"}, "output": "8"}', "not text"),
    "empty response": (b'{"input": "7", "output": ""}', "empty response"),
    "too long": (json.dumps({**GOOD, "input": "7" * 100}).encode(), "too long"),
}
BAD_TALKS = {
    "no list": ({"messages": "hello"}, "messages are not a list"),
    "an object": ({"messages": USER}, "messages are not a list"),
    "missing": ({"conversation": []}, "missing column"),
    "null": ({"messages": None}, "null"),
    "empty": (chat(), "no messages"),
    "not an object": (chat(USER, "Answer: 12"), "message is not an object"),
    "unknown role": (chat(USER, {**REPLY, "role": "bot"}), "unknown role"),
    "no role": (chat(USER, {"content": "12"}), "unknown role"),
    "null role": (chat({**USER, "role": None}, REPLY), "unknown role"),
    "role is a list": (chat({**USER, "role": ["user"]}, REPLY), "unknown role"),
    "no assistant": (chat(USER, USER), "no assistant turn"),
    "no content": (chat({"role": "user"}, REPLY), "missing column"),
    "null content": (chat({**USER, "content": None}, REPLY), "missing column"),
    "content parts": (chat({**USER, "content": [{"type": "text"}]}, REPLY), "not text"),
    "empty response": (chat(USER, {**REPLY, "content": ""}), "empty response"),
    "surrogate": (chat(USER, {**REPLY, "content": "\ud800"}), "half a surrogate pair"),
    "call without id": (
        chat(USER, {**REPLY, "tool_calls": [{**CALL, "id": None}]}),
        "tool call without id",
    ),
    "call without name": (
        chat(USER, {**REPLY, "tool_calls": [{**CALL, "function": {}}]}),
        "tool call without function name",
    ),
    "calls are no list": (chat(USER, {**REPLY, "tool_calls": CALL}), "tool calls are not a list"),
    "answer to no call": (
        chat(USER, {"role": "tool", "content": "12", "tool_call_id": "9"}, REPLY),
        "tool answer to no call",
    ),
    "answer without id": (
        chat(USER, {"role": "tool", "content": "12"}, REPLY),
        "tool answer to no call",
    ),
}


@pytest.mark.parametrize(("line", "rule"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_reported_with_its_file_row_and_rule(encoder, jsonl, line, rule):
    path = jsonl(GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        load(encoder, data_path=path)
    report = str(caught.value)
    assert f"  {rule} (1)\n    {path}:2" in report
    assert report.startswith("1 of 3 rows can not be used:")


@pytest.mark.parametrize(("row", "rule"), BAD_TALKS.values(), ids=BAD_TALKS)
def test_a_bad_conversation_is_reported_with_its_file_row_and_rule(encoder, jsonl, row, rule):
    path = jsonl(chat(USER, REPLY), row)
    with pytest.raises(DataError) as caught:
        load(encoder, data_path=path, messages_key="messages")
    assert f"  {rule} (1)\n    {path}:2" in str(caught.value)


def test_a_report_names_the_field_inside_a_conversation(encoder, jsonl):
    path = jsonl(chat(USER, {**REPLY, "tool_calls": [CALL, {**CALL, "id": ""}]}))
    with pytest.raises(DataError, match=r"messages\[1\]\.tool_calls\[1\]"):
        load(encoder, data_path=path, messages_key="messages")


@pytest.mark.parametrize("case", ["empty", "blank lines", "UTF-16", "gzip"])
def test_a_file_that_is_bad_as_a_whole_is_refused_even_where_rows_may_be_dropped(
    encoder, tmp_path, case
):
    text = json.dumps(GOOD)
    contents = {
        "empty": (b"", "empty file"),
        "blank lines": (b"\n \n\n", "empty file"),
        "UTF-16": (text.encode("utf-16"), "UTF-16"),
        "gzip": (b"\x1f\x8b\x08\x00", "gzip"),
    }
    path = tmp_path / "rows.jsonl"
    path.write_bytes(contents[case][0])
    with pytest.raises(DataError, match=contents[case][1]):
        load(encoder, data_path=str(path), bad_rows="drop", max_bad_rows=1.0)


def test_rows_of_all_sources_and_all_rules_are_in_one_report(encoder, jsonl):
    first = jsonl(GOOD, b"{", {"input": "7"}, name="first.jsonl")
    second = jsonl(*[{"input": "x" * 99, "output": "y"}] * 7, name="second.jsonl")
    with pytest.raises(DataError) as caught:
        load(encoder, data_path=first, validation={"data_path": second})
    report = str(caught.value)
    assert report.startswith("9 of 10 rows")
    assert "too long (7)" in report and "and 2 more" in report
    assert f"{first}:2" in report and f"{first}:3, field `output`" in report
    assert report.index("too long") < report.index("not JSON")
    assert "(data.train: 2 of 3, data.validation: 7 of 7)" in report
    assert report.endswith(
        "Correct the rows: without the bad ones nothing is left of data.validation."
    )


def test_bad_rows_are_dropped_up_to_the_stated_share_and_told(encoder, jsonl):
    path = jsonl(*[GOOD] * 9, b"{")
    data = load(encoder, data_path=path, bad_rows="drop", max_bad_rows=0.1)
    assert len(data.train[0].corpus) == 9
    assert data.warning is not None and f"{path}:10" in data.warning
    with pytest.raises(DataError, match=r"share of 0\.1000, more than data\.max_bad_rows=0\.09"):
        load(encoder, data_path=path, bad_rows="drop", max_bad_rows=0.09)


def test_what_the_report_proposes_is_accepted(encoder, jsonl):
    path = jsonl(GOOD, GOOD, b"{")
    with pytest.raises(DataError) as caught:
        load(encoder, data_path=path)
    share = float(str(caught.value).rsplit("max_bad_rows=", 1)[1].rstrip("."))
    load(encoder, data_path=path, bad_rows="drop", max_bad_rows=share)


def test_a_large_source_does_not_excuse_the_bad_rows_of_a_small_one(encoder, jsonl):
    path = jsonl(*[GOOD] * 3, *[b"{"] * 4)
    source = {"data_path": path, "validation": {"dataset_name": "arithmetic", "num_rows": 512}}
    with pytest.raises(DataError, match=r"4 of 519 rows \(data\.train: 4 of 7\)") as caught:
        load(encoder, **source)
    share = float(str(caught.value).rsplit("max_bad_rows=", 1)[1].rstrip("."))
    with pytest.raises(DataError, match=r"In data\.train that is a share of 0\.5715"):
        load(encoder, **source, bad_rows="drop", max_bad_rows=0.5)
    data = load(encoder, **source, bad_rows="drop", max_bad_rows=share)
    assert len(data.train[0].corpus) == 3


def test_a_share_is_exactly_the_share(encoder, jsonl):
    path = jsonl(*[GOOD] * 71, *[b"{"] * 29)  # 0.29 * 100 is less than 29 in floats
    with pytest.raises(DataError, match=r"data\.max_bad_rows=0\.2900\.$"):
        load(encoder, data_path=path)
    load(encoder, data_path=path, bad_rows="drop", max_bad_rows=0.29)


def test_an_empty_file_is_not_called_a_share_of_rows(encoder, jsonl):
    source = {"data_path": jsonl(), "validation": {"dataset_name": "arithmetic"}}
    with pytest.raises(DataError) as caught:
        load(encoder, **source)
    assert str(caught.value).startswith("1 file can not be used:\n  empty file (1)\n")
    source["validation"] = {"data_path": jsonl(GOOD, b"{", name="second.jsonl")}
    with pytest.raises(DataError, match=r"1 of 2 rows \(data\.validation: 1 of 2\) and 1 file can"):
        load(encoder, **source)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_longest_row_is_shown_first_and_the_length_it_needs_is_accepted(
    encoder, jsonl, num_workers
):
    rows = [{**GOOD, "input": "7" * n} for n in (70, 71, 72, 73, 74, 75, 200)]
    path = jsonl(GOOD, *rows)
    with pytest.raises(DataError) as caught:
        load(encoder, data_path=path, num_workers=num_workers)
    report = str(caught.value)
    assert f"  too long (7)\n    {path}:8, " in report and "and 2 more" in report
    needed = int(re.search(r"set policy\.max_total_sequence_length=(\d+)\n", report)[1])
    assert report.index("max_total_sequence_length=") < report.index("data.bad_rows=drop")
    with pytest.raises(DataError, match=r":8, \d+ tokens"):
        load(encoder, data_path=path, limits=Limits(needed - 1))
    assert len(load(encoder, data_path=path, limits=Limits(needed)).train[0].corpus) == 8


@pytest.mark.parametrize(("max_length", "raises_both"), [(512, False), (64, True)])
def test_a_row_too_long_for_the_data_s_own_limit_names_that_limit(
    encoder, jsonl, max_length, raises_both
):
    path = jsonl(GOOD, {**GOOD, "input": "7" * 90})
    config = DataConfig(train=DatasetConfig(data_path=path), max_input_seq_length=60)
    with pytest.raises(DataError, match=r"data\.max_input_seq_length=\d{3}\n") as caught:
        load_data(config, encoder, Limits(max_length), seed=1)
    assert ("policy.max_total_sequence_length=" in str(caught.value)) == raises_both


COLUMNS = {
    "GSM8K": ({"question": "7", "answer": "8"}, "input_key=question data.train.output_key=answer"),
    "nearest name": ({"inputs": "7", "output": "8", "note": "x"}, "input_key=inputs"),
    "the only other": ({"input": "7", "reply": "8", "id": 5}, "output_key=reply"),
    "the other of a usual one": (
        {"prompt": "7", "text": "8"},
        "input_key=prompt data.train.output_key=text",
    ),
    "conversations": ({"text": "7", "messages": [USER, REPLY]}, "messages_key=messages"),
}


@pytest.mark.parametrize(("row", "settings"), COLUMNS.values(), ids=COLUMNS)
def test_the_columns_that_are_there_are_proposed_and_accepted(encoder, jsonl, row, settings):
    path = jsonl(row)
    with pytest.raises(DataError) as caught:
        load(encoder, data_path=path)
    assert f"set data.train.{settings}\n" in str(caught.value)
    keys = dict(part.removeprefix("data.train.").split("=") for part in settings.split())
    assert len(load(encoder, data_path=path, **keys).train[0].corpus) == 1


@pytest.mark.parametrize("row", [{"a": "7", "b": "8"}, {"input": "7", "score": 8}, {"input": "7"}])
def test_columns_are_not_guessed_where_several_or_none_would_do(encoder, jsonl, row):
    with pytest.raises(DataError, match="missing column") as caught:
        load(encoder, data_path=jsonl(row))
    assert "_key=" not in str(caught.value)


NESTED = {"prompt": [USER], "reward_model": {"ground_truth": "12"}}


def test_a_column_may_be_inside_of_objects_and_lists(encoder, jsonl):
    keys = {"input_key": "prompt.0.content", "output_key": "reward_model.ground_truth"}
    source = {"data_path": jsonl(NESTED), **keys}
    (prompt,) = load(encoder, validation=source, num_prompts=1, **source).validation[0].prompts
    assert ("7+5=?" in prompt.text, prompt.answer) == (True, "12")


def test_a_name_with_a_dot_is_looked_for_as_it_is_first(encoder, jsonl):
    row = {"input": "7+5=?", "a.b": "12", "a": {"b": "13"}}
    (text,) = texts(encoder, load(encoder, data_path=jsonl(row), output_key="a.b").train[0].corpus)
    assert "12" in text and "13" not in text


@pytest.mark.parametrize(
    "key", ["prompt.1.content", "prompt.x", "reward_model.c", "prompt.0.role.x"]
)
def test_a_column_that_is_not_inside_is_missing(encoder, jsonl, key):
    with pytest.raises(DataError, match="missing column") as caught:
        load(
            encoder, data_path=jsonl(NESTED), input_key=key, output_key="reward_model.ground_truth"
        )
    assert key in str(caught.value)


def test_one_odd_row_does_not_rename_the_column_of_all(encoder, jsonl):
    with pytest.raises(DataError, match="missing column") as caught:
        load(encoder, data_path=jsonl(GOOD, GOOD, {"input": "7", "outputs": "8"}))
    assert "_key=" not in str(caught.value)


def test_a_conversation_s_other_name_is_proposed(encoder, jsonl):
    path = jsonl({"id": "a", "conversations": [USER, REPLY]})
    with pytest.raises(DataError, match=r"set data\.train\.messages_key=conversations\n"):
        load(encoder, data_path=path, messages_key="messages")


def test_a_source_of_which_no_row_is_left_is_refused(encoder, jsonl):
    with pytest.raises(DataError, match="no row is left"):
        load(encoder, data_path=jsonl(b"{"), bad_rows="drop", max_bad_rows=1.0)


def test_a_huge_row_is_reported_and_the_rows_after_it_are_read(encoder, jsonl, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 100)
    path = jsonl(GOOD, {**GOOD, "input": "7" * 1000}, GOOD)
    with pytest.raises(DataError, match=r"1 of 3 rows(.|\n)*huge row(.|\n)*rows\.jsonl:2"):
        load(encoder, data_path=path)


def test_tokens_outside_the_models_vocabulary_are_reported(encoder, jsonl):
    with pytest.raises(DataError, match="token outside the vocabulary"):
        load(encoder, data_path=jsonl(GOOD), limits=Limits(64, vocab_size=300))


def test_ids_given_twice_are_reported(encoder, jsonl):
    path = jsonl({**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a"})
    with pytest.raises(DataError, match=r"id given twice \(1\)(.|\n)*:3"):
        load(encoder, data_path=path)


def test_a_row_whose_only_target_is_the_first_token_is_refused(tokenizer, jsonl):
    tokenizer = ChatEncoder(tokenizer).tokenizer
    plain = ChatEncoder(_without_template(tokenizer), add_eos=False)
    with pytest.raises(DataError, match="nothing to learn"):
        load(plain, data_path=jsonl({"input": "", "output": "7"}))


def _without_template(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    return other


@pytest.mark.parametrize(
    "text",
    ["\x00", "\u2028\u2029\x85", "👩‍👩‍👧‍👦🏳️‍🌈", "\u202eabc", "a" + "\u0301" * 15, "ﷺ𝔘", " \n\t "],
)
def test_extremes_of_unicode_come_back_unchanged(encoder, jsonl, text):
    row = {"input": text, "output": text}
    corpus = load(encoder, data_path=jsonl(row), limits=Limits(512)).train[0].corpus
    expected = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>"
    assert texts(encoder, corpus) == [expected]


def test_windows_line_ends_blank_lines_and_a_missing_last_line_end_are_no_faults(encoder, tmp_path):
    path = tmp_path / "rows.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(line + b"\r\n\r\n" + line + b"\n\n" + line)
    assert len(load(encoder, data_path=str(path)).train[0].corpus) == 3


def test_extra_columns_are_ignored(encoder, jsonl):
    rows = load(encoder, data_path=jsonl({**GOOD, "extra": [1, {"a": None}]})).train[0].corpus
    assert rows.fingerprint == load(encoder, data_path=jsonl(GOOD)).train[0].corpus.fingerprint


def test_parquet_folders_and_datasets_hold_the_same_rows_as_jsonl(encoder, jsonl, tmp_path):
    import datasets

    rows = [{"input": f"{i}+1=?", "output": f"Answer: {i + 1}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    folder = tmp_path / "folder"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows[3:]), folder / "b.parquet")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    (folder / "notes.txt").write_text("not data")
    sources = [
        {"data_path": jsonl(*rows)},
        {"data_path": str(tmp_path / "rows.parquet")},
        {"data_path": str(folder)},
        {"dataset_name": str(tmp_path / "saved")},
    ]
    found = {load(encoder, **source).train[0].corpus.fingerprint for source in sources}
    assert len(found) == 1


def test_conversations_in_parquet_are_read(encoder, jsonl, tmp_path):
    rows = [chat(USER, REPLY), chat(USER, REPLY, USER, REPLY)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    key = {"messages_key": "messages"}
    of_parquet = load(encoder, data_path=str(tmp_path / "rows.parquet"), **key)
    of_jsonl = load(encoder, data_path=jsonl(*rows), **key)
    assert of_parquet.train[0].corpus.fingerprint == of_jsonl.train[0].corpus.fingerprint


def test_a_damaged_parquet_file_is_reported(encoder, tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD] * 50), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged parquet file"):
        load(encoder, data_path=str(path))


def test_a_null_in_parquet_is_reported_with_its_row(encoder, tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, {**GOOD, "output": None}]), path)
    with pytest.raises(DataError, match=r"null \(1\)(.|\n)*rows\.parquet:2, field `output`"):
        load(encoder, data_path=str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"data_path": "/nowhere/rows.jsonl"}, "no such file"),
        ({"data_path": "rows.csv"}, "expected .jsonl or .parquet, not `.csv`"),
        ({"data_path": "."}, "no .jsonl or .parquet"),
        ({"dataset_name": "./nowhere"}, "can not be loaded"),
        ({"dataset_name": "arithmetic", "split": "test"}, "expected train or validation"),
    ],
)
def test_a_source_that_does_not_exist_is_a_config_error(
    encoder, tmp_path, monkeypatch, source, message
):
    monkeypatch.chdir(tmp_path)
    if source.get("data_path") == "rows.csv":
        (tmp_path / "rows.csv").write_text("input,output\n")
    with pytest.raises(ConfigError, match=message):
        load(encoder, **source)


def test_pickles_are_never_read(encoder, tmp_path):
    path = tmp_path / "rows.pkl"
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ConfigError, match="expected .jsonl or .parquet"):
        load(encoder, data_path=str(path))


def test_num_rows_takes_the_first(encoder, jsonl):
    path = jsonl(*[{**GOOD, "input": str(i)} for i in range(9)])
    corpus = load(encoder, data_path=path, num_rows=2).train[0].corpus
    assert ["user\n0" in texts(encoder, corpus)[0], "user\n1" in texts(encoder, corpus)[1]] == [
        True
    ] * 2
    assert len(corpus) == 2


def test_prompt_and_system_files_dress_every_row(encoder, jsonl, tmp_path):
    (tmp_path / "prompt.txt").write_text("Solve {} in \\boxed{{}}.")
    (tmp_path / "system.txt").write_text("Be brief.\n")
    files = {
        "prompt_file": str(tmp_path / "prompt.txt"),
        "system_prompt_file": str(tmp_path / "system.txt"),
    }
    plain = load(encoder, data_path=jsonl(GOOD), **files).train[0].corpus
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSolve 7+5=? in \\boxed{}."
    )
    assert texts(encoder, plain)[0].startswith(expected)
    talk = chat({"role": "system", "content": "Own."}, USER, REPLY)
    path = jsonl(talk, name="talk.jsonl")
    own = load(encoder, data_path=path, messages_key="messages", **files).train[0].corpus
    assert texts(encoder, own)[0].startswith(
        "<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user\nSolve"
    )


@pytest.mark.parametrize("content", ["no place", "{} and {}", "{name}", "{"])
def test_a_prompt_file_without_exactly_one_place_is_refused(encoder, jsonl, tmp_path, content):
    (tmp_path / "prompt.txt").write_text(content)
    with pytest.raises(ConfigError, match="prompt_file"):
        load(encoder, data_path=jsonl(GOOD), prompt_file=str(tmp_path / "prompt.txt"))


def test_what_is_held_out_is_never_trained_on_and_depends_on_the_seed_alone(encoder, jsonl):
    questions = [{**GOOD, "input": f"{i}+1=?"} for i in range(400)]
    again = [{**row, "output": "Answer: 13"} for row in questions]  # other answers, same questions
    path = jsonl(*questions, *again)
    data = load(encoder, data_path=path, split_validation_size=0.2)
    asked = [
        {t.split("assistant")[0] for t in texts(encoder, s.corpus)}
        for s in (data.train + data.validation)
    ]
    assert not asked[0] & asked[1]
    assert len(data.train[0].corpus) + len(data.validation[0].corpus) == 800
    assert 100 < len(data.validation[0].corpus) < 220
    same = load(encoder, data_path=path, split_validation_size=0.2)
    other = load(encoder, data_path=path, split_validation_size=0.2, seed=2)
    assert same.validation[0].corpus.fingerprint == data.validation[0].corpus.fingerprint
    assert other.validation[0].corpus.fingerprint != data.validation[0].corpus.fingerprint


def test_a_share_that_holds_out_nothing_is_refused(encoder, jsonl):
    with pytest.raises(DataError, match="held out"):
        load(encoder, data_path=jsonl(GOOD), split_validation_size=1e-6)


def test_prompts_are_the_first_of_the_held_out_rows(encoder, jsonl):
    path = jsonl(*[{**GOOD, "input": str(i)} for i in range(9)])
    data = load(
        encoder,
        data_path=path,
        validation={"data_path": path, "env_name": "math"},
        num_prompts=3,
    )
    source = data.validation[0]
    assert [prompt.index for prompt in source.prompts] == [0, 1, 2]
    for prompt in source.prompts:
        example = source.corpus[prompt.index]
        assert example.token_ids[: len(prompt.token_ids)] == prompt.token_ids
        assert prompt.answer == "Answer: 12"
    assert source.env_name == "math"
    assert data.train[0].prompts == ()


def test_several_sources_keep_their_weights(encoder, jsonl):
    sources = (
        DatasetConfig(data_path=jsonl(GOOD), weight=3.0),
        DatasetConfig(dataset_name="arithmetic", num_rows=5),
    )
    data = load_data(DataConfig(train=sources), encoder, LIMITS, seed=1)
    assert [(s.weight, len(s.corpus)) for s in data.train] == [(3.0, 1), (1.0, 5)]


def test_more_processes_give_the_same_corpus_and_the_same_report(encoder, jsonl):
    path = jsonl(*[{**GOOD, "input": str(i)} for i in range(1200)], b"{", {"input": "7"})
    one, two = (load(encoder, data_path=path, num_workers=n, bad_rows="drop") for n in (1, 2))
    assert one.train[0].corpus.fingerprint == two.train[0].corpus.fingerprint
    assert one.warning is not None and one.warning == two.warning


def test_arithmetic_rows_are_learned_as_they_are(encoder):
    data = load(encoder, dataset_name="arithmetic", num_rows=50)
    assert all(
        "=?<|im_end|>" in t and "Answer: " in t for t in texts(encoder, data.train[0].corpus)
    )


@settings(max_examples=500)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_row_or_a_reported_fault(line):
    row = RawRow("file", 1, _parse(line))
    assert isinstance(row.value, dict | DataError)
