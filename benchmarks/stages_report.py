"""The figures, the table and the chart of benchmarks.stages. It needs neither torch nor the
machine."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from base.charts import COLOURS, DARK, chart
from base.console import bytes_text
from benchmarks.harness import title
from benchmarks.ladder import Machine, Plan, Rung, scaling_points
from benchmarks.rows import ROWS, Bar, add_head, draw_bars
from benchmarks.table import Column, Row, table

# Largest relative difference of the last loss that rounding alone causes in a few steps. If two
# precisions differ, the coarser one counts.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-3, "bf16": 2e-3, "fp8": 1e-2}

Record = Mapping[str, Any]  # the figures of one run
Records = Mapping[str, Sequence[Record]]  # by stage, one for each round


# --- figures


def rate(record: Record) -> float:
    """A run's tokens per second, from its median step."""
    return 1e3 * record["tokens_per_step"] / statistics.median(record["step_ms"])


def ratio(mine: Sequence[Record], other: Sequence[Record]) -> float | None:
    """Speed over the other's: the median over pairs of the same round, so that a slow minute of the
    machine affects both."""
    pairs = list(zip(mine, other))
    return statistics.median(rate(a) / rate(b) for a, b in pairs) if pairs else None


def last_loss(records: Sequence[Record]) -> float | None:
    """The median of the last losses over the rounds. None if one is not finite, or there are
    none."""
    losses = [record["loss"] for record in records]
    return statistics.median(losses) if losses and None not in losses else None


def compare_loss(
    loss: float | None, before: float | None, precisions: Iterable[str], by_design: bool
) -> str:
    """same, by design, differs or not finite; empty if there is no loss to compare with."""
    if loss is None:
        return "not finite"
    if before is None:
        return ""
    if abs(loss - before) <= max(TOLERANCE[precision] for precision in precisions) * abs(before):
        return "same"
    return "by design" if by_design else "differs"


def stage_rows(
    rungs: Sequence[Rung],
    records: Records,
    failed: Mapping[str, str],
    plan: Plan,
    machine: Machine,
    ceilings: Mapping[str, float],
    sheet: Mapping[str, float | None],
) -> list[dict[str, Any]]:
    """One row per stage. Its status is kept, branch, skipped, failed or not reached. The last three
    have no figures.

    `ceilings` and `sheet` are the FLOP/s of one device by precision, as measured and as its maker
    states.
    """
    rows = []
    precision_of = {rung.stage.name: rung.settings.precision for rung in rungs}
    for rung in rungs:
        name, precision, mine = rung.stage.name, rung.settings.precision, records[rung.stage.name]
        row: dict[str, Any] = {
            "stage": name,
            "adds": rung.stage.adds,
            "precision": precision,
            "reason": rung.skipped or failed.get(name),
            "status": "kept" if rung.kept else "branch",
        }
        rows.append(row)
        if rung.skipped or name in failed or not mine:
            none = "skipped" if rung.skipped else "failed" if name in failed else "not reached"
            row["status"] = none
            continue
        before = records[rung.before] if rung.before else ()
        devices = (rung.settings.ranks or plan.ranks) if machine.device == "cuda" else 1
        row |= speed(mine) | {
            "before": rung.before,
            "x_before": ratio(mine, before),
            "x_first": ratio(mine, records.get("baseline", ())),
            "devices": devices,
            "mfu_measured": None,
            "mfu_sheet": None,
            "loss_is": "",
        }
        # a stage on another device (the CPU beside a GPU) has no share of this device's ceiling
        if rung.settings.device != machine.device:
            continue
        for share, peaks in (("mfu_measured", ceilings), ("mfu_sheet", sheet)):
            if flops := peaks.get(precision):
                used = row["tokens_per_second"] * plan.flops_per_token
                row[share] = used / (devices * flops)
        precisions = {precision, precision_of.get(rung.before or "", precision)}
        row["loss_is"] = compare_loss(row["loss"], last_loss(before), precisions, rung.by_design)
    return rows


def speed(mine: Sequence[Record]) -> dict[str, Any]:
    """A stage's own figures over its rounds."""
    rates = [rate(record) for record in mine]
    return {
        "rounds": len(mine),
        "tokens_per_step": mine[0]["tokens_per_step"],
        "step_ms": statistics.median(statistics.median(record["step_ms"]) for record in mine),
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "memory_bytes": max(record["memory_bytes"] for record in mine),
        "loss": last_loss(mine),
        "warnings": sorted({text for record in mine for text in record["warnings"]}),
        "command": mine[-1]["command"],
    }


def scaling_rows(
    points: Mapping[tuple[int, int], tuple[Sequence[Record], float | None]], most: int
) -> list[dict[str, Any]]:
    """The rows of weak, then of strong scaling. A point has timed records and the share of
    communication.

    "speedup" is over one rank, "efficiency" is the speedup over the number of ranks.
    """
    rows = []
    for kind, of_kind in scaling_points(most).items():
        for ranks, each in of_kind:
            timed, communication = points[ranks, each]
            if not timed:
                continue
            gain = ratio(timed, points[of_kind[0]][0])
            rows.append(
                {
                    "kind": kind,
                    "ranks": ranks,
                    "micro_batches_per_rank": each,
                    "rounds": len(timed),
                    "tokens_per_second": statistics.median(map(rate, timed)),
                    "speedup": gain,
                    "efficiency": gain and gain / ranks,
                    "communication": communication,
                }
            )
    return rows


# --- the table

KEPT, BRANCH = COLOURS[0], COLOURS[5]
PRODUCTS: dict[str, Any] = dict(color=DARK, linestyle=(0, (4, 2)), linewidth=1.2)
LONGEST = 90  # characters of a note without figures
LOSSES = {"differs": "loss differs", "by design": "loss by design", "not finite": "loss not finite"}


def figure(name: str, form: str) -> Callable[[Row], str]:
    """A function that formats a figure. Rows without the figure get an empty cell."""
    return lambda row: "" if row.get(name) is None else form.format(row[name])


def span(row: Row) -> str:
    """The cell of the slowest and the fastest round."""
    return f"{row['slowest']:,.0f}-{row['fastest']:,.0f}" if row.get("rounds", 1) > 1 else ""


def note(row: Row) -> str:
    """The cell with everything besides figures: why there are none, or what is special about
    them."""
    if "step_ms" not in row:
        reason = f": {row['reason']}".replace("|", "/") if row["reason"] else ""
        text = row["status"] + reason
        return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    loss = LOSSES.get(row["loss_is"], "")
    loss = loss.upper() if row["loss_is"] == "differs" else loss
    branch = "branch" if row["status"] == "branch" else ""
    return ", ".join(filter(None, [branch, loss, *row["warnings"]]))


STAGES: Sequence[Column] = (
    ("stage", figure("stage", "{}")),
    ("adds", figure("adds", "{}")),
    ("ms a step", figure("step_ms", "{:,.1f}")),
    ("tokens/s", figure("tokens_per_second", "{:,.0f}")),
    ("slowest-fastest", span),
    ("x before", figure("x_before", "{:.2f}")),
    ("x first", figure("x_first", "{:.2f}")),
    ("MFU measured", figure("mfu_measured", "{:.1%}")),
    ("MFU sheet", figure("mfu_sheet", "{:.1%}")),
    ("peak memory", lambda row: bytes_text(row["memory_bytes"]) if "step_ms" in row else ""),
    ("loss", figure("loss", "{:.4f}")),
    ("note", note),
)
SCALING: Sequence[Column] = (
    ("scaling", figure("kind", "{}")),
    ("ranks", figure("ranks", "{}")),
    ("micro-batches a rank", figure("micro_batches_per_rank", "{}")),
    ("tokens/s", figure("tokens_per_second", "{:,.0f}")),
    ("speed-up", figure("speedup", "{:.2f}")),
    ("of linear", figure("efficiency", "{:.1%}")),
    ("communication", figure("communication", "{:.1%}")),
)
SCALING_NOTE = """\
Weak scaling: a micro-batch a rank; strong: the same batch on all ranks. On a CPU every rank has the
same number of cores.
Communication: the share of three traced steps in which rank 0 waits for other ranks: NCCL's kernels
beside no other kernel, on a CPU gloo's collectives beside no operation of PyTorch's."""


def describe(plan: Plan) -> str:
    """The model and the micro-batch, as text."""
    return (
        f"{plan.preset}, {plan.micro_batch} x {plan.seq_len} tokens, vocabulary {plan.vocabulary:,}"
    )


def text_of(result: Record) -> str:
    """The text of stages.md."""
    plan = Plan(**result["plan"])
    ceilings = ", ".join(
        f"{name} {value / 1e12:,.2f}" for name, value in result["ceilings"].items()
    )
    tolerance = ", ".join(f"{name} {value:g}" for name, value in result["tolerance"].items())
    tokens = plan.accumulation * plan.micro_batch * plan.seq_len
    text = (
        f"{describe(plan)}. {title(result['machine']['facts'] | result)}\n\n"
        f"{table(STAGES, result['stages'], ('adds', 'note'))}\n\n"
        "Each stage adds one thing to the last stage above it that is no branch; x before is the "
        "speed over that one.\n"
        f"Figures are medians over runs of {plan.steps} steps, of which the first "
        f"{result['warm_up']} do not count. From accumulation on a step has {tokens:,} tokens.\n"
        f"MFU counts {plan.flops_per_token / 1e6:,.1f} MFLOP a token (6N + 12 L d T) against large "
        f"matrix products as measured here (TFLOP/s: {ceilings or 'none'}) and as the maker "
        "states.\n"
        f"Losses are of the last step; they are the same within a relative {tolerance}, the "
        "coarser of two.\n"
    )
    if result["scaling"]:
        text += f"\n{table(SCALING, result['scaling'])}\n\n{SCALING_NOTE}\n"
    return text


# --- the chart


def draw(result: Record, out: Path) -> None:
    """Draw the ladder as bars of tokens per second, with the speed that matrix products alone would
    have."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = merge_skipped(result["stages"])
    gains = [row["x_first"] for row in rows if row["status"] == "kept" and row["x_first"]]
    with chart(out, 13, 1.8 + 0.42 * len(rows), ROWS, w_pad=0.15, h_pad=0.1) as figure:
        axes = figure.subplots()
        draw_bars(
            axes, "tokens per second, and × the last stage above", [bar_of(row) for row in rows]
        )
        axes.tick_params(axis="y", labelsize=9)
        for y, row in enumerate(rows):
            ceiling = result["ceilings"].get(row["precision"])
            if ceiling and "step_ms" in row and row["stage"] != "cpu":
                x = row["devices"] * ceiling / result["plan"]["flops_per_token"]
                axes.plot([x, x], [y - 0.5, y + 0.5], **PRODUCTS)
        handles = [
            Patch(color=KEPT, label="kept"),
            Patch(
                edgecolor=BRANCH,
                facecolor="white",
                hatch="////",
                label="a branch: not what the engine does here by itself",
            ),
            Line2D([], [], **PRODUCTS, label="large matrix products alone"),
        ]
        gain = f": × {gains[-1]:.3g} in all" if len(gains) > 1 else ""
        where = title(result["machine"]["facts"] | result).partition(":")[0]
        note = f"{describe(Plan(**result['plan']))}. {where}."
        add_head(figure, f"What each optimization buys{gain}", note, handles)


def merge_skipped(rows: Sequence[Record]) -> list[Record]:
    """The rows to draw. Consecutive stages that are skipped for the same reason become one row."""
    drawn: list[Record] = []
    for reason, group in itertools.groupby(rows, key=lambda row: row["reason"]):
        first, *more = group
        if reason and more and first["status"] == "skipped":
            names = f"{first['stage']} to {more[-1]['stage']}"
            drawn.append({**first, "stage": names, "adds": f"{1 + len(more)} stages"})
        else:
            drawn += [first, *more]
    return drawn


def bar_of(row: Record) -> Bar:
    """A stage's bar, or the reason why it has none."""
    name = f"{row['stage']}\n{row['adds']}"
    if "step_ms" not in row:
        return Bar(name, None, text=note(row))
    kept, gain = row["status"] == "kept", row["x_before"]
    loss = LOSSES[row["loss_is"]] if row["loss_is"] in ("differs", "not finite") else ""
    return Bar(
        name,
        row["tokens_per_second"],
        row["slowest"],
        row["fastest"],
        f"{row['tokens_per_second']:,.0f}" + (f"   × {gain:.2f}" if gain else "") + f"   {loss}",
        KEPT if kept else BRANCH,
        hollow=not kept,
        bold=kept and (gain or 1) >= 1.05,
    )
