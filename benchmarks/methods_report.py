"""What benchmarks.methods found, as figures over seeds and as tables. Needs neither torch nor the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.table import markdown
from runlog import bytes_text

Row = Mapping[str, Any]

LABELS = {
    "val_loss": "val loss", "val_perplexity": "perplexity", "chrf": "chrF", "chrf_poem": "chrF poem",
    "distinct_1": "distinct-1", "distinct_2": "distinct-2", "lines_right": "line accuracy",
    "longest_copied": "longest copy",
}  # fmt: skip
PUBLISHED_AS = "published, GPT-2 124M"
# What the systems that this project replaces published, of another base and with other splits of a poem.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "sonnets": {
        "full": {"val_perplexity": 55.73, "distinct_1": 0.621, "distinct_2": 0.927, "rhyming_accuracy": 0.141},
        "full+unlikelihood": {
            "val_perplexity": 51.68, "distinct_1": 0.613, "distinct_2": 0.919, "rhyming_accuracy": 0.215,
        },
        "prefix": {"val_perplexity": 50.11, "distinct_1": 0.572, "distinct_2": 0.878, "rhyming_accuracy": 0.166},
        "prefix+unlikelihood": {
            "val_perplexity": 55.70, "distinct_1": 0.641, "distinct_2": 0.944, "rhyming_accuracy": 0.132,
        },
        "sample-hot": {"chrf": 39.74}, "sample-of-prefix": {"chrf": 35.08}, "contrastive": {"chrf": 35.69},
        "contrastive-growing": {"chrf": 36.35}, "contrastive-mean": {"chrf": 35.69},
        "contrastive-growing-mean": {"chrf": 37.75}, "contrastive-penalty": {"chrf": 24.87}, "beam": {"chrf": 33.44},
        "mbr-beams": {"chrf": 37.75}, "ensemble": {"chrf": 37.65},
    },
}  # fmt: skip


# --- figures


def stat(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation (n - 1) over seeds; none of one seed."""
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def rows_of(
    names: Sequence[str], found: Mapping[str, Sequence[Row]], commands: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row a name that has figures; a figure is {"mean", "spread"} over seeds, absent where a seed has none."""
    rows = []
    for name in names:
        if not (cells := found.get(name)):
            continue
        row: dict[str, Any] = {"name": name, "seeds": [cell["seed"] for cell in cells]}
        row["metrics"] = stats([cell["metrics"] for cell in cells])
        row |= stats([{k: v for k, v in cell.items() if k not in ("seed", "metrics", "warnings")} for cell in cells])
        row["warnings"] = sorted({text for cell in cells for text in cell.get("warnings", ())})
        rows.append(row | {"command": commands[name]})
    return rows


def stats(cells: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Of each figure that all cells have."""
    named = [name for name in cells[0] if all(cell.get(name) is not None for cell in cells)]
    return {name: stat([cell[name] for cell in cells]) for name in named}


# --- the tables


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def cell(figure: Mapping[str, float | None] | None, write: Callable[[float], str] = number) -> str:
    """Mean ± spread."""
    if figure is None or figure["mean"] is None:
        return ""
    spread = figure["spread"]
    return write(figure["mean"]) + (f" ± {spread:.2g}" if spread is not None else "")


def metric_names(rows: Sequence[Row]) -> list[str]:
    """In the order in which the task gives them."""
    return list(dict.fromkeys(name for row in rows for name in row["metrics"] if name != "seconds"))


def label(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))


def best_row(rows: Sequence[Row], best: Sequence[str]) -> Row | None:
    """The row with the best mean of the metric that ranks."""
    having = [row for row in rows if best[0] in row["metrics"]]
    pick = max if best[1] == "max" else min
    return pick(having, key=lambda row: row["metrics"][best[0]]["mean"]) if having else None


def quality_cells(row: Row, metrics: Sequence[str], best: Sequence[str], top: Row | None) -> list[str]:
    """A row's metrics, the best of all in bold."""
    cells = [cell(row["metrics"].get(metric)) for metric in metrics]
    if row is top:
        at = metrics.index(best[0])
        cells[at] = f"**{cells[at]}**"
    return cells


def quality_table(result: Row) -> str:
    """Of the methods: the task's metrics at the step that was chosen, and the lowest perplexity of all epochs."""
    rows, best = result["methods"], result["best"]
    metrics, top = metric_names(rows), best_row(rows, best)
    losses = any("lowest_val_loss" in row for row in rows)
    head = ["method", *map(label, metrics), *(["lowest perplexity"] if losses else []), "seeds"]
    lines = []
    for row in rows:
        lowest = [lowest_perplexity(row)] if losses else []
        lines.append([row["name"], *quality_cells(row, metrics, best, top), *lowest, str(len(row["seeds"]))])
    return markdown(head, lines, (0,))


def lowest_perplexity(row: Row) -> str:
    if "lowest_val_loss" not in row:
        return ""
    return f"{number(math.exp(row['lowest_val_loss']['mean']))} (epoch {row['lowest_epoch']['mean']:.3g})"


def cost_table(rows: Sequence[Row]) -> str:
    """Of the methods: what trained, how long, in how much memory."""
    head = (
        "method", "peak rate", "parameters trained", "share", "training s", "s an epoch", "peak memory", "best epoch",
        "of epochs",
    )  # fmt: skip
    lines = [
        [
            row["name"], f"{row['lr']['mean']:.3g}", f"{row['trained_parameters']['mean']:,.0f}", f"{share(row):.2%}",
            cell(row["seconds"], lambda s: f"{s:,.0f}"), f"{row['seconds_per_epoch']['mean']:.3g}",
            bytes_text(row["memory_bytes"]["mean"]), cell(row["best_epoch"]), f"{row['epochs']['mean']:g}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(head, lines, (0,))


def share(row: Row) -> float:
    return row["trained_parameters"]["mean"] / row["parameters"]["mean"]


def decoding_table(result: Row) -> str:
    """Of the decodings: the task's metrics and the seconds that all answers took."""
    rows, best = result["decodings"], result["best"]
    metrics, top = metric_names(rows), best_row(rows, best)
    published = PUBLISHED.get(result["task"], {})
    head = ["decoding", *map(label, metrics), "seconds", "seeds"]
    head += [f"{label(best[0])} ({PUBLISHED_AS})"] if published else []
    lines = []
    for row in rows:
        words = [row["name"], *quality_cells(row, metrics, best, top), cell(row["metrics"]["seconds"])]
        words.append(str(len(row["seeds"])))
        beside = published.get(row["name"], {}).get(best[0])
        lines.append(words + ([number(beside) if beside else ""] if published else []))
    return markdown(head, lines, (0,))


PUBLISHED_NOTE = {
    "sonnets": "And not that of all: the published perplexity is that of a poem under the frequencies of its own words, "
    "the published rhymes are alike in spelling. The published chrF has the size of whole poems.",
}


def published_table(result: Row) -> str:
    """The methods that have published figures, beside these."""
    published = PUBLISHED.get(result["task"], {})
    rows = [row for row in result["methods"] if published.get(row["name"])]
    if not rows:
        return ""
    metrics = list(published[rows[0]["name"]])
    head = ["method", *(text for m in metrics for text in (label(m), PUBLISHED_AS))]
    lines = [
        [row["name"], *(t for m in metrics for t in (cell(row["metrics"].get(m)), number(published[row["name"]][m])))]
        for row in rows
    ]
    note = (
        f"Other weights to begin with, so other levels: what can be compared is order. {PUBLISHED_NOTE[result['task']]}"
    )
    return f"{markdown(head, lines, (0,))}\n\n{note}\n\n"


def base_line(base: Row) -> str:
    """Which weights all methods but `scratch` begin with."""
    text = (
        f"Base: {base['init']}, {base['parameters']:,} parameters ({base['n_layer']} layers x {base['n_embd']} wide, "
        f"{base['n_head']} heads, context {base['block_size']}, {base['vocab_size']:,} ids)"
    )
    card, results = base.get("card", {}), base.get("results", {})
    if "tokens" in results:
        text += f", trained on {results['tokens']:,} tokens"
    if "val_loss" in results:
        text += f" to a validation loss of {results['val_loss']:.3f}"
    return text + (f"; its data: {card['data']}" if "data" in card else "") + "."


def machine_line(machine: Row) -> str:
    hardware = machine["hardware"]
    where = hardware["gpu"] if machine["device"] == "cuda" else f"{hardware['cpu']}, {hardware['threads']} threads"
    return f"{where}; " + ", ".join(
        f"{k} {v}" for k, v in machine["versions"].items() if v and k in ("python", "torch")
    )


def text_of(result: Row) -> str:
    """methods.md"""
    train, val = result["data"]
    parts = [
        f"# {result['task']}: methods compared\n\n{base_line(result['base'])}\n\nTrained on {train}, chosen and scored on "
        f"{val}. {machine_line(result['machine'])}; {result['date'][:10]}.\n\n```\n{result['command']}\n```\n",
        f"## What is trained\n\n{quality_table(result)}\n\n{cost_table(result['methods'])}\n\n{method_note(result)}\n"
        if result["methods"]
        else "",
        published_table(result),
        f"## How it is decoded\n\n{decoding_table(result)}\n\n{decoding_note(result)}\n" if result["decodings"] else "",
        lost(result),
    ]
    return "\n".join(part for part in parts if part)


def method_note(result: Row) -> str:
    metric, way = result["best"]
    return (
        f"All metrics but the lowest perplexity are of the epoch with the {'highest' if way == 'max' else 'lowest'} {label(metric)}, "
        f"whose weights final/ holds. The validation rows chose that epoch and are scored here as well: each\nfigure is "
        f"a little better than on rows never seen, the more so the noisier it is. Mean ± standard deviation over seeds; "
        f"the methods that did best with the first seed have\nmore of them. Perplexity is that of the answers' tokens. "
        f"Training s: optimizer steps alone. Best epoch: of those trained. Scratch has the base's shape and tokenizer.\n"
    )


def decoding_note(result: Row) -> str:
    prefix = any(row["name"] == "sample-of-prefix" for row in result["decodings"])
    return (
        "All decode the validation rows with the final weights of `full`"
        + (", sample-of-prefix with those of `prefix`" if prefix else "")
        + ". That epoch of `full` was chosen by answers decoded as in `sample`, with the same draws: this row is the best of "
        "several, which the\nothers are not. Seconds: opening the model and answering all rows. Seeds: of training and of "
        "the draws.\n"
    )


def lost(result: Row) -> str:
    """Cells without figures, and why."""
    lines = [f"- {name} failed: {reason}" for name, reason in result["failed"].items()]
    lines += [f"- left out for want of time: {', '.join(result['left_out'])}"] if result["left_out"] else []
    return "## Not there\n\n" + "\n".join(lines) + "\n" if lines else ""
