"""What a user or a reader meets first is said in the field's words: help texts, error lines, opening docstring lines.

CONTRIBUTING has the rule. The list holds words that used to stand here in a sense of our own ("whole" for complete,
"behind" for in the background); phrases that English or the field really uses are allowed.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("megatron_align", "kernels", "tools")
# word or phrase -> what to write instead
BANNED = {
    r"told|tells?": "given, says, reports",
    r"behind": "in the background, after",
    r"(?<!look-)(?<!look)ahead(?! of time)": "pre-pass, prefetched, precomputed, before",
    r"whole(?! numbers?)": "complete, entire, full, intact",
    r"damaged?": "corrupt",
    r"for good": "permanently",
    r"alike": "identically, both",
    r"asked|asks? for": "requested, required",
    r"beside": "next to, alongside",
    r"dealt|deals? (?:out|over)": "distributed, sharded",
    r"apart": "separately; name the difference",
    r"anew|afresh": "again, from scratch",
    r"mend(?:s|ed|ing)?": "fix",
    r"go(?:es)? on(?! to)": "continues, resumes",
    r"(?:is|are|be) let be|lets? be": "is left unchanged",
    r"shall": "must, will",
    r"so many of": "the number of",
}
PATTERN = re.compile(
    "|".join(rf"(?P<w{i}>\b(?:{banned})\b)" for i, banned in enumerate(BANNED)), re.IGNORECASE
)
OPENING = re.compile(
    r"(?:What|How far|How many|Where)\b(?!.*\?)"
)  # of a docstring: a fragment, not a sentence
# (file, text) that may stay, with the reason.
ALLOWED: dict[tuple[str, str], str] = {}


def faults(text):
    """Return ``word: better`` for every banned word of a text."""
    return [f"'{m[0]}': {list(BANNED.values())[int(m.lastgroup[1:])]}" for m in PATTERN.finditer(text)]


def opening_faults(text):
    fragment = [f"'{m[0]} ...': a sentence or a noun phrase"] if (m := OPENING.match(text)) else []
    return fragment + faults(text)


def literal(node):
    """Return the text of a string, an f-string (holes as ``{}``), or of strings anywhere inside an expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return " ".join(filter(None, (literal(child) for child in ast.iter_child_nodes(node))))


def name_of(node):
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def to_stderr(call):
    """Return whether a call prints to stderr: ``print(..., file=sys.stderr)``, ``sys.stderr.write(...)``."""
    return any(k.arg == "file" and name_of(k.value) == "stderr" for k in call.keywords) or (
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "write"
        and name_of(call.func.value) == "stderr"
    )


def messages(tree):
    """Yield ``(line, text)`` of what is raised, required or printed to stderr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.lineno, literal(ast.Tuple(elts=node.exc.args))
        elif isinstance(node, ast.Call) and name_of(node.func) == "require":
            yield node.lineno, literal(ast.Tuple(elts=node.args[1:]))
        elif isinstance(node, ast.Call) and to_stderr(node):
            yield node.lineno, literal(ast.Tuple(elts=node.args))


def helps(tree):
    """Yield ``(line, text)`` of help texts.

    These are ``help=``, phrases in constants (``ABOUT`` of a tool), and docstrings of dataclasses of options.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((k.value.lineno, literal(k.value)) for k in node.keywords if k.arg == "help")
        elif isinstance(node, ast.Assign) and any(name_of(t).isupper() for t in node.targets):
            if " " in (text := literal(node.value)):  # a name of a file is no phrase
                yield node.lineno, text
        elif (
            isinstance(node, ast.ClassDef)
            and "kw_only=True" in "".join(map(ast.unparse, node.decorator_list))
            and "Args:" in (text := ast.get_docstring(node) or "")
        ):
            yield node.lineno, text


def openings(tree):
    """Yield ``(line, text)`` of the first docstring lines of a module and its public classes and functions."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        public = isinstance(node, ast.Module) or (isinstance(node, kinds) and not node.name.startswith("_"))
        if public and (docstring := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), docstring.splitlines()[0]


CHECKS = {
    "error messages": (messages, faults),
    "help texts": (helps, faults),
    "docstrings": (openings, opening_faults),
}


def findings(file, tree, check):
    """Return ``file:line: text: faults`` of one kind of text in a file."""
    texts, judge = CHECKS[check]
    return [
        f"{file}:{line}: {text.strip()!r}: {'; '.join(wrong)}"
        for line, text in texts(tree)
        if (wrong := judge(text)) and (file, text) not in ALLOWED
    ]


@cache
def files():
    """Return the name and the syntax tree of each of our files."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [
        (path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
        for path in paths
        if not any(parent.is_symlink() for parent in path.parents)
    ]


@pytest.mark.parametrize("check", CHECKS)
def test_words(check):
    found = [line for file, tree in files() for line in findings(file, tree, check)]
    assert found == [], "\n".join(found)


def test_every_kind_of_text_is_read():
    """A collector that finds nothing would make the test above vain."""
    counts = {
        check: sum(bool(text) for _, tree in files() for _, text in CHECKS[check][0](tree))
        for check in CHECKS
    }
    assert counts["error messages"] > 200
    assert counts["help texts"] > 100
    assert counts["docstrings"] > 500


BAD = '''
"""What is told of a run."""
ABOUT = "Say what was asked"
DAMAGED = ".damaged"

@dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Args:
        keep: for good
    """

def show():
    require(ok, f"the whole {thing} is damaged")
    raise InputError(f"{x} must " + "be made anew")
    print("training goes on", file=sys.stderr)
    parser.add_argument("--x", help="a file beside this one")
'''
GOOD = '''
"""Compile kernels ahead of time; the look-ahead of a step is a pre-pass."""

def _private():
    """What is told here is nobody's business: a private function."""

def show():
    """Return a whole number."""
    require(ok, f"{thing} must be a whole number")
    told = behind  # identifiers are not texts
'''


def test_words_are_found_where_they_stand():
    lines = {
        check: sorted(line.split(":")[1] for line in findings("f.py", ast.parse(BAD), check))
        for check in CHECKS
    }
    assert lines == {
        "error messages": ["15", "16", "17"],
        "help texts": ["18", "3", "7"],
        "docstrings": ["1"],
    }
    assert [line for check in CHECKS for line in findings("f.py", ast.parse(GOOD), check)] == []
