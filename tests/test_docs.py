"""The pages: their commands parse, commands marked `<!-- runs -->` run, and links lead to
something.

A command is checked as a user would type it, so a renamed option or script fails here and not at a
reader. Only ```sh blocks are commands. Other blocks show files or output.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

import tokenizer
from base.cli import parse
from config import UserError
from support import REPO, parsed_classes
from tasks.description import Description

PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPO / "docs").glob("*.md")),
]
MARKED = [page for page in PAGES if "<!-- runs -->" in page.read_text(encoding="utf-8")]
BLOCK = re.compile(r"^(<!-- runs -->\n+)?```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
OPERATORS = ("|", ">", ">>", "<", "&", "&&", ";", "2>")


def commands(text: str, marked: bool = False) -> Iterator[list[str]]:
    """The words of each line in a page's ```sh blocks that begins with python or torchrun.
    `marked`: only in the blocks that run."""
    for runs, block in BLOCK.findall(text):
        if runs or not marked:
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("python ", "torchrun ")):
                    yield words_of(line)


def words_of(line: str) -> list[str]:
    """The words of a command line as the shell splits it, without comments and without what follows
    the command."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    reader.whitespace_split = True
    words = list(reader)
    return words[: next((i for i, word in enumerate(words) if word in OPERATORS), len(words))]


def program(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command line runs, and its options."""
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        name, rest = launched.training_script, launched.training_script_args
        return (name if launched.module else module_of(name)), rest
    return (words[2], words[3:]) if words[1] == "-m" else (module_of(words[1]), words[2:])


def module_of(script: str) -> str:
    assert (REPO / script).is_file(), f"{script} is not there"
    return script.removesuffix(".py").replace("/", ".")


def check(words: list[str]) -> None:
    """Fail unless the command's module exists and accepts these options."""
    name, options = program(words)
    module: Any = importlib.import_module(name)
    if Path(str(module.__file__)).is_relative_to(REPO / "tests") or name in ("pytest", "pip"):
        return
    try:
        if name == "tokenizer":
            tokenizer._parser().parse_args(options)
        elif name == "benchmarks.wheels":
            assert options[0] in ("download", "install")
        elif name == "tools.sweep":
            with contextlib.chdir(REPO):
                module.plan(module.read_command(options))
        elif name.startswith("finetune."):
            task: Description = module.TASK
            parse(task.config, options, dict(task.defaults))
        else:
            source = Path(str(module.__file__)).read_text(encoding="utf-8")
            (kind,) = parsed_classes(source)
            parse(getattr(module, kind), options)
    except SystemExit as stop:  # --help
        assert not stop.code
    except UserError as error:
        pytest.fail(f"{shlex.join(words)}: {error}")


def page_commands() -> list[Any]:
    return [
        pytest.param(words, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, words in enumerate(commands(page.read_text(encoding="utf-8")), 1)
    ]


@pytest.mark.parametrize("words", page_commands())
def test_the_command_of_a_page_parses(words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.stem)
def test_marked_commands_run(page: Path, run: Any, tmp_path: Path) -> None:
    """They run in a folder that links to the project, so that runs/ and data/ are separate."""
    for path in REPO.iterdir():
        if path.name not in ("runs", "data") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    for words in commands(page.read_text(encoding="utf-8"), marked=True):
        done = run(*words[1:], cwd=tmp_path)
        if "needs the package" in done.stderr:  # of an extra, which the lock has
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in HEADING.findall(FENCED.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(f"{anchor}-{found[anchor]}" if anchor in found else anchor)
        found[anchor] = found.get(anchor, 0) + 1
    return names


def links() -> list[Any]:
    return [
        pytest.param(page, target, id=f"{page.stem}:{target}")
        for page in PAGES
        for target in dict.fromkeys(LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))))
        if not re.match(r"[a-z]+:", target)
    ]


@pytest.mark.parametrize(("page", "target"), links())
def test_a_relative_link_leads_to_a_file_and_its_heading(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    assert file.exists(), f"{page.name} links to {name}, which is not there"
    if anchor and file.suffix == ".md":
        assert anchor in anchors(file.read_text(encoding="utf-8"))


def test_a_wrong_option_and_a_missing_script_are_found() -> None:
    text = (
        "```sh\npython train_gpt2.py --stepz 5\n```\n"
        "```sh\npython no_such_file.py\n```\n"
        "```\npython not_a_command.py\n```\n"
        "<!-- runs -->\n```sh\ntorchrun --nproc_per_node=2 -m finetune.qa --epochs 1  # two\n```\n"
    )
    mistyped, lost, sound = commands(text)
    with pytest.raises(pytest.fail.Exception, match="did you mean"):
        check(mistyped)
    with pytest.raises(AssertionError, match="not there"):
        check(lost)
    check(sound)
    assert list(commands(text, marked=True)) == [sound]
    assert program(sound) == ("finetune.qa", ["--epochs", "1"])


def test_some_commands_run() -> None:
    assert MARKED


def test_anchors_match_github() -> None:
    text = "# A page\n## What `auto` runs, and why\n```sh\n# no heading\n```\n## Twice\n## Twice\n"
    assert anchors(text) == {"a-page", "what-auto-runs-and-why", "twice", "twice-1"}
