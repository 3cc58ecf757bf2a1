import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "observability.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_page_run(number, capsys):
    exec(compile(EXAMPLES[number], f"{PAGE}, example {number}", "exec"), {})
    if "summary" in EXAMPLES[number]:
        assert "0.5000 (from 1.0000)" in capsys.readouterr().out
