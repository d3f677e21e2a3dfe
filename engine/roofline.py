"""The peak speed of a device: from its data sheet, or measured with a large matrix product."""

from __future__ import annotations

import re
import time

# Dense peaks of the matrix units in FLOP/s with fp32 accumulation, from the makers' data sheets:
# words of the device's name, the peak for bf16 and fp16, and that for tf32. The first row applies
# whose words are all in the name.
PEAKS = (
    ("H200", 989e12, 494e12),
    ("GH200", 989e12, 494e12),
    ("H100 PCIe", 756e12, 378e12),
    ("H100 NVL", 835e12, 417e12),
    ("H100", 989e12, 494e12),
    ("H20", 148e12, 74e12),
    ("B300", 2250e12, 1125e12),
    ("B200", 2250e12, 1125e12),
    ("GB300", 2500e12, 1250e12),
    ("GB200", 2500e12, 1250e12),
    ("A100", 312e12, 156e12),
    ("A40", 150e12, 75e12),
    ("A30", 165e12, 82e12),
    ("A10G", 70e12, 35e12),
    ("A10", 125e12, 62e12),
    ("L40S", 362e12, 183e12),
    ("L40", 181e12, 90e12),
    ("L4", 121e12, 60e12),
    ("RTX 6000 Ada", 364e12, 182e12),
    ("RTX A6000", 155e12, 77e12),
    ("RTX 5090", 209e12, 105e12),
    ("RTX 4090", 165e12, 83e12),
    ("RTX 3090 Ti", 80e12, 40e12),
    ("RTX 3090", 71e12, 36e12),
    ("V100", 125e12, None),
    ("T4", 65e12, None),
)
# Words that mark a variant slower than the data sheet of the device without that word.
SLOWER = ("Laptop", "Max-Q", "D", "MIG")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device in a precision. None if it is unknown; MFU is then null."""
    words = re.split(r"[\s-]+", device_name)
    if precision not in ("bf16", "fp16", "tf32") or any(word in words for word in SLOWER):
        return None
    for name, half, tf32 in PEAKS:
        if all(part in words for part in name.split()):
            return tf32 if precision == "tf32" else half
    return None


def product_ceiling(device: str, precision: str, seconds: float = 2.0) -> float:
    """Measured FLOP/s of a large square product: the best of several rounds. The matrices are
    random, because zeros would be faster."""
    import torch

    from engine import processes
    from engine.precision import DTYPES, set_products

    found = processes.start(device).device
    n, products = (8192, 20) if found.type == "cuda" else (2048, 1)
    set_products(precision, found)
    a, b = (
        torch.randn(n, n, device=found, dtype=DTYPES.get(precision, torch.float32))
        for _ in range(2)
    )

    def timed() -> float:
        began = time.perf_counter()
        for _ in range(products):
            product = a @ b
        product[0, 0].item()  # waits for the device
        return (time.perf_counter() - began) / products

    timed()
    until = time.perf_counter() + seconds
    best = timed()
    while time.perf_counter() < until:
        best = min(best, timed())
    return 2 * n**3 / best
