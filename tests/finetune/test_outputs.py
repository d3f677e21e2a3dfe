"""What a run writes: reports, predictions, and nothing at all in a dry run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from config import UserError
from launch import WORDS, launch, log_of
from tasks.classification.command import run_baseline
from tasks.classification.options import ClassificationConfig
from tasks.command import dry_run_predict
from toy_runs import description_of, run_task, run_well, task_of, task_options


def test_a_task_runs_as_a_program_with_its_own_help(run: Any, folder: Path) -> None:
    """A task runs as a user starts it, and --help names its options."""
    done = run(
        "-m", "finetune.qa", *task_options("qa", "--steps", 2, "--eval-every", 0), cwd=folder
    )
    assert done.returncode == 0 and (folder / "run" / "final" / "model.safetensors").exists(), (
        done.stderr
    )
    (end,) = launch(folder, ["--help"], program="finetune.lyrics")
    assert end.code == 0 and "--with-title" in end.out and "--text-column" in end.out, end


def test_log_report_and_predict_agree_on_the_metrics(folder: Path) -> None:
    """Training is in bf16, and the best step is not the last. The loop, the report and --predict
    agree."""
    rows = "".join(
        f"{i},{a} {b} {i % 7},{(i * 7) % 3}\n"
        for i, (a, b) in enumerate([("good", "film"), ("dull", "play")] * 20)
    )
    (folder / "rows.csv").write_text("id,text,label\n" + rows)
    (folder / "val.csv").write_text("id,text,label\n" + rows.replace("film", "song"))
    run_well(
        "sentiment",
        folder,
        "--data rows.csv --val-data val.csv --predict val.csv --epochs 4 --precision bf16",
        "--lr 0.003 --allow-overlap --seq-len 5",
    )
    run = folder / "run"
    metrics, report, scores = (
        json.loads((run / name).read_text())
        for name in ("metrics.json", "validation.report.json", "predictions.scores.json")
    )
    names = ("accuracy", "macro_f1", "calibration_error")
    assert [metrics[n] for n in names] == [report[n] for n in names] == [scores[n] for n in names]
    assert {file["eval_precision"] for file in (metrics, report, scores)} == {"fp32"}
    assert json.loads((run / "config.json").read_text())["precision"] == "bf16"
    assert report["step"] == metrics["final_is_step"]
    (line,) = [line for line in log_of(run, "eval") if line["step"] == report["step"]]
    assert [line[n] for n in names] == pytest.approx([report[n] for n in names], abs=1e-5)
    assert metrics["val_loss"] == line["val_loss"]
    # A later command without --seq-len truncates rows as the run did.
    run_well(
        "sentiment",
        folder,
        "--init run --epochs 0 --predict val.csv --answers again.csv --out other",
    )
    assert (folder / "again.jsonl").read_bytes() == (run / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize(("name", "score"), [("sentiment", "accuracy"), ("qa", "f1")])
def test_shared_rows_are_left_out_of_clean_scores(name: str, score: str, folder: Path) -> None:
    """The clean scores are the scores of a run without the planted rows, in evaluations and under
    --predict."""
    draw = random.Random(0)
    train, clean = ([" ".join(draw.choices(WORDS, k=20)) for _ in range(n)] for n in (12, 6))
    planted = [f"So {text.upper()}" for text in train[:4]]
    for file, texts in (("train", train), ("val", [*planted, *clean]), ("clean", clean)):
        rows = [
            {"text": text, "context": text, "question": "?"}
            | {"answer": "y" if text in clean else "x", "label": int(text in planted or n % 2)}
            for n, text in enumerate(texts)
        ]
        (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = "--data train.jsonl --steps 20 --lr 1e-2 --eval-every 20 --predict val.jsonl"
    more += " --eval-rows 10 --max-new-tokens 1" if name == "qa" else ""
    end = run_well(name, folder, more, "--val-data val.jsonl --answers run.jsonl")
    run_well(name, folder, more, "--val-data clean.jsonl --answers alone.jsonl --out alone")
    found, alone = (
        json.loads((folder / run / "metrics.json").read_text()) for run in ("run", "alone")
    )
    names = [name for name in found if f"clean_{name}" in found]
    assert {n: found[f"clean_{n}"] for n in names} == pytest.approx({n: alone[n] for n in names})
    for metric in ("val_loss", score):
        assert found[metric] != pytest.approx(found[f"clean_{metric}"], rel=1e-4)
    counts = {"rows": 10, "clean_rows": 6, "shared_rows": 4}
    assert found["clean"] == counts | {"examples": [text[:100] for text in planted[:3]]}
    card = (folder / "run" / "final" / "README.md").read_text()
    assert "- clean: 6 of 10 rows share no 13 words in a row with the training rows" in card
    assert f"- clean_val_loss: {found['clean_val_loss']:.4f}" in card
    scores = json.loads((folder / "run.scores.json").read_text())
    assert {n: found[n] for n in scores} == scores | {"seconds": found["seconds"]}
    assert f"clean_{score}" in scores
    assert "\nclean: 6 of 10 rows share no 13 words" in end.out.partition("answers to")[2]


def test_predict_alone_compares_with_the_rows_of_data(folder: Path) -> None:
    """Without --data, or if it cannot be read, the scores are those of all rows alone."""
    run_well("sentiment", folder, "--steps 1 --eval-every 0")
    words = "--init run --epochs 0 --predict toy --answers answers.jsonl --out other"
    for more, clean, said in (
        ("", None, "no clean scores: the training rows are not known; name them with --data FILE"),
        ("--data nowhere.csv", None, "the training rows cannot be read: no such data: nowhere.csv"),
        ("--data toy", 0, "clean: 0 of 8 rows share no 13 words in a row"),
    ):
        end = run_well("sentiment", folder, words, more)
        assert said in end.out
        scores = json.loads((folder / "answers.scores.json").read_text())
        assert scores.get("clean", {}).get("clean_rows") == clean and "accuracy" in scores


def test_a_finished_run_answers_without_its_data(folder: Path) -> None:
    rows = "\n".join(f"{n},text {n},{n % 2}" for n in range(8))
    (folder / "rows.csv").write_text(f"id,sentence,sentiment\n{rows}\n")
    words = "--data rows.csv --steps 1 --eval-every 0 --predict toy"
    run_well("sentiment", folder, words)
    answers = (folder / "run" / "predictions.csv").read_bytes()
    (folder / "run" / "predictions.csv").unlink()
    (folder / "rows.csv").unlink()
    end = run_well("sentiment", folder, words)
    assert "run is finished (1 steps)" in end.out and "training rows cannot be read" in end.out
    assert (folder / "run" / "predictions.csv").read_bytes() == answers


def test_a_finished_lstm_run_predicts_the_same_again(inputs: Path, folder: Path) -> None:
    """--init alone is enough to open it, with or without --model lstm."""
    words = "--model lstm --init base --steps 3 --lr 1e-2 --micro-batch 4 --predict toy"
    run_well("sentiment", folder, words, "--answers", "answers.jsonl")
    for model in (("--model", "lstm"), ()):
        again = "--init run --epochs 0 --predict toy --answers again.jsonl --out other"
        run_well("sentiment", folder, again, *model)
        one, other = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for name in ("answers.jsonl", "again.jsonl")
        )
        assert [row["prediction"] for row in one] == [row["prediction"] for row in other] and len(
            one
        ) == 8
        for a, b in zip(one, other, strict=True):
            assert b["probabilities"] == pytest.approx(a["probabilities"], abs=1e-5)


@pytest.mark.parametrize("model", ["naive-bayes", "tf-idf"])
def test_a_dry_run_of_a_baseline_writes_nothing(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry(**options: Any) -> int:
        return run_baseline(
            description_of("sentiment"),
            ClassificationConfig(out=str(out), dry_run=True, **options),
            model,
        )

    out, answers = tmp_path / "new" / "run", tmp_path / "deep" / "answers.csv"
    assert dry(predict="toy", answers=str(answers)) == 0
    assert "dry run: nothing is started or written" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no such data: .*nowhere"):
        dry(predict=f"{tmp_path}/nowhere.csv")
    with pytest.raises(UserError, match=r"no such data: .*nowhere"):
        dry(data=f"{tmp_path}/nowhere.csv")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_predict_alone_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_well("sentiment", folder, "--epochs 1 --out made")
    before = {path for path in folder.rglob("*") if not path.name.startswith("rank0.")}
    words = "--epochs 0 --init made --out new --dry-run"
    (end,) = run_task("sentiment", folder, words, "--predict", "nowhere")
    assert (
        end.code == 2
        and end.err.startswith("error: no such data: nowhere")
        and end.err.count("\n") == 1
    ), end

    def dry(init: str) -> int:
        cfg = ClassificationConfig(init=str(folder / init), predict="toy", epochs=0, dry_run=True)
        return dry_run_predict(task_of("sentiment"), cfg)

    assert dry("made") == 0
    assert (
        "dry run: nothing is written (8 rows of toy would be answered by" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="base is not a classifier"):
        dry("base")
    assert {path for path in folder.rglob("*") if not path.name.startswith("rank0.")} == before


def test_a_baseline_writes_the_scores_of_its_answers(tmp_path: Path) -> None:
    out, answers = tmp_path / "run", tmp_path / "answers.jsonl"
    cfg = ClassificationConfig(out=str(out), predict="toy", answers=str(answers))
    assert run_baseline(description_of("sentiment"), cfg, "naive-bayes") == 0
    scores, metrics = (
        json.loads(path.read_text())
        for path in (tmp_path / "answers.scores.json", out / "metrics.json")
    )
    assert scores["eval_precision"] == "fp64"
    assert {name: metrics[name] for name in scores} == scores  # both are of the toy rows


def test_a_baseline_needs_a_writable_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(**options: Any) -> int:
        return run_baseline(
            description_of("sentiment"), ClassificationConfig(**options), "naive-bayes"
        )

    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "run")
    for out, said in (
        ("file", "cannot be written"),
        ("file/run", "cannot be written"),
        ("link", "link to a folder that is not there"),
    ):
        with pytest.raises(UserError, match=rf"--out .*{said}"):
            fit(out=str(tmp_path / out))

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tasks.classification.command.write_json", full)
    with pytest.raises(
        UserError, match=r"cannot write to --out .*/run: No space left on device; name a folder"
    ):
        fit(out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"cannot write to --out"):
        fit(out=str(tmp_path / "run"), predict="toy", answers=str(tmp_path / "answers" / "a.csv"))
