"""The schemas of every registered operator, frozen: programs of ``torch.export`` hold them, and must load later.

A change is deliberate: it is made in ``schemas.txt`` too, and CHANGELOG says which exported programs it ends.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convnextv2_kernels import backends

FROZEN = Path(__file__).with_name("schemas.txt").read_text().splitlines()


def registered(namespace: str) -> list[str]:
    schemas = (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(f"{namespace}::"))
    return sorted(map(str, schemas))


def frozen(namespace: str) -> list[str]:
    return sorted(line for line in FROZEN if line.startswith(f"{namespace}::"))


def test_schemas_of_the_composite_and_native_operators():
    assert registered("convnextv2_kernels") == frozen("convnextv2_kernels")


def test_schemas_of_the_triton_operators():
    pytest.importorskip("triton")
    _ = backends.get("triton").operators  # registers them

    assert registered("convnextv2_kernels_triton") == frozen("convnextv2_kernels_triton")
