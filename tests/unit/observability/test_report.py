import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources

import pytest

from nemo_like.observability.records import Answer, Table, ownership_table
from nemo_like.observability.report import write_report
from nemo_like.observability.run_folder import RunFolder
from nemo_like.observability.sinks import JsonlSink

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</pre></style>"
OWNERS = [
    {"name": "model.q_proj.weight", "shape": [4, 6], "optimizer": "muon", "reason": "hidden"},
    {"name": "model.k_proj.weight", "shape": [4, 6], "optimizer": "muon", "reason": "hidden"},
    {"name": "model.norm.weight", "shape": [1000], "optimizer": "adamw", "reason": "norm"},
]


class Tags(HTMLParser):
    """The tags, attributes and identifiers of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def make_run(tmp_path, text="plain", num_steps=12):
    folder = RunFolder.create(tmp_path)
    sink = JsonlSink(folder.metrics)
    for step in range(1, num_steps + 1):
        values = {
            "train/loss": 1 / step,
            "train/grad_norm": math.nan if step == 3 else 1.0,
            f"train/{text}": 1.0,
            "train/muon/update_rms": math.inf if step == 4 else 0.1,
            "timing/train": 0.9,
            f"timing/{text}": 0.1,
            "performance/wall_s": 1.0,
        }
        sink.log(step, values)
        sink.log(step, {"validation/accuracy": step / 20})
    folder.append_answers([Answer(num_steps, text, text, text, step > 3) for step in range(3)])
    folder.write_tables([Table(text, (text, "n"), ((text, "12"),)), ownership_table(OWNERS)])
    folder.write_facts({"device": text, "command": text})
    folder.write_config({"policy": {"model_name": text}})
    return folder


def test_the_page_shows_curves_answers_configuration_tables_and_facts(tmp_path):
    page = write_report(make_run(tmp_path)).read_text()
    for expected in (
        "exp_001",
        "Where the time of a step goes",
        "Gradient norm",
        "Accuracy on held-out problems",
        "Answers to held-out prompts",
        "model.q_proj.weight",
        "model_name: plain",
        "Which parameters each optimizer owns, and why",
        "60.0%",
    ):
        assert expected in page
    tags = Tags(page)
    assert tags.tags.count("svg") == 5


@pytest.mark.parametrize("num_steps", [0, 1, 2, 1000])
def test_any_number_of_steps_makes_a_page_without_a_warning(tmp_path, num_steps):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tags(write_report(make_run(tmp_path, num_steps=num_steps)).read_text())


def test_an_empty_folder_makes_a_page(tmp_path):
    assert "No step has been finished yet" in write_report(RunFolder.create(tmp_path)).read_text()


def test_nothing_that_a_model_or_a_name_says_becomes_markup(tmp_path):
    page = write_report(make_run(tmp_path, EVIL)).read_text()
    tags = Tags(page)
    assert "script" not in tags.tags and "img" not in tags.tags
    assert not any(name.startswith("on") for name, _ in tags.attributes)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = write_report(make_run(tmp_path)).read_text()
    attributes = Tags(page).attributes
    links = [v for k, v in attributes if k in ("src", "href", "xlink:href", "data", "action")]
    assert all(link.startswith("#") for link in links)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_identifiers_are_unique_and_every_reference_has_one(tmp_path):
    page = write_report(make_run(tmp_path)).read_text()
    attributes = Tags(page).attributes
    ids = [v for k, v in attributes if k == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", page))
    used |= {v[1:] for k, v in attributes if k == "xlink:href"}
    assert used and used <= set(ids)


def test_charts_take_their_colours_from_the_page(tmp_path):
    page = write_report(make_run(tmp_path)).read_text()
    assert "var(--muted)" in page and "prefers-color-scheme: dark" in page
    assert "#010203" not in page and "#010204" not in page


def test_a_report_can_be_made_again_from_the_folder_alone(tmp_path):
    folder = make_run(tmp_path)
    first = write_report(folder).read_bytes()
    folder.report.unlink()
    command = [sys.executable, "-m", "nemo_like.observability.report", str(folder.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder.report)
    assert folder.report.read_bytes() == first


def test_a_folder_that_is_no_log_folder_is_refused(tmp_path):
    command = [sys.executable, "-m", "nemo_like.observability.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "holds no metrics.jsonl" in done.stdout


def test_the_template_is_part_of_the_package():
    assert (resources.files("nemo_like.observability") / "report.html.jinja").is_file()


def test_the_ownership_table_counts_what_each_optimizer_owns():
    assert ownership_table(OWNERS).rows == (
        ("muon", "hidden", "model.q_proj.weight", "2", "48", "0.0"),
        ("adamw", "norm", "model.norm.weight", "1", "1,000", "0.0"),
    )
