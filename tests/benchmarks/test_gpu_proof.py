"""Which kernels fit on which card: the engine's choice, and a small part of the proof that compiles
them."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from benchmarks import gpu_proof
from benchmarks.gpu_proof import ARCHS, Row, judged
from benchmarks.sass import per_element
from config import ATTENTION_WIDTH, TrainConfig, UserError, resolve
from kernels import _card
from kernels._card import CARDS, Card
from kernels.attention import KernelTiles, Tile, choose_tiles

PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8")


def choose(card: str, asked: str = "auto", **options: Any) -> tuple[list[str], str | None]:
    given: dict[str, Any] = {
        "precision": "bf16",
        "document_mask": True,
        "kernels": asked,
        **options,
    }
    chosen, lost = kernels.choose(resolve(TrainConfig(**given), "cuda"), "cuda", CARDS[card])
    return chosen.split(","), lost


@given(
    st.tuples(st.integers(5, 14), st.integers(0, 9)),
    st.integers(0, 300 << 10),
    st.sampled_from(PRECISIONS),
    st.integers(-1, 200),
)
def test_no_blocks_are_chosen_that_do_not_fit(capability, shared_memory, precision, head_dim):
    chosen = choose_tiles(Card("a card", capability, shared_memory), precision, head_dim)
    if isinstance(chosen, KernelTiles):
        assert chosen.shared <= shared_memory
        assert capability >= (8, 0) and 1 <= head_dim <= ATTENTION_WIDTH
    else:
        assert "a card" in chosen or str(head_dim) in chosen


@pytest.mark.parametrize("name", [name for name in CARDS if name != "T4"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_card_since_ampere_has_blocks(name, precision):
    for head_dim in (1, 32, 64, 65, 128):
        assert isinstance(choose_tiles(CARDS[name], precision, head_dim), KernelTiles)


def test_hopper_keeps_the_blocks_it_was_tuned_for():
    for precision in ("bf16", "fp16", "fp8"):
        chosen = choose_tiles(CARDS["H100"], precision, 64)
        assert isinstance(chosen, KernelTiles)
        assert chosen[:3] == (Tile(128, 64, 8, 4), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3))


def test_a_t4_masks_documents_without_the_kernel():
    chosen, lost = choose("T4", precision="fp16")
    assert chosen == ["adamw", "bias_gelu", "cross_entropy"]
    assert (
        lost is not None
        and "attention needs a GPU of compute capability 8.0" in lost
        and "Tesla T4 has 7.5" in lost
    )


def test_attention_asked_for_on_a_t4_is_refused():
    with pytest.raises(
        UserError, match=r"--kernels attention,adamw: attention needs .*; use --kernels adamw"
    ):
        choose("T4", "attention,adamw", precision="fp16")


@pytest.mark.parametrize(
    ("card", "precision"),
    [("RTX 4090", "bf16"), ("RTX 3090", "fp16"), ("RTX 5090", "bf16"), ("A100", "tf32")],
)
def test_wide_heads_get_blocks_that_fit(card, precision):
    assert "attention" in choose(card, n_head=6, precision=precision)[0]
    narrow, wide = (choose_tiles(CARDS[card], precision, head_dim) for head_dim in (64, 128))
    assert isinstance(narrow, KernelTiles) and isinstance(wide, KernelTiles)
    assert narrow != wide and wide.shared <= CARDS[card].shared_memory


def test_auto_takes_smaller_blocks_if_memory_is_short():
    large, small = (choose_tiles(CARDS[name], "tf32", 128) for name in ("A100", "RTX 4090"))
    assert (
        isinstance(large, KernelTiles)
        and isinstance(small, KernelTiles)
        and small.shared < large.shared
    )


def test_auto_leaves_heads_that_no_block_holds_to_pytorch():
    chosen, lost = choose("H100", n_head=2)
    assert "attention" not in chosen and lost is not None and "384 wide" in lost


def test_a_machine_without_a_gpu_has_no_card():
    assert _card.card("cpu") is None
    assert torch.cuda.is_available() or _card.card() is None


@pytest.mark.parametrize(
    ("figures", "fault"),
    [
        ({}, None),
        ({"registers": 0}, "no number of registers"),
        ({"spilled": 65}, "spills 65 bytes"),
        ({"shared": 99 * 1024 + 1}, "RTX 4090 has 101376"),
        ({"shared": 2000}, "says 1000"),
    ],
)
def test_spills_and_too_much_memory_are_failures(figures, fault):
    sound = Row(89, "", "", registers=9, spilled=64, shared=1000)
    row = judged(dataclasses.replace(sound, **figures), CARDS["RTX 4090"], limit=1000)
    assert row.result == ("failed" if fault else "compiled") and (fault or "") in row.reason


def sass(*code: str) -> str:
    """Lines as nvdisasm prints them."""
    lines = (line if line[0] == "." else f"/*0000*/ {line} ;" for line in code)
    return "\n".join(" " * 8 + line for line in lines)


def test_instructions_are_counted_per_element_read():
    zeros = (".L_x_0:", "STG.E.128 [R2], RZ", "@P0 BRA `(.L_x_0)")
    whole = (".L_x_1:", "LDG.E.128 R4, [R2.64]", "FADD R4", "@P0 BRA `(.L_x_1)")
    tail = (".L_x_2:", "@!P1 LDG.E.64 R4, [R2.64]", "FADD R4", "FADD R5", "@P0 BRA `(.L_x_2)")
    # 8 bf16 elements per pass and thread; 100 / (8 x 4) = 3 whole passes, the last one masked
    count = per_element(sass(*zeros, *whole, *tail, "EXIT"), 2, threads=4, width=100)
    assert count.loops == 3 / 8 and count.row == (3 * 3 + 4 + 1) * 4 / 100
    # all loads masked: 100 / (4 x 4) = 7 passes
    count = per_element(sass(*zeros, *tail, "EXIT"), 2, threads=4, width=100)
    assert count.loops == 4 / 4 and count.row == (7 * 4 + 1) * 4 / 100


def test_a_failed_kernel_is_exit_code_1(monkeypatch, tmp_path, capsys):
    rows = [
        Row(90, "one", "group", result="failed", reason="spills"),
        Row(80, "two", "group", "k", registers=7),
    ]
    monkeypatch.setattr(gpu_proof, "run", lambda archs, names, quick: rows)
    monkeypatch.setattr(gpu_proof, "versions_of_tools", lambda: {})
    for name in ("TRITON_CACHE_DIR", "TRITON_DUMP_PTXAS_LOG", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")  # main sets them, and monkeypatch restores them
    monkeypatch.setattr(sys, "argv", ["gpu_proof", "--archs", "80", "90", "--out", str(tmp_path)])
    assert gpu_proof.main() == 1
    assert "1 FAILED" in capsys.readouterr().out
    monkeypatch.setattr(gpu_proof, "run", lambda archs, names, quick: rows[1:])
    assert gpu_proof.main() == 0


def no_compiler() -> str:
    try:
        gpu_proof.versions_of_tools()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.skipif(bool(no_compiler()), reason=no_compiler() or "there is a compiler")
def test_attention_and_cross_entropy_compile_for_real_cards(run, tmp_path):
    words = [
        "--quick",
        "--archs",
        "75",
        "90",
        "--kernels",
        "attention",
        "cross_entropy",
        "--out",
        "out",
    ]
    done = run("-m", "benchmarks.gpu_proof", *words, env={"TRITON_INTERPRET": "1"}, fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out/gpu-proof.json").read_text())
    rows = [Row(**dict(zip(results["columns"], row, strict=True))) for row in results["rows"]]
    assert {row.result for row in rows if row.arch == 75} == {"refused"}
    compiled = [row for row in rows if row.arch != 75]
    assert len(compiled) == 2 * 3 + 3 and {row.result for row in compiled} == {"compiled"}
    for row in compiled:
        assert 0 < row.registers < 256 and row.shared <= CARDS[ARCHS[row.arch]].shared_memory
        assert (row.tensor_cores or "none") == ("none" if "entropy" in row.case else "wgmma")
        assert (0 < row.loops <= 16) == ("entropy" in row.case)  # instructions per element
    table = (tmp_path / "out/gpu-proof.md").read_text()
    assert table.strip() == done.stdout.strip() and "H100 (sm_90)" in table


def test_the_proof_without_triton_is_one_line(run):
    code = (
        "import sys; sys.modules['triton'] = None; from benchmarks import gpu_proof as p, "
        "gpu_proof; "
    )
    done = run(
        "-c",
        code + "from base.cli import entry_point; sys.argv[1:] = []; entry_point(p.main)",
        fresh=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "pip install triton" in done.stderr
    )


@pytest.mark.parametrize("words", [["--archs", "70"], ["--kernels", "atention"]])
def test_unknown_architectures_and_kernels_are_refused(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["gpu_proof", *words])
    with pytest.raises(UserError, match=words[1]):
        gpu_proof.main()
