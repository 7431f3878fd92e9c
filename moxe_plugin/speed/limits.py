"""What the machine allows: products of matrices, copies, new memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import torch
from fairseq2.nn import Embedding
from torch import Tensor, nn

from moxe_plugin.nn import products
from moxe_plugin.speed.clock import measure_copy, measure_matmul, measure_new_memory
from moxe_plugin.speed.options import MeasureOptions

Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Multiplies two matrices."""

MATMUL_DTYPES: Final = ("bfloat16", "float32")
"""What products are measured in."""

_MEMORY_SHARE: Final = 16
"""A tensor that is copied takes at most this part of the machine's memory."""

_WEIGHT_TRAFFIC: Final = 3
"""How often a training step moves a weight at least: read in the forward and in the
backward pass, and its gradient written."""


def measure_limits(options: MeasureOptions) -> dict[str, Any]:
    """Measure what no system can exceed.

    :param options: Where to measure, and with which sizes.

    :returns: Plain values: ``why_torch_products``, why our models do not multiply
        float32 by our own products, ``None`` if they do; ``matmul_size``;
        ``matmul_by_library``, GFLOP/s by data type and library; ``matmul_gflop_per_s``,
        the best of a data type; ``copy_bytes``; ``copy_gb_per_s``, what copies read and
        write; ``new_memory_gb_per_s``, what is written into memory that the allocator
        has just handed out.
    """
    device = options.device

    by_library = {name: _measure_products(name, options) for name in MATMUL_DTYPES}

    num_bytes = min(options.copy_bytes, _count_memory(device) // _MEMORY_SHARE)

    return {
        "why_torch_products": _find_reason(device),
        "matmul_size": options.matmul_size,
        "matmul_by_library": by_library,
        "matmul_gflop_per_s": {
            name: max(rates.values()) for name, rates in by_library.items()
        },
        "copy_bytes": num_bytes,
        "copy_gb_per_s": measure_copy(num_bytes, device),
        # Pages that the system must first find are some 30 times slower than a copy.
        "new_memory_gb_per_s": measure_new_memory(max(1, num_bytes // 4), device),
    }


def _measure_products(dtype_name: str, options: MeasureOptions) -> dict[str, float]:
    dtype, device = getattr(torch, dtype_name), options.device

    return {
        library: measure_matmul(dtype, options.matmul_size, device, product)
        for library, product in list_products(dtype, device).items()
    }


def list_products(dtype: torch.dtype, device: torch.device) -> dict[str, Product]:
    """List the libraries that multiply matrices.

    torch takes MKL for float32 on CPUs, whose fastest instructions it does not use on
    all of them; oneDNN's are measured as well.

    :param dtype: The data type of the matrices.
    :param device: Where they are.

    :returns: Products by the name of their library: ``torch``, and on a CPU ``onednn``
        for float32 where torch has it, and our own, ``moxe_plugin``, where they run.
    """
    listed: dict[str, Product] = {"torch": torch.mm}

    if device.type != "cpu":
        return listed

    if dtype == torch.float32 and _has_onednn():
        listed["onednn"] = _multiply_by_onednn
    if products.runs_native(torch.empty(0, dtype=dtype)):
        listed["moxe_plugin"] = products.multiply

    return listed


def least_memory_seconds(model: nn.Module, limits: Mapping[str, Any]) -> float:
    """Compute how long a training step moves parameters and gradients at least.

    Every parameter is read in the forward pass and again in the backward pass, and its
    gradient is written: three times its bytes at the rate of copies. Tables that tokens
    are only looked up in are not read, yet their gradient is as large as they are.
    Activations, the optimizer, and reading a gradient that is added to are left out.

    :param model: The model, whose experts all get a token.
    :param limits: What :func:`measure_limits` returned.

    :returns: Seconds.
    """
    # A table that is tied to the output projection belongs to a module that reads it.
    read = {
        parameter
        for module in model.modules()
        if not isinstance(module, (nn.Embedding, Embedding))
        for parameter in module.parameters(recurse=False)
    }

    num_bytes = sum(
        (_WEIGHT_TRAFFIC if parameter in read else 1) * _count_bytes(parameter)
        for parameter in model.parameters()
    )

    return num_bytes / float(limits["copy_gb_per_s"]) / 1e9


def new_gradient_seconds(model: nn.Module, limits: Mapping[str, Any]) -> float:
    """Compute how long gradients take to be written once into new memory.

    A training step frees its gradients, and the next one asks for their memory again.

    :param model: The model.
    :param limits: What :func:`measure_limits` returned.

    :returns: Seconds.
    """
    num_bytes = sum(map(_count_bytes, model.parameters()))

    return num_bytes / float(limits["new_memory_gb_per_s"]) / 1e9


def _count_bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _find_reason(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"ours are for CPUs, and this is {device.type}"

    return products.why_torch()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )


def _multiply_by_onednn(lhs: Tensor, rhs: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        lhs, rhs.t(), None, "none", [], ""
    )

    return product


def _count_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory

    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
