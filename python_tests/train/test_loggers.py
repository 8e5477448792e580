"""Scalars for TensorBoard."""

import pytest
from helpers.training import CONFIG, losses, tiny_model

from convnextv2_kernels.data.images import CropDataset
from convnextv2_kernels.train.pretrain import PretrainTask
from convnextv2_kernels.train.trainer import Storage, train


def test_scalars_of_a_resumed_run_have_each_step_once(tmp_path, sources):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(stop):
        task = PretrainTask(tiny_model(), CropDataset(sources, CONFIG.img_size, CONFIG.seed), CONFIG)
        return train(task, Storage(tmp_path, save_every=2, tensorboard=True), max_steps=stop)

    run(3)
    (tmp_path / "checkpoint-3.pt").unlink()  # as if killed before it was written: step 3 is done again
    run(5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("loss")
    assert [p.step for p in points] == [1, 2, 3, 4, 5]
    assert [p.value for p in points] == pytest.approx([loss for _, loss, _ in losses(tmp_path)], rel=1e-6)
    assert {"lr", "grad_norm", "images_per_second"} <= set(events.Tags()["scalars"])
