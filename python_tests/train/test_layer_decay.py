import pytest
import torch

from convnextv2_kernels.models import FCMAE, ConvNeXtV2
from convnextv2_kernels.train.optim import layer_decay_groups, layer_ids

ATTO, BASE = (2, 2, 6, 2), (3, 3, 27, 3)


def network(depths=(1, 1, 1, 1)) -> ConvNeXtV2:
    with torch.device("meta"):
        return ConvNeXtV2(depths=depths, dims=(8, 8, 16, 16), num_classes=3)


def table(depths, kind) -> dict[str, int]:
    """Ids of whole layers, with the check that all parameters of a layer agree."""
    found: dict[str, set[int]] = {}
    for name, number in layer_ids(network(depths), kind).items():
        parts = name.split(".")
        layer = {"stages": 3, "downsample_layers": 2}.get(parts[0], 1)
        found.setdefault(".".join(parts[:layer]), set()).add(number)
    assert all(len(ids) == 1 for ids in found.values())
    return {layer: ids.pop() for layer, ids in found.items()}


def flat(downsamplings, stages, last) -> dict[str, int]:
    expected = {f"downsample_layers.{i}": number for i, number in enumerate(downsamplings)}
    expected |= {f"stages.{s}.{b}": number for s, ids in enumerate(stages) for b, number in enumerate(ids)}
    return {**expected, "norm": last, "head": last}


# Written down by hand from the official optim_factory.py.
TABLES = [
    (ATTO, "single", flat([1, 3, 5, 11], [[1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12]], 13)),
    (BASE, "single", flat([1, 4, 7, 34], [[1, 2, 3], [4, 5, 6], list(range(7, 34)), [34, 35, 36]], 37)),
    (
        BASE,
        "group",
        flat(
            [0, 2, 3, 12],
            [
                [1, 1, 1],
                [2, 2, 2],
                [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 11],
                [12, 12, 12],
            ],
            13,
        ),
    ),
    # not in the official code: three blocks to an id, no gaps
    (ATTO, "group", flat([0, 2, 3, 5], [[1, 1], [2, 2], [3, 3, 3, 4, 4, 4], [5, 5]], 6)),
    ((1, 1, 4, 1), "group", flat([0, 2, 3, 5], [[1], [2], [3, 3, 3, 4], [5]], 6)),
]


@pytest.mark.parametrize("depths, kind, expected", TABLES)
def test_layer_ids_are_the_official_ones(depths, kind, expected):
    assert table(depths, kind) == expected


def scales(depths, layer_decay, kind) -> dict[str, float]:
    model = network(depths)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = layer_decay_groups(model, 0.05, layer_decay, kind)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def test_scales_of_the_documented_recipes():
    atto = scales(ATTO, 0.9, "single")
    assert atto["downsample_layers.0.0.weight"] == pytest.approx(0.282, abs=5e-4)
    assert atto["stages.3.1.dwconv.weight"] == pytest.approx(0.9)
    assert atto["head.weight"] == atto["norm.bias"] == 1
    base = scales(BASE, 0.6, "group")
    assert base["downsample_layers.0.0.weight"] == pytest.approx(0.0013, abs=5e-5)
    assert base["stages.2.26.grn.gamma"] == pytest.approx(0.36)
    assert base["head.bias"] == 1


def test_every_trainable_parameter_is_in_one_group_in_ascending_order():
    model = network(ATTO)
    model.downsample_layers[0].requires_grad_(False)
    model.stages[0][0].requires_grad_(False)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = layer_decay_groups(model, 0.3, 0.9, "single")
    members = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(members) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert not any(n.startswith(("downsample_layers.0", "stages.0.0")) for n in members)
    expected = [f"layer_{i}_{kind}" for i in range(2, 14) for kind in ("decay", "no_decay")]
    assert [group["name"] for group in groups] == expected
    assert all(group["params"] for group in groups)
    for group in groups:
        assert set(group) == {"params", "weight_decay", "lr_scale", "name"}
        assert group["weight_decay"] == (0.0 if group["name"].endswith("no_decay") else 0.3)
        for parameter in group["params"]:
            name = names[id(parameter)]
            spared = name.endswith(("bias", "gamma", "beta", "norm.weight")) or parameter.ndim == 1
            assert spared == group["name"].endswith("no_decay"), name


def test_without_layer_decay_there_are_two_groups():
    model = network()
    decayed, spared = layer_decay_groups(model, 0.05)
    assert (decayed["name"], spared["name"]) == ("decay", "no_decay")
    assert decayed["lr_scale"] == spared["lr_scale"] == 1
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_torch_accepts_the_groups():
    model = ConvNeXtV2(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=2)
    optimizer = torch.optim.AdamW(layer_decay_groups(model, 0.05, 0.5, "group"), lr=1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.5**i for i in range(6)}


@pytest.mark.parametrize("layer_decay", [0, -1, 1.01, float("nan")])
def test_layer_decay_out_of_range(layer_decay):
    with pytest.raises(ValueError, match="layer_decay must be greater than 0 and at most 1, got"):
        layer_decay_groups(network(), 0.05, layer_decay)


def test_other_models_and_kinds_are_refused():
    with pytest.raises(ValueError, match="kind must be 'single' or 'group', got 'both'"):
        layer_ids(network(), "both")
    with pytest.raises(ValueError, match="model must be a ConvNeXtV2"):
        layer_ids(torch.nn.Linear(2, 2))
    fcmae = FCMAE(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), img_size=64, decoder_embed_dim=8)
    with pytest.raises(ValueError, match="model must"):
        layer_decay_groups(fcmae, 0.05, 0.9)
