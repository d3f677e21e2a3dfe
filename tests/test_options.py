"""Every option of every command. A number's range and a path's mark are part of its definition, and
an extreme value gives one line."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import threading
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune
from base.arguments import field_docs, options_of
from base.cli import parse, parse_typed
from config import PathName, Positional, Range, TrainConfig, UserError, check_ranges, expand, marks
from decoding.options import DecodeConfig, check_decode
from docs.options import page
from docs.packages import source_files
from support import REPO, parsed_classes
from tasks.description import Description

TEXTS = {  # text options that do not name a file or folder
    "device_name",
    "preset",
    "push",
    "kernels",
    "without",
    "prompts",
    "system",
    "words",
    "class_weights",
    "also",
    "dataset",
    "name",
    "split",
    "columns",
    "alike",
    "only",
    "grid",
    "entry",
    "shape",
    "batch",
    "decode",
    "precision",
    "against",
    "vocab",
    "method",
    "task",
    "extra",
    "host",
    "parallel",
}


def kinds_of_options() -> list[Any]:
    """The dataclass of options of each command: the one that its file gives to `parse`, or the
    `config` of its task."""
    found: dict[str, type] = {}
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        if "entry_point(" not in text or path.name == "cli.py":
            continue
        names = parsed_classes(text)
        if not names and path.parent.name != "finetune":
            continue
        module = importlib.import_module(".".join(path.relative_to(REPO).with_suffix("").parts))
        kinds = [getattr(module, name) for name in names]
        tasks = [value for value in vars(module).values() if isinstance(value, Description)]
        kinds += [task.config for task in tasks]
        found |= {f"{kind.__module__}.{kind.__name__}": kind for kind in kinds}
    return list(found.values())


KINDS = kinds_of_options()


def scalars(hint: Any) -> set[type]:
    return (
        {hint}
        if not get_args(hint)
        else {kind for part in get_args(hint) for kind in scalars(part)}
    )


def numeric(kind: Any) -> dict[str, tuple[type, Range]]:
    hints = get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        types = {t for t in scalars(hints[field.name]) if isinstance(t, type)}
        if types & {int, float}:
            (limits,) = [mark for mark in marks(kind)[field.name] if isinstance(mark, Range)]
            found[field.name] = (float if float in types else int, limits)
    return found


def test_every_command_has_options() -> None:
    names = {kind.__module__ for kind in KINDS}
    assert {
        "config",
        "generate",
        "evaluate",
        "fineweb_prep",
        "finetune.qa",
        "benchmarks.stages",
    } <= names
    assert len(KINDS) > 20


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_number_has_a_range_and_every_path_is_marked(kind: Any) -> None:
    numeric(kind)  # raises if a number has no range, or two
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if str in scalars(hints[field.name]):
            is_path = any(isinstance(mark, PathName) for mark in marks(kind)[field.name])
            is_text = field.name in TEXTS or field.name.endswith("_column")
            assert is_path != is_text, (
                f"{field.name}: mark it as PathOrName or PathsOrNames, or name it in TEXTS"
            )


EXTREMES = (
    st.sampled_from(
        [
            0,
            -1,
            1,
            2**31 - 1,
            2**31,
            2**63,
            2**64,
            10**30,
            -(10**30),
            5e-324,
            1e-45,
            1e308,
            0.0,
            math.inf,
            -math.inf,
            math.nan,
        ]
    )
    | st.integers()
    | st.floats()
)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_extreme_number_is_accepted_or_refused_in_one_line(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([kind for kind in KINDS if numeric(kind)]))
    name = data.draw(st.sampled_from(sorted(numeric(kind))))
    of, limits = numeric(kind)[name]
    number = data.draw(EXTREMES)
    word = f"--{name.replace('_', '-')}"
    try:
        value = of(number)
        words = [f"{word}={value}"]
    except (ValueError, OverflowError):
        words = [f"{word}={number}"]
    try:
        cfg: Any = parse(kind, words)
    except UserError as error:
        assert "\n" not in str(error)
        return
    got = getattr(cfg, name)
    assert all(
        limits.least <= one <= limits.most for one in (got if isinstance(got, tuple) else (got,))
    )
    try:
        if hasattr(cfg, "without"):
            cfg.check()
        elif isinstance(cfg, DecodeConfig):
            check_decode(cfg)
    except UserError as error:
        assert "\n" not in str(error)


def test_a_number_of_5000_digits_is_refused() -> None:
    from config import TrainConfig

    with pytest.raises(UserError):
        parse(TrainConfig, ["--seed", "9" * 5000])


def test_a_seed_beyond_64_bits_names_its_limit() -> None:
    from config import TrainConfig

    with pytest.raises(UserError, match="--seed is 18446744073709551616; it must be at most"):
        parse(TrainConfig, ["--seed", "18446744073709551616"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_defaults_lie_in_their_ranges(kind: Any) -> None:
    check_ranges(kind())


# --- ~


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_path_option_expands_the_home_folder(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    words, expected = [], {}
    for name, found in marks(kind).items():
        path = next((mark for mark in found if isinstance(mark, PathName)), None)
        positional = any(isinstance(mark, Positional) for mark in found)
        if path is None or positional:
            continue
        typed = "~/a b,~/c*.txt,./~,org/name" if path.many else "~/a,~b"
        words.append(f"--{name.replace('_', '-')}={typed}")
        expected[name] = (
            "/home/someone/a b,/home/someone/c*.txt,./~,org/name"
            if path.many
            else "/home/someone/a,~b"
        )
    cfg = parse(kind, words)
    for name, meant in expected.items():
        got = getattr(cfg, name)
        assert got == ((meant,) if isinstance(got, tuple) else meant)


def test_config_files_and_positionals_expand_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from config import TrainConfig
    from generate import GenerateConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.json").write_text(
        '{"out": "~/run", "data": "x.txt,~/y.txt", "prompts": ["~/kept"]}', encoding="utf-8"
    )
    for words in (["--config", "~/c.json"], ["--config=~/c.json"]):
        cfg = parse(TrainConfig, words)
        assert (cfg.out, cfg.data) == (f"{tmp_path}/run", f"x.txt,{tmp_path}/y.txt")
        assert cfg.prompts == ("~/kept",)
    assert parse(GenerateConfig, ["~/m", "~ is a tilde"]).checkpoint == f"{tmp_path}/m"
    assert parse(GenerateConfig, ["~/m", "~ is a tilde"]).prompts == ("~ is a tilde",)


def test_the_home_of_another_user_and_of_no_user() -> None:
    assert expand("~root/x").endswith("/x") and not expand("~root/x").startswith("~")
    assert expand("~no-such-user-here/x") == "~no-such-user-here/x"
    assert expand("./~") == "./~" and expand("org/model") == "org/model" and expand(None) is None


def test_a_config_file_nested_too_deep_is_refused(tmp_path: Path) -> None:
    from config import TrainConfig

    (tmp_path / "c.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match="is not valid json"):
        parse(TrainConfig, ["--config", str(tmp_path / "c.json")])


def test_an_empty_name_is_refused() -> None:
    for option in ("--data", "--val-data", "--tokenizer", "--out", "--init"):
        for empty in ("", " "):
            with pytest.raises(UserError, match=f"{option} is empty"):
                parse(TrainConfig, [option, empty])
    assert parse(TrainConfig, []).data is None


@pytest.mark.parametrize("bad", ["caf\udce9", "\ud800", "\udced\udc95\udc9c x"])
def test_bytes_that_are_not_utf_8_are_replaced_with_a_warning(
    bad: str, tmp_path: Path, capsys
) -> None:
    from config import TrainConfig
    from generate import GenerateConfig

    (tmp_path / "c.json").write_text(
        json.dumps({"prompts": [bad, "é"], "out": bad}), encoding="utf-8"
    )
    read = parse(TrainConfig, ["--config", str(tmp_path / "c.json")])
    typed = parse(GenerateConfig, [bad, bad, "é"])
    for cfg, path in ((read, read.out), (typed, typed.checkpoint)):
        assert path == bad, "a path is bytes, and keeps them"
        assert cfg.prompts == (re.sub(r"[\ud800-\udfff]", "\ufffd", bad), "é")
    said = "holds bytes that are not UTF-8; each is read as U+FFFD\n"
    assert capsys.readouterr().err == f"warning: --prompts {said}warning: PROMPT ... {said}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_a_config_file_can_hold_any_text(kind: Any, tmp_path: Path) -> None:
    """Also a text that begins with a dash, and the text of a positional."""
    hints, texts = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if hints[field.name] in (str, str | None):
            texts[field.name] = "-a b"
        elif hints[field.name] == tuple[str, ...]:
            texts[field.name] = ("-a b", "--seed", "")
            if any(isinstance(mark, PathName) for mark in marks(kind)[field.name]):
                texts[field.name] = ("-a b", "c")
    file = tmp_path / "-c.json"
    file.write_text(json.dumps(texts), encoding="utf-8")
    cfg, typed = parse_typed(kind, [f"--config={file}"])
    assert {name: getattr(cfg, name) for name in texts} == texts
    assert typed == set(texts)


def test_a_config_file_is_read_once(tmp_path: Path) -> None:
    """A pipe, such as `--config <(...)`, gives its content only once."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=('{"steps": 3}',))
    writer.start()
    cfg, typed = parse_typed(TrainConfig, ["--config", str(tmp_path / "pipe")])
    writer.join()
    assert cfg.steps == 3 and typed == {"steps"}


def test_a_positional_overrides_a_config_file(tmp_path: Path) -> None:
    from generate import GenerateConfig
    from tools.compare import CompareConfig

    file = tmp_path / "c.json"
    file.write_text('{"checkpoint": "a", "prompts": ["b", "c"]}', encoding="utf-8")
    given = ["--config", str(file)]
    assert parse(GenerateConfig, [*given, "d"]).checkpoint == "d"
    assert parse(GenerateConfig, [*given, "d"]).prompts == ("b", "c")
    assert parse(GenerateConfig, ["d", "e", *given]).prompts == ("e",)
    for words, called in ((["--prompts", "a"], "PROMPT"), (["--checkpoint=a"], "CHECKPOINT")):
        with pytest.raises(
            UserError, match=f"^{words[0].partition('=')[0]} is not an option; type {called}"
        ):
            parse(GenerateConfig, words)
    with pytest.raises(UserError, match=r"^A B is empty"):
        parse(CompareConfig, [""])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"promts": ["a"]}', "the key 'promts', .*did you mean prompts"),
        ('{"checkpoint": ["a", "b"]}', 'checkpoint is .* it must be text'),
        ('{"prompts": [["a"]]}', 'prompts is .* it must be text'),
        ('{"tokenizer": true}', 'tokenizer is true; it must be text'),
    ],
)  # fmt: skip
def test_a_wrong_config_file_is_one_line(text: str, told: str, tmp_path: Path) -> None:
    from generate import GenerateConfig

    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        parse(GenerateConfig, ["--config", str(tmp_path / "c.json")])


# --- words


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--n_layer 3", {"n_layer": 3}),
        ("--n_layer=3 --n-head=2", {"n_layer": 3, "n_head": 2}),
        ("--compile --no-compile", {"compile": False}),
        ("--no_compile --cuda_graphs", {"compile": False, "cuda_graphs": True}),
        ("--steps many --steps 6", {"steps": 6}),
        ("--micro-batch 8 --lr 1e-3", {"micro_batch": 8, "lr": 1e-3}),
        ("--micro-batch auto", {"micro_batch": "auto"}),
        ("--prompts a '' -1 -.5 - --steps 5", {"prompts": ("a", "", "-1", "-.5", "-"), "steps": 5}),
        ("--prompts=-a b", {"prompts": ("-a", "b")}),
        ("--prompts a --prompts b", {"prompts": ("b",)}),
        ("--prompts", {"prompts": ()}),
        ("--out=-x", {"out": "-x"}),
        ("--out a=b --", {"out": "a=b"}),
    ],
)
def test_options_can_be_typed_in_many_ways(words: str, options: dict[str, Any]) -> None:
    cfg, typed = parse_typed(TrainConfig, shlex.split(words))
    assert {name: getattr(cfg, name) for name in options} == options
    assert cfg == dataclasses.replace(TrainConfig(), **options)
    assert typed == set(options)


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        ("m a --top-k 2 b --no-stream c", ("a", "b", "c")),
        ("--top-k 2 m", ()),
        ("m a --top-k 2 -- -b --seed --", ("a", "-b", "--seed", "--")),
        ("-- m --help", ("--help",)),
        ("m '' -1 -1e5 '- a dash'", ("", "-1", "-1e5", "- a dash")),
    ],
)
def test_prompts_may_come_anywhere_between_options(words: str, prompts: tuple[str, ...]) -> None:
    from generate import GenerateConfig

    cfg = parse(GenerateConfig, shlex.split(words))
    assert (cfg.checkpoint, cfg.prompts, cfg.seed) == ("m", prompts, 1337)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lr abc", "--lr is 'abc'; it must be a number"),
        ("--lr ''", "--lr is ''; it must be a number"),
        ("--steps 5.0", "--steps is '5.0'; it must be a whole number"),
        (
            f"--steps {'9' * 5000}",
            f"--steps is '{'9' * 59}... (5002 characters); it must be a whole number",
        ),
        (
            "--micro-batch outo",
            "--micro-batch is 'outo'; it must be a whole number or auto (did you mean auto?)",
        ),
        (
            "--schedule cosin",
            "--schedule is 'cosin'; it must be cosine, linear, wsd, constant or "
            "slanted-triangular (did you mean cosine?)",
        ),
        ("--steps", "--steps needs a value"),
        ("--steps --lr 1", "--steps needs a value"),
        ("--out -x", "--out needs a value"),
        ("--compile=yes", "--compile takes no value; type --compile or --no-compile alone"),
        ("--step 5", "unknown option --step (did you mean --steps?)"),
        ("-steps 5", "unknown option -steps (did you mean --steps?)"),
        ("--no-compil", "unknown option --no-compil (did you mean --no-compile?)"),
        ("--prompts a -- b", "unexpected word 'b'; options are written --name value (see --help)"),
        ("--config", "--config needs a value"),
        ("--config ''", "--config is empty; give a file, or leave --config out"),
    ],
)
def test_a_wrong_word_is_one_line(words: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        parse(TrainConfig, shlex.split(words))
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"steps": true}', "steps is true; it must be a whole number"),
        ('{"steps": [1]}', "steps is [1]; it must be a whole number"),
        ('{"steps": 1.5}', "steps is 1.5; it must be a whole number"),
        ('{"compile": 1}', "compile is 1; it must be true or false"),
        ('{"lr": "--x"}', "lr is '--x'; it must be a number"),
        ('{"optimizer": "sgd"}', "optimizer is 'sgd'; it must be adamw or muon"),
    ],
)
def test_a_config_value_of_the_wrong_kind_is_one_line(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        parse(TrainConfig, ["--config", str(file)])
    assert str(error.value) == f"--config {file}: {told}"


def test_a_date_in_a_toml_file_is_text(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("out = 2026-01-02", encoding="utf-8")
    assert parse(TrainConfig, ["--config", str(file)]).out == "2026-01-02"
    file.write_text("steps = 2026-01-02", encoding="utf-8")
    with pytest.raises(UserError, match=r"steps is .*2026-01-02.*; it must be a whole number"):
        parse(TrainConfig, ["--config", str(file)])


# --- help


@pytest.mark.parametrize("columns", ["1", "80"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_help_names_every_option(
    kind: Any, columns: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as end:
        parse(kind, ["--seed", "abc", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for option in options_of(kind):
        assert option.label in shown
        assert all(typed in shown for typed in option.typed)


def test_the_page_of_options_matches_the_dataclasses() -> None:
    committed = (REPO / "docs" / "options.md").read_text(encoding="utf-8")
    assert committed == page(), "run python -m docs.options"
    commands = [kind for kind in KINDS if not kind.__module__.startswith("benchmarks")]
    for option in {option.label for kind in commands for option in options_of(kind)}:
        assert f"| `{option}` |" in committed


def test_the_page_of_options_finds_a_new_task(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "riddles.py").write_text(
        "from dataclasses import dataclass\n"
        "from types import SimpleNamespace\n"
        "from tasks.generation.options import GenerationConfig\n"
        "@dataclass(frozen=True)\n"
        "class Options(GenerationConfig):\n"
        "    riddle_column: str | None = None\n"
        '    """Column of the riddle."""\n'
        "TASK = SimpleNamespace(config=Options)\n"
    )
    monkeypatch.setattr(finetune, "__path__", [*finetune.__path__, str(tmp_path)])
    section = page().partition("## Riddles\n")[2].partition("## ")[0]
    assert "`finetune.riddles`" in section and "`--riddle-column`" in section


def test_help_has_defaults_and_docstrings_of_base_classes(capsys) -> None:
    from finetune.sentiment import SentimentConfig

    with pytest.raises(SystemExit):
        parse(SentimentConfig, ["-h"], {"out": "runs/sentiment 100%"})
    shown = " ".join(capsys.readouterr().out.split())
    docs = field_docs(SentimentConfig)
    for line in (
        "--config FILE Read options from a JSON or TOML file",
        # A docstring of the class itself, one of a base class, and defaults of both.
        f"--label-column TEXT {docs['label_column']}",
        f"--steps INT {docs['steps']} --",
        f"--dropout FLOAT {docs['dropout']} (default: 0.1)",
        f"--keep INT {docs['keep']} (default: 1)",
        f"--micro-batch INT|auto {docs['micro_batch']} (default: auto)",
        f"--words [TEXT ...] {docs['words']}",
        f"--strict, --no-strict {docs['strict']}",
        "Default: runs/PRESET, or runs/TASK.",
    ):
        assert line in shown
