"""Classes by other names: --images whose folders are numbers, --class-map, a flat val/ with a table."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CLASSES
from tests.test_data import assert_fails
from utils.data import list_folder, load_split, read_class_map


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def numbered(folder, form, classes=12):
    for i in range(classes):
        save(folder / form.format(i) / "0.png")
    return folder


@pytest.mark.parametrize("form", ["{}", "{:05d}", "new{:03d}"])
def test_folders_that_are_numbers_are_classes_by_number(tmp_path, capsys, form):
    labels, found, files = list_folder(numbered(tmp_path, form), [f"n{i:02}" for i in range(12)])
    assert [form.format(label) for label in labels] == found == [file.split("/")[0] for file in files]
    last = labels[-1]
    assert f"folder {form.format(last)} holds class n{last:02}" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["{}", "{:02d}", "new{}"])
def test_classes_that_are_numbers_go_by_their_value(tmp_path, form):
    names = sorted(map(str, range(12)))                              # 0, 1, 10, 11, 2, ...
    labels, found, _ = list_folder(numbered(tmp_path, form), names)
    assert [form.format(int(names[label])) for label in labels] == found


def test_class_map(tmp_path):
    for name in "x", "y", "cat":
        save(tmp_path / "images" / name / "0.png")
    (tmp_path / "map.json").write_text(json.dumps({"x": "dog", "y": ["ant", "an insect"], "z": "bee"}))
    labels, found, _ = list_folder(tmp_path / "images", ["ant", "cat", "dog"],
                                   read_class_map(tmp_path / "map.json"))
    assert found == ["cat", "x", "y"] and labels.tolist() == [1, 2, 0]


def test_two_folders_of_one_class_are_told(tmp_path, capsys):
    for name in "x", "y":
        save(tmp_path / name / "0.png")
    assert_fails(capsys, ["class 'ant' stands where 'bee' does", "--class-map"], list_folder, tmp_path,
                 ["ant", "bee"], {"x": "ant", "y": "ant"})


def test_images_of_other_names_are_labelled_and_trained_on(project, tmp_path):
    names = dict(zip(("w", "x", "y", "z"), reversed(CLASSES)))
    for name in names:
        save(tmp_path / "theirs" / name / "0.png", 10)
        save(tmp_path / "theirs" / name / "1.png", 20)
    (tmp_path / "map.json").write_text(json.dumps(names))
    theirs = "--tag theirs", "--images", tmp_path / "theirs"
    assert "--class-map" in project.mistake("relabel", *theirs)
    project.call("relabel", *theirs, "--class-map", tmp_path / "map.json")
    assert f"--class-map {tmp_path / 'map.json'}" in project.printed          # of the command that is next
    mapped = *theirs, "--class-map", tmp_path / "map.json"
    assert project.call("train_eval", *mapped)["images"] == 8
    (tmp_path / "map.json").write_text(json.dumps(names | {"w": names["x"], "x": names["w"]}))
    for phase in "relabel", "train_eval":
        assert "made from other class map" in project.mistake(phase, *mapped)


def test_foreign_images_by_two_spellings_are_the_same(project, tmp_path, monkeypatch):
    for name in CLASSES:
        save(tmp_path / "theirs" / name / "1.png", 20)
    monkeypatch.chdir(tmp_path)
    theirs = "--tag theirs --ipc 1 --images"
    project.call("relabel", theirs, "theirs")
    for images in tmp_path / "theirs", "../" + tmp_path.name + "/theirs/":
        project.call("relabel", theirs, images)
        assert "already done" in project.printed
        project.call("train_eval", theirs, images)


def test_files_of_foreign_images_that_are_not_read_are_counted(project, tmp_path):
    for name in CLASSES:
        save(tmp_path / "theirs" / name / "1.png", 20)
    for name in ".hidden.png", "a.txt", "b.txt":
        (tmp_path / "theirs/ant" / name).touch()
    project.call("relabel", "--tag theirs --ipc 1 --images", tmp_path / "theirs")
    assert "not read: 1 files or folders that are hidden, such as " in project.printed
    assert "not read: 2 files or folders that are no images, or of no class, such as " in project.printed


def test_a_class_map_is_of_foreign_images_alone(recovered, tmp_path):
    plain = recovered.call("train_eval", "--labels hard")
    (tmp_path / "map.json").write_text(json.dumps(dict(zip(CLASSES, reversed(CLASSES)))))
    mapped = recovered.call("train_eval", "--labels hard --overwrite --class-map", tmp_path / "map.json")
    assert mapped["top1_per_seed"] == plain["top1_per_seed"]
    assert "note: --class-map has no effect without --images" in recovered.printed


@pytest.mark.parametrize("text", ["x dog", "[1]", '{"x": 1}', '{"x": []}', '{"x": [0, "dog"]}'])
def test_a_bad_class_map_is_named(project, tmp_path, text):
    (tmp_path / "map.json").write_text(text)
    error = project.mistake("train_eval", "--labels hard --tag theirs --images", project.dataset / "train",
                            "--ipc 12 --class-map", tmp_path / "map.json")
    assert "map.json is no JSON file" in error


def flat(root):
    """A data set whose four test images, 0..3 in grey, lie in val/ itself; their classes are b, a, a, b."""
    for name in "ab":
        save(root / "train" / name / "0.png")
    for i in range(4):
        save(root / "val" / f"val_{i}.png", i)
    return root


@pytest.mark.parametrize("table", ["val.txt", "val/val.txt"])
@pytest.mark.parametrize("names", ["ba", "10"])
def test_flat_val_with_a_table_of_names_or_numbers(tmp_path, table, names):
    classes = [names[0], names[1], names[1], names[0]]
    (flat(tmp_path) / table).write_text("".join(f"val_{i}.png {name}\n" for i, name in enumerate(classes)))
    split = load_split(str(tmp_path), "", "test")
    assert split.images[:, 0, 0, 0].tolist() == [1, 2, 0, 3] and split.labels.tolist() == [0, 0, 1, 1]


def test_flat_val_with_the_devkit_of_torchvision(tmp_path):
    torch.save(({"a": ("ant",), "b": ("bee",)}, ["b", "a", "a", "b"]), flat(tmp_path) / "meta.bin")
    split = load_split(str(tmp_path), "", "test")
    assert split.images[:, 0, 0, 0].tolist() == [1, 2, 0, 3] and split.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("content", [b"text", ({}, ["a", "b"])])
def test_a_devkit_that_does_not_fit_is_named(tmp_path, capsys, content):
    path = flat(tmp_path) / "meta.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(SystemExit) as end:
        load_split(str(tmp_path), "", "test")
    assert end.value.code == 2
    assert "meta.bin does not give the classes of the 4 images" in capsys.readouterr().err
