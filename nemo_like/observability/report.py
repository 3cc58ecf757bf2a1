"""The page that a run leaves: curves, answers, configuration, facts; one file, no network.

python -m nemo_like.observability.report logs/exp_001     # make it again
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nemo_like.errors import NemoLikeError
from nemo_like.observability.curves import charts_of, read_series
from nemo_like.observability.headlines import headlines
from nemo_like.observability.records import is_number
from nemo_like.observability.run_folder import RunFolder, read_lines


def write_report(folder: RunFolder) -> Path:
    """The path of `report.html`, made new from the files of the folder."""
    from nemo_like.observability.plots import draw

    series = read_series(folder.metrics)
    page = render(
        "report.html.jinja",
        name=folder.path.resolve().name,
        headlines=headlines(series),
        charts=[draw(chart) for chart in charts_of(series)],
        answers=_answers_by_step(folder),
        tables=_json_of(folder.tables, []),
        facts=_json_of(folder.facts, {}),
        config=folder.config.read_text() if folder.config.exists() else "",
    )
    temporary = folder.report.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(folder.report)
    return folder.report


def render(template: str, *, beside: Path | None = None, **values: Any) -> str:
    """The page that a template here, or in the folder `beside`, makes of values."""
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

    # Everything is escaped, whatever the file's name, since answers of a model may be anything.
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("nemo_like.observability", "."), FileSystemLoader(beside or [])]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["number_text"] = is_number
    return environment.get_template(template).render(values)


def main() -> int:
    """Make the report of a log folder again; returns the exit code."""
    from nemo_like.observability.console import RunConsole

    parser = argparse.ArgumentParser(description="Make report.html again from a log folder.")
    parser.add_argument("folder", type=Path, help="such as logs/exp_001")
    path: Path = parser.parse_args().folder
    console = RunConsole()
    try:
        console.say(str(write_report(RunFolder.of_run(path))))
    except NemoLikeError as error:
        console.say(str(error))
        return error.exit_code
    return 0


def _answers_by_step(folder: RunFolder) -> list[tuple[int, list[dict[str, Any]]]]:
    """The latest step first; of a prompt answered twice at one step, the last answer."""
    steps: dict[int, dict[str, dict[str, Any]]] = {}
    for record in read_lines(folder.samples):
        steps.setdefault(record["step"], {})[record["prompt"]] = record
    return [(step, list(steps[step].values())) for step in sorted(steps, reverse=True)]


def _json_of(path: Path, missing: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else missing


if __name__ == "__main__":
    raise SystemExit(main())
