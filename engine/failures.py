"""Recognizes errors that end a run: memory ran out, or a compiler failed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

import torch

from base.console import printable
from config import UserError

# Messages of PyTorch's and CUDA's allocators, and of cuBLAS and cuDNN, which use their own.
OUT_OF_MEMORY = re.compile(
    r"out[ _]of[ _]memory|allocate memory|_ALLOC(ATION)?_FAILED", re.IGNORECASE
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, even if the compiler has wrapped the original error."""
    return any(
        isinstance(inner, torch.OutOfMemoryError | MemoryError) or OUT_OF_MEMORY.search(str(inner))
        for inner in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the chain of errors that caused it, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# Messages of inductor about C++, and of Triton about the C code that launches a kernel. The latter
# do not quote the compiler.
COMPILER_FAILED = re.compile(
    r"InvalidCxxCompiler|No working C\+\+ compiler|C\+\+ compile error|Failed to find C compiler"
    r"|Command '\[.*\.c'.*-shared.* returned non-zero exit status"
)


# A library in the cache of torch.compile that a kill has cut short.
CUT_OFF = re.compile(r"(/[^\n]*?\.so): (?:file too short|invalid ELF header)")


def compiler_error(error: BaseException) -> UserError | None:
    """The UserError to show if torch.compile's C or C++ compiler failed or a file in its cache is
    damaged. None for any other error."""
    for inner in causes(error):
        if cut_off := CUT_OFF.search(str(inner)):
            return UserError(
                f"{cut_off[1]} in torch.compile's cache is damaged, perhaps by a kill; delete it "
                "and type the same command again",
                local=True,
            )
    text = next((str(inner) for inner in causes(error) if COMPILER_FAILED.search(str(inner))), None)
    if text is None:
        return None
    lines = [line.strip() for line in text.splitlines()]
    message = next((line for line in lines if "error: " in line), None)
    message = message or next(line for line in lines if COMPILER_FAILED.search(line))
    return UserError(
        f"torch.compile's C or C++ compiler failed ({printable(message[:200])}); install it and "
        "Python's headers (apt install g++ python3-dev), or type --no-compile",
        local=True,
    )


def release_frames(error: BaseException | None) -> None:
    """Free the tensors that the frames of an error, and of the errors that caused it, refer to."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
