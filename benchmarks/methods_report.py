"""The figures of benchmarks.methods over seeds, and its tables. It needs neither torch nor the
runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from base.console import bytes_text
from benchmarks.table import Column, Row, table

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
# Figures that the systems replaced by this project published, from another base. The keys are the
# task and a part of the data's name.
PUBLISHED: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    ("sonnets", ""): {
        "full": {
            "val_perplexity": 55.73,
            "distinct_1": 0.621,
            "distinct_2": 0.927,
            "rhyming_accuracy": 0.141,
        },
        "full+unlikelihood": {
            "val_perplexity": 51.68,
            "distinct_1": 0.613,
            "distinct_2": 0.919,
            "rhyming_accuracy": 0.215,
        },
        "prefix": {
            "val_perplexity": 50.11,
            "distinct_1": 0.572,
            "distinct_2": 0.878,
            "rhyming_accuracy": 0.166,
        },
        "prefix+unlikelihood": {
            "val_perplexity": 55.70,
            "distinct_1": 0.641,
            "distinct_2": 0.944,
            "rhyming_accuracy": 0.132,
        },
        "sample-hot": {"chrf": 39.74},
        "sample-of-prefix": {"chrf": 35.08},
        "contrastive": {"chrf": 35.69},
        "contrastive-growing": {"chrf": 36.35},
        "contrastive-mean": {"chrf": 35.69},
        "contrastive-growing-mean": {"chrf": 37.75},
        "contrastive-penalty": {"chrf": 24.87},
        "beam": {"chrf": 33.44},
        "mbr-beams": {"chrf": 37.75},
        "ensemble": {"chrf": 37.65},
    },
    ("sentiment", "sst"): {
        "full": {"accuracy": 0.518, "macro_f1": 0.490},
        "ulmfit": {"accuracy": 0.509, "macro_f1": 0.480},
    },
    ("sentiment", "cfimdb"): {"full": {"accuracy": 0.988, "macro_f1": 0.988}},
    ("paraphrase", "quora"): {
        "full+word": {"accuracy": 0.9081, "macro_f1": 0.9019},
        "full": {"accuracy": 0.8919, "macro_f1": 0.8849},
        "full+mean": {"accuracy": 0.8872, "macro_f1": 0.88},
        "full+simcse": {"accuracy": 0.8946, "macro_f1": 0.8879},
        "full+augment": {"accuracy": 0.8854, "macro_f1": 0.8781},
        "full+also": {"accuracy": 0.8891, "macro_f1": 0.8505},
        "lora-attention-16": {"accuracy": 0.8707, "macro_f1": 0.8623},
        "lora-attention-8": {"accuracy": 0.8599, "macro_f1": 0.8498},
        "dora-attention-8": {"accuracy": 0.8601, "macro_f1": 0.8501},
    },
}


def published(result: Row) -> dict[str, dict[str, float]]:
    """The published figures for these rows, by method or decoding."""
    name = Path(result["data"][0]).name.lower()
    return next(
        (of for (task, part), of in PUBLISHED.items() if task == result["task"] and part in name),
        {},
    )


# --- figures


def stat(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and the standard deviation (n - 1) over seeds. One seed has no deviation."""
    return {
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
    }


def rows_of(
    names: Sequence[str], found: Mapping[str, Sequence[Row]], best: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each name that has figures. A figure is {"mean", "spread"} over seeds, and is
    absent if a seed lacks it.

    "intervals" are those of the seed that is best by the ranking metric.
    """
    rows = []
    for name in names:
        if not (cells := found.get(name)):
            continue
        row: dict[str, Any] = {"name": name, "seeds": [cell["seed"] for cell in cells]}
        for group in ("metrics", "between_epochs"):
            row[group] = stats([cell.get(group, {}) for cell in cells])
        row |= stats(
            [
                {k: v for k, v in cell.items() if isinstance(v, int | float) and k != "seed"}
                for cell in cells
            ]
        )
        best_cell = best_of(cells, best, lambda cell, metric: cell["metrics"].get(metric))
        row["intervals"] = best_cell.get("intervals", {}) if best_cell else {}
        row["warnings"] = sorted({text for cell in cells for text in cell.get("warnings", ())})
        rows.append(row | {"command": cells[0]["command"]})
    return rows


def stats(cells: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """`stat` of each figure that all cells have."""
    named = [name for name in cells[0] if all(cell.get(name) is not None for cell in cells)]
    return {name: stat([cell[name] for cell in cells]) for name in named}


# --- the tables


def number(value: float) -> str:
    """The number as text with four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def cell(figure: Mapping[str, float | None] | None, write: Callable[[float], str] = number) -> str:
    """A figure as text: mean ± spread."""
    if figure is None or figure["mean"] is None:
        return ""
    spread = figure["spread"]
    return write(figure["mean"]) + (f" ± {spread:.2g}" if spread is not None else "")


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The names of the metrics, in the task's order."""
    return list(dict.fromkeys(name for row in rows for name in row["metrics"] if name != "seconds"))


def label(metric: str) -> str:
    """The name of a metric in tables and charts."""
    return LABELS.get(metric, metric.replace("_", " "))


def best_of(
    rows: Sequence[Row], best: Sequence[str], value: Callable[[Row, str], float | None]
) -> Row | None:
    """The row with the best value of the ranking metric, or None."""
    having = [(found, row) for row in rows if (found := value(row, best[0])) is not None]
    pick = max if best[1] == "max" else min
    return pick(having, key=lambda pair: pair[0])[1] if having else None


def mean_of(row: Row, metric: str) -> float | None:
    """The mean of a row's metric, or None."""
    return row["metrics"].get(metric, {}).get("mean")


def quality_columns(
    head: str, rows: Sequence[Row], metrics: Sequence[str], best: Sequence[str]
) -> list[Column]:
    """The columns of the metrics. The ranking metric is bold in the best row, and its confidence
    follows it."""
    ranks, top = best[0], best_of(rows, best, mean_of)

    def quality(metric: str) -> Column:
        bold = "**" if metric == ranks else ""

        def text(row: Row) -> str:
            found = cell(row["metrics"].get(metric))
            return f"{bold}{found}{bold}" if row is top else found

        return label(metric), text

    columns = [quality(metric) for metric in metrics]
    at = metrics.index(ranks) + 1
    columns[at:at] = [
        ("95% of rows", lambda row: interval_text(row["intervals"].get(ranks))),
        ("p against full", lambda row: p_text(row.get("against_full"))),
    ]
    return [(head, name), *columns]


def interval_text(interval: Sequence[float] | None) -> str:
    """The limits of a confidence interval as text."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def p_text(test: Row | None) -> str:
    """The p-value of McNemar's test as text."""
    if not test:
        return ""
    p = test["mcnemar_p"]
    return f"{p:.2g}" if p >= 1e-4 else "<0.0001"


def name(row: Row) -> str:
    """The cell of a row's name."""
    return row["name"]


def seeds(row: Row) -> str:
    """The cell of a row's number of seeds."""
    return str(len(row["seeds"]))


def quality_table(result: Row) -> str:
    """The methods' metrics at the chosen step. For texts also the lowest perplexity over all
    epochs."""
    rows, texts = result["methods"], not of_labels(result)
    metrics = metric_names(rows) if texts else OF_LABELS
    columns = quality_columns("method", rows, metrics, result["best"])
    lowest: list[Column] = [("lowest perplexity", lowest_perplexity)] if texts else []
    return table([*columns, *lowest, ("seeds", seeds)], rows)


def of_labels(result: Row) -> bool:
    """Whether the task has labels."""
    return result["family"] == "classification"


def other_tasks(result: Row) -> str:
    """The metrics of `full+also` on the tasks that it learns as well."""
    lines = [
        f"{row['name']}: "
        f"{', '.join(f'{label(m)} {cell(figure)}' for m, figure in more.items())}.\n\n"
        for row in result["methods"]
        if (more := {m: figure for m, figure in row["metrics"].items() if m.endswith("_accuracy")})
    ]
    return "".join(lines) if of_labels(result) else ""


def lowest_perplexity(row: Row) -> str:
    """The cell of the lowest perplexity and its epoch."""
    if "lowest_val_loss" not in row:
        return ""
    return (
        f"{number(math.exp(row['lowest_val_loss']['mean']))} (epoch "
        f"{row['lowest_epoch']['mean']:.3g})"
    )


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


def mean(figure: str, form: str) -> Callable[[Row], str]:
    """A function that formats the mean of a figure. Rows without the figure get an empty cell."""
    return lambda row: form.format(row[figure]["mean"]) if figure in row else ""


def duration(seconds: float) -> str:
    """Seconds as text."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}"


def share(row: Row) -> float:
    """The trained share of all parameters."""
    return row["trained_parameters"]["mean"] / row["parameters"]["mean"]


def trial_table(result: Row) -> str:
    """The scores of a search, with a column per setting and the chosen setting of each method in
    bold."""
    tried: dict[str, dict[str, Any]] = {}
    for trial in result["trials"]:
        setting = f"rate x {trial['rate']:g}, {epochs_text(trial['epochs'])}"
        tried.setdefault(trial["name"], {"name": trial["name"]})[setting] = trial
    heads = list(dict.fromkeys(head for row in tried.values() for head in row if head != "name"))
    columns = [(head, lambda row, head=head: trial_text(row[head])) for head in heads]
    return table([("method", name), *columns], list(tried.values()))


def epochs_text(epochs: int) -> str:
    """The number of epochs as text."""
    return f"{epochs} epoch" + "s" * (epochs != 1)


def trial_text(trial: Row) -> str:
    """The cell of a trial's score."""
    if trial["score"] is None:
        return ""
    text = number(trial["score"])
    return f"**{text}**" if trial["chosen"] else text


def decoding_table(result: Row) -> str:
    """The decodings' metrics, and the seconds for all answers."""
    rows = result["decodings"]
    columns = quality_columns("decoding", rows, metric_names(rows), result["best"])
    seconds: Column = ("seconds", lambda row: cell(row["metrics"]["seconds"]))
    return table([*columns, seconds, ("seeds", seeds)], rows)


PUBLISHED_NOTE = {
    "sonnets": "The published perplexity is that of a poem under the frequencies of its own words, "
    "the published rhymes are alike in spelling, and the published chrF has the size of whole "
    "poems.",
    "sentiment": "Published: batches of 64 rows, rate 2e-5, dropout 0.3, the best of 6 epochs.",
    "paraphrase": "Published: batches of 96 rows, rate 1e-5 to 5e-5, 3 epochs of full+simcse, 10 of "
    "full+word and of full+augment, 20 of the others.",
}


def published_table(result: Row) -> str:
    """The methods and decodings that have published figures, with both figures side by side."""
    beside = published(result)
    rows = [row for row in [*result["methods"], *result["decodings"]] if row["name"] in beside]
    if not rows:
        return ""
    columns: list[Column] = [("run", name)]
    for metric in dict.fromkeys(metric for row in rows for metric in beside[row["name"]]):
        columns.append((label(metric), lambda row, m=metric: cell(row["metrics"].get(m))))
        columns.append(
            (
                f"{label(metric)} published",
                lambda row, m=metric: f"{beside[row['name']].get(m, '')}",
            )
        )
    return (
        f"## What was published of GPT-2 124M\n\n{table(columns, rows)}\n\nOther weights to begin "
        "with give other levels: what can be compared is order.\n"
        f"{PUBLISHED_NOTE[result['task']]}\n"
    )


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


def machine_line(machine: Row) -> str:
    """The hardware and the versions, as text."""
    hardware = machine["hardware"]
    where = (
        hardware["gpu"]
        if machine["device"] == "cuda"
        else f"{hardware['cpu']}, {hardware['threads']} threads"
    )
    return f"{where}; " + ", ".join(
        f"{k} {v}" for k, v in machine["versions"].items() if v and k in ("python", "torch")
    )


def text_of(result: Row) -> str:
    """The text of methods.md."""
    train, val = result["data"]
    parts = [
        f"# {result['task']}: methods compared\n\n{base_line(result['base'])}\n\nTrained on "
        f"{train}, chosen and scored on "
        f"{val}. {machine_line(result['machine'])}; "
        f"{result['date'][:10]}.\n\n```\n{result['command']}\n```\n",
        "## What is "
        f"trained\n\n{quality_table(result)}\n\n{other_tasks(result)}"
        f"{cost_table(result)}\n\n{method_note(result)}\n"
        if result["methods"]
        else "",
        f"## What the search tried\n\n{trial_table(result)}\n\n{trial_note(result)}\n"
        if result["trials"]
        else "",
        f"## How it is decoded\n\n{decoding_table(result)}\n\n{decoding_note(result)}\n"
        if result["decodings"]
        else "",
        published_table(result),
        lost(result),
    ]
    return "\n".join(part for part in parts if part)


def method_note(result: Row) -> str:
    """The explanation below the tables of methods."""
    metric, way = result["best"]
    most = "highest" if way == "max" else "lowest"
    return (
        f"{'Metrics' if of_labels(result) else 'All metrics but the lowest perplexity'} are of the "
        f"epoch with the {most} {label(metric)}, whose weights final/ holds. "
        "The validation rows chose that epoch and are scored here as well,\nso a figure is a little "
        "better than on rows never seen. Mean ± standard deviation over seeds; the best methods of "
        "the first seed have more.\nTraining s: optimizer steps alone; s to best: until that "
        "epoch's end; rows/s: of the median step.\n"
        f"{label(metric)} between epochs: its standard deviation over the evaluations of a run's "
        "second half. Scratch has the base's shape and tokenizer.\n"
    ) + (LABEL_NOTE if of_labels(result) else "Perplexity is that of the answers' tokens.\n")


LABEL_NOTE = (
    "95% of rows: the bootstrap's interval of the best seed. P against full: McNemar's exact test "
    "of the first seed's labels;\nof twenty methods that are no different one is below 0.05 by "
    "chance. Val loss of full+word is over all words, of the others over the labels.\n"
)


def trial_note(result: Row) -> str:
    """The explanation below the table of a search."""
    return (
        f"{label(result['best'][0])} of the first seed; rates in multiples of the method's own. The "
        "tables above hold the setting in bold.\nA best setting at the edge of what was tried may "
        "have a better one beyond it.\n"
    )


def decoding_note(result: Row) -> str:
    """The explanation below the table of decodings."""
    prefix = any(row["name"] == "sample-of-prefix" for row in result["decodings"])
    return (
        "All decode the validation rows with the final weights of `full`"
        + (", sample-of-prefix with those of `prefix`" if prefix else "")
        + ".\nAnswers decoded as in `sample` chose that epoch of `full`, so `sample` alone is the "
        "best of several. Seconds: opening the model and answering all rows.\n"
    )


def lost(result: Row) -> str:
    """The cells without figures, with the reasons."""
    lines = [f"- {name} failed: {reason}" for name, reason in result["failed"].items()]
    lines += (
        [f"- left out for want of time: {', '.join(result['left_out'])}"]
        if result["left_out"]
        else []
    )
    return "## Not there\n\n" + "\n".join(lines) + "\n" if lines else ""
