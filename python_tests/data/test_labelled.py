import numpy as np
import pytest
import torch
from helpers.pictures import picture
from PIL import Image
from torch.utils.data import DataLoader

from convnextv2_kernels.analysis.features import extract_features, labelled_loader
from convnextv2_kernels.data.augment import eval_transform, train_transform
from convnextv2_kernels.data.labelled import EvalDataset, LabelledDataset, LabelledSample, collate_labelled
from convnextv2_kernels.models import ConvNeXtV2


def images(count=6):
    return [picture(i) for i in range(count)]


def training(sources, labels, seed=3):
    return LabelledDataset(sources, labels, train_transform((32, 32)), seed)


def test_sample_depends_on_seed_epoch_and_index_alone():
    first, again = (training(images(), range(6)) for _ in range(2))
    again[(5, 1)]
    np.random.rand(), torch.rand(1)
    a, b = first[(2, 4)], again[(2, 4)]
    assert torch.equal(a.image, b.image) and a.label == b.label == 4 and a.failures == []
    assert a.image.shape == (3, 32, 32) and a.image.dtype == torch.float32
    others = [first[(3, 4)], training([*images(4), picture(4), picture(4)], range(6))[(2, 5)]]
    others.append(training(images(), range(6), seed=4)[(2, 4)])
    assert not any(torch.equal(a.image, other.image) for other in others)


def test_samples_leave_the_global_streams_alone():
    dataset = training(images(), range(6))
    torch.manual_seed(0), np.random.seed(0)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(0), np.random.seed(0)
    dataset[(0, 0)]
    assert torch.equal(torch.rand(3), expected[0]) and np.array_equal(np.random.rand(3), expected[1])


def test_worker_processes_of_type_spawn_make_the_same_samples(tmp_path):
    # spawn: the worker knows nothing of this process, so the transform must import timm its own way
    for index in range(4):
        picture(index).save(tmp_path / f"{index}.png")
    dataset = training(sorted(tmp_path.glob("*.png")), [0, 1, 0, 1])
    keys = [[(1, 2), (1, 0)], [(1, 3), (1, 1)]]
    options = {"batch_sampler": keys, "collate_fn": collate_labelled}
    here = list(DataLoader(dataset, **options))
    there = list(DataLoader(dataset, num_workers=1, multiprocessing_context="spawn", **options))
    assert [batch.labels.tolist() for batch in there] == [[0, 0], [1, 1]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(here, there, strict=True))


def test_an_unreadable_file_is_replaced_with_the_others_own_label(tmp_path):
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"no picture")
    sound = training([picture(0), picture(1), picture(1), picture(2)], [5, 6, 7, 8])
    sample = training([picture(0), broken, missing, picture(2)], [5, 6, 7, 8])[(0, 1)]
    assert sample.label == 8
    assert [name for name, _ in sample.failures] == [str(broken), str(missing)]
    assert sample.image.shape == (3, 32, 32) and sound[(0, 1)].label == 6
    # The draws are those of the place asked for: picture 2 under the augmentation of index 1.
    assert torch.equal(sample.image, training([picture(0), picture(2)], [0, 1])[(0, 1)].image)
    wrapped = training([picture(0), broken], [5, 6])[(0, 1)]
    assert wrapped.label == 5
    gone = training([broken, missing], [0, 1])[(0, 0)]
    assert gone.image is None and gone.label == -1 and len(gone.failures) == 2


def test_evaluation_leaves_an_unreadable_file_out_by_its_label(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    dataset = EvalDataset([picture(0), tmp_path / "broken.png", picture(2)], [4, 5, 6], eval_transform((32, 48)))
    batch = collate_labelled([dataset[i] for i in range(3)])
    assert batch.labels.tolist() == [4, -1, 6] and batch.images.shape == (3, 3, 32, 48)
    assert not batch.images[1].any() and [name for name, _ in batch.failures] == [str(tmp_path / "broken.png")]
    assert torch.equal(dataset[2].image, eval_transform((32, 48))(picture(2)))
    assert torch.equal(dataset[2].image, dataset[2].image)


def test_images_are_upright_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(3, (96, 48)).save(tmp_path / "turned.png", exif=exif)
    upright = picture(3, (96, 48)).transpose(Image.Transpose.ROTATE_270)
    transform = eval_transform((32, 32))
    turned, straight = EvalDataset([tmp_path / "turned.png", upright], [0, 0], transform)
    assert torch.equal(turned.image, straight.image)
    grey = EvalDataset([picture(3).convert("L")], [0], transform)[0].image
    assert grey.shape == (3, 32, 32)


def test_collate():
    samples = [LabelledSample(torch.full((3, 2, 2), float(i)), i, [(f"{i}", "why")] * i) for i in range(3)]
    batch = collate_labelled(samples)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2] and batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [0, 1, 2] and batch.failures == [("1", "why"), ("2", "why"), ("2", "why")]
    gone = collate_labelled([*samples, LabelledSample(None, -1, [("x", "gone")])])
    assert gone.images is None and gone.labels.tolist() == [0, 1, 2, -1] and len(gone.failures) == 4


def test_labels_are_one_for_each_source():
    with pytest.raises(ValueError, match="labels must be one for each source, got 2 for 6 sources"):
        training(images(), [0, 1])


@pytest.mark.parametrize("pool", ["mean", "norm"])
def test_features_are_those_of_the_model(tmp_path, pool):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    sources = [*images(4), tmp_path / "broken.png", picture(5)]
    dataset = EvalDataset(sources, [3, 1, 4, 1, 5, 9], eval_transform((32, 64)))
    model = ConvNeXtV2(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), num_classes=3, drop_path_rate=0.5)
    model.norm.weight.data.normal_(), model.norm.bias.data.normal_()
    ticks, failures = [], []
    features, labels = extract_features(
        model, labelled_loader(dataset, 2), "cpu", ticks.append, pool=pool, failures=failures
    )
    assert labels.tolist() == [3, 1, 4, 1, 9] and labels.dtype == torch.int64
    assert features.shape == (5, 16) and features.dtype == torch.float32 and not features.requires_grad
    assert ticks == [2, 4, 6] and len(failures) == 1 and model.training
    model.eval()
    with torch.no_grad():
        for index, row in zip([0, 1, 2, 3, 5], features, strict=True):
            expected = model.run_stages(dataset[index].image[None]).double().mean((1, 2))[0]
            if pool == "norm":
                z = (expected - expected.mean()) / (expected.var(unbiased=False) + 1e-6).sqrt()
                expected = z * model.norm.weight + model.norm.bias
            # float32 sums over at most 16 channels and sites, in another batch size
            assert torch.allclose(row.double(), expected, rtol=1e-4, atol=1e-5)


def test_features_of_nothing(tmp_path):
    model = ConvNeXtV2(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=0)
    dataset = EvalDataset([tmp_path / "missing.png"], [0], eval_transform((32, 32)))
    with pytest.raises(ValueError, match="data must hold a readable image, got none in 1"):
        extract_features(model, labelled_loader(dataset))
    with pytest.raises(ValueError, match="pool must be 'mean' or 'norm', got 'max'"):
        extract_features(model, labelled_loader(dataset), pool="max")
