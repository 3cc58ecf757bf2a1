"""What makers state of their GPUs, for forecasts: peaks, not what programs reach."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_like.config.report import nearest_choice
from nemo_like.errors import ConfigError
from nemo_like.observability.timing import peak_flops


@dataclass(frozen=True)
class Device:
    """A GPU. Units: bytes; FLOP/s (bf16, dense, fp32 accumulation); bytes/s.

    `link` is what a GPU sends to others of its machine, `network` to other machines, each in one
    direction.
    """

    memory: float
    flops: float
    memory_rate: float
    link: float
    network: float
    source: str


def _peak(product: str) -> float:
    flops = peak_flops(product, "bfloat16")
    assert flops is not None, product
    return flops


DEVICES = {
    "a100-80gb": Device(
        80e9, _peak("A100"), 2.039e12, 300e9, 25e9,
        "NVIDIA A100 datasheet (SXM); DGX A100 datasheet: a 200 Gb/s adapter for each GPU",
    ),
    "h100-80gb": Device(
        80e9, _peak("H100"), 3.35e12, 450e9, 50e9,
        "NVIDIA H100 datasheet (SXM; half of the figure with sparsity); DGX H100 datasheet: a "
        "400 Gb/s adapter for each GPU",
    ),
    "h200-141gb": Device(
        141e9, _peak("H200"), 4.8e12, 450e9, 50e9,
        "NVIDIA H200 datasheet (SXM; half of the figure with sparsity); DGX H200 datasheet: a "
        "400 Gb/s adapter for each GPU",
    ),
    "b200-180gb": Device(
        180e9, _peak("B200"), 8e12, 900e9, 50e9,
        "DGX B200 datasheet, an eighth of it (half of the figure with sparsity): 400 Gb/s adapters",
    ),
    "l40s-48gb": Device(
        48e9, _peak("L40S"), 0.864e12, 32e9, 25e9,
        "NVIDIA L40S datasheet (PCIe 4.0 x16, no NVLink); network: assumed 200 Gb/s for each GPU",
    ),
}  # fmt: skip
"""By name. NVLink's figures are halved: makers add both directions up."""


def device_named(name: str) -> Device:
    """The device of this name.

    Raises:
        ConfigError: there is none.
    """
    if name in DEVICES:
        return DEVICES[name]
    guess = nearest_choice(name, DEVICES)
    raise ConfigError(
        f"--device {name}: no such device"
        + (f"; did you mean {guess}?" if guess else "")
        + f" Known are {', '.join(DEVICES)}"
    )
