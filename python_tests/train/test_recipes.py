"""Recipes: the published values, which ``paper_tables.py`` has once more, and how what is given overrides them."""

import pytest

from convnextv2_kernels import cli
from convnextv2_kernels.cli import finetune as finetune_cli
from convnextv2_kernels.cli import pretrain as pretrain_cli
from convnextv2_kernels.train import recipes
from convnextv2_kernels.train.config import FinetuneOptions, PretrainOptions

from .paper_tables import TABLES, values_of

V1_SIZES = ("tiny", "small", "base", "large", "xlarge")
# recipe: the table whose values it has, and where it differs from it, by the other source that it names
FINE_TUNING = {
    **{f"convnextv2_{size}": ("9", size, {}) for size in ("atto", "femto", "pico", "nano")},
    "convnextv2_tiny": ("10", "tiny", {}),
    "convnextv2_base": ("11", "base", {"blr": 6.25e-4}),
    "convnextv2_base-paper": ("11", "base", {}),
    "convnextv2_large": ("11", "large", {"blr": 6.25e-4}),
    "convnextv2_large-paper": ("11", "large", {}),
    "convnextv2_huge": ("11", "huge", {}),
    "convnext_base-fcmae": ("11", "base", {"blr": 6.25e-4}),
    "convnext_large-fcmae": ("11", "large", {"blr": 6.25e-4}),
    **{f"convnextv2_{size}-22k": ("12", size, {}) for size in ("nano", "tiny", "base", "large", "huge")},
    **{f"convnextv2_{size}-22k-1k": ("13", size, {}) for size in ("nano", "tiny", "base", "large", "huge")},
    **{f"convnextv2_{size}-22k-384": ("12", size, {}) for size in ("nano", "tiny", "base", "large", "huge")},
    **{f"convnextv2_{size}-22k-1k-384": ("13", size, {}) for size in ("nano", "tiny", "base", "large", "huge")},
    "convnextv2_huge-22k-1k-512": ("13", "huge", {}),
    **{f"convnext_{size}": ("V1 5, 1K", size, {}) for size in ("tiny", "small", "base", "large")},
    **{f"convnext_{size}-22k": ("V1 5, 22K", size, {}) for size in ("tiny", "small", "base", "large", "xlarge")},
    **{
        f"convnext_{size}-22k-1k": ("V1 6, after 22K", size, {})
        for size in ("tiny", "small", "base", "large", "xlarge")
    },
    **{
        f"convnext_{size}-22k-1k-384": ("V1 6, after 22K", size, {})
        for size in ("tiny", "small", "base", "large", "xlarge")
    },
}
# all values are assumed, as for another size
ASSUMED = {
    **{f"convnext_{size}": "tiny" for size in ("atto", "femto", "pico", "nano")},
    "convnext_xlarge": "large",
    **{f"convnextv2_{size}-supervised": "tiny" for size in ("atto", "femto", "pico", "nano", "tiny")},
    **{f"convnextv2_{size}-supervised": size for size in ("base", "large")},
}


def pretrain(*words):
    parser = cli.build_parser()
    args = parser.parse_args(["pretrain", "--data", "x", *words])
    return PretrainOptions(**pretrain_cli.resolve(parser, args), command=())


def finetune(*words):
    parser = cli.build_parser()
    args = parser.parse_args(["finetune", "--data", "x", *words])
    return FinetuneOptions(**finetune_cli.resolve(parser, args), command=())


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_values_are_those_of_the_tables(name):
    table, size, differing = FINE_TUNING[name]
    recipe, expected = recipes.FINETUNE[name], {**values_of(table, size), **differing}
    by_v1 = table.startswith("V1")
    rate = expected.pop("blr") * (256 / expected["batch_size"] if by_v1 else 1)  # V1 states the rate of its batch
    assert recipe.values["blr"] == pytest.approx(rate)
    assert {key: recipe.values[key] for key in expected} == expected
    stated = f"Table {table.split(',')[0].split()[-1]}"
    for key in {*expected, "blr"} - differing.keys() - {"aa"}:
        origin = recipe.origin(key)
        assert (stated in origin or "TRAINING.md" in origin) and ("V1" in origin) == by_v1, f"{key}: {origin}"
    rest = {"crop_scale": 0.08, "hflip": 0.5, "mix_prob": 1, "switch_prob": 0.5, "color_jitter": None}
    rest |= {"clip_grad": None, "reprob": 0.25, "min_lr": 1e-6, "precision": "float32"}
    assert {key: recipe.values[key] for key in rest} == rest
    grouped = (("base" in name or "large" in name) and "V1" not in recipe.source) or table == "V1 6, after 22K"
    assert recipe.values["layer_decay_kind"] == ("group" if grouped else "single")


def test_every_recipe_of_fine_tuning_has_a_table_or_says_that_it_is_assumed():
    assert FINE_TUNING.keys() | ASSUMED.keys() | {"default"} == recipes.FINETUNE.keys()
    for name, size in ASSUMED.items():
        recipe = recipes.FINETUNE[name]
        assert recipe.values == recipes.FINETUNE[f"convnext_{size}"].values
        assert {recipe.origin(key) for key in recipe.values} == {f"assumed, as for convnext_{size}"}


def test_image_sizes_are_those_of_section_5_and_table_15():
    sizes = {name: recipe.values["img_size"] for name, recipe in recipes.FINETUNE.items()}
    assert {name for name, size in sizes.items() if size == (512, 512)} == {"convnextv2_huge-22k-1k-512"}
    assert {name for name, size in sizes.items() if size == (384, 384)} == {n for n in sizes if n.endswith("-384")}
    origin = {name: recipe.origin("img_size") for name, recipe in recipes.FINETUNE.items()}
    assert origin["convnextv2_nano-22k-384"] == "paper section 5"
    for name in ("nano-22k-1k", "large-22k-1k", "huge-22k-1k-384", "huge-22k-1k-512"):
        assert origin[f"convnextv2_{name}"] == "paper Table 15"
    for name in ("nano-22k", "huge-22k", "huge-22k-1k"):
        assert origin[f"convnextv2_{name}"].startswith("assumed, as ")
    assert "section 5 names 384 px alone" in recipes.FINETUNE["convnextv2_huge-22k-1k-512"].note


@pytest.mark.parametrize("name", recipes.PRETRAIN)
def test_pre_training_values_are_the_published_ones(name):
    values = recipes.PRETRAIN[name].values
    assert (values["blr"], values["weight_decay"], values["betas"]) == (1.5e-4, 0.05, (0.9, 0.95))
    assert (values["mask_ratio"], values["decoder_depth"], values["decoder_embed_dim"]) == (0.6, 1, 512)
    assert values["warmup_epochs"] == 40 and values["norm_pix_loss"] is True
    assert (values["epochs"], values["batch_size"], values["hflip"]) == {
        "default": (800, 64, 0.5),
        "paper": (1600, 4096, 0.0),
        "paper-800": (800, 4096, 0.0),
        "official": (1600, 4096, 0.5),
    }[name]
    assert values["decay"] == ("official" if name == "official" else "standard")


def test_assumed_values_are_shown_as_such():
    expected = {"convnextv2_large": {"blr"}, "convnextv2_huge": set(), "convnextv2_base-22k": {"img_size"}}
    for name, assumed in expected.items():
        shown = recipes.resolve(recipes.FINETUNE, name, {}).lines()
        assert {line.split()[0] for line in shown if "  assumed" in line} == assumed
    shown = recipes.resolve(recipes.FINETUNE, "convnextv2_large", {"blr": 1e-3}).lines()
    assert not any("assumed" in line for line in shown)  # what is given is no longer assumed
    assert recipes.FINETUNE["convnextv2_huge"].origin("layer_decay_kind") == "paper A.2"


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


def test_both_lengths_of_table_8_have_its_warm_up():
    lines = TABLES["8"].split("training epochs | ")[1].splitlines()
    for epochs in map(int, lines[0].split(" or ")):
        for name in recipes.PRETRAIN:
            resolved = pretrain("--recipe", name, "--epochs", str(epochs)).resolved
            assert resolved.values["warmup_epochs"] == 40
            assert resolved.origins["warmup_epochs"] == f"paper Table 8, for {epochs} epochs"
    assert "of the epochs" in pretrain("--recipe", "paper", "--epochs", "400").resolved.origins["warmup_epochs"]


def test_a_run_keeps_the_warm_up_that_it_began_with():
    resolved = pretrain("--recipe", "paper", "--epochs", "800").resolved
    kept = resolved.keeping({"warmup_epochs": 20.0})
    assert kept.values["warmup_epochs"] == 20 and "earlier version" in kept.origins["warmup_epochs"]
    assert resolved.keeping({"warmup_epochs": 30.0}).values["warmup_epochs"] == 40  # given to that run
    given = pretrain("--recipe", "paper", "--epochs", "800", "--warmup-epochs", "40").resolved
    assert given.keeping({"warmup_epochs": 20.0}).values["warmup_epochs"] == 40


def test_coco_and_ade20k_are_as_in_the_appendix():
    coco, ade = recipes.DOWNSTREAM["coco"], recipes.DOWNSTREAM["ade20k"]
    assert coco.sweep == {"layer_decay": (0.9, 0.95), "drop_path": (0.2, 0.3, 0.4, 0.5)}
    names = ("lr", "weight_decay", "batch_size", "epochs", "img_size", "scale_range")
    assert tuple(coco.values[name] for name in names) == (1e-4, 0.05, 32, 36, (1024, 1024), (0.1, 2.0))
    assert ade.sweep == {"layer_decay": (0.8, 0.9), "lr": (1e-4, 2e-4, 3e-4), "drop_path": (0.1, 0.2, 0.3, 0.4)}
    names = ("weight_decay", "batch_size", "iterations", "img_size", "test_scales", "test_size")
    expected = (0.05, 16, 160000, (512, 512), (0.75, 0.875, 1.0, 1.125, 1.25), (512, 2048))
    assert tuple(ade.values[name] for name in names) == expected


def test_info_prints_recipes(capsys):
    assert cli.main(["info", "--recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in (*recipes.PRETRAIN, *recipes.FINETUNE, *recipes.DOWNSTREAM))
    assert cli.main(["info", "--recipes", "coco", "convnextv2_huge-22k-1k-512", "default"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "drop_path 0.2, 0.3, 0.4, 0.5 paper A.3; swept, the best is not stated" in lines
    assert "img_size 512x512 paper Table 15" in lines
    assert {"pretrain, default:", "finetune, default:"} <= set(lines)
    assert cli.main(["info", "--recipes", "best"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --recipes must be names of recipes, which are default,") and "got 'best'" in error
    for option in ("--img-size", "--patch-size"):
        assert cli.main(["info", "--recipes", option, "64"]) == 2
        assert capsys.readouterr().err == f"error: {option} is of a network, --recipes is not\n"


def test_a_recipe_sets_the_size_of_the_images_and_an_option_another():
    assert finetune("--recipe", "convnextv2_huge-22k-1k-512").img_size == (512, 512)
    assert finetune("--recipe", "convnextv2_huge-22k-1k-512", "--img-size", "64").img_size == (64, 64)
    assert pretrain().img_size == finetune().img_size == (224, 224)


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


@pytest.mark.parametrize("command", ("pretrain", "finetune"))
def test_an_empty_name_is_no_recipe(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--data", str(tmp_path), "--recipe", ""])
    assert stopped.value.code == 2 and "--recipe must be one of default, " in capsys.readouterr().err
