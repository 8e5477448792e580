import sys

import pytest

import convnextv2_kernels
from convnextv2_kernels import cli
from convnextv2_kernels.cli import pretrain
from convnextv2_kernels.train import recipes


def resolved(*words):
    parser = cli.build_parser()
    values = pretrain.resolve(parser, parser.parse_args(["pretrain", *words]))
    return {**values, **values.pop("resolved").values}


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert all(word in text for word in ("info", "bench", "pretrain", "--demo"))


def test_help_of_pretrain_states_each_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    recipe = recipes.PRETRAIN["default"].values
    for name in ("epochs", "batch_size", "blr", "weight_decay", "mask_ratio", "decoder_depth", "decay"):
        assert f"(default: {recipe[name]})" in text
    for value in ("pretrain_output; demo: demo_output", "convnextv2_atto", "batch size 8", "0.002, 1400 steps"):
        assert value in text


def test_defaults_are_the_official_recipe():
    values = resolved("--data", "x")
    assert values["epochs"] == 800 and values["warmup_epochs"] == 40
    assert values["blr"] == 1.5e-4 and "lr" not in values and values["weight_decay"] == 0.05
    assert values["mask_ratio"] == 0.6 and values["norm_pix_loss"] is True


def test_given_options_win():
    values = resolved("--data", "x", "--img-size", "64x96", "--no-norm-pix-loss", "--lr", "0.1")
    assert values["img_size"] == (64, 96) and values["norm_pix_loss"] is False
    assert values["lr"] == 0.1
    assert resolved("--demo", "--lr", "0.1")["lr"] == 0.1
    assert resolved("--demo")["norm_pix_loss"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["pretrain"], "one of the arguments --demo --data is required"),
        (["pretrain", "--demo", "--data", "x"], "not allowed with"),
        (["pretrain", "--demo", "--epochs", "3", "--keep", "1"], "does not take --epochs, --keep"),
        (["pretrain", "--data", "x", "--batch-size", "0"], "a whole number above 0, got '0'"),
        (["pretrain", "--data", "x", "--lr", "nan"], "a number above 0, got 'nan'"),
        (["pretrain", "--data", "x", "--mask-ratio", "1"], "between 0 and 1, got '1'"),
        (["pretrain", "--data", "x", "--img-size", "3x4x5"], "a side or HxW in pixels, got '3x4x5'"),
        (["pretrain", "--data", "x", "--seed", "-1"], "0 or more, got '-1'"),
        (["pretrain", "--data", "x", "--lr", "1", "--blr", "1"], "not allowed with"),
        (
            ["pretrain", "--data", "x", "--epochs", "5", "--warmup-epochs", "5"],
            "--warmup-epochs 5 must be less than --epochs 5",
        ),
    ],
)
def test_usage_errors(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_missing_folder(tmp_path, capsys):
    words = ["--data", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    assert cli.main(["pretrain", *words]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_missing_package_is_named(tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("convnextv2_kernels.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert cli.main(["pretrain", "--data", str(tmp_path)]) == 1
    assert "pip install Pillow" in capsys.readouterr().err


def test_bench_gets_its_arguments_untouched(monkeypatch):
    monkeypatch.setattr(cli.bench, "main", lambda argv: {"--help": 0}.get(argv[0], 7))
    assert cli.main(["bench", "--help"]) == 0
    assert cli.main(["bench", "fcmae", "--quick"]) == 7


def test_info_prints_what_the_package_says(monkeypatch, capsys):
    monkeypatch.setattr(convnextv2_kernels, "info", lambda: "all is well", raising=False)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == "all is well\n"
