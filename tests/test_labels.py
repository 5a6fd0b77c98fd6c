"""The soft-label files, and DistilledDataset beside what train_eval.py trains on."""
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import train_eval
from utils import labels
from utils.augment import apply_epoch
from utils.data import load_folder
from utils.labels import DistilledDataset, StoredLabels


def test_epochs_written_in_any_order_by_any_process_are_the_files_that_numpy_saves(tmp_path):
    rows = {key: np.random.default_rng(0).integers(0, 2, (5, 3, *row)).astype(dtype)
            for key, (dtype, row) in (labels.DRAWN | {"logits": (np.float16, (4,))}).items()}
    writers = [labels.LabelWriter(tmp_path / "written", 5, 3, 4) for _ in range(2)]        # two processes
    writers[0].create()
    for epoch, writer in zip([3, 0, 4, 1, 2], itertools.cycle(writers)):
        drawn = {key: torch.from_numpy(value[epoch]) for key, value in rows.items()}
        writer.write(epoch, drawn.pop("logits"), drawn)
    writers[1].sync()
    for key, value in rows.items():
        np.save(tmp_path / f"{key}.npy", value)
        assert (tmp_path / f"written/{key}.npy").read_bytes() == (tmp_path / f"{key}.npy").read_bytes()


def test_labels_take_no_room_on_the_disk_before_they_are_written(tmp_path):
    labels.LabelWriter(tmp_path, 1000, 1000, 10).create()
    assert os.stat(tmp_path / "logits.npy").st_blocks * 512 < 100_000


@pytest.fixture(scope="module")
def mixes(labelled, new_project):
    """{mix: a project whose labels were mixed so}"""
    projects = {"cutmix": labelled}
    for mix in "mixup", "none":
        projects[mix] = new_project(labelled.dataset)
        shutil.copytree(labelled.root / "runs", projects[mix].root / "runs")
        projects[mix].call("relabel", f"--mix {mix} --overwrite")
    return projects


def trained_on(project, epoch, rows):
    """The mixed samples, logits and classes that train_eval.py makes of the images `rows` in an epoch."""
    result = json.loads((project.run() / "labels/result.json").read_text())
    images, number, names, _ = load_folder(project.run() / "images", result["data"]["image_size"])
    stored, mean_std = StoredLabels(project.run() / "labels", result["args"]["mix"]), torch.tensor(
        [result["data"]["mean"], result["data"]["std"]])
    mixed = apply_epoch(images, stored.epoch(epoch), rows, stored.mix, mean_std)
    classes = torch.tensor([result["data"]["classes"].index(names[label]) for label in number])
    return mixed, stored.soft_logits(epoch, rows, mixed), classes[rows]


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
@pytest.mark.parametrize("size, workers", [(1, 0), (3, 0), (8, 2)])
def test_a_distilled_dataset_gives_what_train_eval_trains_on_to_the_bit(mix, size, workers, mixes):
    dataset = DistilledDataset(mixes[mix].run(), epoch=2)
    assert len(dataset) == 8 and dataset.epochs == 3
    loader = DataLoader(dataset, size, num_workers=workers, persistent_workers=workers > 0)
    for epoch in 2, 0:
        dataset.set_epoch(epoch)
        rows = torch.arange(8).split(size)
        for batch, found in zip(rows, loader, strict=True):
            for mine, theirs in zip(found, trained_on(mixes[mix], epoch, batch), strict=True):
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_train_eval_trains_on_the_samples_of_a_distilled_dataset(labelled, monkeypatch, tmp_path):
    shutil.copytree(labelled.root / "runs", tmp_path / "runs")
    seen, learned, loss = [], [], train_eval.student_loss
    monkeypatch.setattr(train_eval, "apply_epoch", lambda *args: seen.append(apply_epoch(*args)) or seen[-1])
    monkeypatch.setattr(train_eval, "student_loss",
                        lambda *args, **how: learned.append(args[1:3]) or loss(*args, **how))
    labelled.call("train_eval", "--run-dir", tmp_path / "runs", "--overwrite")
    assert len(seen) == 3                                            # a batch of all images in each epoch
    for epoch, (mixed, (y, soft)) in enumerate(zip(seen, learned, strict=True)):
        samples = list(map(DistilledDataset(labelled.run(), epoch).__getitem__, range(8)))
        order = [next(i for i, (one, *_) in enumerate(samples) if torch.equal(one, image)) for image in mixed]
        assert sorted(order) == list(range(8))
        assert torch.equal(soft, torch.stack([samples[i][1] for i in order]))
        assert y.tolist() == [samples[i][2] for i in order]


def test_a_distilled_dataset_counts_from_the_end_and_ends(labelled):
    dataset = DistilledDataset(labelled.run())
    assert torch.equal(dataset[-1][0], dataset[7][0]) and len(list(dataset)) == 8
    with pytest.raises(IndexError):
        dataset[8]


@pytest.mark.parametrize("damage, words", [
    (lambda run: (run / "labels/result.json").unlink(), "holds no finished labels"),
    (lambda run: (run / "labels/logits.npy").write_bytes(b"half"), "does not hold whole labels"),
    (lambda run: next((run / "images").glob("*/*.png")).unlink(), "was made for other images")])
def test_a_distilled_dataset_names_what_is_wrong_with_a_run(damage, words, relabelled):
    damage(relabelled.run())
    with pytest.raises(ValueError, match=words):
        DistilledDataset(relabelled.run())


def test_a_distilled_dataset_refuses_an_epoch_that_is_not_stored(labelled):
    with pytest.raises(ValueError, match="epoch 3 is not among the 3"):
        DistilledDataset(labelled.run(), epoch=3)


def test_a_dataset_of_images_that_are_not_there_raises_instead_of_ending_the_program(labelled, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        DistilledDataset(labelled.run(), images=tmp_path / "nowhere")


def test_labels_without_flips_differ_in_nothing_else_that_is_drawn(relabelled):
    before = StoredLabels(relabelled.run() / "labels", "cutmix").drawn
    before = {key: np.array(array) for key, array in before.items()}
    result = relabelled.call("relabel", "--no-flip --overwrite")
    after = StoredLabels(relabelled.run() / "labels", "cutmix").drawn
    assert result["args"]["flip"] is False and before["flip"].any() and not after["flip"].any()
    assert all(np.array_equal(before[key], after[key]) for key in set(labels.DRAWN) - {"flip"})
    assert "--flip" in relabelled.mistake("relabel")


def test_labels_older_than_the_flag_had_flips(relabelled):
    path = relabelled.run() / "labels/result.json"
    result = json.loads(path.read_text())
    del result["args"]["flip"]
    path.write_text(json.dumps(result))
    relabelled.call("relabel")
    assert "already done" in relabelled.printed
    assert "--flip True (now False)" in relabelled.mistake("relabel", "--no-flip")


def test_relabel_refuses_teachers_of_permuted_classes_at_its_start(recovered):
    for path in (recovered.teachers / f"{name}.pt" for name in ("convnet_w8", "wrn10_1")):
        record = torch.load(path, weights_only=True)
        record["data"]["classes"] = [*reversed(record["data"]["classes"])]
        torch.save(record, path)
    line = recovered.mistake("relabel", "--images", recovered.run() / "images")
    assert "differ in their classes" in line and str(recovered.teachers) in line
