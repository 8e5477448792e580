"""Recipes: the published values, typed here once more, and how what is given overrides them."""

import pytest

from convnextv2_kernels import cli
from convnextv2_kernels.cli import finetune as finetune_cli
from convnextv2_kernels.cli import pretrain as pretrain_cli
from convnextv2_kernels.train import recipes
from convnextv2_kernels.train.config import FinetuneOptions, PretrainOptions

COLUMNS = (
    "blr",
    "epochs",
    "warmup_epochs",
    "layer_decay",
    "weight_decay",
    "drop_path",
    "mixup",
    "cutmix",
    "smoothing",
    "batch_size",
    "layer_decay_kind",
    "ema_decay",
)
# paper Tables 9 to 13; the learning rates of base and large as in the official TRAINING.md
TABLE = {
    "atto": (2e-4, 600, 0, 0.9, 0.3, 0.1, 0, 0, 0.2, 1024, "single", 0.9999),
    "femto": (2e-4, 600, 0, 0.9, 0.05, 0, 0.3, 0.3, 0.2, 1024, "single", 0.9999),
    "pico": (2e-4, 600, 0, 0.9, 0.3, 0, 0.3, 0.3, 0.2, 1024, "single", 0.9999),
    "nano": (2e-4, 600, 0, 0.9, 0.3, 0.1, 0.5, 0.5, 0.2, 1024, "single", 0.9999),
    "tiny": (8e-4, 300, 40, 0.9, 0.05, 0.2, 0.8, 1, 0.1, 1024, "single", 0.9999),
    "base": (6.25e-4, 100, 20, 0.6, 0.05, 0.1, 0.8, 1, 0.1, 1024, "group", 0.9999),
    "base-paper": (6.25e-3, 100, 20, 0.6, 0.05, 0.1, 0.8, 1, 0.1, 1024, "group", 0.9999),
    "large": (6.25e-4, 100, 20, 0.6, 0.05, 0.2, 0.8, 1, 0.1, 1024, "group", 0.9999),
    "large-paper": (6.25e-3, 100, 20, 0.6, 0.05, 0.2, 0.8, 1, 0.1, 1024, "group", 0.9999),
    "huge": (1.25e-3, 50, 10, 0.75, 0.05, 0.3, 0.8, 1, 0.1, 1024, "single", 0.9999),
}


def pretrain(*words):
    parser = cli.build_parser()
    args = parser.parse_args(["pretrain", "--data", "x", *words])
    return PretrainOptions(**pretrain_cli.resolve(parser, args), command=())


def finetune(*words):
    parser = cli.build_parser()
    args = parser.parse_args(["finetune", "--data", "x", *words])
    return FinetuneOptions(**finetune_cli.resolve(parser, args), command=())


@pytest.mark.parametrize("size", TABLE)
def test_fine_tuning_values_are_the_published_ones(size):
    values = recipes.FINETUNE[f"convnextv2_{size}"].values
    assert tuple(values[name] for name in COLUMNS) == TABLE[size]
    assert values["aa"] == "rand-m9-mstd0.5-inc1" and values["head_init_scale"] == 0.001 and values["reprob"] == 0.25
    assert values["betas"] == (0.9, 0.999) and values["min_lr"] == 1e-6
    names = ("crop_scale", "hflip", "mix_prob", "switch_prob", "color_jitter", "clip_grad")
    assert tuple(values[name] for name in names) == (0.08, 0.5, 1, 0.5, None, None)


@pytest.mark.parametrize(
    ("size", "decay"), [("nano", 0.9), ("tiny", 0.9), ("base", 0.8), ("large", 0.8), ("huge", 0.8)]
)
def test_two_steps_by_way_of_imagenet_22k(size, decay):
    first, second = (recipes.FINETUNE[f"convnextv2_{size}-{kind}"] for kind in ("22k", "22k-1k"))
    names = ("blr", "batch_size", "epochs", "warmup_epochs", "layer_decay", "ema_decay")
    assert tuple(first.values[n] for n in names) == (2.5e-4, 4096, 90, 5, decay, None)
    names = ("blr", "batch_size", "weight_decay", "mixup", "cutmix")
    assert tuple(second.values[n] for n in names) == (2.5e-5, 512, 1e-8, 0, 0)
    resolved = recipes.resolve(recipes.FINETUNE, f"convnextv2_{size}-22k", {})
    assert "Table 12" in resolved.origins["drop_path"] and "Table 12" in resolved.origins["blr"]


@pytest.mark.parametrize("name", recipes.PRETRAIN)
def test_pre_training_values_are_the_published_ones(name):
    values = recipes.PRETRAIN[name].values
    assert (values["blr"], values["weight_decay"], values["betas"]) == (1.5e-4, 0.05, (0.9, 0.95))
    assert (values["mask_ratio"], values["decoder_depth"], values["decoder_embed_dim"]) == (0.6, 1, 512)
    assert values["warmup_epochs"] == 40 and values["norm_pix_loss"] is True
    expected = {"default": (800, 64, 0.5), "paper": (1600, 4096, 0.0), "official": (1600, 4096, 0.5)}
    assert (values["epochs"], values["batch_size"], values["hflip"]) == expected[name]
    assert values["decay"] == ("official" if name == "official" else "standard")


def test_assumed_values_are_shown_as_such():
    expected = {"convnextv2_large": {"blr"}, "convnextv2_huge": {"layer_decay_kind"}, "convnextv2_base": set()}
    for name, assumed in expected.items():
        shown = recipes.resolve(recipes.FINETUNE, name, {}).lines()
        assert {line.split()[0] for line in shown if "  assumed" in line} == assumed
    shown = recipes.resolve(recipes.FINETUNE, "convnextv2_large", {"blr": 1e-3}).lines()
    assert not any("assumed" in line for line in shown)  # what is given is no longer assumed


def test_every_recipe_has_every_value():
    for table in (recipes.PRETRAIN, recipes.FINETUNE):
        names = {frozenset(recipe.values) for recipe in table.values()}
        assert len(names) == 1
        assert all(set(recipe.assumed) <= set(recipe.values) for recipe in table.values())


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_every_value_can_be_given(command):
    args = vars(cli.build_parser().parse_args([command, "--data", "x"]))
    table = recipes.PRETRAIN if command == "pretrain" else recipes.FINETUNE
    assert set(table["default"].values) <= set(args)


def test_learning_rate_follows_the_batch():
    assert pretrain("--recipe", "paper").lr == pytest.approx(2.4e-3)  # 64 GPUs of 64 images
    assert pretrain("--recipe", "paper", "--batch-size", "512").lr == pytest.approx(3e-4)
    assert finetune("--recipe", "convnextv2_base-paper").lr == pytest.approx(0.025)
    options = pretrain("--lr", "0.01")
    assert options.lr == 0.01 and "blr" not in options.resolved.values


def test_given_values_win_and_say_so():
    options = pretrain("--recipe", "official", "--weight-decay", "0", "--ema-decay", "0.99", "--decoder-width", "256")
    values, origins = options.resolved.values, options.resolved.origins
    assert (values["weight_decay"], values["ema_decay"], values["decoder_embed_dim"]) == (0, 0.99, 256)
    assert origins["weight_decay"] == "given" and "TRAINING.md" in origins["grn_scope"]
    assert any("weight_decay" in line and "given" in line for line in options.resolved.lines())
    assert finetune("--ema-decay", "off").resolved.values["ema_decay"] is None
    assert pretrain("--betas", "0.8", "0.99").resolved.values["betas"] == (0.8, 0.99)
    assert finetune("--color-jitter", "0.4", "--aa", "none").resolved.values["aa"] == ""


def test_warmup_keeps_its_share():
    assert pretrain("--epochs", "100").resolved.values["warmup_epochs"] == 5
    assert finetune("--model", "convnextv2_tiny", "--epochs", "30").resolved.values["warmup_epochs"] == 4
    assert pretrain("--epochs", "100", "--warmup-epochs", "7").resolved.values["warmup_epochs"] == 7


def test_fine_tuning_takes_the_recipe_of_its_model():
    assert finetune("--model", "convnextv2_base").resolved.recipe == "convnextv2_base"
    assert finetune("--model", "convnextv2_small").resolved.recipe == "default"
    assert finetune().resolved.recipe == "convnextv2_atto"


def test_unknown_recipe_lists_the_known(capsys):
    for words in (["pretrain", "--data", "x"], ["finetune", "--data", "x"]):
        with pytest.raises(SystemExit, match="2"):
            parser = cli.build_parser()
            args = parser.parse_args([*words, "--recipe", "best"])
            (pretrain_cli if words[0] == "pretrain" else finetune_cli).resolve(parser, args)
        error = capsys.readouterr().err
        assert "--recipe must be one of default," in error and "got 'best'" in error
