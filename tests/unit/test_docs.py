"""The documents: what they show can be typed, what they link exists, what is made is up to date."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, Block, anchors, blocks, commands, inline_code, links, text_of
from write_docs import HERE, files

from qmpballoon.cli.ctl import read_question
from qmpballoon.cli.program import complete_parser, verbs_of
from qmpballoon.config.reader import parse
from qmpballoon.protocol.verbs import VERBS as ASKED
from qmpballoon.protocol.verbs import Scope, arguments_of

PARSER = complete_parser()
VERBS = verbs_of(PARSER)
BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("", "sh", "console")]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))

_MODULE = re.compile(r"^(?!examples/|scripts/|tests/)[a-z]+/[a-z_]+\.py$")
_FILE = re.compile(r"^(?:examples|scripts|tests)/[\w@./-]*$|^qmpballoon/[\w./-]+\.(?:py|json)$")


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def ours(block: Block) -> Iterator[list[str]]:
    """Yield the arguments of each qmpballoon command in a block; an indented block may be something else."""
    text = block.text
    if block.language == "" and not re.search(r"^(\S+=\S* )?(qmpballoon|\S+ \|) ", text, flags=re.MULTILINE):
        return
    for words in commands(block):
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words and words[0].rpartition("/")[2] == "qmpballoon":
            yield words[1:]


TYPED = [
    pytest.param(words, id=f"{block} {' '.join(words)}"[:80]) for block in SHELL for words in ours(block)
]


# ---- what is typed ----


@pytest.mark.parametrize("words", TYPED)
def test_every_command_is_one_that_the_program_takes(words: list[str]) -> None:
    if {"-h", "--help", "--version", "--print-completion"} & set(words):
        with pytest.raises(SystemExit, match=r"^0$"):
            PARSER.parse_args(words)
        return
    arguments = PARSER.parse_args(words)
    if arguments.verb == "ctl":
        _, vm = arguments.target
        read_question(arguments.request, "host" if vm is None else "vm", arguments.words)


def test_commands_were_found() -> None:
    typed = {words.values[0][0] for words in TYPED if words.values[0]}  # type: ignore[index]
    assert set(VERBS) <= typed


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_every_block_of_shell_can_be_parsed(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_every_block_of_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_every_block_of_json_can_be_read(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_every_block_of_toml_is_a_configuration(block: Block) -> None:
    text = block.text.replace('owner = "db"', 'owner = "root"')  # a user of the reader's machine
    assert tomllib.loads(text)
    parse(text, str(block), surroundings=HERE)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_of_a_kind_that_is_tested_or_is_text(block: Block) -> None:
    assert block.language in ("", "sh", "console", "python", "json", "toml", "yaml", "text", "{toctree}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_verb_target_module_and_file_that_a_page_names_exists(page: Path) -> None:
    named = [*inline_code(page), *(line for block in blocks(page) for line in block.text.splitlines())]
    for code in named:
        if (found := re.match(r"qmpballoon ([a-z-]+)", code)) and not found[1].startswith("-"):
            assert found[1] in VERBS, code
        for target in re.findall(r"^make ([a-z-]+)", code):
            assert target in TARGETS, code
        for module in re.findall(r"python3? -m (qmpballoon[\w.]*)", code):
            assert importlib.util.find_spec(module), code
        for path in _FILE.findall(code):
            assert (ROOT / path).exists(), code
        for path in _MODULE.findall(code):
            assert (ROOT / "qmpballoon" / path).exists(), code


def test_every_test_that_a_page_names_exists() -> None:
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    files_of_tests = {file.name for file in (ROOT / "tests").rglob("*.py")}
    named = {code for page in PAGES for code in inline_code(page) if re.match(r"test_\w+", code)}
    assert len(named) >= 20
    for name in named:
        begin = name.partition("…")[0]
        assert begin in files_of_tests if begin.endswith(".py") else f"def {begin}" in sources, name


@pytest.mark.parametrize(
    ("scope", "verb"), [(scope, verb) for scope, verbs in ASKED.items() for verb in verbs]
)
def test_every_request_has_its_row_with_all_arguments(scope: Scope, verb: str) -> None:
    (row,) = re.findall(rf"^\| {scope} `{verb}` \|(.*?)\|", text_of("requests.md"), flags=re.MULTILINE)
    assert set(arguments_of(ASKED[scope][verb])) <= set(re.findall("`([^`]+)`", row))


# ---- what is linked ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_an_anchor(page: Path) -> None:
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), link
        assert page.name == "README.md" or file.parent == ROOT / "docs", link
        assert not anchor or anchor in anchors(file), link


def test_every_page_is_in_the_site_and_linked_from_its_first_page() -> None:
    index = ROOT / "docs/index.md"
    contents = [block.text for block in blocks(index) if block.language == "{toctree}"]
    listed = {line for text in contents for line in text.splitlines() if line and not line.startswith(":")}
    pages = {page.stem for page in PAGES if page.name not in ("README.md", "index.md")}
    assert listed == pages
    assert pages <= {link.partition("#")[0].removesuffix(".md") for link in links(index)}


# ---- what is made ----


@pytest.mark.parametrize("path", files())
def test_what_is_made_from_tables_is_up_to_date(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == files()[path], "run scripts/write_docs.py"


def logged_words() -> set[str]:
    """Return the words that the sources log, as far as they are written where they are logged."""
    found: set[str] = set()
    for file in (ROOT / "qmpballoon").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                first = node.args[0]
                if node.func.id in ("log_event", "log_always", "log") and isinstance(first, ast.Constant):
                    found.add(str(first.value))
    return found


def test_every_word_of_the_log_is_explained() -> None:
    rows = text_of("operating.md").partition("## What the log says")[2].splitlines()
    explained = {
        word for row in rows if row.startswith("| `") for word in re.findall("`([^`]+)`", row.split("|")[1])
    }
    words = logged_words()
    assert {"agent-started", "target", "health"} <= words
    assert words <= explained
