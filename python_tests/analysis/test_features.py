import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import DEPTHS, DIMS, autoencoder, images, network, stir

from convnextv2_kernels import PatchLayout, analysis, random_mask
from convnextv2_kernels.analysis import TAPS, block_names, hidden_features, tapped
from convnextv2_kernels.cli import analyze
from convnextv2_kernels.models import SparseEncoder


def layout_of(n: int) -> PatchLayout:
    """Ragged: a different number of visible patches in each image."""
    mask = random_mask(n, (2, 2), 0.5, torch.Generator().manual_seed(0))
    mask[0] = torch.tensor([[False, True], [True, True]])
    return PatchLayout.from_mask(mask)


@pytest.mark.parametrize("grn", ["default", "none", "l1,standardize,no-skip"])
@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_chain_gives_the_blocks_own_output(grn, packed):
    torch.manual_seed(0)
    encoder = stir(SparseEncoder(3, DEPTHS, DIMS, grn=grn).double())
    x, layout = images(3, dtype=torch.float64), layout_of(3) if packed else None
    seen = {}
    for name, block in zip(block_names(encoder), [b for s in encoder.stages for b in s], strict=True):
        block.register_forward_hook(lambda _, given, out, n=name: seen.update({n: (given[0], out)}))
    found = {(layer.name, layer.tap): layer.features for layer in tapped(encoder, x, layout, tuple(TAPS))}
    assert len(found) == 3 * sum(DEPTHS)
    for name in block_names(encoder):
        block = encoder.get_submodule(name)
        grn_map, output = found[name, "grn"], found[name, "block"]
        assert torch.equal(output, seen[name][1])
        again = seen[name][0] + F.linear(grn_map, block.pwconv2.weight, block.pwconv2.bias)
        # float64, sums of at most 64 products of numbers of the size of the output
        torch.testing.assert_close(again, output, rtol=1e-11, atol=1e-11 * float(output.abs().max()))
        assert found[name, "act"].shape == (*output.shape[:3], 4 * output.shape[3])
        if grn == "none":
            assert torch.equal(grn_map, found[name, "act"])
        else:
            assert (grn_map - found[name, "act"]).abs().max() > 0.1


def test_act_is_gelu_of_the_expansion_computed_by_hand():
    model = network().double().eval()
    block = model.stages[0][0]
    x = images(2, 9, 7, dtype=torch.float64)[:, :1].expand(-1, 8, -1, -1).contiguous()
    y = F.conv2d(x, block.dwconv.weight, block.dwconv.bias, padding=3, groups=8).permute(0, 2, 3, 1)
    y = F.layer_norm(y, (8,), block.norm.weight, block.norm.bias, 1e-6)
    act = F.gelu(F.linear(y, block.pwconv1.weight, block.pwconv1.bias))
    norm = act.square().sum((1, 2), keepdim=True).sqrt()
    response = norm / (norm.mean(-1, keepdim=True) + 1e-6)
    grn = act + block.grn.gamma * act * response + block.grn.beta
    found = hidden_features(block, x.permute(0, 2, 3, 1).contiguous())
    torch.testing.assert_close(found[0], act, rtol=1e-11, atol=1e-11)  # float64, 49 products
    torch.testing.assert_close(found[1], grn, rtol=1e-11, atol=1e-10)


def test_visible_patches_alone_are_seen():
    encoder, layout, x = autoencoder(), layout_of(3), images(3)
    hidden = layout.hidden_mask().repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    changed = torch.where(hidden, 1e4, x)
    for one, other in zip(
        tapped(encoder, x, layout, tuple(TAPS)), tapped(encoder, changed, layout, tuple(TAPS)), strict=True
    ):
        assert one.features.shape[0] == layout.num_patches
        assert torch.equal(one.features, other.features)


def test_places_and_order():
    layers = list(tapped(network(), images(1), taps=("block", "act")))
    assert [layer.name for layer in layers[::2]] == block_names(network())
    assert [layer.tap for layer in layers] == ["act", "block"] * 5
    assert [layer.index for layer in layers[::2]] == list(range(5))
    assert [layer.stage for layer in layers[::2]] == [0, 1, 1, 2, 3]


def test_modes_are_put_back_and_nothing_is_dropped():
    model = network(drop_path_rate=0.9).train()
    model.stages[1].eval()
    expected = [layer.features for layer in tapped(model, images(2), taps=("block",))]
    again = [layer.features for layer in tapped(model, images(2), taps=("block",))]
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert not any(f.requires_grad for f in expected)
    half_way = tapped(model, images(2))
    next(half_way)
    assert torch.is_grad_enabled()
    half_way.close()
    assert model.training and model.stages[0].training and not model.stages[1][0].training


def test_bad_input():
    with pytest.raises(TypeError, match="model must be a ConvNeXtV2.*got Linear"):
        list(tapped(torch.nn.Linear(2, 2), images(1)))
    with pytest.raises(ValueError, match="taps must be of act, grn, block, got 'gelu'"):
        list(tapped(network(), images(1), taps=("gelu",)))
    with pytest.raises(ValueError, match="sides of at least 32"):
        list(tapped(network(), images(1, 16, 64)))


def test_package_does_not_import_the_analyses():
    code = (
        "import sys, convnextv2_kernels.cli as cli; cli.build_parser(); bad = [m for m in sys.modules if m in "
        "('convnextv2_kernels.analysis', 'matplotlib', 'timm')]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_exported_name_is_there():
    assert all(getattr(analysis, name) is not None for name in analysis.__all__)
    assert set(analyze.TAPS) == set(TAPS)
