"""Whatever is typed, the answer is a valid tree or one readable report, never a traceback."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_like.config import compat, compose
from nemo_like.config.command_line import to_yaml
from nemo_like.config.draft import Draft
from nemo_like.config.grpo import GRPOTree
from nemo_like.config.report import nearest_keys, report
from nemo_like.config.schema import defaults, known_paths
from nemo_like.config.sft import SFTTree
from nemo_like.config.validate import validate
from nemo_like.errors import ConfigError

KNOWN = known_paths(SFTTree)
SCHEMA = compose.Schema(KNOWN, defaults(SFTTree))
KNOWN_IN_GRPO = known_paths(GRPOTree)
quick = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

words = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
paths = sorted({*KNOWN, *KNOWN_IN_GRPO})
names = st.sampled_from(sorted({part for path in paths for part in path.split(".")})) | words
scalars = st.none() | st.booleans() | st.integers() | st.floats() | words
trees = st.recursive(
    scalars,
    lambda t: st.lists(t, max_size=3) | st.dictionaries(names, t, max_size=4),
    max_leaves=12,
)
sections = st.dictionaries(
    st.sampled_from(["sft", "grpo", "loss_fn", "env", "policy", "data", "cluster"]) | names, trees
)


@pytest.fixture(scope="module")
def base() -> compose.Files:
    return compose.read_files(compose.CONFIGS / "sft_tiny.yaml", ())


@pytest.mark.parametrize(("tree", "known"), [(SFTTree, KNOWN), (GRPOTree, KNOWN_IN_GRPO)])
@quick
@given(values=sections)
def test_any_nested_values_give_a_tree_or_a_report(tree, known, values):
    draft = Draft(values, defaults(tree))
    compat.translate(draft)
    node, problems = validate(draft, tree, known)
    assert (node is None) == bool(problems)
    assert report(problems, draft)


@quick
@given(
    key=st.sampled_from(sorted(KNOWN)) | st.lists(names, max_size=3).map(".".join),
    value=words | st.sampled_from(["1", "[1]", "{a: 1}", "${sft.seed}", "null", "???", "a,b"]),
    prefix=st.sampled_from(["", "+", "++", "~"]),
    joint=st.sampled_from(["=", "", "@x=", "/y="]),
)
def test_any_override_gives_a_tree_or_a_report(base, key, value, prefix, joint):
    combinations, problems = compose.parse_overrides([prefix + key + joint + value], multirun=False)
    assert problems or combinations
    for overrides in combinations:
        draft = compose.apply(base, overrides.values, SCHEMA)
        compat.translate(draft)
        node, problems = validate(draft, SFTTree, KNOWN)
        assert (node is None) == bool(problems)
        assert report(problems, draft)


@quick
@given(text=words | trees.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True)))
def test_any_file_gives_values_or_a_report(tmp_path, text):
    path = tmp_path / "fuzz.yaml"
    path.write_text(text)
    try:
        draft = compose.apply(compose.read_files(path, ()), (), SCHEMA)
    except ConfigError as error:
        assert "fuzz" in str(error)
    else:
        assert isinstance(draft.values, dict)


@settings(quick, max_examples=20)
@given(
    lr=st.floats(min_value=0, allow_infinity=False, allow_nan=False),
    name=words.filter(lambda text: text != "???"),
    overrides=st.dictionaries(
        words, scalars.filter(lambda v: v == v and v not in (math.inf, -math.inf))
    ),
)
def test_any_tree_survives_being_written_and_read(tmp_path, lr, name, overrides):
    tree = SFTTree.model_validate(
        {
            "policy": {
                "optimizer": {"lr": lr},
                "hf_config_overrides": {"x": list(overrides.values())},
            },
            "logger": {"wandb": {"name": name}},
        }
    )
    path = tmp_path / "tree.yaml"
    path.write_text(to_yaml(tree))
    draft = compose.apply(compose.read_files(path, ()), (), SCHEMA)
    again, problems = validate(draft, SFTTree, KNOWN)
    assert not problems
    assert again == tree


@quick
@given(path=st.sampled_from(paths), where=st.floats(0, 0.999))
def test_a_key_with_one_letter_missing_is_found_again(path, where):
    known = KNOWN if path in KNOWN else KNOWN_IN_GRPO
    place, _, name = path.rpartition(".")
    if len(name) < 5:
        return
    at = int(where * len(name))
    typo = f"{place}.{name[:at]}{name[at + 1 :]}".lstrip(".")
    if typo not in known:
        assert path in nearest_keys(typo, known)
