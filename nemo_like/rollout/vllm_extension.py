"""How weights come into an engine whose parts are processes of their own, one for each GPU.

vLLM mixes this class into its workers. Every part gets every weight whole, and keeps its share.

Source: vLLM 0.32, `reload_weights` of `vllm.model_executor.model_loader.reload.inplace`, which
takes one iterator, and `collective_rpc`, which carries tensors of the host, but no iterators.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

NAME = f"{__name__}.TakesWeights"
"""What vLLM is told to find it by."""


def forget_packed_experts(model: nn.Module) -> None:
    """Makes a mixture's layers ready for new experts; comes before every update.

    On a CPU vLLM 0.32 packs experts for their kernel when the kernel is made, and keeps the kernel
    through a reload, with the old experts in it. Without one it makes another. On a GPU the kernel
    reads the weights where they are, and CUDA graphs know its address.
    """
    if not import_module("vllm.platforms").current_platform.is_cpu():
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


class TakesWeights:
    """Methods of a part, called on all of them."""

    vllm_config: Any
    model_config: Any
    model_runner: Any
    device: torch.device

    def begin_reload(self) -> None:
        """Begins an update, which must be ended: meanwhile layers have no memory."""
        model = self.model_runner.get_model()
        forget_packed_experts(model)
        with self._configured():
            _reload().initialize_layerwise_reload(model)

    @torch.no_grad()
    def take_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Takes some of the weights; the memory that they came in is used again after this."""
        own = [(name, tensor.to(self.device, copy=True)) for name, tensor in weights]
        with self._configured():
            self.model_runner.get_model().load_weights(iter(own))

    @torch.no_grad()
    def end_reload(self) -> None:
        """Ends the update."""
        with self._configured():
            _reload().finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)

    def _configured(self) -> Any:
        return import_module("vllm.config").set_current_vllm_config(self.vllm_config)


def _reload() -> Any:
    return import_module("vllm.model_executor.model_loader.reload")
