"""What benchmarks.peers found, as figures, as a table and in words. Needs neither torch nor the
machine it ran on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from base.console import bytes_text
from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.table import markdown

NOTES = (
    "plain: a module as nanoGPT writes it. litgpt: its blocks, head and loss, GPT-2's position "
    "table added and its own "
    "rotary\npositions taken out. liger: transformers' GPT-2 with Liger's layer norm and its fused "
    "head and loss."
)
BASELINE = "transformers compiled"  # whose memory the project's goal is a share of


def rates(tokens: int, seconds: Sequence[float]) -> dict[str, float]:
    of = [tokens / s for s in seconds]
    return {"tokens_per_second": statistics.median(of), "slowest": min(of), "fastest": max(of)}


def assessed(case: dict[str, Any]) -> dict[str, Any]:
    """The JSON of one case: ours over all its turns, the shares of the ceilings, and the best of
    the others."""
    contenders = {
        name: case["contenders"][name] for name in CONTENDERS if name in case["contenders"]
    }
    measured = {name: of for name, of in contenders.items() if "error" not in of}
    contenders[OURS] = overall(case, measured)
    for name in measured:
        contenders[name] = contenders[name] | shares(case, contenders[name]["tokens_per_second"])
    return case | {"contenders": contenders, "best": best(measured)}


def overall(case: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Our figures from the turns alone and those beside each of the others."""
    turns = [measured[OURS], *(of["beside"] for of in measured.values() if "beside" in of)]
    tokens = case["rows"] * case["seq_len"] * case["accumulation"]
    seconds = [s for of in turns for s in of["seconds"]]
    return (
        measured[OURS]
        | rates(tokens, seconds)
        | {"memory_bytes": max(of["memory_bytes"] for of in turns)}
    )


def shares(case: dict[str, Any], tokens_per_second: float) -> dict[str, float]:
    """Of the measured ceiling, and of the maker's data sheet where it is known."""
    flops = case["flops_per_token"] * tokens_per_second
    found = {"mfu": flops / case["ceiling_flops"]}
    if case["sheet_flops"]:
        found["mfu_of_data_sheet"] = flops / case["sheet_flops"]
    return found


def best(measured: dict[str, Any]) -> dict[str, Any]:
    """The fastest of the others as it ships, and with our allocator: by name, and our ratios to
    it."""
    found = {}
    for kind, kept in (("as it ships", False), ("with our allocator", True)):
        peers = [
            name for name in measured if CONTENDERS[name].peer and CONTENDERS[name].kept == kept
        ]
        if peers:
            name = min(peers, key=lambda name: measured[name]["speed_ratio"])
            found[kind] = {"name": name, "speed_ratio": measured[name]["speed_ratio"]}
            found[kind]["memory_ratio"] = measured[name]["memory_ratio"]
    return found


# --- in words


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Results as a Markdown table, aligned so that it reads as plain text too."""
    head = [
        "shape",
        "precision",
        "trainer",
        "tokens/s",
        "slowest-fastest",
        "MFU",
        "of sheet",
        "peak memory",
    ]
    rows = [[*head, "speed x", "memory x"], *(row for case in cases for row in table_rows(case))]
    if not any(case["sheet_flops"] for case in cases):
        rows = [row[:6] + row[7:] for row in rows]
    return markdown(rows[0], rows[1:], words=range(3))


def table_rows(case: dict[str, Any]) -> Iterator[list[str]]:
    for name, of in case["contenders"].items():
        words = [f"{case['shape']}, {size(case)}", case["precision"]]
        if "error" in of:
            yield [*words, f"{name}: {of['error']:.60}", *[""] * 7]
            continue
        speed = f"{of['tokens_per_second']:,.0f}", f"{of['slowest']:,.0f}-{of['fastest']:,.0f}"
        sheet = f"{of['mfu_of_data_sheet']:.1%}" if "mfu_of_data_sheet" in of else ""
        ratios = (
            (f"{of['speed_ratio']:.2f}", f"{of['memory_ratio']:.2f}")
            if "speed_ratio" in of
            else ("", "")
        )
        yield [
            *words,
            name,
            *speed,
            f"{of['mfu']:.1%}",
            sheet,
            bytes_text(of["memory_bytes"]),
            *ratios,
        ]


def size(case: dict[str, Any]) -> str:
    """Micro-batch x length, and x accumulation where there is any."""
    return f"{case['rows']} x {case['seq_len']}" + (
        f" x {case['accumulation']}" if case["accumulation"] > 1 else ""
    )


def sentence(case: dict[str, Any]) -> str:
    """Ours beside the best of the others, in words."""
    parts = [
        f"{of['speed_ratio']:.2f} x the speed of the best peer {kind} ({of['name']}), "
        f"{of['memory_ratio']:.2f} x its memory"
        for kind, of in case["best"].items()
    ]
    baseline = case["contenders"].get(BASELINE, {})
    if "memory_ratio" in baseline:
        parts.append(f"{baseline['memory_ratio']:.2f} x the memory of {BASELINE}")
    return (
        f"- {case['shape']} {case['precision']}: "
        + ("; ".join(parts) or "no peer was measured")
        + "."
    )


def report(facts: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    hardware = facts["hardware"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    versions = ", ".join(
        f"{name} {version}" for name, version in facts["versions"].items() if version
    )
    ceilings = {case["precision"]: case["ceiling_flops"] for case in cases}
    ceiling = ", ".join(
        f"{flops / 1e12:.3g} TFLOP/s in {precision}" for precision, flops in ceilings.items()
    )
    turns = "steps of each alone" if hardware["gpu"] else "alternated steps"
    sheet = (
        ";\nof sheet: of the maker's data sheet"
        if any(case["sheet_flops"] for case in cases)
        else ""
    )
    return (
        f"One optimizer step on {where}, {facts['date'][:10]}: {versions}.\n\n{table(cases)}\n\n"
        "Shapes: micro-batch x length x accumulation. Speed x and memory x: this engine over the "
        "other, medians over "
        f"{turns}; more speed,\nless memory is better. MFU: share of the matrix-product ceiling "
        "measured in this "
        f"run, {ceiling}{sheet}.\nPeak memory is that of a process (on a GPU: of its allocations) "
        f"without its code.\n{NOTES}\n\n" + "\n".join(map(sentence, cases)) + "\n"
    )
