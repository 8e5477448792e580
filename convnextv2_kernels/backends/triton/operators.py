"""Kernels as operators ``torch.ops.convnextv2_kernels_triton``: opaque to torch.compile and torch.export.

A function's annotations are its schema; names, arguments and results are those of ``csrc/torch/schemas.cpp``, and so
the fakes of ``backends/_fakes.py`` serve both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _fakes

NAMESPACE = "convnextv2_kernels_triton"
# the functions behind the operators, whose fakes would answer on the device "meta"
FUNCTIONS: dict[str, Callable] = {}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(function):
    """Registers a function that only reads its arguments and returns new tensors, and returns the operator."""
    name = function.__name__
    FUNCTIONS[name] = function
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, "CompositeExplicitAutograd")
    _fakes.register(NAMESPACE, name)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
