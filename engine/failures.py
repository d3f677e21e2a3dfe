"""What an error that ends a run means: memory ran out, or a compiler failed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

import torch

from base.console import printable
from config import UserError

# PyTorch's allocators and CUDA's; and cuBLAS and cuDNN, which allocate past PyTorch's.
OUT_OF_MEMORY = re.compile(
    r"out[ _]of[ _]memory|allocate memory|_ALLOC(ATION)?_FAILED", re.IGNORECASE
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, also where the compiler has wrapped the error that said so."""
    return any(
        isinstance(inner, torch.OutOfMemoryError | MemoryError) or OUT_OF_MEMORY.search(str(inner))
        for inner in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from or in the handling of, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# inductor's for C++; Triton's for the C that launches a kernel, which ends without the compiler's
# own words.
COMPILER_FAILED = re.compile(
    r"InvalidCxxCompiler|No working C\+\+ compiler|C\+\+ compile error|Failed to find C compiler"
    r"|Command '\[.*\.c'.*-shared.* returned non-zero exit status"
)


# a library that torch.compile was writing into its cache when it was killed
CUT_OFF = re.compile(r"(/[^\n]*?\.so): (?:file too short|invalid ELF header)")


def compiler_error(error: BaseException) -> UserError | None:
    """The line to show where the machine's C or C++ compiler failed under torch.compile, or its
    cache holds a damaged file; None for any other error."""
    for inner in causes(error):
        if cut_off := CUT_OFF.search(str(inner)):
            return UserError(
                f"{cut_off[1]}, which torch.compile keeps, is damaged, as a kill leaves it; delete "
                "it and type the same command again",
                local=True,
            )
    text = next((str(inner) for inner in causes(error) if COMPILER_FAILED.search(str(inner))), None)
    if text is None:
        return None
    lines = [line.strip() for line in text.splitlines()]
    said = next((line for line in lines if "error: " in line), None)
    said = said or next(line for line in lines if COMPILER_FAILED.search(line))
    return UserError(
        f"torch.compile's C or C++ compiler failed ({printable(said[:200])}); install it whole, "
        "with Python's headers (apt install g++ python3-dev), or type --no-compile",
        local=True,
    )


def release_frames(error: BaseException | None) -> None:
    """Let go of the tensors that an error's frames hold, and those of the errors that led to it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
