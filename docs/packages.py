"""Draws docs/packages.svg, the picture of the packages, from the imports that the code has.

python -m docs.packages

It also holds the two readers of source that the tests on structure share: who imports whom, and
how many tokens a file has.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import io
import tokenize
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
OUTSIDE = {"tests", "docs", "examples"}  # Python that is not part of the program
COMMANDS = ("train_gpt2", "generate", "evaluate", "fineweb_prep", "tokenizer")

LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FSTRING_START, FSTRING_END = (
    getattr(tokenize, name, None) for name in ("FSTRING_START", "FSTRING_END")
)


# --- reading the source


def source_files() -> list[Path]:
    """Every Python file of the program: those at the top level and those of its packages."""
    packages = [
        folder
        for folder in REPO.iterdir()
        if folder.name not in OUTSIDE and folder.name[0] != "." and any(folder.glob("*.py"))
    ]
    files = (file for folder in packages for file in folder.rglob("*.py"))
    return sorted([*REPO.glob("*.py"), *files])


@functools.cache
def modules() -> Mapping[str, Path]:
    """Every module of the program by its dotted name."""
    parts = {file: file.relative_to(REPO).with_suffix("").parts for file in source_files()}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in parts.items()}


@functools.cache
def imports(name: str) -> frozenset[str]:
    """The program's modules that a module imports, at its top or inside a function."""
    known = modules()
    found: set[str] = set()
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import name`: name may be a module or something inside the package
            found.update(
                f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names
            )
    return frozenset(module for module in found if module in known) - {name}


def tokens(source: str) -> int:
    """Tokens of Python source without comments, docstrings and layout."""
    documentation = {
        (statement.lineno, statement.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(body := getattr(node, "body", None), list)
        for statement in body
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }
    count = inside = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # From Python 3.12 on an f-string is several tokens; it counts as one here.
        inside -= token.type == FSTRING_END
        if token.type not in LAYOUT and token.start not in documentation and not inside:
            count += token.type != FSTRING_END
        inside += token.type == FSTRING_START
    return count


# --- the picture


def box_of(module: str) -> str:
    """The box of the picture that a module belongs to: its package, or the commands."""
    unit = module.partition(".")[0]
    return "commands" if unit in COMMANDS else unit


def boxes() -> tuple[dict[str, int], dict[str, set[str]]]:
    """Tokens of each box, and the boxes that it imports."""
    size: dict[str, int] = defaultdict(int)
    needs: dict[str, set[str]] = defaultdict(set)
    for name, file in modules().items():
        box = box_of(name)
        size[box] += tokens(file.read_text(encoding="utf-8"))
        needs[box] |= {box_of(other) for other in imports(name)} - {box}
    return size, needs


def floors(needs: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each box: one above the highest box that it imports."""
    floor: dict[str, int] = {}
    for box in graphlib.TopologicalSorter(needs).static_order():
        floor[box] = max((floor[other] + 1 for other in needs.get(box, ())), default=0)
    return floor


def direct(needs: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that do not follow from others (the transitive reduction): too many arrows show
    nothing."""

    @functools.cache
    def reaches(box: str) -> frozenset[str]:
        return frozenset(needs.get(box, ())).union(*map(reaches, needs.get(box, ())))

    return [
        (box, other)
        for box, others in needs.items()
        for other in sorted(others)
        if not any(other in reaches(between) for between in others - {other})
    ]


def draw(path: Path) -> None:
    """Write the picture as SVG: a row for each floor, an arrow from a box to each that it
    imports."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # The same code gives the same file, and its words stay words.
    plt.rcParams |= {"svg.hashsalt": "packages", "svg.fonttype": "none"}
    size, needs = boxes()
    floor = floors(needs)
    rows: dict[int, list[str]] = defaultdict(list)
    for box in sorted(floor):
        rows[floor[box]].append(box)
    x: dict[str, float] = {}
    for row in sorted(rows):
        rows[row].sort(key=lambda box: (_middle(box, needs, x), box))
        for at, box in enumerate(rows[row]):
            x[box] = at - (len(rows[row]) - 1) / 2
    figure, axes = plt.subplots(figsize=(7.5, 0.72 * len(rows) + 0.4))
    style = {"boxstyle": "round,pad=0.5", "edgecolor": "#4c72b0"}
    for box in x:
        axes.text(
            2 * x[box],
            floor[box],
            f"{box}\n{size[box] / 1000:.1f}k tokens",
            ha="center",
            va="center",
            fontsize=8,
            bbox=style | {"facecolor": "#eaf0fa"},
            zorder=3,
        )
    for box, other in direct(needs):
        bend = 0.0 if floor[box] - floor[other] == 1 or x[box] != x[other] else 0.9
        axes.annotate(
            "",
            xy=(2 * x[other], floor[other] + 0.33),
            xytext=(2 * x[box], floor[box] - 0.33),
            zorder=1,
            arrowprops={
                "arrowstyle": "->",
                "color": "#777777",
                "linewidth": 0.8,
                "connectionstyle": f"arc3,rad={bend}",
            },
        )
    axes.set_xlim(-4, 4)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _middle(box: str, needs: Mapping[str, set[str]], x: Mapping[str, float]) -> float:
    """Where a box would hang straight above what it imports."""
    below = [x[other] for other in needs.get(box, ())]
    return sum(below) / max(1, len(below))


if __name__ == "__main__":
    draw(REPO / "docs" / "packages.svg")
