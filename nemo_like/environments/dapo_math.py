r"""Whether what follows the last `Answer:` is what was expected, letter by letter.

Source: Yu et al., DAPO, https://arxiv.org/abs/2503.14476, section 4.1, the form of the answer and a
reward by rule; Lewkowycz et al., Minerva, https://arxiv.org/abs/2206.14858, appendix D.1, the
normalization before the comparison. Here a word is removed only where it stands alone, and commas
only between thousands, so that the list 1,2 is not the number 12.
"""

from __future__ import annotations

import re

_LONGEST = 300
_ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

_ARTICLE = re.compile(r"\ban? ")
_WORDS = re.compile(
    r"(?<![A-Za-z\\])(?:square|ways|integers|multiples|digits|edges|points|students|meals|units"
    r"|degrees|dollars|cents|mph|hours|minutes|inches|feet|km|cm|gm|meters|pounds)(?![A-Za-z])"
)
_LIST_AND = re.compile(r",?\s*\\text\{\s*and\s*\}")
_EMPTY_TEXT = re.compile(r"\\text\{[\s.]*(?:[ms]\b)?\s*\}(?:\^[23])?")
_NOTHING = re.compile(
    r'\\mathrm\{th\}|\^\\circ|\^\{\\circ\}|\\ldots|\\dots|\\;|,\\!|\{,\}|\\\$|\\ |"'
)
_FIRST_FORMULA = re.compile(r".*?\$(.*?)\$.*")
_WRAPPED = re.compile(r"\\(?:text|textbf|overline)\{([^{}]*)\}")
_BOXED = re.compile(r"\\boxed\{(.*)\}")
_SHORT_FRACTION = re.compile(r"frac([^{}])([^{}])")
_SHORT_ROOT = re.compile(r"sqrt([^{\[])")
_THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")


def normalized(answer: str) -> str:
    r"""An answer in the form in which equal ones are mostly the same text.

    Of an equation the right side; of text around a formula the formula; without units, articles,
    spacing, and the commands that only set text. `\frac12` becomes `\frac{1}{2}`, `\sqrt2` becomes
    `\sqrt{2}`, and `1,000` becomes `1000`.
    """
    answer = answer.rpartition("=")[2].replace("mbox", "text").replace(".$", "$")
    answer = _LIST_AND.sub(",", answer)
    for ignored in (_ARTICLE, _WORDS, _EMPTY_TEXT, _NOTHING):
        answer = ignored.sub("", answer)
    answer = "".join(answer.split())
    for kept in (_FIRST_FORMULA, _WRAPPED, _BOXED):
        answer = kept.sub(r"\1", answer)
    answer = _SHORT_FRACTION.sub(r"frac{\1}{\2}", answer)
    answer = _SHORT_ROOT.sub(r"sqrt{\1}", answer).replace("$", "")
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def reward(prompt: str, answer: str, expected: str) -> float:
    """1 if the last `Answer:` in the last 300 characters is followed by what was expected, else 0.

    Case does not matter in `Answer:`, and the line ends the answer.
    """
    found = _ANSWER.findall(answer[-_LONGEST:])
    return float(bool(found) and normalized(found[-1]) == normalized(expected))
