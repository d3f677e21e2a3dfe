"""The number formats of a run's computation. Parameters, gradients and optimizer stay fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from config import UserError

# The format of activations. With fp8 only the blocks' products are narrower.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
CAST_ONCE = ("bf16", "fp8")  # fp16's range is too small for a residual stream


def casts_once(precision: str, without: Collection[str]) -> bool:
    """Whether matrix products read copies of the weights that are cast once a step."""
    return precision in CAST_ONCE and "cast-once" not in without


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a forward pass; an empty context for fp32 and tf32."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


class Cast(nn.Module):
    """Wraps a module so that its linear layers read copies of their parameters in a lower
    precision, cast once per update (`refresh`) and not in every use.

    The module computes in the copies' format, and each parameter gets an fp32 gradient. Embeddings
    and norms are not copied: their gradients are sums of many terms, and most of a table is not
    read in a step. The trade-off against autocast: every operation that is not a product moves half
    the bytes, but the copies take memory (half of the linear layers' weights).
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, in_place: bool = False):
        super().__init__()
        self.module = module
        self.in_place = in_place  # see _UseCopy
        self.params = dict(_linear_parameters(module))
        self.copies = {name: p.detach().to(dtype) for name, p in self.params.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the copies in place of its linear layers' parameters."""
        stand_ins = {
            name: _UseCopy.apply(p, self.copies[name], self.in_place)
            for name, p in self.params.items()
        }
        return functional_call(self.module, stand_ins, args, kwargs)

    def refresh(self) -> None:
        """Cast the parameters again. Call this whenever they have changed."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.copies.values()), list(self.params.values()))


def _linear_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            yield from layer.named_parameters(prefix, recurse=False)


class _UseCopy(torch.autograd.Function):
    """Returns the copy in the forward pass, and passes its gradient to the parameter, in fp32.

    With `in_place` the gradient of a later micro-batch is added to the parameter's here: one pass
    that reads the low precision, 10 bytes per element instead of 18. Otherwise autograd adds it,
    which DDP must see.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor, in_place: bool) -> Tensor:
        ctx.parameter = parameter if in_place else None
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if ctx.parameter is not None and ctx.parameter.grad is not None:
            ctx.parameter.grad += grad
            return None, None, None
        return grad.float(), None, None


def set_products(precision: str, device: torch.device, without: Collection[str] = ()) -> bool:
    """Set how this process multiplies fp32 matrices: in TF32 if `precision` says so, else exactly.

    Returns whether oneDNN multiplies them on a CPU. By default PyTorch uses MKL, which on AMD's
    processors uses only 256 of the 512 bits of a vector. It uses oneDNN only if that may round its
    inputs to bf16 ("medium"), which a processor without AMX does not do. Therefore oneDNN is used
    only if a test shows that its products are exact.
    """
    candidate = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    if (
        device.type == "cpu"
        and "cpu-products" not in without
        and candidate
        and torch.backends.mkldnn.is_available()
    ):
        torch.set_float32_matmul_precision("medium")
        if _products_are_exact():
            return True
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return False


@contextlib.contextmanager
def exact_products() -> Generator[None]:
    """Compute fp32 products exactly inside this context, even in a run with --precision tf32."""
    before = torch.get_float32_matmul_precision()
    if before == "high":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _products_are_exact(n: int = 256) -> bool:
    """Multiply numbers that bf16 would round, but whose sums fp32 represents exactly."""
    ones, near = torch.ones(n, n), torch.full((n, n), 1 + 2.0**-12)
    return all(
        bool((product == n * (1 + 2.0**-12)).all())
        for product in (near @ ones, ones @ near, near.t() @ ones)
    )


def choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """The precision to use for `--precision`, and why. Raises UserError if the device does not
    have the one asked for."""
    cuda = device.type == "cuda"
    major = torch.cuda.get_device_capability(device)[0] if cuda else 0
    lacks = {
        "fp8": None
        if major >= 9
        else "needs a CUDA GPU of the Hopper generation or newer; use --precision bf16",
        "fp16": None if cuda else "needs a CUDA GPU; use --precision bf16 or fp32",
        "tf32": None
        if major >= 8
        else "needs a CUDA GPU of the Ampere generation or newer; use --precision fp32",
        "bf16": "is not in this GPU; use --precision fp16" if cuda and major < 8 else None,
    }
    if lacks.get(asked):
        raise UserError(f"--precision {asked} {lacks[asked]}")
    if asked != "auto":
        return asked, "set by --precision or by the run"
    if cuda:
        return (
            ("bf16", "native on this GPU")
            if major >= 8
            else ("fp16", "no bf16 on this GPU; losses are scaled")
        )
    if device.type == "cpu" and cpu_has_bf16():
        return "bf16", "native on this CPU"
    return "fp32", f"no fast bf16 on this {device.type}"


def inference_dtype(asked: str, device: torch.device) -> torch.dtype:
    """The format of the weights for `--precision` auto, fp32 or bf16 of a command that trains
    nothing. Older GPUs emulate bf16, which is slower than fp32."""
    native = (
        asked == "auto" and device.type == "cuda" and choose_precision("auto", device)[0] == "bf16"
    )
    return torch.bfloat16 if native or asked == "bf16" else torch.float32


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bf16, according to /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = set(
                next((line for line in file if line.startswith(("flags", "Features"))), "").split()
            )
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


class LossScale:
    """Scales the loss so that fp16 gradients do not underflow; always 1 in other precisions.

    A skipped update halves the scale, and `interval` good updates in a row double it (Micikevicius
    et al. 2018). It stays on the device, so nothing waits for it.
    """

    interval = 2000

    def __init__(self, on: bool, device: torch.device):
        self.on = on
        self.scale = torch.tensor(2.0**16 if on else 1.0, device=device)
        self.good = torch.tensor(0.0, device=device)  # good updates since the last change

    def update(self, ok: Tensor) -> None:
        """Adapt the scale to an update that was made (`ok`, a bool scalar) or skipped."""
        if not self.on:
            return
        grow = ok & (self.good + 1 >= self.interval)
        self.scale.mul_(torch.where(ok, torch.where(grow, 2.0, 1.0), 0.5))
        self.good.copy_(torch.where(ok & ~grow, self.good + 1, 0.0))

    def state(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint."""
        return {"scale": self.scale, "good": self.good}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Load the scale of an fp16 run. A checkpoint of another precision holds the constant 1,
        which is ignored."""
        if self.on and (float(tensors["scale"]) != 1 or float(tensors["good"]) != 0):
            self.scale.copy_(tensors["scale"])
            self.good.copy_(tensors["good"])
