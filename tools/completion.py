r"""Prints what completes keys and values of the examples' command lines in a shell.

    uv run tools/completion.py bash > ~/.nemo_like.bash     and `source` it in ~/.bashrc
    uv run tools/completion.py zsh  > ~/.nemo_like.zsh      and `source` it in ~/.zshrc
    uv run tools/completion.py fish > ~/.config/fish/conf.d/nemo_like.fish

It completes `uv run examples/run_*.py` and `python examples/run_*.py`, and leaves everything else
to what completed `uv` and `python` before; so source it after that. Print it again when the keys
have changed.
"""

# Why no library does it: Hydra's completion knows the keys of the composed files, and ours are
# sparse; shtab and argcomplete complete a program by its name, which is `uv` here. What starts
# Python at each press of a key takes 0.8 s of CPU, this 10 ms; and the schema changes rarely.

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from nemo_like.config.command_line import OPTIONS
from nemo_like.config.compose import CONFIGS
from nemo_like.config.schema import Key, known_paths
from nemo_like.plan.devices import DEVICES
from tools.command_line import Parser, run
from tools.migrate import TREES

# Reads lines of key, values, and the algorithm if only one has it. A word without `=` is completed
# up to the next dot; `+`, `++` and `~` may stand before it.
PROGRAM = r"""
BEGIN { FS = "\t"; word = ENVIRON["word"]; kind = ENVIRON["kind"]
        match(word, /^[+~]*/); mark = substr(word, 1, RLENGTH); word = substr(word, RLENGTH + 1)
        length_of_key = index(word, "=") }
$3 != "" && $3 != kind { next }
length_of_key && $1 == substr(word, 1, length_of_key) {
  count = split($2, values, " ")
  for (i = 1; i <= count; i++) if (index($1 values[i], word) == 1) print mark $1 values[i]
}
$1 ~ /^policy\// && !index(word, "/") { next }  # a group, which is no section of keys
!length_of_key && index($1, word) == 1 {
  rest = substr($1, length(word) + 1); dot = index(rest, ".")
  found = dot ? word substr(rest, 1, dot) : $1
  if (mark == "~") sub(/=$/, "", found)
  if (!(found in seen)) print mark found
  seen[found]
}
"""
OURS = r"run_(sft|grpo|grpo_math|eval)\.py[[:space:]]"
SHARED = r"""
_nemo_like_keys='{keys}'
_nemo_like_found() {{  # line up to the cursor, word under it
  [[ $1 =~ --config[[:space:]]+[^[:space:]]*$ ]] && return
  local kind=grpo
  [[ $1 =~ run_sft\.py ]] && kind=sft
  printf '%s\n' "$_nemo_like_keys" | word=$2 kind=$kind awk '{program}'
}}
"""
SHELLS = {
    "bash": SHARED
    + r"""
_nemo_like() {{
  local line=${{COMP_LINE:0:COMP_POINT}} ours='{ours}' found
  local word=${{line##*[[:space:]]}}
  if ! [[ $line =~ $ours ]]; then
    local before=_nemo_like_before_$1
    [[ -n ${{!before}} ]] && "${{!before}}" "$@"
    return
  fi
  # Bash has cut the word at `=` and completes what comes after it.
  local cut=
  [[ $COMP_WORDBREAKS == *=* ]] && cut=${{word%"${{word##*=}}"}}
  COMPREPLY=()
  while IFS= read -r found; do
    [[ -n $found ]] && COMPREPLY+=("${{found#"$cut"}}")
  done <<< "$(_nemo_like_found "$line" "$word")"
  [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *[.=] ]] && compopt -o nospace
}}
for _nemo_like_command in uv python; do
  [[ $(complete -p $_nemo_like_command 2> /dev/null) =~ -F\ ([^ ]+) ]] &&
    [[ ${{BASH_REMATCH[1]}} != _nemo_like ]] &&
    printf -v _nemo_like_before_$_nemo_like_command %s "${{BASH_REMATCH[1]}}"
  complete -o bashdefault -o default -F _nemo_like $_nemo_like_command
done
unset _nemo_like_command
""",
    "zsh": r"(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}"
    + SHARED
    + r"""
typeset -gA _nemo_like_before
_nemo_like() {{
  local word=${{LBUFFER##*[[:space:]]}} ours='{ours}'
  if ! [[ $LBUFFER =~ $ours ]]; then
    ${{=_nemo_like_before[$service]:-_default}}
    return
  fi
  local -a found=("${{(@f)$(_nemo_like_found "$LBUFFER" "$word")}}")
  found=(${{found:#}})
  if (( $#found )); then
    compadd -S '' -- ${{(M)found:#*[.=]}}
    compadd -- ${{found:#*[.=]}}
  else
    compset -P '*='
    _files
  fi
}}
for _nemo_like_command in uv python; do
  [[ ${{_comps[$_nemo_like_command]:-_nemo_like}} != _nemo_like ]] &&
    _nemo_like_before[$_nemo_like_command]=$_comps[$_nemo_like_command]
  compdef _nemo_like $_nemo_like_command
done
unset _nemo_like_command
""",
    "fish": r"""
set -g _nemo_like_keys '{keys}'
function _nemo_like_ours
  string match -qr '{ours}' -- (commandline -cp)
  and not string match -qr -- '--config\s+\S*$' (commandline -cp)
end
function _nemo_like_found
  set -lx word (commandline -ct)
  set -lx kind grpo
  string match -qr 'run_sft\.py' -- (commandline -cp); and set kind sft
  printf '%s\n' $_nemo_like_keys | awk '{program}'
end
for command in uv python
  complete -c $command -n _nemo_like_ours -a '(_nemo_like_found)'
end
""",
}


def main(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("shell", choices=SHELLS)
    return run(parser, argv, _print)


def _print(options: argparse.Namespace) -> int:
    keys = "\n".join(lines())
    assert "'" not in keys, "it stands between quotes"
    program, ours = PROGRAM, OURS
    if options.shell == "fish":  # in whose quotes a backslash may quote
        program, ours = (text.replace("\\", "\\\\") for text in (PROGRAM, OURS))
    print(SHELLS[options.shell].format(keys=keys, program=program, ours=ours).lstrip(), end="")
    return 0


def lines() -> Iterator[str]:
    """A line for everything that can be completed: the word, its values, whose it is."""
    for option in OPTIONS:
        yield f"{option}\t\t"
    yield f"--device=\t{' '.join(DEVICES)}\t"
    for name in TREES:
        forms = (file.stem for file in (CONFIGS / "recipes/tiny").glob(f"{name}*.yaml"))
        yield f"recipes/tiny=\t{' '.join(sorted(forms))}\t{name}"
    trees = {name: known_paths(tree) for name, tree in TREES.items()}
    for name, known in trees.items():
        for path, key in known.items():
            everywhere = all(other.get(path) == key for other in trees.values())
            if not key.section and (not everywhere or name == next(iter(trees))):
                yield f"{_word(key)}\t{' '.join(key.choices)}\t{'' if everywhere else name}"
    for folder in sorted({file.parent for file in CONFIGS.rglob("*.yaml")} - {CONFIGS}):
        group = folder.relative_to(CONFIGS)
        if all(".".join(group.parts) in known for known in trees.values()):
            values = " ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            yield f"{group}=\t{values}\t"


def _word(key: Key) -> str:
    return f"{key.path}." if key.open else f"{key.path}="


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
