"""The names that each code base gives the parameters of ConvNeXt V2 and V1.

A parameter's canonical name is its name in the official dense code, or in FCMAE for the parts that only FCMAE has. V1
differs in its blocks: a layer scale ``stages.{stage}.{block}.gamma`` and no GRN. The
tables pair canonical names with each format's own and are read in both directions; names are patterns with fields in
braces.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

_VALUES = {
    "stage": ("0", "1", "2", "3"),
    "down": ("1", "2", "3"),
    "i": ("0", "1"),
    "j": ("1", "2"),
    "kind": ("weight", "bias"),
    "grn": ("gamma", "beta"),
    "output": ("stem", "stage1", "stage2", "stage3", "stage4"),
    # of the layers in GRN's place, see nn/hidden_layers.py
    "layer": (
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "constants",
        *(f"fc{j}.{kind}" for j in (1, 2) for kind in ("weight", "bias")),
        *(f"channel.fc{j}.weight" for j in (1, 2)),
        "spatial.conv.conv.weight",
        *(f"spatial.conv.bn.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ),
}
_DEPTHWISE = re.compile(r"stages\.({stage}|[0-3])\.{block}\.dwconv\.(weight|{kind})")
GRN = re.compile(r"(stages\.[0-3]|decoder)\.\d+\.grn\.(gamma|beta)")
LAYER_SCALE = re.compile(r"(stages\.[0-3]|decoder)\.\d+\.gamma")
V2, V1 = "a ConvNeXt V2 (GRN)", "a ConvNeXt V1 (layer scale, no GRN)"
OTHER_LAYER = "a ConvNeXt with another layer in the place of GRN"
_FIELD = re.compile(r"{(\w+)}")
_BLOCK = "0|[1-9][0-9]*"
# Fields whose values cannot be listed; "other" are names in a decoder that is no row of blocks (models/decoders.py).
_PATTERNS = {"block": _BLOCK, "other": r"(?:levels|layers|norm)\..+"}

_ENCODER = {
    name: name
    for name in (
        "downsample_layers.{stage}.{i}.{kind}",
        "stages.{stage}.{block}.dwconv.{kind}",
        "stages.{stage}.{block}.norm.{kind}",
        "stages.{stage}.{block}.pwconv{j}.{kind}",
        "stages.{stage}.{block}.grn.{grn}",
        "stages.{stage}.{block}.grn.layer.{layer}",
        "stages.{stage}.{block}.gamma",
    )
}
_DECODER = {
    name: name
    for name in (
        "mask_token",
        "proj.{kind}",
        "pred.{kind}",
        "decoder.{block}.dwconv.{kind}",
        "decoder.{block}.norm.{kind}",
        "decoder.{block}.pwconv{j}.{kind}",
        "decoder.{block}.grn.{grn}",
        "decoder.{block}.grn.layer.{layer}",
        "decoder.{block}.gamma",
        "decoder.{other}",
    )
}
_OFFICIAL = {**_ENCODER, "norm.{kind}": "norm.{kind}", "head.{kind}": "head.{kind}"}
_FCMAE = {**{name: f"encoder.{name}" for name in _ENCODER}, **_DECODER}
_OFFICIAL_SPARSE = {
    "downsample_layers.0.{i}.{kind}": "encoder.downsample_layers.0.{i}.{kind}",
    "downsample_layers.{down}.0.{kind}": "encoder.downsample_layers.{down}.0.ln.{kind}",
    "downsample_layers.{down}.1.weight": "encoder.downsample_layers.{down}.1.kernel",
    "downsample_layers.{down}.1.bias": "encoder.downsample_layers.{down}.1.bias",
    "stages.{stage}.{block}.dwconv.weight": "encoder.stages.{stage}.{block}.dwconv.kernel",
    "stages.{stage}.{block}.dwconv.bias": "encoder.stages.{stage}.{block}.dwconv.bias",
    "stages.{stage}.{block}.norm.{kind}": "encoder.stages.{stage}.{block}.norm.ln.{kind}",
    "stages.{stage}.{block}.pwconv{j}.{kind}": "encoder.stages.{stage}.{block}.pwconv{j}.linear.{kind}",
    "stages.{stage}.{block}.grn.{grn}": "encoder.stages.{stage}.{block}.grn.{grn}",
    **{name: own for name, own in _DECODER.items() if name != "decoder.{block}.gamma"},
}
_TIMM = {
    "downsample_layers.0.{i}.{kind}": "stem.{i}.{kind}",
    "downsample_layers.{down}.{i}.{kind}": "stages.{down}.downsample.{i}.{kind}",
    "stages.{stage}.{block}.dwconv.{kind}": "stages.{stage}.blocks.{block}.conv_dw.{kind}",
    "stages.{stage}.{block}.norm.{kind}": "stages.{stage}.blocks.{block}.norm.{kind}",
    "stages.{stage}.{block}.pwconv{j}.{kind}": "stages.{stage}.blocks.{block}.mlp.fc{j}.{kind}",
    "stages.{stage}.{block}.grn.gamma": "stages.{stage}.blocks.{block}.mlp.grn.weight",
    "stages.{stage}.{block}.grn.beta": "stages.{stage}.blocks.{block}.mlp.grn.bias",
    "stages.{stage}.{block}.gamma": "stages.{stage}.blocks.{block}.gamma",
    "norm.{kind}": "head.norm.{kind}",
    "head.{kind}": "head.fc.{kind}",
}
_TRANSFORMERS = {
    "downsample_layers.0.0.{kind}": "convnextv2.embeddings.patch_embeddings.{kind}",
    "downsample_layers.0.1.{kind}": "convnextv2.embeddings.layernorm.{kind}",
    "downsample_layers.{down}.{i}.{kind}": "convnextv2.encoder.stages.{down}.downsampling_layer.{i}.{kind}",
    "stages.{stage}.{block}.dwconv.{kind}": "convnextv2.encoder.stages.{stage}.layers.{block}.dwconv.{kind}",
    "stages.{stage}.{block}.norm.{kind}": "convnextv2.encoder.stages.{stage}.layers.{block}.layernorm.{kind}",
    "stages.{stage}.{block}.pwconv{j}.{kind}": "convnextv2.encoder.stages.{stage}.layers.{block}.pwconv{j}.{kind}",
    "stages.{stage}.{block}.grn.gamma": "convnextv2.encoder.stages.{stage}.layers.{block}.grn.weight",
    "stages.{stage}.{block}.grn.beta": "convnextv2.encoder.stages.{stage}.layers.{block}.grn.bias",
    "norm.{kind}": "convnextv2.layernorm.{kind}",
    "head.{kind}": "classifier.{kind}",
}
_TRANSFORMERS_V1 = {
    name: own.replace("convnextv2.", "convnext.") for name, own in _TRANSFORMERS.items() if ".grn." not in name
} | {"stages.{stage}.{block}.gamma": "convnext.encoder.stages.{stage}.layers.{block}.layer_scale_parameter"}
_MMPRETRAIN = {
    "downsample_layers.{stage}.{i}.{kind}": "backbone.downsample_layers.{stage}.{i}.{kind}",
    "stages.{stage}.{block}.dwconv.{kind}": "backbone.stages.{stage}.{block}.depthwise_conv.{kind}",
    "stages.{stage}.{block}.norm.{kind}": "backbone.stages.{stage}.{block}.norm.{kind}",
    "stages.{stage}.{block}.pwconv{j}.{kind}": "backbone.stages.{stage}.{block}.pointwise_conv{j}.{kind}",
    "stages.{stage}.{block}.grn.{grn}": "backbone.stages.{stage}.{block}.grn.{grn}",
    "stages.{stage}.{block}.gamma": "backbone.stages.{stage}.{block}.gamma",
    "norm.{kind}": "backbone.norm3.{kind}",
    "head.{kind}": "head.fc.{kind}",
}
# Of V1 alone. Stages and what is between them take turns in one list.
_TORCHVISION = {
    "downsample_layers.0.{i}.{kind}": "features.0.{i}.{kind}",
    **{f"downsample_layers.{n}.{{i}}.{{kind}}": f"features.{2 * n}.{{i}}.{{kind}}" for n in (1, 2, 3)},
    **{
        f"stages.{n}.{{block}}.{name}": f"features.{2 * n + 1}.{{block}}.{own}"
        for n in range(4)
        for name, own in {
            "dwconv.{kind}": "block.0.{kind}",
            "norm.{kind}": "block.2.{kind}",
            "pwconv1.{kind}": "block.3.{kind}",
            "pwconv2.{kind}": "block.5.{kind}",
            "gamma": "layer_scale",
        }.items()
    },
    "norm.{kind}": "classifier.0.{kind}",
    "head.{kind}": "classifier.2.{kind}",
}

_FEATURE_NORMS = {"hidden_states_norms.{output}.{kind}": "hidden_states_norms.{output}.{kind}"}


def _without(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {name: own.removeprefix(prefix) for name, own in names.items()}


_TABLES = {
    "official": _OFFICIAL,
    "official-sparse": _OFFICIAL_SPARSE,
    "fcmae": _FCMAE,
    "timm": _TIMM,
    "transformers": _TRANSFORMERS,
    "mmpretrain": _MMPRETRAIN,
    "torchvision": _TORCHVISION,
}
WRITABLE = tuple(_TABLES)
# Parts of a model with names of their own, and V1 where its names are others.
_TABLES |= {
    "transformers V1": _TRANSFORMERS_V1,
    "official-sparse encoder": _without("encoder.", _OFFICIAL_SPARSE),
    "timm features_only": {
        name: own.replace("stem.", "stem_").replace("stages.", "stages_") for name, own in _TIMM.items()
    },
    "transformers base model": _without("convnextv2.", _TRANSFORMERS)
    | _without("convnext.", _TRANSFORMERS_V1)
    | _FEATURE_NORMS,
    "mmpretrain backbone": _without("backbone.", _MMPRETRAIN),
}


class Format:
    """The names of one code base; ``table`` pairs canonical patterns with its own. ``depthwise`` matches the name of a
    stage's depthwise convolution behind any prefix."""

    def __init__(self, name: str, table: dict[str, str]):
        self.name = name
        self._to_own = [(_regex(canonical), own) for canonical, own in table.items()]
        self._to_canonical = [(_regex(own), canonical) for canonical, own in table.items()]
        depthwise = [
            own.replace("{kind}", "weight") for canonical, own in table.items() if _DEPTHWISE.fullmatch(canonical)
        ]
        # without the names of groups, which may be there once only
        either = "|".join(_regex(own).pattern for own in depthwise)
        self.depthwise = re.compile(rf"(?P<prefix>.*\.)?(?:{re.sub('[?]P<.*?>', '?:', either)})", re.DOTALL)

    def canonical(self, key: str) -> str | None:
        """Canonical name of a key of this format, ``None`` if the format has no such key."""
        return _translate(key, self._to_canonical)

    def own(self, name: str) -> str | None:
        """This format's key for a canonical name, ``None`` if the format lacks the parameter."""
        return _translate(name, self._to_own)


def networks_in(keys: Iterable[str]) -> dict[str, list[tuple[str, Format]]]:
    """The ConvNeXts among these keys: by the prefix of their keys, the formats they can be read as, each with the
    prefix that this takes.

    Recognised by the depthwise convolutions of the stages, which have another name in every format. A format that has
    a longer name for them needs a shorter prefix and comes first: ``encoder.stages.0.0.dwconv.weight`` is of an FCMAE,
    or of an official network called ``encoder``.
    """
    found: dict[str, list[tuple[str, Format]]] = {}
    for key in keys:
        readings = [
            (match["prefix"] or "", known) for known in FORMATS.values() if (match := known.depthwise.fullmatch(key))
        ]
        if readings:
            readings.sort(key=lambda reading: len(reading[0]))
            found.setdefault(readings[0][0], readings)
    return found


def part_of(name: str) -> str:
    """The part a canonical name belongs to, which a model has completely or not at all: ``stages.0`` to ``stages.3``
    (each with the downsampling before it), ``norm``, ``head``, ``decoder``, ``hidden_states_norms.<output>``."""
    owner, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    if owner in ("stages", "downsample_layers"):
        return f"stages.{index}"
    if owner == "hidden_states_norms":
        return f"{owner}.{index}"
    return owner if owner in ("norm", "head") else "decoder"


def layer_names(names: Iterable[str]) -> set[str]:
    """What the layer in GRN's place holds, by canonical names of a checkpoint; nothing where that is GRN."""
    return {name.partition(".grn.layer.")[2] for name in names if ".grn.layer." in name}


def other_decoder(names: Iterable[str]) -> str | None:
    """Of canonical names the first of a decoder that is no row of blocks, None where there is none."""
    return next((name for name in names if re.fullmatch(rf"decoder\.{_PATTERNS['other']}", name)), None)


def complete(names: Iterable[str]) -> list[str]:
    """Canonical names of a complete checkpoint with as many blocks: four stages and the parts found in ``names``.

    Every block has the same layer in GRN's place. The names in a decoder that is no row of blocks are not listed."""
    names = set(names)
    parts = {part_of(name) for name in names} | {f"stages.{stage}" for stage in _VALUES["stage"]}
    kinds = [kind for kind in (GRN, LAYER_SCALE) if any(map(kind.fullmatch, names))]
    absent = [kind for kind in (GRN, LAYER_SCALE) if kind not in kinds]
    if "head" in parts:
        parts.add("norm")
    blocks: dict[str, set[str]] = {}
    for name in names:
        if found := re.match(rf"(stages\.[0-3]|decoder)\.({_BLOCK})\.", name):
            blocks.setdefault(found[1], set()).add(found[2])
    layer = layer_names(names)
    values = {**_VALUES, "layer": tuple(layer), "grn": () if layer else _VALUES["grn"]}
    has_rows = other_decoder(names) is None
    whole = []
    for pattern in (*_OFFICIAL, *_DECODER, *_FEATURE_NORMS):
        if "{other}" in pattern or (pattern.startswith("decoder.") and not has_rows):
            continue
        fields = [field for field in _FIELD.findall(pattern) if field != "block"]
        for chosen in itertools.product(*(values[field] for field in fields)):
            name = pattern.format(block="{block}", **dict(zip(fields, chosen, strict=True)))
            if part_of(name) in parts:
                owner, block, _ = name.partition(".{block}")
                depth = max(1, len(blocks.get(owner, ()))) if block else 1
                whole += [name.replace("{block}", str(index)) for index in range(depth)]
    return [name for name in whole if not any(kind.fullmatch(name) for kind in absent)]


def block_kind(names: Iterable[str]) -> str:
    """In words what these canonical names have in their blocks: :data:`V2`, :data:`V1`, :data:`OTHER_LAYER` or none of
    them."""
    names = list(names)
    if layer_names(names):
        return OTHER_LAYER
    grn, scale = (any(map(kind.fullmatch, names)) for kind in (GRN, LAYER_SCALE))
    if grn != scale:
        return V2 if grn else V1
    return "a ConvNeXt with both GRN and layer scale" if grn else "a ConvNeXt with neither GRN nor layer scale"


def written_as(to: str, names: Iterable[str]) -> Format | None:
    """The format called ``to`` of a network with these canonical names, None if its code base has no such block."""
    stages = [name for name in names if name.startswith("stages.")]
    needed = [name for kind in (GRN, LAYER_SCALE) if (name := next(filter(kind.fullmatch, stages), None))]
    found = (FORMATS[name] for name in (to, f"{to} V1") if name in FORMATS)
    return next((known for known in found if all(map(known.own, needed))), None)


def _regex(pattern: str) -> re.Pattern[str]:
    pieces = _FIELD.split(pattern)  # text and fields alternate
    pieces[::2] = map(re.escape, pieces[::2])
    pieces[1::2] = [
        f"(?P<{field}>{_PATTERNS.get(field) or '|'.join(map(re.escape, _VALUES[field]))})" for field in pieces[1::2]
    ]
    return re.compile("".join(pieces))


def _translate(text: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for regex, pattern in rules:
        if found := regex.fullmatch(text):
            return pattern.format(**found.groupdict())
    return None


FORMATS = {name: Format(name, table) for name, table in _TABLES.items()}
