import hashlib
import itertools
import json
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from utils import data
from utils.data import DATASETS, describe, load_folder, load_split


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def make_folder(root, splits=("train", "val"), classes=("cat", "dog"), count=2, shape=(8, 8, 3), ext="png"):
    """<root>/<split>/<class>/<number>.<ext>, each image of another seed."""
    for seed, (split, name, number) in enumerate((s, c, n) for s in splits for c in classes
                                                 for n in range(count)):
        save(root / split / name / f"{number}.{ext}", noise(*shape, seed=seed))
    return root


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def assert_fails(capsys, parts, call, *args, **options):
    """The call ends with code 2 and one line that holds all parts."""
    with pytest.raises(SystemExit) as end:
        call(*args, **options)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and all(str(part) in err for part in parts), err


@pytest.fixture(scope="module")
def shapes():
    return {split: load_split("shapes", "nowhere", split) for split in ("train", "test")}


def digest(images):
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


@pytest.mark.slow
def test_shapes_are_the_same_bytes_every_time_and_leave_the_generators_alone(shapes):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert all(digest(load_split("shapes", "nowhere", s).images) == digest(shapes[s].images) for s in shapes)
    assert torch.equal(state, torch.get_rng_state()) and numpy_state == np.random.get_state()[1].tolist()


def test_shapes_are_balanced_and_no_test_image_is_a_training_image(shapes):
    assert shapes["train"].labels.bincount().tolist() == [500] * 10
    assert shapes["test"].labels.bincount().tolist() == [100] * 10
    train, test = ({image.numpy().tobytes() for image in shapes[s].images} for s in ("train", "test"))
    assert len(train) == 5000 and len(test) == 1000 and not train & test


def test_the_constants_of_shapes_are_those_of_its_training_images(shapes):
    images, row = shapes["train"].images.double() / 255, DATASETS["shapes"]
    assert (images.mean((0, 2, 3)) - torch.tensor(row["mean"])).abs().max() < 1e-4
    assert (images.std((0, 2, 3)) - torch.tensor(row["std"])).abs().max() < 1e-4
    assert images.shape == (5000, 3, row["image_size"], row["image_size"])
    assert len(shapes["train"].classes) == row["num_classes"]


def test_shapes_can_be_had_in_another_size():
    assert load_split("shapes", "nowhere", "test", image_size=16).images.shape == (1000, 3, 16, 16)
    large = load_split("shapes", "nowhere", "test", image_size=96)
    assert large.streamed and large.read(torch.tensor([3, 999])).shape == (2, 3, 96, 96)


def test_no_shape_is_another_one_turned_or_mirrored():
    y, x = np.mgrid[-1:1:65j, -1:1:65j]
    turns = [(x * np.cos(a) + y * np.sin(a), y * np.cos(a) - x * np.sin(a)) for a in np.arange(24) * np.pi
             / 12]
    turned = {name: np.stack([f(u, v) < 0 for u, v in turns] + [f(u, -v) < 0 for u, v in turns])
              for name, f in data.SHAPES.items()}
    for one, other in itertools.permutations(data.SHAPES, 2):
        overlap = (turned[one][0] & turned[other]).sum((1, 2)) / (turned[one][0] | turned[other]).sum((1, 2))
        assert overlap.max() < 0.85, (one, other)


def test_classes_are_listed_in_sorted_order(shapes):
    assert shapes["train"].classes == shapes["test"].classes == sorted(data.SHAPES)


@pytest.mark.parametrize("beside", ["val", "test"])
def test_a_folder_is_read_in_sorted_order_and_other_files_are_ignored(tmp_path, beside):
    root = make_folder(tmp_path / "mine", ("train", beside), ("zebra", "Ant", "bee"), count=2)
    save(root / "train/bee/10.PNG", noise(8, 8, 3, seed=99))
    (root / "train/bee/notes.txt").write_text("no image")
    (root / "train/readme.md").write_text("no class")
    split = load_split(str(root), "nowhere", "train", workers=3)
    assert split.classes == ["Ant", "bee", "zebra"] and split.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert len(split) == 7 and split.labels.dtype == torch.int64
    assert split.images.dtype == torch.uint8 and not split.streamed
    files = [root / "train" / name for name in ("Ant/0.png", "Ant/1.png", "bee/0.png", "bee/1.png",
                                                "bee/10.PNG")]
    assert torch.equal(split.images[:5], torch.stack([pixels(file) for file in files]))
    test = load_split(str(root), "nowhere", "test")
    assert len(test) == 6 and torch.equal(test.images[5], pixels(root / beside / "zebra/1.png"))


def test_batches_in_memory_follow_the_order_and_the_last_one_is_short(tmp_path):
    split = load_split(str(make_folder(tmp_path, count=3)), "nowhere", "train")
    order = torch.tensor([5, 0, 3, 3, 1])
    batches = list(split.batches(order.split(2), crop_seed=1))
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([images for images, _ in batches]), split.images[order])
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels[order])
    assert torch.equal(torch.cat([images for images, _ in split.batches(4)]), split.images)
    assert torch.equal(split.read(order), split.images[order])


def test_a_split_moves_to_a_device_unless_it_is_streamed(tmp_path):
    make_folder(tmp_path, count=3)
    order = torch.tensor([5, 0, 3])
    for size, device in (8, "meta"), (80, "cpu"):
        split = load_split(str(tmp_path), "x", "train", size).to(torch.device("meta"))
        batches = list(split.batches(order.split(2), crop_seed=0))
        assert [(images.shape, images.device.type, labels.device.type) for images, labels in batches] == [
            ((count, 3, size, size), device, device) for count in (2, 1)]


def make_cifar(root, dataset, monkeypatch):
    """An archive like that of CIFAR-10 or -100, 20 images to a file; the md5 sums of the real one are not
    checked."""
    cifar = getattr(datasets, dataset.upper())
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(cifar, name, [[file, None] for file, _ in getattr(cifar, name)])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": None})
    folder = root / cifar.base_folder
    folder.mkdir(parents=True)
    key, classes = ("labels", 10) if dataset == "cifar10" else ("fine_labels", 100)
    entries = {}
    for seed, (file, _) in enumerate(cifar.train_list + cifar.test_list):
        entries[file] = {"data": noise(20, 3072, seed=seed),
                         key: [(7 * i + seed) % classes for i in range(20)]}
        (folder / file).write_bytes(pickle.dumps(entries[file]))
    names = {cifar.meta["key"]: [f"class{k:02}" for k in range(classes)]}
    (folder / cifar.meta["filename"]).write_bytes(pickle.dumps(names))
    return entries


@pytest.mark.parametrize("dataset, classes, count", [("cifar10", 10, 100), ("cifar100", 100, 20)])
def test_the_cifar_archives_are_read_as_torchvision_lays_them_out(tmp_path, monkeypatch, dataset, classes,
                                                                  count):
    entries = make_cifar(tmp_path, dataset, monkeypatch)
    split = load_split(dataset, tmp_path, "train")
    rows = np.concatenate([entry["data"] for file, entry in entries.items() if "test" not in file])
    assert np.array_equal(split.images.numpy(), rows.reshape(count, 3, 32, 32))
    assert split.labels[:3].tolist() == [0, 7, 14 % classes] and len(split.classes) == classes
    assert len(load_split(dataset, tmp_path, "test")) == 20
    assert describe(dataset, tmp_path)["classes"] == split.classes


def test_a_folder_named_like_the_data_set_comes_before_the_archive(tmp_path, monkeypatch):
    make_cifar(tmp_path, "cifar10", monkeypatch)
    make_folder(tmp_path / "cifar10", ("train", "test"))
    assert load_split("cifar10", tmp_path, "train").classes == ["cat", "dog"]
    assert load_split("cifar10", tmp_path, "test").images.shape == (4, 3, 32, 32)


WNIDS = ["n02", "n01", "n10"]


def make_tiny(root):
    """Tiny-ImageNet as its authors lay it out, one image in three grey."""
    for seed, name in enumerate(WNIDS):
        save(root / f"train/{name}/images/{name}_0.JPEG", noise(64, 64, 3, seed=seed))
        save(root / f"train/{name}/images/{name}_1.JPEG", noise(64, 64, seed=seed))
        (root / f"train/{name}/{name}_boxes.txt").write_text("n02_0.JPEG\t0\t0\t1\t1\n")
    lines = []
    for number in range(6):
        save(root / f"val/images/val_{number}.JPEG", noise(64, 64, *[3] * (number % 3 > 0), seed=number))
        lines.append(f"val_{number}.JPEG\t{WNIDS[number % 3]}\t0\t32\t44\t62\n")
    (root / "val/val_annotations.txt").write_text("".join(lines))
    save(root / "test/images/test_0.JPEG", noise(64, 64, 3))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    return root


def test_tiny_imagenet_is_read_as_its_authors_lay_it_out(tmp_path):
    root = make_tiny(tmp_path / "tiny-imagenet-200")
    train, test = (load_split("tiny", tmp_path, split, workers=2) for split in ("train", "test"))
    assert train.classes == test.classes == ["n01", "n02", "n10"] and train.images.shape == (6, 3, 64, 64)
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(test.images[0], pixels(root / "val/images/val_1.JPEG"))
    grey = torch.from_numpy(np.array(Image.open(root / "val/images/val_0.JPEG")))
    assert torch.equal(test.images[2], grey.expand(3, -1, -1))      # the first of n02
    found = describe("tiny", tmp_path)
    assert found == dict(classes=["n01", "n02", "n10"], image_size=64, patch=4, mean=[0.4802, 0.4481, 0.3975],
                         std=[0.2302, 0.2265, 0.2262])


def test_tiny_imagenet_is_looked_at_in_its_archive_too(tmp_path):
    root = make_tiny(tmp_path / "tiny-imagenet-200")
    before = data.look("tiny", tmp_path)
    assert before["path"] == str(root.resolve()) and before["train"] and before["fingerprint"]
    next((root / "train").rglob("*.JPEG")).unlink()
    assert data.look("tiny", tmp_path)["fingerprint"] != before["fingerprint"]


def test_tiny_imagenet_with_its_val_sorted_into_class_folders_is_read_too(tmp_path):
    root = make_folder(tmp_path / "tiny-imagenet-200", shape=(64, 64, 3), ext="JPEG")
    assert torch.equal(load_split("tiny", tmp_path, "test").images[3], pixels(root / "val/dog/1.JPEG"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_folder(root / "imagenet", count=4, shape=(120, 160, 3), ext="JPEG")
    return root


def gather(split, index=3, **options):
    return torch.cat([images for images, _ in split.batches(index, **options)])


def test_large_images_are_streamed_with_the_same_bytes_whatever_the_workers(imagenet):
    alone, helped = (load_split("imagenet", imagenet, "train", workers=workers) for workers in (0, 2))
    assert alone.streamed and alone.images is None and len(alone) == 8 and alone.image_size == 224
    assert [len(labels) for _, labels in alone.batches(3)] == [3, 3, 2]
    for index, crop_seed in (3, None), (3, 5), (torch.tensor([6, 1, 4, 0]).split(3), 0):
        first, second = (list(split.batches(index, crop_seed)) for split in (alone, helped))
        assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x),
                   (b, y) in zip(first, second, strict=True))
        assert first[0][0].shape == (3, 3, 224, 224) and first[0][0].dtype == torch.uint8


def test_a_crop_depends_on_seed_and_image_alone(imagenet):
    split = load_split("imagenet", imagenet, "train", image_size=96)
    every, order = gather(split, crop_seed=3), torch.tensor([7, 2, 2, 5])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(gather(split, order.split(1), crop_seed=3), every[order])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(gather(split, crop_seed=4), every) and not torch.equal(gather(split), every)


def test_reading_the_stream_equals_the_customary_resize_and_centre_crop(imagenet):
    split, index = load_split("imagenet", imagenet, "test"), torch.tensor([5, 0])
    customary = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    image = Image.open(imagenet / "imagenet/val/dog/1.JPEG")
    assert torch.equal(split.read(index)[0], customary(image)) and torch.equal(gather(split)[index],
                                                                               split.read(index))
    assert split.labels[index].tolist() == [1, 0]


def test_a_split_can_be_sent_to_workers_that_do_not_fork(imagenet):
    split = load_split("imagenet", imagenet, "train", image_size=96)
    assert torch.equal(gather(pickle.loads(pickle.dumps(split)), crop_seed=1), gather(split, crop_seed=1))


RED, CLEAR_RED, HALF_BLACK = (255, 0, 0), (255, 0, 0, 0), (0, 0, 0, 128)


def palette(transparency=None):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize("image, colour", [
    (Image.new("L", (8, 8), 77), (77, 77, 77)),
    (Image.new("1", (8, 8), 1), (255, 255, 255)),
    (Image.new("LA", (8, 8), (10, 255)), (10, 10, 10)),
    (Image.new("LA", (8, 8), (10, 0)), (255, 255, 255)),
    (Image.new("RGBA", (8, 8), CLEAR_RED), (255, 255, 255)),
    (Image.new("RGBA", (8, 8), HALF_BLACK), (127, 127, 127)),
    (Image.new("RGBA", (8, 8), (*RED, 255)), RED),
    (palette(), RED),
    (palette(transparency=1), (255, 255, 255)),
    (palette(transparency=0), RED),
    (Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16)), (100, 100, 100)),
])
def test_an_image_of_any_mode_becomes_rgb_with_white_behind_what_is_transparent(tmp_path, image, colour):
    folder = tmp_path / "any"
    folder.mkdir()
    image.save(folder / "image.png")
    images = load_folder(tmp_path, 8)[0]
    assert torch.equal(images, torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(1, 3, 8,
                                                                                                   8))


@pytest.mark.parametrize("height, width", [(4, 4), (16, 16), (30, 90), (91, 32), (2, 8)])
def test_an_image_of_any_size_has_its_shorter_side_fitted_and_its_centre_cut_out(tmp_path, height, width):
    side, band = min(height, width), np.zeros((height, width, 3), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    band[top:top + side, left:left + side] = 200            # what lies beside the centre is black
    save(tmp_path / "any/image.png", band)
    centre = load_folder(tmp_path, 16)[0][0]
    assert centre.shape == (3, 16, 16) and (centre[:, 6:10, 6:10] == 200).all()


def test_distilled_images_come_back_bit_by_bit_with_their_relative_paths(tmp_path):
    for name, number in (("dog", 3), ("cat", 0), ("cat", 12)):
        save(tmp_path / name / f"{number:05}.png", noise(96, 96, 3, seed=number))
    images, labels, classes, ids = load_folder(tmp_path, 96, workers=2)
    assert ids == ["cat/00000.png", "cat/00012.png", "dog/00003.png"] and classes == ["cat", "dog"]
    assert labels.tolist() == [0, 0, 1] and labels.dtype == torch.int64
    assert torch.equal(images, torch.stack([pixels(tmp_path / name) for name in ids]))


@pytest.mark.parametrize("shape, asked, size", [((48, 48, 3), None, 48), ((48, 48, 3), 32, 32),
                                                ((100, 80, 3), 96, 96)])
def test_a_folder_is_described_by_its_own_training_pixels(tmp_path, shape, asked, size):
    root = make_folder(tmp_path / "mine", shape=shape)
    found = describe(str(root), "nowhere", asked)
    assert json.loads(json.dumps(found)) == found
    assert found["classes"] == ["cat", "dog"] and found["image_size"] == size
    assert found["patch"] == (4 if size <= 64 else 16)
    split = load_split(str(root), "nowhere", "train", asked)
    images = split.read(torch.arange(4)).double() / 255
    assert np.allclose(found["mean"], images.mean((0, 2, 3)))
    assert np.allclose(found["std"], images.std((0, 2, 3), correction=0))


def test_a_channel_without_contrast_has_a_std_to_divide_by(tmp_path):
    for split in ("train", "val"):
        for name in "red", "too":
            save(tmp_path / split / f"{name}/0.png", np.full((8, 8, 3), RED, np.uint8))
    found = describe(str(tmp_path), "nowhere")
    assert found["mean"] == [1, 0, 0] and np.allclose(found["std"], 1 / 255)


@pytest.mark.parametrize("sizes, size", [
    ([(28, 28)] * 2, 28), ([(64, 64)], 64), ([(65, 65)], 64), ([(96, 96)], 64), ([(97, 97)], 96),
    ([(32, 48)], 32),
    ([(32, 32), (64, 64), (64, 64)], 64), ([(24, 30), (90, 50), (55, 70)], 48), ([(500, 375)], 224),
    ([(5, 7)], 8)])
def test_mixed_images_are_cut_to_the_size_that_most_of_them_have(tmp_path, sizes, size):
    for number, shape in enumerate(sizes):
        save(tmp_path / f"train/a/{number}.png", noise(*shape, 3))
    make_folder(tmp_path, ("val",), ("a",), shape=(99, 99, 3))
    assert load_split(str(tmp_path), "nowhere", "test").image_size == size
    assert data.look(str(tmp_path), "nowhere")["image_size"] == size


@pytest.mark.parametrize("size, classes, column", [
    (16, 2, "cifar10"), (64, 20, "cifar10"), (32, 21, "cifar100"), (33, 21, "tiny"), (64, 200, "tiny"),
    (65, 2, "imagenet")])
def test_the_settings_of_a_folder_go_by_size_and_number_of_classes(size, classes, column):
    assert data.folder_column(size, classes) == column


def test_every_tenth_image_of_a_class_is_held_out(tmp_path):
    root = make_folder(tmp_path, count=23)
    whole = load_split(str(root), "x", "train")
    train, held = (load_split(str(root), "x", split, holdout=True) for split in ("train", "test"))
    assert len(held) == 2 * len(whole.classes) and len(train) + len(held) == len(whole)
    for label in range(len(whole.classes)):
        mine = whole.images[whole.labels == label]
        assert torch.equal(held.images[held.labels == label], mine[[9, 19]])
        assert torch.equal(train.images[train.labels == label],
                           mine[[i for i in range(23) if i not in (9, 19)]])


def test_nothing_to_hold_out_is_told(tmp_path, capsys):
    root = make_folder(tmp_path, count=9)
    assert_fails(capsys, ["--holdout", "ten"], load_split, str(root), "x", "test", holdout=True)


def test_named_data_sets_keep_their_own_settings():
    row = DATASETS["shapes"]
    assert describe("shapes", "nowhere") == dict(classes=sorted(data.SHAPES), image_size=32, patch=4,
                                                 mean=list(row["mean"]), std=list(row["std"]))


@pytest.mark.parametrize("size, patch", [(224, 16), (72, 16), (64, 4), (32, 4)])
def test_imagenet_has_the_patches_of_small_images_up_to_64_pixels(tmp_path, size, patch):
    make_folder(tmp_path / "imagenet", shape=(80, 80, 3))
    assert describe("imagenet", str(tmp_path), size)["patch"] == patch


def test_a_name_that_is_neither_known_nor_a_folder_fails(tmp_path, capsys):
    for call in (describe, lambda *args: load_split(*args, "train")):
        assert_fails(capsys, ["--dataset cifar", "tiny", "train/<class>/<image>"], call, "cifar", tmp_path)
    assert_fails(capsys, [f"--dataset {tmp_path}"], describe, str(tmp_path), tmp_path, 32)


@pytest.mark.parametrize("dataset, parts", [
    ("cifar10", ["cifar10/train", "cifar-10-batches-py", "--download"]),
    ("cifar100", ["cifar100/train", "cifar-100-python", "--download"]),
    ("tiny", ["tiny/train", "tiny-imagenet-200", "--download"]), ("imagenet", ["imagenet/train/<class>"])])
def test_an_absent_data_set_fails_with_the_places_looked_at_and_fetches_nothing(tmp_path, capsys, dataset,
                                                                                parts):
    for call in (describe, lambda *args: load_split(*args, "test")):
        assert_fails(capsys, [f"--dataset {dataset}", tmp_path, "--data-dir", *parts], call, dataset,
                     tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_archive_fails(tmp_path, capsys):
    (tmp_path / "cifar-10-batches-py").mkdir()
    parts = ["--dataset cifar10", "cifar-10-batches-py", "--download"]
    assert_fails(capsys, parts, load_split, "cifar10", tmp_path, "train")


@pytest.mark.parametrize("dataset", ["cifar10", "tiny"])
def test_a_download_without_network_fails_and_leaves_nothing_behind(tmp_path, capsys, monkeypatch, dataset):
    def refuse(*args, **options):
        raise URLError("no route")
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", refuse)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    parts = [f"--dataset {dataset}", "no route"]
    assert_fails(capsys, parts, load_split, dataset, tmp_path / "new", "train", download=True)
    assert not any(tmp_path.rglob("*.*"))


def test_tiny_imagenet_is_fetched_when_asked_and_then_kept(tmp_path, monkeypatch):
    fetched = []

    def fetch(url, folder, md5):
        fetched.append(url)
        make_tiny(Path(folder, "tiny-imagenet-200"))
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    for split in ("train", "test"):
        assert len(load_split("tiny", tmp_path / "new", split, download=True)) == 6
    assert fetched == [data.TINY_URL] and [path.name
                                           for path in (tmp_path / "new").iterdir()] == ["tiny-imagenet-200"]


def test_a_folder_without_test_images_fails(tmp_path, capsys):
    root = str(make_folder(tmp_path, ("train",)))
    assert len(load_split(root, "x", "train")) == 4
    assert_fails(capsys, [tmp_path, "val/", "test/"], load_split, root, "x", "test")


@pytest.mark.parametrize("split, name", [("train", "emu"), ("val", "ant")])
def test_a_class_in_one_split_only_fails_and_is_named(tmp_path, capsys, split, name):
    root = make_folder(tmp_path)
    save(root / split / name / "0.png", noise(8, 8, 3))
    lacks = {"train": "val lacks class emu of train", "val": "train lacks class ant of val"}[split]
    assert_fails(capsys, [f"{root}/{lacks}"], load_split, str(root), "x", "test")


def test_a_class_in_the_annotations_of_tiny_imagenet_only_fails_and_is_named(tmp_path, capsys):
    root = make_tiny(tmp_path / "tiny-imagenet-200")
    with (root / "val/val_annotations.txt").open("a") as file:
        file.write("val_9.JPEG\tn99\t0\t0\t1\t1\n")
    assert_fails(capsys, ["class n99"], describe, "tiny", tmp_path)


def test_an_empty_class_folder_or_an_empty_split_fails(tmp_path, capsys):
    root = make_folder(tmp_path)
    (root / "train/emu").mkdir()
    (root / "train/emu/notes.txt").write_text("no image")
    assert_fails(capsys, [root / "train", "emu"], load_split, str(root), "x", "train")
    (tmp_path / "bare/train").mkdir(parents=True)
    assert_fails(capsys, [tmp_path / "bare/train"], load_split, str(tmp_path / "bare"), "x", "train")
    assert_fails(capsys, [tmp_path / "images", "<class>/<image>"], load_folder, tmp_path / "images", 32)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
@pytest.mark.parametrize("image_size, workers", [(32, 0), (32, 2), (96, 0), (96, 2)])
def test_an_unreadable_image_fails_in_one_line_that_names_it(tmp_path, capsys, damage, image_size, workers):
    root = make_folder(tmp_path, shape=(70, 70, 3), ext="jpg")
    victim = root / "train/dog/0.jpg"
    victim.write_bytes({"truncated": victim.read_bytes()[:900], "text": b"no image", "empty": b""}[damage])

    def use():
        split = load_split(str(root), "x", "train", image_size, workers)
        list(split.batches(2, crop_seed=0))
    assert_fails(capsys, [victim, "remove it"], use)
    if image_size == 96:
        assert_fails(capsys, [victim], load_split(str(root), "x", "train", 96, workers).read,
                     torch.tensor([0, 2]))


def test_an_unreadable_header_fails(tmp_path, capsys):
    (make_folder(tmp_path) / "train/cat/0.png").write_text("no image")
    assert_fails(capsys, [tmp_path / "train/cat/0.png"], data.look, str(tmp_path), "x")


def test_an_image_listed_but_absent_fails(tmp_path, capsys):
    root = make_tiny(tmp_path / "tiny-imagenet-200")
    (root / "val/images/val_4.JPEG").unlink()
    assert_fails(capsys, ["val_annotations.txt names val_4.JPEG and it is not in"], load_split, "tiny",
                 tmp_path, "test")


def test_a_decompression_bomb_fails(tmp_path, capsys, monkeypatch):
    root = make_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    assert_fails(capsys, [root / "train/cat", "bomb"], load_split, str(root), "x", "train", 8)
