import itertools

import pytest
import torch
from conformance.backends import needs_cpu_kernels
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import convnextv2_kernels as ck
from convnextv2_kernels import cli
from convnextv2_kernels.benchmark.model_counts import count_model, describe
from convnextv2_kernels.sizes import CONFIGS

# millions, as printed in Table 14 of the paper
PARAMETERS = {"atto": 3.7, "femto": 5.2, "pico": 9.1, "nano": 15.6, "tiny": 28.6, "base": 89, "large": 198, "huge": 660}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_are_those_of_the_paper(size):
    counts = count_model(f"convnextv2_{size}")
    assert counts.total("parameters", counts.head) / 1e6 == pytest.approx(PARAMETERS[size], rel=0.01)


CASES = [
    *((name, (224, 224), 32, 0.6) for name in CONFIGS),
    ("convnextv2_atto", (192, 320), 32, 0.75),
    ("convnextv2_nano", (256, 384), 64, 0.5),
]


@pytest.mark.parametrize(("name", "img_size", "patch_size", "ratio"), CASES)
@needs_cpu_kernels
def test_counts_are_those_of_flop_counter_mode(name, img_size, patch_size, ratio):
    counts = count_model(name, img_size, patch_size, ratio)
    with torch.device("meta"):
        model = ck.models.create_model(name)
        fcmae = ck.models.create_fcmae(name, img_size=img_size, patch_size=patch_size, mask_ratio=ratio)
    assert counts.total("parameters", counts.head) == sum(p.numel() for p in model.parameters())
    assert counts.total("parameters", counts.decoder) == sum(p.numel() for p in fcmae.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(1, 3, *img_size)
        for network, part, what in ((model, counts.head, "dense"), (fcmae, counts.decoder, "packed")):
            network.to_empty(device="cpu")
            with FlopCounterMode(display=False) as counter:
                network(images)
            assert counter.get_total_flops() == 2 * counts.total(what, part)


def test_a_mask_that_hides_half_halves_the_encoder():
    counts = count_model("convnextv2_atto", (64, 64), 32, 0.5)
    assert (counts.visible, counts.patches) == (2, 4)
    assert counts.total("dense") == 2 * counts.total("packed")
    assert counts.decoder.dense - counts.decoder.packed == 2 * 320 * 512


def test_the_table_adds_up():
    lines = describe(count_model("convnextv2_atto")).splitlines()
    rows = [line.split() for line in lines if line.startswith("  ") and " G" in line]
    sums = [line.split() for line in lines if line.startswith(("classifier", "FCMAE: "))]
    assert len(rows) == 6 and len(sums) == 2

    def giga(row: list[str]) -> list[float]:
        return [float(word) for word, unit in itertools.pairwise(row) if unit == "G"]

    dense = [giga(row)[0] for row in rows]
    assert giga(sums[0]) == [pytest.approx(sum(dense[:5]), abs=0.003)] == [pytest.approx(0.547, abs=0.001)]
    assert giga(sums[1])[0] == pytest.approx(sum(dense) - dense[4], abs=0.003)
    assert giga(sums[1])[1] == pytest.approx(sum(giga(row)[1] for row in rows if len(giga(row)) > 1), abs=0.003)


def test_info_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda t, **_: pytest.fail("weights") if not t.is_meta else t)
    assert cli.main("info --model huge --img-size 384x512 --mask-ratio 0.5 --patch-size 64".split()) == 0
    assert capsys.readouterr().out == describe(count_model("convnextv2_huge", (384, 512), 64, 0.5)) + "\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--img-size 224", "--img-size is of a network, expected --model as well"),
        ("--patch-size 64", "--patch-size is of a network, expected --model as well"),
        ("--model atto --img-size 200", "--img-size 200x200: expected multiples of --patch-size 32"),
        ("--model atto --mask-ratio 0", "--mask-ratio 0 hides none of the 49 patches"),
        ("--model atto --patch-size 48", "expected a side in pixels, a multiple of 32, got '48'"),
        ("--model atta", "expected one of convnextv2_atto,"),
    ],
)
def test_a_wrong_request_is_a_sentence(words, sentence, capsys):
    try:
        code = cli.main(["info", *words.split()])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2 and sentence in err and not out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("convnextv2_atto", (224, 200)), "img_size must be multiples of patch_size 32, got 224x200"),
        (("convnextv2_atto", (96, 96), 48), "patch_size must be a multiple of 32, got 48"),
        (("convnextv2_atto", (64, 64), 32, 0.9), "mask_ratio 0.9 hides all 4 patches"),
        (("atto",), "model name must be one of"),
    ],
)
def test_a_wrong_argument_is_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        count_model(*arguments)
