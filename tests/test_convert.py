"""utils/convert.py: other projects' tensors, an ImageFolder there and back, a run to publish."""
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_data import make_folder
from utils.convert import UNITS, load_tensors, main, to_pixels
from utils.data import load_folder
from utils.hub import write_zip
from utils.labels import DistilledDataset


def call(*words):
    main([str(word) for word in words])


def mistake(capsys, *words):
    """The one line on stderr of a call that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    return error


def pixels_of(folder):
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path))
            for path in folder.rglob("*.png")}


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.fixture
def tensors(tmp_path):
    """Bytes of 6 images of 3 classes, the same as floats in CIFAR-10's units, their classes; and both files
    of floats."""
    pixels = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = torch.tensor(UNITS["cifar10"])[..., None, None]
    images, labels = (pixels / 255 - mean) / std, torch.tensor([2, 0, 1, 1, 0, 2])
    torch.save(torch.nn.Parameter(images), tmp_path / "images_best.pt")
    torch.save(labels, tmp_path / "labels_best.pt")
    return pixels, images, labels


def units(name="cifar10"):
    return ["--mean", *UNITS[name][0], "--std", *UNITS[name][1]]


def check_folder(folder, pixels, labels, classes="012"):
    rows = [0, 0, 0]
    for image, label in zip(pixels.permute(0, 2, 3, 1).numpy(), labels):
        assert (pixels_of(folder)[f"{classes[label]}/{rows[label]:05d}.png"] == image).all()
        rows[label] += 1
    assert len(pixels_of(folder)) == len(pixels)


def test_two_tensors_become_a_folder_of_the_same_pixels(tensors, tmp_path, capsys):
    call(tmp_path / "images_best.pt", tmp_path / "labels_best.pt", tmp_path / "out", *units())
    check_folder(tmp_path / "out", tensors[0], tensors[2])
    assert "rounding moved pixels by 0.000 of 255 on average; clamping moved 0.0 %" in capsys.readouterr().out


def test_names_of_classes_and_units_come_from_the_data_set(beasts, tensors, tmp_path):
    _, _, labels = tensors
    torch.save(torch.arange(6) % 4, tmp_path / "labels_best.pt")
    call(tmp_path / "images_best.pt", tmp_path / "labels_best.pt", tmp_path / "out", "--dataset", beasts)
    assert sorted(os.listdir(tmp_path / "out")) == ["10", "9", "ant", "bee"]


@pytest.mark.parametrize("index, expected", [([], 1), (["--index", 0], 0)])
def test_condensation_files_give_the_last_experiment_or_the_one_named(tensors, tmp_path, index, expected):
    pixels, images, labels = tensors
    # accuracies as main_DM.py collects them
    torch.save({"data": [[images, labels], [images.flip(3), labels]],
                "accs_all_exps": {"ConvNet": [np.sum([True, True]) / 3]}}, tmp_path / "res.pt")
    call(tmp_path / "res.pt", tmp_path / "out", *index, *units())
    check_folder(tmp_path / "out", pixels.flip(3) if expected else pixels, labels)


def test_numbers_of_numpy_1_are_read(tensors, tmp_path):
    torch.save({"data": [list(tensors[1:])], "accuracy": np.float64(0.5)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_tensors([tmp_path / "old.pt"])["accuracy"] == 0.5


@pytest.mark.parametrize("layout", ["floats", "bytes", "channels last"])
def test_npz(tensors, tmp_path, layout):
    pixels, images, labels = (part.numpy() for part in tensors)
    held = {"floats": images, "bytes": pixels, "channels last": pixels.transpose(0, 2, 3, 1)}[layout]
    np.savez(tmp_path / "set.npz", images=held, labels=labels, classes=3, mean=0.5)  # neither names nor units
    call(tmp_path / "set.npz", tmp_path / "out", *(units() if layout == "floats" else ()))
    check_folder(tmp_path / "out", tensors[0], tensors[2])


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_a_folder_there_and_back_has_equal_bytes(tensors, tmp_path, suffix):
    values = torch.arange(256, dtype=torch.uint8).repeat(18).view(6, 3, 16, 16)  # every byte in every channel
    np.savez(tmp_path / "set.npz", images=values, labels=tensors[2], classes=["a:b", "c d", "."])
    call(tmp_path / "set.npz", tmp_path / "one")
    call(tmp_path / "one", tmp_path / f"tensors.{suffix}", *units("tiny"))
    call(tmp_path / f"tensors.{suffix}", tmp_path / "two")  # the file knows its units
    assert len(bytes_of(tmp_path / "one")) == 6 and bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_folders_that_are_numbers_keep_them(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((12, 3, 8, 8), np.uint8), labels=np.arange(12))
    call(tmp_path / "set.npz", tmp_path / "one")
    assert (tmp_path / "one" / "00").rename(tmp_path / "one" / "0") and (tmp_path / "one"
                                                                         / "02").rename(tmp_path / "one"
                                                                                        / "2")
    call(tmp_path / "one", tmp_path / "out.npz", *units())
    with np.load(tmp_path / "out.npz") as found:
        assert found["classes"][[0, 2, 10]].tolist() == ["0", "2",
                                                         "10"] and sorted(found["labels"]) == list(range(12))


def test_floats_of_a_folder_are_normalised(tensors, tmp_path):
    np.savez(tmp_path / "set.npz", images=tensors[0], labels=tensors[2])
    call(tmp_path / "set.npz", tmp_path / "one")
    call(tmp_path / "one", tmp_path / "out.pt", *units())
    images, labels = torch.load(tmp_path / "out.pt", weights_only=True)["data"][0]
    order = tensors[2].argsort(stable=True)
    assert torch.allclose(images, tensors[1][order], atol=1e-6) and torch.equal(labels, tensors[2][order])


def test_how_far_pixels_move():
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0, 0] = torch.tensor([-10 / 255, 100.25 / 255])
    pixels, moved = to_pixels(images, [[0.0] * 3, [1.0] * 3])
    assert pixels[0, 0, 0].tolist() == [0, 100]
    assert moved == (f"rounding moved pixels by {0.25 / 12:.3f} of 255 on average; clamping moved "
                     f"{100 / 12:.1f} % of them, "
                     "by up to 10.0")


def test_soft_labels_become_classes_and_that_is_said(tensors, tmp_path, capsys):
    torch.save(torch.nn.functional.one_hot(tensors[2]).float(), tmp_path / "labels_best.pt")
    call(tmp_path / "images_best.pt", tmp_path / "labels_best.pt", tmp_path / "out", *units())
    check_folder(tmp_path / "out", tensors[0], tensors[2])
    assert "soft labels" in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda y: y[:, None], lambda y: y.astype(np.uint16),
                                    lambda y: y[:, None].astype(np.float32)])
def test_a_column_of_labels_and_unsigned_ones_are_classes(tensors, tmp_path, change):
    np.savez(tmp_path / "set.npz", images=tensors[0].numpy(), labels=change(tensors[2].numpy()))
    call(tmp_path / "set.npz", tmp_path / "out")
    check_folder(tmp_path / "out", tensors[0], tensors[2])


def test_names_of_classes_may_be_bytes(tensors, tmp_path):
    np.savez(tmp_path / "set.npz", images=tensors[0].numpy(), labels=tensors[2],
             classes=np.array([b"x", b"y", b"z"]))
    call(tmp_path / "set.npz", tmp_path / "out")
    check_folder(tmp_path / "out", tensors[0], tensors[2], "xyz")


def test_a_folder_of_12_bit_images_is_as_bright_as_for_the_phases(tmp_path):
    (tmp_path / "deep/a").mkdir(parents=True)
    Image.fromarray(np.linspace(0, 4080, 64).astype(np.uint16).reshape(8, 8)).save(tmp_path / "deep/a/0.png")
    call(tmp_path / "deep", tmp_path / "deep.npz", "--mean", 0, 0, 0, "--std", 1, 1, 1)
    found, _, _, _ = load_folder(tmp_path / "deep", 8)
    with np.load(tmp_path / "deep.npz") as arrays:
        assert (np.round(arrays["images"] * 255) == found.numpy()).all() and found.max() == 254


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_data_set_is_no_folder_of_classes(tmp_path, capsys):
    root = make_folder(tmp_path / "mine")
    assert f"name one, such as {root / 'train'}\n" in mistake(capsys, root, tmp_path / "out.npz", *units())


@pytest.mark.parametrize("name, change, told", [
    ("text", lambda x, y: (b"no tensors", y), "images.pt is no whole file of tensors"),
    ("code", lambda x, y: ({"data": Code()}, y), "it would run"),
    ("nan", lambda x, y: (x.index_fill(0, torch.tensor([4]), torch.nan), y),
     "pixels of image 4 are not finite"),
    ("length", lambda x, y: (x, y[1:]), "labels of shape [5] for 6 images"),
    ("fraction", lambda x, y: (x, y + 0.5), "label 2.5; number the classes from 0 on"),
    ("negative", lambda x, y: (x, y - 1), "label -1; number the classes from 0 on"),
    ("huge", lambda x, y: (x, y + 10 ** 12 * (y == 2)), "class 2 has no image for the 1000000000003 classes"),
    ("none", lambda x, y: (x[:0], y[:0]), "images of shape [0, 3, 8, 8]; write them as [N, 3, H, W], none"),
    ("channels", lambda x, y: (x[:, [0, 1, 2, 0]], y), "images of shape [6, 4, 8, 8]"),
    ("numbers", lambda x, y: (x.long(), y), "images of type torch.int64"),
    ("list", lambda x, y: (["a"], y), "holds no images and labels"),
])
def test_bad_files_end_in_one_line_that_names_them(tensors, tmp_path, capsys, monkeypatch, name, change,
                                                   told):
    monkeypatch.chdir(tmp_path)
    for file, value in zip(("images.pt", "labels.pt"), change(*tensors[1:])):
        (tmp_path / file).write_bytes(value) if isinstance(value, bytes) else torch.save(value,
                                                                                         tmp_path / file)
    error = mistake(capsys, "images.pt", "labels.pt", "out", *units())
    assert told in error and ("images.pt" in error or "labels.pt" in error)
    assert sorted(os.listdir()) == ["images.pt", "images_best.pt", "labels.pt", "labels_best.pt"]


@pytest.mark.parametrize("more, told", [
    ({"mean": [0, 0, np.nan], "std": [1, 1, 1]}, "no units of pixels; name --mean and --std"),
    ({"mean": [0, 0, 0], "std": [1, 0, 1]}, "no units of pixels; name --mean and --std"),
    ({"mean": ["a", "b", "c"], "std": [1, 0, 1]}, "no units of pixels; name --mean and --std"),
    ({"mean": [0, 0, 0], "std": [1, 1, 1], "classes": ["a", "b", "a"]}, "class a stands twice"),
    ({}, "--index 3 is of a res_*.pt; leave it out")])
def test_a_file_of_odd_units_names_or_count_is_not_read(tmp_path, capsys, more, told):
    np.savez(tmp_path / "set.npz", images=np.zeros((3, 3, 8, 8), "f"), labels=np.arange(3), **more)
    index = () if more else ("--index", 3)
    assert told in mistake(capsys, tmp_path / "set.npz", tmp_path / "out", *index)


def test_floats_of_which_most_lie_outside_black_and_white_are_in_other_units(tensors, tmp_path, capsys):
    files = tmp_path / "images_best.pt", tmp_path / "labels_best.pt", tmp_path / "out"
    units = "--mean", 0, 0, 0, "--std", 9, 9, 9
    assert "% of the pixels lie outside 0 .. 255 with mean [0.0, 0" in mistake(capsys, *files, *units)


@pytest.mark.parametrize("units", [(np.nan, 0, 0, 1, 1, 1), (0, 0, 0, 1, 1, np.inf), (0, 0, 0, 0, 1, 1)])
def test_odd_units_on_the_command_line_are_told(tensors, tmp_path, capsys, units):
    files = tmp_path / "images_best.pt", tmp_path / "labels_best.pt", tmp_path / "out"
    assert "three finite numbers each" in mistake(capsys, *files, "--mean", *units[:3], "--std", *units[3:])


@pytest.mark.parametrize("content", [b"text", b""])
def test_bad_npz(tmp_path, capsys, content):
    (tmp_path / "set.npz").write_bytes(content)
    assert "set.npz is no whole file" in mistake(capsys, tmp_path / "set.npz", tmp_path / "out", *units())


def test_npz_of_objects_is_not_unpickled(tmp_path, capsys):
    np.savez(tmp_path / "set.npz", images=np.array([Code()], object), labels=np.zeros(1))
    assert "set.npz is no whole file" in mistake(capsys, tmp_path / "set.npz", tmp_path / "out", *units())


def test_classes_must_be_those_of_the_data_set(beasts, tensors, tmp_path, capsys):
    files = tmp_path / "images_best.pt", tmp_path / "labels_best.pt", tmp_path / "out", "--dataset", beasts
    assert "labels_best.pt: class 3 has no image for the 4 classes 10 .. bee" in mistake(capsys, *files)
    torch.save(torch.tensor([0, 1, 2, 3, 4, 0]), tmp_path / "labels_best.pt")
    assert "labels_best.pt: class 4 is one too many" in mistake(capsys, *files)


def test_mistakes_of_the_command_line(tensors, tmp_path, capsys):
    files = tmp_path / "images_best.pt", tmp_path / "labels_best.pt"
    assert "matrix" in mistake(capsys, *files, tmp_path / "out", "--zca")
    assert "--dataset, or --mean and --std" in mistake(capsys, *files, tmp_path / "out")
    assert "name both" in mistake(capsys, *files, tmp_path / "out", "--mean", 0, 0, 0)
    assert "is missing" in mistake(capsys, tmp_path / "none.pt", tmp_path / "out")
    assert "holds no images and labels" in mistake(capsys, files[0], tmp_path / "out", *units())
    assert "is there already" in mistake(capsys, *files, tmp_path, *units())
    assert "name one or two files" in mistake(capsys, files[0])
    assert "labels_best.pt ends like a file of tensors" in mistake(capsys, *files, *units())
    assert "--index 3" in mistake(capsys, *files, tmp_path / "out", "--index", 3)
    assert "name one of them" in mistake(capsys, tmp_path, "--hub", "hub", "--zip", "run.zip")
    assert "no run of recover.py" in mistake(capsys, tmp_path, "--hub", tmp_path / "hub")


@pytest.fixture
def run(labelled):
    return labelled.run()


def test_hub_folder(run, tmp_path):
    call(run, "--hub", tmp_path / "hub")
    assert bytes_of(tmp_path / "hub" / "images") == bytes_of(run / "images")
    rows = [json.loads(line) for line in open(tmp_path / "hub" / "images" / "metadata.jsonl")]
    assert [row["file_name"] for row in rows] == sorted(bytes_of(run / "images")) and rows[2] == {
        "file_name": "9/00000.png", "label": 1, "class": "9"}
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "path: images/*/*.png" in card and "8 distilled images of the 4 classes of beasts" in card
    assert "TO BE FILLED IN" in card and "soft labels of 3 epochs" in card and "{" not in card
    assert (np.load(tmp_path / "hub" / "labels" / "logits.npy")
            == np.load(run / "labels" / "logits.npy")).all()
    for mine, theirs in zip(DistilledDataset(run, 1)[3], DistilledDataset(tmp_path / "hub", 1)[3]):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
    assert str(run.parents[2]) not in "".join(path.read_text() for path in tmp_path.rglob("*.[jm][sd]*"))


def test_labels_of_other_images_are_not_published(run, tmp_path, capsys):
    copied = Path(shutil.copytree(run, tmp_path / "copied"))
    result = json.loads((copied / "result.json").read_text())
    (copied / "result.json").write_text(json.dumps(result | {"image_set": "0"}))
    assert "labels was made for other images" in mistake(capsys, copied, "--hub", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_hub_card_names_settings_that_are_zero(run, tmp_path):
    call(run, "--hub", tmp_path / "hub")
    card = (tmp_path / "hub/README.md").read_text()
    assert "seed 0, " in card and "stay 0.0, " in card


def test_a_run_in_place_of_its_images_is_told(run, tmp_path, capsys):
    assert f"is a run; name its images, {run / 'images'}" in mistake(capsys, run, tmp_path / "out.npz")


def test_hub_card_without_labels_speaks_of_none(squeezed, recovered, tmp_path):
    call(recovered.run(), "--hub", tmp_path / "hub")
    assert "logits" not in (tmp_path / "hub" / "README.md").read_text() and not (tmp_path / "hub"
                                                                                 / "labels").exists()


@pytest.mark.parametrize("flag", ["--hub", "--zip"])
def test_class_names_that_are_not_utf_8_are_told(run, tmp_path, flag, capsys):
    copied = shutil.copytree(run, tmp_path / "odd")
    try:
        (copied / "images" / "b\udcff").mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.raises(SystemExit) as end:
        call(copied, flag, tmp_path / "out")
    assert end.value.code == 2 and "class 'b\\udcff' is not UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_zip_is_the_same_each_time_and_unpacks_to_the_images(run, tmp_path, capsys):
    call(run, "--zip", tmp_path / "a.zip")
    assert write_zip(run, tmp_path / "b.zip") in capsys.readouterr().out
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert (tmp_path / "a.zip.sha256").read_text().endswith("  a.zip\n")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        archive.extractall(tmp_path / "out")
    assert bytes_of(tmp_path / "out" / "images") == bytes_of(run / "images")


def test_converted_images_train_by_their_classes_and_by_soft_labels(project, tmp_path):
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"data": [[images, torch.arange(4).repeat_interleave(2)]]}, tmp_path / "res.pt")
    call(tmp_path / "res.pt", tmp_path / "theirs", "--dataset", project.dataset)
    theirs = "--tag theirs", "--images", tmp_path / "theirs"
    assert project.call("train_eval", *theirs, "--labels hard")["images"] == 8
    assert project.call("relabel", *theirs)["images"] == 8
    assert project.call("train_eval", *theirs)["images"] == 8
