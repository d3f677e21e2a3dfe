"""The figures of benchmarks.methods over seeds, its tables and its chart. It needs neither torch
nor the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.charts import COLOURS, chart, short_number, short_numbers
from base.console import bytes_text
from benchmarks.harness import title
from benchmarks.rows import ROWS, Bar, add_head, draw_bars
from benchmarks.table import Column, Row, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figure = Mapping[str, Any]  # the mean and the spread over seeds
# the title of a panel, the figure of a row, and how it is drawn: point, bar or log (a bar)
Panel = tuple[str, Callable[[Row], Figure | None], str]
LABELS = {
    "val_loss": "val loss",
    "val_perplexity": "perplexity",
    "chrf": "chrF",
    "chrf_poem": "chrF poem",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "lines_right": "line accuracy",
    "longest_copied": "longest copy",
    "macro_f1": "macro-F1",
}
# metrics of a task with labels, in the order of the table
OF_LABELS = ("accuracy", "macro_f1", "val_loss", "calibration_error")
# Figures that the systems replaced by this project published, from another base: by the task and a
# part of the data's name, then by metric, then by method or decoding.
PUBLISHED: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    ("sonnets", ""): {
        "val_perplexity": {
            "full": 55.73,
            "full+unlikelihood": 51.68,
            "prefix": 50.11,
            "prefix+unlikelihood": 55.70,
        },
        "distinct_1": {
            "full": 0.621,
            "full+unlikelihood": 0.613,
            "prefix": 0.572,
            "prefix+unlikelihood": 0.641,
        },
        "distinct_2": {
            "full": 0.927,
            "full+unlikelihood": 0.919,
            "prefix": 0.878,
            "prefix+unlikelihood": 0.944,
        },
        "rhyming_accuracy": {
            "full": 0.141,
            "full+unlikelihood": 0.215,
            "prefix": 0.166,
            "prefix+unlikelihood": 0.132,
        },
        "chrf": {
            "sample-hot": 39.74,
            "sample-of-prefix": 35.08,
            "contrastive": 35.69,
            "contrastive-growing": 36.35,
            "contrastive-mean": 35.69,
            "contrastive-growing-mean": 37.75,
            "contrastive-penalty": 24.87,
            "beam": 33.44,
            "mbr-beams": 37.75,
            "ensemble": 37.65,
        },
    },
    ("sentiment", "sst"): {
        "accuracy": {"full": 0.518, "ulmfit": 0.509},
        "macro_f1": {"full": 0.490, "ulmfit": 0.480},
    },
    ("sentiment", "cfimdb"): {"accuracy": {"full": 0.988}, "macro_f1": {"full": 0.988}},
    ("paraphrase", "quora"): {
        "accuracy": {
            "full+word": 0.9081,
            "full": 0.8919,
            "full+mean": 0.8872,
            "full+simcse": 0.8946,
            "full+augment": 0.8854,
            "full+also": 0.8891,
            "lora-attention-16": 0.8707,
            "lora-attention-8": 0.8599,
            "dora-attention-8": 0.8601,
        },
        "macro_f1": {
            "full+word": 0.9019,
            "full": 0.8849,
            "full+mean": 0.88,
            "full+simcse": 0.8879,
            "full+augment": 0.8781,
            "full+also": 0.8505,
            "lora-attention-16": 0.8623,
            "lora-attention-8": 0.8498,
            "dora-attention-8": 0.8501,
        },
    },
}
PUBLISHED_NOTES = {
    "sonnets": "The published perplexity is that of a poem under the frequencies of its own words, "
    "the published rhymes are alike in spelling, and the published chrF has the size of whole "
    "poems.",
    "sentiment": "They had batches of 64 rows, rate 2e-5, dropout 0.3, the best of 6 epochs.",
    "paraphrase": "They had batches of 96 rows, rate 1e-5 to 5e-5, 3 epochs of full+simcse, 10 of "
    "full+word and of full+augment, 20 of the others.",
}
LABEL_NOTE = (
    "95% of rows: the bootstrap's interval of the best seed. P against full: McNemar's exact test "
    "of the first seed's labels;\nof twenty methods that are no different one is below 0.05 by "
    "chance. Val loss of full+word is over all words, of the others over the labels.\n"
)


def published(result: Row) -> dict[str, dict[str, float]]:
    """The published figures for these rows, by metric, then by method or decoding."""
    name = Path(result["data"][0]).name.lower()
    return next(
        (of for (task, part), of in PUBLISHED.items() if task == result["task"] and part in name),
        {},
    )


# --- figures


def rows_of(
    names: Sequence[str], found: Mapping[str, Mapping[int, Row]], best: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each name that has figures in `found`, by name and seed. A figure is {"mean",
    "spread"} over seeds, and is absent if a seed lacks it.

    "intervals" are those of the seed that is best by the ranking metric.
    """
    ranks, way = best
    rows = []
    for name in (name for name in names if name in found):
        cells = list(found[name].values())
        top = max(cells, key=lambda cell: merit(cell["metrics"].get(ranks), way))
        row = stats(cells) | {
            "name": name,
            "seeds": list(found[name]),
            "metrics": stats([cell["metrics"] for cell in cells]),
            "between_epochs": stats([cell.get("between_epochs", {}) for cell in cells]),
            "intervals": top.get("intervals", {}),
            "command": cells[0]["command"],
        }
        rows.append(row)
    return rows


def stats(cells: Sequence[Row]) -> dict[str, Any]:
    """The mean and the standard deviation (n - 1) of each number that all cells have. One cell has
    no deviation."""
    columns: dict[str, list[Any]] = {name: [cell.get(name) for cell in cells] for name in cells[0]}
    return {
        name: {
            "mean": statistics.fmean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else None,
        }
        for name, values in columns.items()
        if all(isinstance(value, int | float) for value in values)
    }


def merit(score: float | None, way: str) -> float:
    """The score with its sign changed if less is better. Minus infinity if there is no score."""
    if score is None:
        return -math.inf
    return score if way == "max" else -score


def lowest_perplexity(row: Row) -> Figure | None:
    """The lowest perplexity over all epochs, not at the chosen one, from the lowest loss."""
    if not (loss := row.get("lowest_val_loss")):
        return None
    perplexity = math.exp(loss["mean"])
    return {"mean": perplexity, "spread": perplexity * (loss["spread"] or 0.0)}


# --- the cells of the tables


def number(value: float) -> str:
    """The number as text with four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as text."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def cell(figure: Figure | None, write: Callable[[Any], str] = number) -> str:
    """A figure as text: mean ± spread."""
    if figure is None:
        return ""
    spread = figure["spread"]
    return write(figure["mean"]) + (f" ± {spread:.2g}" if spread is not None else "")


def mean(name: str, form: str) -> Callable[[Row], str]:
    """A function that formats the mean of a figure. Rows without the figure get an empty cell."""
    return lambda row: form.format(row[name]["mean"]) if name in row else ""


def label(metric: str) -> str:
    """The name of a metric in tables and charts."""
    return LABELS.get(metric, metric.replace("_", " "))


def epochs_text(epochs: int) -> str:
    """The number of epochs as text."""
    return f"{epochs} epoch" + "s" * (epochs != 1)


def interval_text(interval: Sequence[float] | None) -> str:
    """The limits of a confidence interval as text."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def p_text(test: Row | None) -> str:
    """The p-value of McNemar's test as text."""
    if not test:
        return ""
    p = test["mcnemar_p"]
    return f"{p:.2g}" if p >= 1e-4 else "<0.0001"


def lowest_text(row: Row) -> str:
    """The cell of the lowest perplexity and its epoch."""
    found = lowest_perplexity(row)
    return f"{number(found['mean'])} (epoch {row['lowest_epoch']['mean']:.3g})" if found else ""


def name(row: Row) -> str:
    """The cell of a row's name."""
    return row["name"]


# --- the tables


def of_labels(result: Row) -> bool:
    """Whether the task has labels."""
    return result["family"] == "classification"


def quality_table(head: str, result: Row, rows: Sequence[Row], more: Sequence[Column]) -> str:
    """The metrics at the chosen step, each beside what was published, then `more`. The ranking
    metric is bold in the best row, and its confidence follows it."""
    ranks, way = result["best"]
    found = dict.fromkeys(name for row in rows for name in row["metrics"])
    metrics = [name for name in found if name != "seconds"]
    if of_labels(result):  # and of the tasks that are learned as well
        metrics = [*OF_LABELS, *(name for name in found if name.endswith("_accuracy"))]
    top = max(rows, key=lambda row: merit(row["metrics"].get(ranks, {}).get("mean"), way))
    beside = published(result)

    def of_metric(metric: str) -> list[Column]:
        def text(row: Row) -> str:
            found = cell(row["metrics"].get(metric))
            return f"**{found}**" if found and metric == ranks and row is top else found

        there = beside.get(metric, {})
        return [
            (label(metric), text),
            (f"published {label(metric)}", lambda row: f"{there.get(row['name'], '')}"),
        ]

    columns = [column for metric in metrics for column in of_metric(metric)]
    at = 2 * metrics.index(ranks) + 2
    columns[at:at] = [
        ("95% of rows", lambda row: interval_text(row["intervals"].get(ranks))),
        ("p against full", lambda row: p_text(row.get("against_full"))),
    ]
    seeds: Column = ("seeds", lambda row: str(len(row["seeds"])))
    return table([(head, name), *columns, *more, seeds], rows)


def cost_table(result: Row) -> str:
    """The methods' trained parameters, time, memory and speed, and how much the metric varies
    between epochs."""
    steady = result["best"][0]
    columns: list[Column] = [
        ("method", name),
        ("peak rate", mean("lr", "{:.3g}")),
        ("parameters trained", mean("trained_parameters", "{:,.0f}")),
        ("share", lambda row: f"{share(row):.2%}"),
        ("training s", lambda row: cell(row["seconds"], duration)),
        ("s to best", lambda row: cell(row.get("seconds_to_best"), duration)),
        ("rows/s", mean("rows_per_second", "{:,.3g}")),
        ("peak memory", lambda row: bytes_text(row["memory_bytes"]["mean"])),
        ("best epoch", lambda row: cell(row.get("best_epoch"))),
        ("of epochs", mean("epochs", "{:.3g}")),
        (
            f"{label(steady)} between epochs",
            lambda row: mean(steady, "{:.2g}")(row["between_epochs"]),
        ),
    ]
    return table(columns, result["methods"])


def share(row: Row) -> float:
    """The trained share of all parameters."""
    return row["trained_parameters"]["mean"] / row["parameters"]["mean"]


def trial_table(result: Row) -> str:
    """The scores of a search, with the chosen setting of each method in bold."""

    def score(trial: Row) -> str:
        if trial["score"] is None:
            return ""
        bold = "**" * trial["chosen"]
        return f"{bold}{number(trial['score'])}{bold}"

    columns: list[Column] = [
        ("method", name),
        ("rate x", lambda trial: f"{trial['rate']:g}"),
        ("epochs", lambda trial: f"{trial['epochs']}"),
        (label(result["best"][0]), score),
    ]
    return table(columns, result["trials"])


# --- the text


def base_line(base: Row) -> str:
    """A sentence on the weights that all methods except `scratch` start from."""
    text = (
        f"Base: {base['init']}, {base['parameters']:,} parameters ({base['n_layer']} layers x "
        f"{base['n_embd']} wide, "
        f"{base['n_head']} heads, context {base['block_size']}, {base['vocab_size']:,} ids)"
    )
    card, results = base.get("card", {}), base.get("results", {})
    if "tokens" in results:
        text += f", trained on {results['tokens']:,} tokens"
    if "val_loss" in results:
        text += f" to a validation loss of {results['val_loss']:.3f}"
    return text + (f"; its data: {card['data']}" if "data" in card else "") + "."


def text_of(result: Row) -> str:
    """The text of methods.md."""
    train, val = result["data"]
    metric = label(result["best"][0])
    text = (
        f"# {result['task']}: methods compared\n\n{base_line(result['base'])}\n\nTrained on "
        f"{train}, chosen and scored on {val}. {title(result['machine'] | result)}\n\n"
        f"```\n{result['command']}\n```\n"
    )
    if rows := result["methods"]:
        lowest: list[Column] = [("lowest perplexity", lowest_text)]
        more = [] if of_labels(result) else lowest
        text += (
            f"\n## What is trained\n\n{quality_table('method', result, rows, more)}\n\n"
            f"{cost_table(result)}\n\nMetrics, but not the lowest perplexity, are of the epoch with "
            f"the best {metric}, whose weights final/ holds. The validation rows chose that epoch "
            "and are scored here as well,\nso a figure is a little better than on rows never seen. "
            "Mean ± standard deviation over seeds; the best methods of the first seed have more.\n"
            "Training s: optimizer steps alone; s to best: until that epoch's end; rows/s: of the "
            f"median step.\n{metric} between epochs: its standard deviation over the evaluations of "
            "a run's second half. Scratch has the base's shape and tokenizer.\n"
        )
        text += LABEL_NOTE if of_labels(result) else "Perplexity is that of the answers' tokens.\n"
    if result["trials"]:
        text += (
            f"\n## What the search tried\n\n{trial_table(result)}\n\n{metric} of the first seed; "
            "rates in multiples of the method's own. The tables above hold the setting in bold.\nA "
            "best setting at the edge of what was tried may have a better one beyond it.\n"
        )
    if rows := result["decodings"]:
        seconds: list[Column] = [("seconds", lambda row: cell(row["metrics"]["seconds"]))]
        text += (
            f"\n## How it is decoded\n\n{quality_table('decoding', result, rows, seconds)}\n\nAll "
            "decode the validation rows with the final weights of `full`, sample-of-prefix with "
            "those of `prefix`.\nAnswers decoded as in `sample` chose that epoch of `full`, so "
            "`sample` alone is the best of several. Seconds: opening the model and answering all "
            "rows.\n"
        )
    if published(result):
        text += (
            "\nPublished figures are of GPT-2 124M. Other weights to begin with give other levels: "
            f"what can be compared is order.\n{PUBLISHED_NOTES[result['task']]}\n"
        )
    lost = [f"- {name} failed: {reason}\n" for name, reason in result["failed"].items()]
    if result["left_out"]:
        lost.append(f"- left out for want of time: {', '.join(result['left_out'])}\n")
    return text + (f"\n## Not there\n\n{''.join(lost)}" if lost else "")


# --- the chart

FAMILIES = {  # beginning of a method's name to its colour and what it trains
    "scratch": (COLOURS[6], "from scratch"),
    "last": (COLOURS[5], "part of the model"),
    "lstm-gpt2": (COLOURS[5], "part of the model"),
    "lora": (COLOURS[2], "LoRA, DoRA"),
    "dora": (COLOURS[2], "LoRA, DoRA"),
    "prefix": (COLOURS[3], "prefix, soft prompt"),
    "soft": (COLOURS[3], "prefix, soft prompt"),
    "lstm": (COLOURS[1], "without GPT-2"),
    "naive-bayes": (COLOURS[1], "without GPT-2"),
    "tf-idf": (COLOURS[1], "without GPT-2"),
}
EVERYTHING = (COLOURS[0], "everything")


def family(row: Row) -> tuple[str, str]:
    """The colour and the name of what a method trains, or the method whose weights are decoded."""
    name = row["name"].partition("-of-")[2] or row["name"]
    return next((of for begin, of in FAMILIES.items() if name.startswith(begin)), EVERYTHING)


def draw(result: Row, out: Path) -> None:
    """Write the chart: a row per method with its quality and cost, most trained parameters first,
    then the decodings. Without methods there is no file."""
    from matplotlib.patches import Patch

    ranks, way = result["best"]
    methods = sorted(result["methods"], key=lambda row: -row["trained_parameters"]["mean"])
    decodings = [row for row in result["decodings"] if ranks in row["metrics"]]
    if not methods:
        return

    def metric(name: str) -> Callable[[Row], Figure | None]:
        return lambda row: row["metrics"].get(name)

    best = f"{label(ranks)} ({'more' if way == 'max' else 'less'} is better)"
    second: Panel = ("perplexity (less is better)", lowest_perplexity, "point")
    if of_labels(result):
        second = ("macro-F1 (more is better)", metric("macro_f1"), "point")
    parts: list[tuple[Sequence[Row], list[Panel]]] = [
        (
            methods,
            [
                (best, metric(ranks), "point"),
                second,
                ("parameters trained", lambda row: row["trained_parameters"], "log"),
                ("training, s", lambda row: row["seconds"], "bar"),
            ],
        )
    ]
    if decodings:
        by = f"{best} by decoding"
        took: Panel = ("all answers, s", metric("seconds"), "bar")
        parts.append((decodings, [(by, metric(ranks), "point"), took]))
    heights = [len(rows) + 2.6 for rows, _ in parts]
    with chart(out, 14, 1.2 + 0.34 * sum(heights), ROWS, w_pad=0.1, h_pad=0.12) as figure:
        of_parts = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
        for of_part, (rows, panels) in zip(of_parts, parts):
            for axes, panel in zip(of_part.subplots(1, len(panels), sharey=True), panels):
                draw_panel(axes, rows, *panel)
        families = dict.fromkeys(map(family, methods))
        base = result["base"]
        add_head(
            figure,
            f"{result['task']}: what each way of fine-tuning gives, and what it costs",
            f"Base: {base['init']}, {short_number(base['parameters'])} parameters. Lines: spread "
            f"over seeds. {title(result['machine'] | result).partition(':')[0]}.",
            [Patch(color=colour, label=trains) for colour, trains in families],
        )


def draw_panel(
    axes: Axes, rows: Sequence[Row], head: str, value: Callable[[Row], Figure | None], kind: str
) -> None:
    """Draw a figure of each row with its spread. A dashed line marks the point of `full`."""
    bars = []
    for row in rows:
        figure, colour = value(row) or {"mean": None, "spread": None}, family(row)[0]
        x, spread = figure["mean"], figure["spread"] or 0.0
        bars.append(Bar(row["name"], x, (x or 0) - spread, (x or 0) + spread, colour=colour))
        if row["name"] == "full" and kind == "point" and x is not None:
            axes.axvline(x, color=colour, alpha=0.5, linewidth=1, linestyle="--")
    draw_bars(axes, head, bars, kind == "point")
    if kind == "log":
        axes.set_xscale("log")
        axes.minorticks_off()
        short_numbers(axes.xaxis)
