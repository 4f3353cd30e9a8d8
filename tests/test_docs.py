"""What README.md and docs/ say exists: flags, files, links, names in code, sentences of errors."""

import ast
import dataclasses
import importlib
import re
import textwrap
import typing
from functools import cache
from pathlib import Path

import pytest

from tdmpc2_support.cli import saved_fields

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(path.stem for name in ("tdmpc*", "newt*", "deploy") for path in ROOT.glob(f"{name}.py"))
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("tdmpc2_support/**/*.py"), *ROOT.glob("*/*.py")]
MODULES = {*SCRIPTS, "envs", "tdmpc2_support"}
OF_OTHERS = {"--gpus", "--help", "--strict", "--smooth-coef"}  # of other programs, and an example
OTHERS = [
    ROOT / name
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/README.md", "tests/golden/README.md")
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_blocks(page, language):
    """Text of the page's code blocks in this language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", page.read_text())


def code_spans(page):
    """Code within the page's sentences."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", page.read_text()))


def flags_of(kind):
    """The flags of a dataclass that a script parses, those of dataclasses within it among them."""
    flags = set()
    hints = typing.get_type_hints(kind)
    for field in saved_fields(kind):
        flag = field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.default):
            flags |= flags_of(type(field.default))
        elif bool in (hints[field.name], *typing.get_args(hints[field.name])):
            flags |= {f"--{flag}", f"--no-{flag}"}
        else:
            flags.add(f"--{flag}")
    return flags


@cache
def flags_of_script(name):
    """The flags of one of our programs, by the name of its file."""
    if name == "envs.py":
        return set()
    if name.startswith("benchmarks/"):
        tree = ast.parse((ROOT / name).read_text())
        bodies = [node.body for node in tree.body if getattr(node, "name", "") == "Args"]  # modules have none
        fields = [node.target.id for node in sum(bodies, []) if isinstance(node, ast.AnnAssign)]
        return {f"--{field.replace('_', '-')}" for field in fields}
    if name.startswith("examples/"):
        return set(re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / name).read_text()))
    return flags_of(importlib.import_module(name.removesuffix(".py")).Args)


def commands(text):
    """The programs of ours that a text starts, each with the flags that it is given."""
    for line in text.replace("\\\n", " ").splitlines():
        for name, rest in re.findall(r"python ([\w/]+\.py)([^#&;|]*)", line):
            yield name, set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest))


@each_page
def test_every_command_has_flags_of_its_program_only(page):
    texts = [*code_blocks(page, "bash"), *code_spans(page)]
    own = [(name, flags) for text in texts for name, flags in commands(text) if name != "my_agent.py"]
    unknown = {(name, *flags - flags_of_script(name)) for name, flags in own if flags - flags_of_script(name)}
    assert not unknown


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_the_first_line_of_a_benchmark_says_what_it_answers(path):
    """`--help` begins with it."""
    first = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
    assert first.endswith((".", "?"))


@each_page
def test_every_flag_in_a_sentence_is_one_of_a_script(page):
    programs = [
        *(f"{name}.py" for name in SCRIPTS),
        *(f"benchmarks/{path.name}" for path in ROOT.glob("benchmarks/*.py")),
    ]
    known = OF_OTHERS.union(*map(flags_of_script, programs))
    spans = [span for span in code_spans(page) if span.startswith("--")]
    named = {flag for span in spans for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    assert named <= known


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_every_link_leads_somewhere(page):
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@cache
def anchors(page):
    """The anchors of a page's headings, as they are made of their words."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_file_that_is_named_exists(page):
    named = {span for span in code_spans(page) if re.fullmatch(r"[\w./-]+\.(py|md|txt|toml|yml)", span)}
    named |= {span for span in code_spans(page) if re.match(r"(tdmpc2_support|benchmarks|tests|docs|examples)/", span)}
    folders = [ROOT, *(path for path in ROOT.glob("tdmpc2_support/**") if path.is_dir()), ROOT / "benchmarks"]
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert not missing


@each_page
def test_python_code_compiles_and_what_it_takes_from_our_modules_is_there(page):
    for code in code_blocks(page, "python"):
        tree = ast.parse(textwrap.dedent(code))
        aliases = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                aliases |= {a.asname or a.name: a.name for a in node.names if a.name.partition(".")[0] in MODULES}
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in MODULES:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), code
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in aliases:
                assert hasattr(importlib.import_module(aliases[node.value.id]), node.attr), node.attr


@pytest.mark.parametrize("name", ["reading.md", "fork.md"])
def test_every_identifier_in_a_page_about_the_code_is_in_the_code(name):
    code = "\n".join(path.read_text() for path in SOURCES)
    words = {*re.findall(r"\w+", code)}
    identifiers = {span for span in code_spans(ROOT / "docs" / name) if re.fullmatch(r"[A-Za-z_]\w*", span)}
    assert identifiers <= words


def test_every_sentence_that_the_error_page_explains_is_one_of_the_code():
    code = "\n".join(path.read_text() for path in SOURCES)
    sentences = re.findall(r"(?m)^### `([^`]+)`$", (ROOT / "docs" / "faq.md").read_text())
    assert len(sentences) > 10
    assert not [sentence for sentence in sentences if sentence not in code]


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
