"""Variants of global response normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.reference.grn_variants import AGGREGATIONS, NORMALIZERS

_SKIPS = {"skip": True, "no-skip": False}
_WORDS = (*AGGREGATIONS, *NORMALIZERS, *_SKIPS)


@dataclass(frozen=True)
class GRNVariant:
    """Global response normalisation as ablated in ConvNeXt V2, Table 2a-c; the default is the paper's choice.

    With ``G(x)`` one number per image and channel over the visible sites:

    * ``aggregation`` (Table 2a): ``"l2"`` norm, ``"l1"`` norm, or ``"mean"``, global average pooling. The mean is
      signed, so the normaliser's denominator can be close to zero.
    * ``normalizer`` (Table 2b), over the channels j: ``"divisive"`` ``G / (mean_j G + eps)``, ``"standardize"``
      ``(G - mean_j G) / (std_j G + eps)`` with the biased deviation, ``"inverse"`` ``1 / (mean_j G + eps)``. The paper
      writes sums and scales by the number of channels in its footnote 1: hence means.
    * ``skip`` (Table 2c): ``x + gamma * (x * N(G(x))) + beta``, or ``gamma * (x * N(G(x))) + beta`` without it. Then
      gamma starts at 1, which the paper does not specify: at 0 a block would start as the identity, without a gradient
      for the layers before GRN.
    * ``enabled=False``: no GRN at all, the block of ConvNeXt V1 without its layer scale. A block computes it as GRN
      with gamma and beta of zero, which shows in an image with NaN or infinity only: as with GRN, all of it becomes
      NaN.

    eps is the layer's, 1e-6; it is never inside a root.

    Raises:
        ValueError: a field has an unknown value, or is set although GRN is disabled.
        TypeError: ``skip`` or ``enabled`` is not a bool.
    """

    aggregation: str = "l2"
    normalizer: str = "divisive"
    skip: bool = True
    enabled: bool = True

    def __post_init__(self) -> None:
        for name, known in (("aggregation", AGGREGATIONS), ("normalizer", NORMALIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("skip", "enabled"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not self.enabled and self.formula != ("l2", "divisive", True):
            raise ValueError(
                f"enabled=False leaves GRN out, so the other fields must keep their defaults, got {self.formula}"
            )

    @property
    def formula(self) -> tuple[str, str, bool]:
        """``(aggregation, normalizer, skip)``."""
        return self.aggregation, self.normalizer, self.skip

    @property
    def fused(self) -> bool:
        """Whether kernels support it: the default and "none", which is the default with gamma = beta = 0."""
        return self.formula == ("l2", "divisive", True)

    def affine(self, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta as the formula takes them: zeros without a graph where there is no GRN."""
        if self.enabled:
            return gamma, beta
        # two tensors: torch.compile refuses one tensor given twice to an autograd function
        return torch.zeros_like(gamma, requires_grad=False), torch.zeros_like(beta, requires_grad=False)

    @classmethod
    def parse(cls, text: str) -> GRNVariant:
        """The variant that ``text`` describes: ``"default"``, ``"none"``, or comma-separated words of l2, l1, mean,
        divisive, standardize, inverse, skip, no-skip, at most one of each kind; the rest keeps its default.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: an unknown word, or two of one kind.
        """
        if not isinstance(text, str):
            raise TypeError(f"grn must be a string or a GRNVariant, got {type(text).__name__}")
        words = [word.strip() for word in text.split(",")]
        if words in (["default"], ["none"]):
            return cls(enabled=words == ["default"])
        fields: dict[str, Any] = {}
        for word in words:
            if word not in _WORDS:
                raise ValueError(
                    f"grn must be 'default', 'none' or comma-separated words of {', '.join(_WORDS)}, got {text!r}"
                )
            name = "aggregation" if word in AGGREGATIONS else "normalizer" if word in NORMALIZERS else "skip"
            if name in fields:
                kind = {"aggregation": AGGREGATIONS, "normalizer": NORMALIZERS, "skip": tuple(_SKIPS)}[name]
                raise ValueError(f"grn must hold at most one of {', '.join(kind)}, got {text!r}")
            fields[name] = _SKIPS.get(word, word)
        return cls(**fields)

    @classmethod
    def of(cls, grn: str | GRNVariant) -> GRNVariant:
        """A variant unchanged, or the one that a string describes, see :meth:`parse`."""
        return grn if isinstance(grn, GRNVariant) else cls.parse(grn)

    def __str__(self) -> str:
        """The shortest text that :meth:`parse` reads as this variant."""
        if not self.enabled:
            return "none"
        default = GRNVariant()
        words = [self.aggregation] if self.aggregation != default.aggregation else []
        words += [self.normalizer] if self.normalizer != default.normalizer else []
        words += [] if self.skip else ["no-skip"]
        return ",".join(words) or "default"
