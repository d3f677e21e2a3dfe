"""What differs between runs, how they ended, and whether the differences are more than luck.

Each section prints its tables and returns the figures that --json writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.console import bytes_text
from base.files import write_json
from config import UserError
from engine.log import finite_values, json_safe
from tasks.classification.confusion import paired_test
from tools import seeds
from tools.predictions import Predictions, read_predictions, show_table
from tools.runs import HASHES, RunFolder, common_names, differing, loss_curves, reached, same_losses

# Metrics of which less is better end in one of these.
LESS_IS_BETTER = ("loss", "perplexity", "error")
RANKING = ("accuracy", "val_loss", "train_loss")  # the first that all runs have chooses the best
# Figures that are shown only if they differ.
COUNTS = ("steps", "final_is_step", "skipped", "parameters", "trained_parameters")
NOT_COMPARED = ("planned_steps",)
COSTS = ("tokens", "memory_bytes")  # figures that a seed does not change
MOST_COLUMNS = 4  # up to this many runs are the columns of a table; more are its rows
MOST_NAMES = 12  # of options or figures that only some runs have
HASH_LENGTH = 12  # characters of a sha256 that are shown


def compare_runs(
    runs: Sequence[RunFolder],
    out: Path | None = None,
    plot: Path | None = None,
    loss: float | None = None,
    seed: int = 1337,
) -> None:
    """Print what differs between runs and how they ended, write the figures to `out` as JSON, and
    draw the curves into `plot`."""
    drawable = [run for run in runs if run.train]
    if plot and not drawable:
        raise UserError(f"--plot {plot}: no run has logged training steps to draw")
    metrics, tests = tested(runs, seed)
    for run in runs:
        print(f"{run.name}  {run.path}{_unfinished(run)}")
    figures = {
        "runs": [_described(run) for run in runs],
        "differ": show_differences(runs),
        "metrics": show_metrics(runs, metrics),
        "to_loss": show_time_to_loss(runs, loss),
        "groups": show_groups(runs, metrics),
        "tests": show_tests(tests),
    }
    if plot:
        from tools.curves import draw_curves

        draw_curves(labelled(seeds.groups(drawable)), plot)
        print(f"\nwrote {plot}")
    if out:
        write_json(out, json_safe(figures | {"seed": seed}))
        print(f"{'' if plot else chr(10)}wrote {out}")


def _unfinished(run: RunFolder) -> str:
    if run.finished:
        return ""
    planned = f" of {run.planned_steps:,}" if run.planned_steps else ""
    return f"  (unfinished: step {run.metrics.get('steps', 0):,}{planned}; figures of its log)"


def _described(run: RunFolder) -> dict[str, Any]:
    about = {"name": run.name, "path": str(run.path), "finished": run.finished}
    curve = [point._asdict() for point in run.val]
    return about | {"options": run.options, "metrics": run.metrics, "val_loss": curve}


def show_differences(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Print the options, versions, hardware and data in which the runs differ. Returns them by
    name, as lists in the order of the runs."""
    options = {run.name: run.options for run in runs if run.options}
    about = {run.name: run.versions | run.identity for run in runs if run.versions}
    shared = common_names(list(options.values()))
    found = {
        "options": _show_differing("options", options, [n for n in shared if n != "out"]),
        "versions_hardware_data": _show_differing(
            "versions, hardware and data",
            about,
            [n for n in common_names(list(about.values())) if n in HASHES or n not in shared],
        ),
    }
    if about and (silent := [run.name for run in runs if run.options and run.name not in about]):
        print(f"not recorded: those of {', '.join(silent)}")
    if not same_losses(runs):
        print(
            "the tasks, validation data or tokenizers are not the same: the losses cannot be "
            "compared"
        )
    return found


def _show_differing(
    title: str, values: dict[str, dict[str, Any]], among: list[str]
) -> dict[str, dict[str, Any]]:
    """Print and return the values of the names in which the runs differ, by name and run."""
    if len(values) < 2:
        return {}
    found = differing(list(values.values()), among)
    hashed = HASHES if title != "options" else ()
    print(f"\n{title} that differ{'' if found else ': none'}")
    columns = {
        f"{name} (sha256)" if name in hashed else name: [
            _value(each[name]) for each in values.values()
        ]
        for name in found
    }
    _show(list(values), columns)
    everywhere = common_names(list(values.values()))
    some = {name for each in values.values() for name in each if name not in everywhere}
    if some and title == "options":
        print(f"not in every run: {_listed(sorted(some))}")
    return {name: {run: each[name] for run, each in values.items()} for name in found}


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (
        f" and {more} more (--json has all)" if more > 0 else ""
    )


def _value(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return value[:HASH_LENGTH]
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None or value == "" else str(value)


def _show(names: Sequence[str], columns: dict[str, list[str]]) -> None:
    """Print a table of a few columns for each run."""
    if columns:
        rows = [["", *columns], *([name, *row] for name, row in zip(names, zip(*columns.values())))]
        few = len(names) <= MOST_COLUMNS < len(columns) + 1
        show_table([list(row) for row in zip(*rows)] if few else rows)


# --- metrics


def tested(
    runs: Sequence[RunFolder], seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The metrics of each run, and paired tests of the run with the best accuracy and each other
    run, for the runs with predictions of the same rows with labels."""
    metrics = [dict(run.metrics) for run in runs]
    read: list[tuple[RunFolder, Predictions]] = []
    reasons: list[dict[str, Any]] = []
    for run, figures in zip(runs, metrics):
        if run.predictions is None:
            continue
        files = [read[0][1].where] if read else []
        try:
            found = read_predictions([*files, str(run.predictions)])[-1]
            if not found.known.any():
                raise UserError(f"{run.predictions} has no row with a known label")
        except UserError as error:
            if run.predictions == run.path:  # the user named the file itself
                raise
            reasons.append({"runs": [run.name], "not_tested": str(error)})
            continue
        read.append((run, found))
        figures |= dict(zip(("accuracy", "macro_f1"), found.scores())) if not figures else {}
    if len(read) < 2:
        return metrics, reasons
    best = max(range(len(read)), key=lambda number: read[number][1].scores()[0])
    pairs = [sorted((best, number)) for number in range(len(read)) if number != best]
    return metrics, [_test(read[a], read[b], seed) for a, b in pairs] + reasons


def _test(
    first: tuple[RunFolder, Predictions], second: tuple[RunFolder, Predictions], seed: int
) -> dict[str, Any]:
    known = first[1].known & second[1].known
    found = paired_test(
        first[1].true[known], first[1].predicted[known], second[1].predicted[known], seed
    )
    return {"runs": [first[0].name, second[0].name], **found}


def common_metrics(metrics: Sequence[dict[str, Any]]) -> list[str]:
    """The names of figures that all runs have."""
    return [
        name
        for name in common_names(metrics)
        if name not in NOT_COMPARED and all(finite_values([each], name) for each in metrics)
    ]


def show_metrics(
    runs: Sequence[RunFolder], metrics: Sequence[dict[str, Any]]
) -> dict[str, list[Any]]:
    """Print the final metrics that all runs have, and name those that only some have. Returns the
    common ones by name, in the order of the runs."""
    common = common_metrics(metrics)
    different = differing(metrics, common)
    shown = [name for name in common if name not in COUNTS or name in different]
    print(f"\nfinal metrics{'' if shown else ': none that all runs have'}")
    _show(
        [run.name for run in runs],
        {_title(name): [_figure(name, each[name]) for each in metrics] for name in shown},
    )
    numbers = {name for each in metrics for name in each if finite_values([each], name)}
    if some := sorted(numbers - {*common, *COUNTS, *NOT_COMPARED}):
        print(f"not in every run: {_listed(some)}")
    return {name: [each[name] for each in metrics] for name in common}


def _title(name: str) -> str:
    return {"memory_bytes": "memory"}.get(name, name)


def _figure(name: str, value: float, size: float | None = None) -> str:
    """A figure as text. size: the figure whose number of decimals it gets. None: its own."""
    size = value if size is None else size
    if name == "memory_bytes":
        return bytes_text(value)
    if isinstance(size, int) or abs(size) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if name == "seconds" or name.endswith("_second") else f"{value:.4f}"


def show_time_to_loss(runs: Sequence[RunFolder], loss: float | None) -> dict[str, Any] | None:
    """Print the steps, tokens and time that each run took to a loss. None: the worst of the final
    losses, if the losses can be compared."""
    runs = [run for run in runs if run.train]
    if len(runs) < 2 or (loss is None and not same_losses(runs)):
        return None
    name, curves = loss_curves(runs)
    limit = max(curve[-1].loss for curve in curves) if loss is None else loss
    points = [reached(curve, limit) for curve in curves]
    # A curve that begins below the loss may have reached it before.
    marks = ["≤ " if curve and curve[0].loss <= limit else "" for curve in curves]
    why = "the worst of the final losses" if loss is None else "--loss"
    smoothed = ", smoothed" if name == "train_loss" else ""
    print(f"\nto {name} {limit:.4f} ({why}{smoothed})")
    columns = {
        title: [
            f"{mark}{getattr(point, name):,.{digits}f}" if point else "not reached"
            for point, mark in zip(points, marks)
        ]
        for title, name, digits in (
            ("steps", "step", 0),
            ("tokens", "tokens", 0),
            ("seconds", "seconds", 1),
        )
    }
    _show([run.name for run in runs], columns)
    spent = [point._asdict() if point else None for point in points]
    return {"of": name, "loss": limit, "runs": dict(zip([run.name for run in runs], spent))}


def show_tests(tests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the paired tests, and why a run was not tested. Returns them."""
    done = [test for test in tests if "rows" in test]
    if done:
        print("\npaired tests on the same rows: first run minus second, with 95% intervals")
        show_table(
            [
                ["", "rows", "accuracy", "", "macro-F1", "", "only 1st", "only 2nd", "McNemar p"],
                *(
                    [
                        " - ".join(test["runs"]),
                        f"{test['rows']:,}",
                        *_interval_cells(**test["accuracy"]),
                        *_interval_cells(**test["macro_f1"]),
                        f"{test['wins']:,}",
                        f"{test['losses']:,}",
                        f"{test['mcnemar_p']:.4g}",
                    ]
                    for test in done
                ),
            ]
        )
        print("only 1st, only 2nd: the rows that only this one answers correctly")
    for test in tests:
        if "not_tested" in test:
            print(f"\n{test['runs'][0]} is not tested: {test['not_tested']}")
    return list(tests)


def _interval_cells(difference: float, interval: Sequence[float] | None) -> list[str]:
    limits = f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "-"
    return [f"{difference:+.4f}", limits]


# --- seeds


def labelled(groups: Sequence[Sequence[RunFolder]]) -> list[tuple[str, Sequence[RunFolder]]]:
    """The groups with names: the run's own for a single run, else the options that tell the groups
    apart."""
    options = [group[0].options | {"out": None, "seed": None} for group in groups]
    known = [own for group, own in zip(groups, options) if group[0].options]
    names = differing(known)
    found: list[tuple[str, Sequence[RunFolder]]] = []
    for group, own in zip(groups, options):
        told = ", ".join(f"{name} {_value(own.get(name))}" for name in names)
        found.append((told or "all runs" if len(group) > 1 else group[0].name, group))
    return found


def show_groups(
    runs: Sequence[RunFolder], metrics: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Print mean and 95 % interval of each group of seeds, and the difference of the best group and
    each other one. Returns None if no two runs differ in their seed alone."""
    groups = labelled(seeds.groups(runs))
    if not any(len(group) > 1 for _, group in groups):
        return None
    common = [name for name in common_metrics(metrics) if name not in COUNTS + COSTS]
    figures_of = {run.name: figures for run, figures in zip(runs, metrics)}
    values = [
        {name: [figures_of[run.name][name] for run in group] for name in common}
        for _, group in groups
    ]
    found: list[dict[str, Any]] = [
        {
            "label": label,
            "runs": [run.name for run in group],
            "metrics": {name: seeds.summary(each[name]) for name in common},
        }
        for (label, group), each in zip(groups, values)
    ]
    print("\nseeds of one configuration: mean ± half of the 95% t-interval")
    _show(
        [label for label, _ in groups],
        {"seeds": [str(len(group)) for _, group in groups]}
        | {
            _title(name): [_mean_text(name, each["metrics"][name]) for each in found]
            for name in common
        },
    )
    return {"groups": found, "differences": show_group_differences(groups, values)}


def _mean_text(name: str, figure: dict[str, Any]) -> str:
    mean = _figure(name, float(figure["mean"]))
    if figure["interval"] is None:
        return mean
    margin = figure["interval"][1] - figure["mean"]
    return f"{mean} ± {_figure(name, margin, figure['mean'])}"


def show_group_differences(
    groups: Sequence[tuple[str, Sequence[RunFolder]]], values: Sequence[dict[str, list[float]]]
) -> list[dict[str, Any]]:
    """Print and return the difference of the best group and each other one, by the first metric of
    RANKING, if the losses can be compared."""
    name = next((name for name in RANKING if name in values[0]), None)
    if name is None or len(groups) < 2 or not same_losses([run for _, g in groups for run in g]):
        return []
    means = [sum(each[name]) / len(each[name]) for each in values]
    best = means.index(min(means) if name.endswith(LESS_IS_BETTER) else max(means))
    found: list[dict[str, Any]] = [
        {"metric": name, "groups": [groups[best][0], groups[other][0]]}
        | seeds.difference(values[best][name], values[other][name])
        for other in range(len(groups))
        if other != best
    ]
    print(f"\n{name} of the best group, {groups[best][0]}, minus that of each other group")
    show_table(
        [
            ["", "difference", "95% interval", "p", "seeds needed"],
            *(
                [
                    each["groups"][1],
                    *_interval_cells(each["difference"], each["interval"]),
                    f"{each['p']:.4g}" if each["interval"] else "-",
                    _needed(each),
                ]
                for each in found
            ),
        ]
    )
    print(
        "seeds needed: in each group, to see a true difference of this size with a probability of "
        "80% at p < 0.05"
    )
    return found


def _needed(found: dict[str, Any]) -> str:
    if found["interval"] is None:
        return "-"
    return f"{found['seeds_needed']:,}" if found["seeds_needed"] else "over a million"
