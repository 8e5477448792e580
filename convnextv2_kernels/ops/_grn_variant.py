"""Variants of global response normalisation, and the layers that the paper puts in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.reference.grn_variants import AGGREGATIONS, NORMALIZERS

# Other layers between GELU and the second linear map (Table 2d, e), built by :mod:`.nn.hidden_layers`.
LAYERS = ("lrn", "bn", "ln", "se", "cbam")
_DEFAULT = ("l2", "divisive", True)
_WORDS: dict[str, dict[str, Any]] = {
    **{word: {"aggregation": word} for word in AGGREGATIONS},
    **{word: {"normalizer": word} for word in NORMALIZERS},
    "skip": {"skip": True},
    "no-skip": {"skip": False},
    "affine": {"aggregation": "none", "normalizer": "none"},
    "aggregate-only": {"normalizer": "none"},
    "normalize-only": {"aggregation": "none"},
}
_KINDS = {
    "aggregation": (*AGGREGATIONS, "normalize-only", "affine"),
    "normalizer": (*NORMALIZERS, "aggregate-only", "affine"),
    "skip": ("skip", "no-skip"),
}


@dataclass(frozen=True)
class GRNVariant:
    """Global response normalisation as ablated in ConvNeXt V2, Tables 2 and 16; the default is the paper's choice.

    With ``G(x)`` one number per image and channel over the visible sites:

    * ``aggregation`` (Table 2a): ``"l2"`` norm, ``"l1"`` norm, or ``"mean"``, global average pooling. The mean is
      signed, so the normaliser's denominator can be close to zero. ``"none"`` (Table 16c): ``x * N(x)``, the normaliser
      over the channels of each site; as ``x`` is signed, that is unstable, in the paper too.
    * ``normalizer`` (Table 2b), over the channels j: ``"divisive"`` ``G / (mean_j G + eps)``, ``"standardize"``
      ``(G - mean_j G) / (std_j G + eps)`` with the biased deviation, ``"inverse"`` ``1 / (mean_j G + eps)``. The paper
      writes sums and scales by the number of channels in its footnote 1: hence means. ``"none"`` (Table 16b):
      ``x * G(x)``. With both "none" (Table 16a), channel-wise scaling and shifting alone: ``x + gamma * x + beta``.
    * ``skip`` (Table 2c): ``x + gamma * (x * N(G(x))) + beta``, or ``gamma * (x * N(G(x))) + beta`` without it. Then
      gamma starts at 1, which the paper does not specify: at 0 a block would start as the identity, without a gradient
      for the layers before GRN.
    * ``enabled=False``: no GRN at all, the block of ConvNeXt V1 without its layer scale. A block computes it as GRN
      with gamma and beta of zero, which shows in an image with NaN or infinity only: as with GRN, all of it becomes
      NaN.
    * ``layer`` (Table 2d, e): another layer in GRN's place, one of ``"lrn"``, ``"bn"``, ``"ln"``, ``"se"``,
      ``"cbam"``; see :mod:`convnextv2_kernels.nn.hidden_layers`.

    eps is the layer's, 1e-6; it is never inside a root.

    Raises:
        ValueError: a field has an unknown value, or is set although GRN is disabled or replaced.
        TypeError: ``skip`` or ``enabled`` is not a bool.
    """

    aggregation: str = "l2"
    normalizer: str = "divisive"
    skip: bool = True
    enabled: bool = True
    layer: str = "grn"

    def __post_init__(self) -> None:
        for name, known in (
            ("aggregation", (*AGGREGATIONS, "none")),
            ("normalizer", (*NORMALIZERS, "none")),
            ("layer", ("grn", *LAYERS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("skip", "enabled"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not self.enabled and self.formula != _DEFAULT:
            raise ValueError(
                f"enabled=False leaves GRN out, so the other fields must keep their defaults, got {self.formula}"
            )
        if self.layer != "grn" and (self.formula, self.enabled) != (_DEFAULT, True):
            raise ValueError(
                f"layer={self.layer!r} replaces GRN, so the other fields must keep their defaults, got "
                f"{(*self.formula, self.enabled)}"
            )

    @property
    def formula(self) -> tuple[str, str, bool]:
        """``(aggregation, normalizer, skip)``."""
        return self.aggregation, self.normalizer, self.skip

    @property
    def fused(self) -> bool:
        """Whether kernels support it: the default and "none", which is the default with gamma = beta = 0."""
        return self.formula == _DEFAULT and self.layer == "grn"

    @property
    def batch_statistics(self) -> bool:
        """Whether a batch norm is in it: training depends on which images are computed together, and keeps running
        statistics."""
        return self.layer in ("bn", "cbam")

    def affine(self, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta as the formula takes them: zeros without a graph where there is no GRN."""
        if self.enabled:
            return gamma, beta
        # two tensors: torch.compile refuses one tensor given twice to an autograd function
        return torch.zeros_like(gamma, requires_grad=False), torch.zeros_like(beta, requires_grad=False)

    @classmethod
    def parse(cls, text: str) -> GRNVariant:
        """The variant that ``text`` describes: ``"default"``, ``"none"``, one of ``"lrn"``, ``"bn"``, ``"ln"``,
        ``"se"``, ``"cbam"``, or comma-separated words of l2, l1, mean, divisive, standardize, inverse, skip, no-skip,
        affine (Table 16a), aggregate-only (16b), normalize-only (16c), at most one of each kind; the rest keeps its
        default.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: an unknown word, or two of one kind.
        """
        if not isinstance(text, str):
            raise TypeError(f"grn must be a string or a GRNVariant, got {type(text).__name__}")
        words = [word.strip() for word in text.split(",")]
        if words in (["default"], ["none"]):
            return cls(enabled=words == ["default"])
        if len(words) == 1 and words[0] in LAYERS:
            return cls(layer=words[0])
        fields: dict[str, Any] = {}
        for word in words:
            if word not in _WORDS:
                raise ValueError(
                    f"grn must be 'default', 'none', one of {', '.join(LAYERS)}, or comma-separated words of "
                    f"{', '.join(_WORDS)}, got {text!r}"
                )
            for name in _WORDS[word].keys() & fields.keys():
                raise ValueError(f"grn must hold at most one of {', '.join(_KINDS[name])}, got {text!r}")
            fields |= _WORDS[word]
        return cls(**fields)

    @classmethod
    def of(cls, grn: str | GRNVariant) -> GRNVariant:
        """A variant unchanged, or the one that a string describes, see :meth:`parse`."""
        return grn if isinstance(grn, GRNVariant) else cls.parse(grn)

    def __str__(self) -> str:
        """The shortest text that :meth:`parse` reads as this variant."""
        if not self.enabled or self.layer != "grn":
            return self.layer if self.enabled else "none"
        default = GRNVariant()
        aggregation, normalizer = self.aggregation, self.normalizer
        if (aggregation, normalizer) == ("none", "none"):
            words = ["affine"]
        else:
            names = {"none": "normalize-only"}
            words = [names.get(aggregation, aggregation)] if aggregation != default.aggregation else []
            names = {"none": "aggregate-only"}
            words += [names.get(normalizer, normalizer)] if normalizer != default.normalizer else []
        words += [] if self.skip else ["no-skip"]
        return ",".join(words) or "default"
