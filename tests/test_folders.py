"""Folders as people have them: each kind is read, counted or refused in one line."""
import json
import os
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.own_folders import METHODS, run_cell
from tests.test_data import assert_fails, make_folder, noise, save
from tests.test_presets import PHASES, parsed
from utils import cli, figures, parser
from utils.data import (check_count, class_numbers, describe, find_split, fitting_size, list_folder,
                        load_folder, load_split, look)
from utils.folders import list_images, white_levels
from utils.presets import FOLDER


def test_hidden_and_foreign_names_are_passed_over_and_counted(tmp_path):
    root = make_folder(tmp_path)
    for split in "train", "val":
        (root / split / ".ipynb_checkpoints").mkdir()
        save(root / split / "cat/.ipynb_checkpoints/x.png", noise(8, 8, 3))
        save(root / split / "cat/._0.png", noise(8, 8, 3))
    (root / "train/cat/notes.txt").write_text("x")
    split, found = load_split(str(root), "x", "train"), look(str(root), "x")
    assert split.classes == ["cat", "dog"] and len(split) == 4
    assert found["passed"]["hidden"][0] == 6
    assert found["passed"]["other"] == [1, str(root / "train/cat/notes.txt")]


def test_a_folder_without_test_images_can_do_with_a_held_out_tenth(tmp_path, capsys, monkeypatch):
    root = make_folder(tmp_path, splits=["train"], count=10)
    assert_fails(capsys, [str(root), "val/", "--holdout"], look, str(root), "x")
    args = parsed("squeeze", monkeypatch, "--dataset", str(root), "--holdout")
    assert [args.data_set[key] for key in ("train", "test", "classes")] == [20, 0, 2]
    assert describe(str(root), "x")["classes"] == ["cat", "dog"]
    assert [len(load_split(str(root), "x", split, holdout=True)) for split in ("train", "test")] == [18, 2]


def test_classes_that_lie_outside_of_train_are_told_where_to_go(tmp_path, capsys):
    make_folder(tmp_path, splits=["mine"])
    assert_fails(capsys, ["mine/train", "beside cat/", "--holdout"], look, str(tmp_path / "mine"), "x")


def test_the_first_line_tells_that_a_tenth_is_held_out(tmp_path, monkeypatch):
    root = make_folder(tmp_path, splits=["train"], count=10)
    line = cli.describe_choice(parsed("squeeze", monkeypatch, "--dataset", str(root), "--holdout"))
    assert "20 training images of 8 pixels, of which a tenth of each class is held out to test" in line


def test_more_distilled_images_than_training_images_are_noted_before_any_work(tmp_path, monkeypatch):
    root, note = make_folder(tmp_path, count=5), "note: --ipc 6 makes 12 images of 10 training images"
    for ipc, noted in ("5", False), ("6", True):
        args = parsed("squeeze", monkeypatch, "--dataset", str(root), "--ipc", ipc)
        assert (note in cli.describe_choice(args)) == noted


def test_holdout_needs_no_test_images_of_a_named_data_set_either_and_ignores_those_of_no_class(tmp_path):
    make_folder(tmp_path / "tiny", splits=["train"], count=10)
    assert look("tiny", str(tmp_path), holdout=True)["test"] == 0
    assert describe("tiny", str(tmp_path))["classes"] == ["cat", "dog"]
    save(tmp_path / "tiny/test/1.png", noise(8, 8, 3))
    assert look("tiny", str(tmp_path), holdout=True)["test"] == 0


@pytest.mark.parametrize("kind", ["jfif", "gif", "webp", "tiff", "bmp"])
def test_what_pillow_reads_is_read(tmp_path, kind):
    save(tmp_path / f"cat/0.{kind}", np.full((8, 8, 3), 200, np.uint8), format={"jfif": "JPEG"}.get(kind))
    assert abs(load_folder(tmp_path, 8)[0].int() - 200).max() <= 2


@pytest.mark.parametrize("pixels, white, shown", [
    (np.full((8, 8), 0.5, np.float32), 1, 128), (np.full((8, 8), 100, np.float32), 255, 100),
    (np.full((8, 8), 100, np.int32), 255, 100), (np.full((8, 8), 2048, np.uint16), 4095, 128),
    (np.full((8, 8), 100, np.uint16), 255, 100), (np.full((8, 8), 100 * 257, np.uint16), 65535, 100)])
def test_more_than_eight_bits_are_scaled_by_the_range_of_the_data_set(tmp_path, pixels, white, shown):
    save(tmp_path / "cat/0.tiff", pixels)
    assert list(white_levels([tmp_path / "cat/0.tiff"]).values()) == [white]
    assert (load_folder(tmp_path, 8)[0] == shown).all()


def test_a_black_image_tells_nothing_of_the_range(tmp_path, capsys):
    save(tmp_path / "cat/0.png", np.zeros((8, 8), np.uint16))
    save(tmp_path / "cat/1.png", np.full((8, 8), 4095, np.uint16))
    assert load_folder(tmp_path, 8)[0][:, 0, 0, 0].tolist() == [0, 255] and not capsys.readouterr().err


def test_a_dark_image_keeps_its_place_in_the_range_of_the_others(tmp_path):
    save(tmp_path / "cat/0.png", np.full((8, 8), 257, np.uint16))
    save(tmp_path / "cat/1.png", np.full((8, 8), 65535, np.uint16))
    assert load_folder(tmp_path, 8)[0][:, 0, 0, 0].tolist() == [1, 255]


@pytest.mark.parametrize("value", [-3.0, 300.0])
def test_floats_of_no_known_range_are_refused(tmp_path, capsys, value):
    save(tmp_path / "cat/0.tiff", np.full((8, 8), value, np.float32))
    assert_fails(capsys, ["cat/0.tiff", f"{value:g}", "0 .. 1"], load_folder, tmp_path, 8)


def test_pixels_that_are_no_number_or_brighter_than_those_of_training_are_refused(tmp_path, capsys):
    values = np.full((8, 8), 0.5, np.float32)
    values[3, 3] = np.nan
    save(tmp_path / "float/cat/0.tiff", values)
    assert_fails(capsys, ["cat/0.tiff", "nan"], load_folder, tmp_path / "float", 8)
    root = make_folder(tmp_path / "mine", shape=(8, 8))
    for split, value in ("train", 4000), ("val", 60000):
        save(root / split / "cat/0.png", np.full((8, 8), value, np.uint16))
    assert_fails(capsys, ["val/cat/0.png", "60000", "0 .. 4095"], load_split, str(root), "x", "test")


def test_deep_test_images_beside_training_images_of_eight_bits_have_their_own_range(tmp_path):
    root = make_folder(tmp_path, shape=(8, 8))
    save(root / "val/cat/0.png", np.full((8, 8), 4095, np.uint16))
    images = load_split(str(root), "x", "test").images
    assert any((image == 255).all() for image in images)


def test_an_image_of_a_far_smaller_range_is_a_warning(tmp_path, capsys):
    root = make_folder(tmp_path, shape=(8, 8))
    for split, name, value in ("train", "a", 60000), ("train", "b", 2000), ("val", "a", 200):
        save(root / split / f"cat/{name}.png", np.full((8, 8), value, np.uint16))
    for split in "train", "test":
        load_split(str(root), "x", split)
    assert [line.split(",")[1] for line in capsys.readouterr().err.splitlines()] == [
        f" such as {root / file}" for file in ("train/cat/b.png", "train/cat/b.png", "val/cat/a.png")]


def test_a_link_that_leads_back_is_not_followed(tmp_path):
    root = make_folder(tmp_path)
    (root / "train/cat/loop").symlink_to(root / "train")
    (root / "train/cat/itself").symlink_to(".")
    assert len(load_split(str(root), "x", "train")) == 4


def test_classes_that_link_to_each_other_are_read_once(tmp_path):
    for name, other in ("a", "b"), ("b", "a"):
        save(tmp_path / name / "0.png", noise(8, 8, 3))
        (tmp_path / name / "link").symlink_to(tmp_path / other)
    assert len(list_images(tmp_path)[0]) == 4                        # its own, and through the link the other's


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("gone.png"), os.mkfifo])
def test_a_link_to_nothing_and_a_pipe_are_named(make, tmp_path, capsys):
    root = make_folder(tmp_path)
    make(root / "train/cat/9.png")
    assert_fails(capsys, ["train/cat/9.png", "replace or remove"], look, str(root), "x")


@pytest.mark.parametrize("sizes, size", [
    (3 * [(28, 28)], 28), (3 * [(12, 12)] + [(10, 20)], 12), (3 * [(4, 4)], 8),
    (2 * [(28, 28)] + 2 * [(27, 30)], 24), (3 * [(100, 100)], 96), (3 * [(70, 90)], 64)])
def test_the_size_that_fits_is_that_of_most_images(sizes, size):
    assert fitting_size(sizes) == size


def test_drawn_shapes_are_not_those_of_a_folder_of_that_name(tmp_path):
    make_folder(tmp_path / "shapes")
    assert look("shapes", str(tmp_path))["train"] is None
    assert "circle" in describe("shapes", str(tmp_path))["classes"]


def test_folders_of_nearly_the_right_names_are_told_how_to_rename(tmp_path, capsys):
    make_folder(tmp_path / "mine", splits=["Train", "Val"])
    assert_fails(capsys, ["rename Train/ to train/"], look, str(tmp_path / "mine"), "x")
    assert_fails(capsys, ["--dataset is empty"], look, "", "x")


def test_classes_that_holdout_leaves_untested_are_told(tmp_path, capsys):
    root = make_folder(tmp_path, splits=["train"], count=10)
    (root / "train/dog/0.png").unlink()
    load_split(str(root), "x", "test", holdout=True)
    assert "1 of 2 classes, such as dog, have fewer than ten" in capsys.readouterr().err


def test_images_one_level_up_are_told_where_they_are(tmp_path, capsys):
    make_folder(tmp_path / "theirs", splits=["images"])
    assert_fails(capsys, ["name", "theirs/images"], list_folder, tmp_path / "theirs", ["cat", "dog"])


def test_a_flat_channel_is_a_warning_that_names_a_file(tmp_path, capsys):
    for split in "train", "val":
        for name in "a", "b":
            save(tmp_path / split / name / "0.png", np.dstack([noise(8, 8, 2), np.zeros((8, 8), np.uint8)]))
    describe(str(tmp_path), "x")
    assert capsys.readouterr().err.split(": ", 1)[1].startswith("blue is 0 of 255")
    assert not capsys.readouterr().err


def test_an_image_is_turned_as_its_orientation_says(tmp_path):
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "cat/0.png", half, exif=exif)
    assert (load_folder(tmp_path, 8)[0][0, 0, :4] == 255).all()
    assert (load_folder(tmp_path, 8)[0][0, 0, 4:] == 0).all()


def test_class_folders_win_over_a_left_over_table(tmp_path):
    root = make_folder(tmp_path)
    (root / "val/val_annotations.txt").write_text("00.png\tcat\n")
    assert len(find_split(str(root), "x", "test")[0]) == 4


def test_a_flat_val_is_read_by_a_table_of_names_and_classes_or_refused(tmp_path, capsys):
    root = make_folder(tmp_path, ("train",))
    for number in range(2):
        save(root / f"val/{number}.png", noise(8, 8, 3))
    assert_fails(capsys, ["val", "2 images", "val.txt", "<class>"], find_split, str(root), "x", "test")
    (root / "val.txt").write_text("1.png cat\n0.png 1\n")
    files, labels, classes = find_split(str(root), "x", "test")
    assert [Path(file).name for file in files] == ["1.png", "0.png"] and labels == [0, 1]
    assert classes == ["cat", "dog"]
    save(root / "val/2.png", noise(8, 8, 3))
    assert look(str(root), "x")["passed"]["other"] == [1, str(root / "val/2.png")]


@pytest.mark.parametrize("text, told", [
    ("\ufeff0.png a b\n1.png cat\n", None), ("0.png\ta b\tmore\n1.png\tcat\n", None),
    ("0.png a b\n0.png cat\n", "names 0.png 2 times"), ("0.png\n", "does not name a file and a class"),
    ("0.png a b\n1.png cat\n9.png cat\n", "names 9.png and it is not in"),
    ("0.png a b\n1.png cat\nx y.png cat\n", "y.png of"),
    ("0.png caf\xe9\n".encode("latin-1"), "no text in UTF-8")])
def test_a_table_of_names_and_classes_is_read_or_refused(tmp_path, capsys, text, told):
    root = make_folder(tmp_path, ("train",), ("a b", "cat"))
    for number in range(2):
        save(root / f"val/{number}.png", noise(8, 8, 3))
    (root / "val.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    if told:
        assert_fails(capsys, ["val.txt", told], find_split, str(root), "x", "test")
    else:
        assert find_split(str(root), "x", "test")[1:] == ([0, 1], ["a b", "cat"])


def test_accents_composed_and_decomposed_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
    make_folder(tmp_path, ("train",), ("ant", composed))
    make_folder(tmp_path, ("val",), ("ant", decomposed))
    assert find_split(str(tmp_path), "x", "test")[1:] == ([0, 0, 1, 1], ["ant", composed])


def test_folders_of_images_sort_as_classes_do_and_older_escapes_are_understood(tmp_path):
    for name in "a:b", "a1", "c":
        save(tmp_path / name / "0.png", noise(8, 8, 3))
    assert list_folder(tmp_path, ["a1", "a:b", "c"])[0].tolist() == [0, 1, 2]
    assert class_numbers(["a%3Ab", "a1", "c"], ["a1", "a:b", "c"], tmp_path) == [1, 0, 2]


def test_images_are_as_many_as_ipc_says(capsys):
    check_count(torch.tensor([0, 0, 1]), 2, "there")
    assert capsys.readouterr().err == "warning: --images there has 1 to 2 images a class\n"
    assert_fails(capsys, ["--ipc 5", "--ipc 2"], check_count, torch.tensor([0, 0, 1, 1]), 5, "there")


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b""])
@pytest.mark.parametrize("ext", ["png", "jpg"])
def test_a_damaged_test_image_is_found_before_training(tmp_path, capsys, damage, ext):
    victim = make_folder(tmp_path, ext=ext, shape=(80, 80, 3)) / f"val/dog/1.{ext}"
    victim.write_bytes(damage(victim.read_bytes()))
    assert_fails(capsys, [victim, "remove it"], look, str(tmp_path), "x")


def test_one_folder_by_two_spellings_is_one_and_changed_files_are_told(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    first = look("mine", "x")
    assert look("./mine/", "x") == look(str(root), "x") == first == look("mine", "x", [first])
    save(root / "train/cat/0.png", noise(8, 8, 3, seed=99))
    assert look("mine", "x", [first])["fingerprint"] != first["fingerprint"]


def test_equal_files_among_the_test_images_or_in_two_classes_are_a_warning(tmp_path, capsys):
    root = make_folder(tmp_path / "mine")
    look(str(root), "x")
    assert capsys.readouterr().err == ""
    train, val = (sorted(root.glob(f"{split}/*/*.png")) for split in ("train", "val"))
    val[0].write_bytes(train[-1].read_bytes())
    look(str(root), "x")
    assert capsys.readouterr().err == (f"warning: 1 test images are training images, such as {val[0]} and "
                                       f"{train[-1]}; remove one of each pair\n")
    save(val[0], noise(8, 8, 3, seed=99))
    train[0].write_bytes(train[-1].read_bytes())
    look(str(root), "x")
    assert capsys.readouterr().err == (f"warning: 1 training images are of two classes, such as {train[0]} "
                                       f"and {train[-1]}; remove one of each pair\n")


def test_of_val_and_test_the_one_that_holds_images_is_taken(tmp_path):
    root = make_folder(tmp_path / "mine", splits=("train", "test"))
    (root / "val").mkdir()
    (root / "val/.DS_Store").touch()
    assert look(str(root), "x")["test"] == 4


def test_of_several_frames_the_first_is_read_and_that_is_said(tmp_path, capsys):
    root = make_folder(tmp_path / "mine")
    frames = [Image.fromarray(noise(8, 8, 3, seed=seed)) for seed in (1, 2)]
    frames[0].save(root / "train/cat/many.tiff", save_all=True, append_images=frames[1:])
    look(str(root), "x")
    assert "1 images, such as" in (error := capsys.readouterr().err) and "many.tiff, have several" in error


@pytest.mark.parametrize("value, dark", [(4000, True), (40000, False)])
def test_colours_of_16_bits_that_use_fewer_are_a_warning(tmp_path, capsys, value, dark):
    def chunk(kind, content):
        content = kind + content
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    rows = 8 * (b"\0" + 8 * struct.pack(">3H", value, value // 2, 0))
    header = struct.pack(">2I5B", 8, 8, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == (value // 256, value // 512, 0)
    white_levels([str(tmp_path / "a.png")])
    assert ("1 images of 16 bits a colour" in capsys.readouterr().err) == dark


@pytest.mark.parametrize("order, mark", [("<", b"II*\0"), (">", b"MM\0*")])
def test_colours_of_16_bits_in_a_tiff_of_either_byte_order(order, mark, tmp_path, capsys):
    # width, height, bits (at 126), no compression, RGB, pixels at 132, 3 colours, rows, bytes
    tags = {256: 8, 257: 8, 258: 126, 259: 1, 262: 2, 273: 132, 277: 3, 278: 8, 279: 384}
    entries = [struct.pack(order + "HHII", tag, 4 - (tag == 258), 3 if tag == 258 else 1, value)
               for tag, value in tags.items()]
    (tmp_path / "a.tiff").write_bytes(b"".join([
        mark, struct.pack(order + "IH", 8, len(tags)), *entries, struct.pack(order + "I", 0), b"\0\0\0\0",
        struct.pack(order + "3H", 16, 16, 16), struct.pack(order + "192H", *[2000] * 192)]))
    assert Image.open(tmp_path / "a.tiff").getpixel((0, 0)) == (7, 7, 7)
    white_levels([str(tmp_path / "a.tiff")])
    assert "1 images of 16 bits a colour" in capsys.readouterr().err


def test_two_data_sets_of_one_name_do_not_share_a_folder(tmp_path, capsys):
    flags = ["--dataset", str(tmp_path / "a/mine"), "--run-dir", str(tmp_path)]
    args = cli.identity_flags(parser.Parser("")).parse_args(flags)
    one, other = ({"path": path, "fingerprint": path} for path in ("a/mine", "b/mine"))
    cli.check_data_set(args, one, {"x": {"data_set": one}})
    assert_fails(capsys, ["a/mine", "b/mine", "--run-dir"], cli.check_data_set, args, one,
                 {"x": {"data_set": other}})


def test_a_folder_does_not_share_results_with_the_data_set_it_is_named_as(tmp_path, capsys):
    folder, path = str(tmp_path / "shapes"), str(tmp_path / "elsewhere")
    found = {"shapes": {"path": None, "fingerprint": None}, folder: {"path": path, "fingerprint": "x"}}
    for now, before in ("shapes", folder), (folder, "shapes"):
        args = cli.identity_flags(parser.Parser("")).parse_args(["--dataset", now])
        earlier = {"x": {"data_set": found[before], "args": {"dataset": before}}}
        words = [found[before]["path"] or before, "--run-dir"]
        assert_fails(capsys, words, cli.check_data_set, args, found[now], earlier)


@pytest.fixture
def remembered(tmp_path):
    """Flags of a folder of 8 pixels; squeeze.json of --teachers small chose 16 pixels and one backbone."""
    data, teachers = make_folder(tmp_path / "mine"), tmp_path / "runs/mine/teachers/small"
    teachers.mkdir(parents=True)
    chosen = look(str(data), "x") | {"image_size": 16, "backbones": ["wrn10_1"]}
    (teachers / "squeeze.json").write_text(json.dumps({"data_set": chosen}))
    return ["--dataset", str(data), "--run-dir", str(tmp_path / "runs")]


@pytest.mark.parametrize("phase", PHASES[1:])
def test_what_squeeze_chose_is_the_default_of_later_phases_with_its_teachers(remembered, phase, monkeypatch):
    def found(*flags):
        args = parsed(phase, monkeypatch, *remembered, *flags)
        return args.image_size, args.backbones

    assert found("--teachers", "small") == (16, ["wrn10_1"])
    flags = "--teachers", "small", "--image-size", "16", "--backbones", "convnet_w8"
    assert found(*flags) == (16, ["convnet_w8"])
    assert found() == (8, FOLDER["*", "backbones"])                       # other teachers: chosen anew


def test_backbones_squeezed_later_are_noted_as_none_that_other_phases_take(remembered, monkeypatch):
    note = "note: the other phases take wrn10_1, squeezed first; for others name --backbones there too"
    for name, noted in ("wrn10_1", False), ("convnet_w8", True):
        args = parsed("squeeze", monkeypatch, *remembered, "--teachers", "small", "--backbones", name)
        assert (note in cli.describe_choice(args)) == noted


@pytest.mark.parametrize("phase", PHASES)
def test_another_size_than_squeeze_chose_is_told_with_both(remembered, phase, monkeypatch, capsys):
    path = f"{remembered[3]}/mine/teachers/small/squeeze.json"
    flags = *remembered, "--teachers", "small", "--image-size", "24"
    assert_fails(capsys, ["--image-size 24", "chose 16", path, "leave it out"], parsed, phase, monkeypatch,
                 *flags)


def test_squeezing_again_chooses_the_size_anew(remembered, monkeypatch):
    flags = *remembered, "--teachers", "small", "--overwrite"
    assert parsed("squeeze", monkeypatch, *flags).image_size == 8
    assert parsed("squeeze", monkeypatch, *flags, "--image-size", "24").image_size == 24


@pytest.mark.slow
def test_a_folder_of_three_classes_trains_by_the_defaults(tmp_path):
    results = list(run_cell(tmp_path, classes=3, pixels=16, images=20))
    assert [(cell["method"], cell.get("said")) for cell in results] == [(method, None) for method in METHODS]
    for cell in results:                                             # chance is 33; seen: 93 to 100
        assert min(cell["student"], *cell["teachers"].values()) > 60, cell


def test_home_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--run-dir=~/runs", "--data-dir", "~/data", "--dataset=~/mine"]
    args = cli.identity_flags(parser.Parser("")).parse_args(flags)
    assert (args.run_dir, args.data_dir, args.dataset) == tuple(
        str(tmp_path / name) for name in ("runs", "data", "mine"))
    assert figures.get_parser("losses").parse_args(["~/a", "x"]).folders == [tmp_path / "a", Path("x")]


def test_a_long_tail_falls_from_the_first_class_to_the_last(tmp_path):
    root = make_folder(tmp_path, classes=tuple("abcde"), count=16)
    split = load_split(str(root), "x", "train", imbalance=16)
    assert torch.bincount(split.labels).tolist() == [16, 8, 4, 2, 1]
    assert len(load_split(str(root), "x", "test", imbalance=16)) == 80


def test_a_file_and_a_folder_that_is_not_there_are_told_with_their_whole_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("theirs.pt").write_text("x")
    assert_fails(capsys, [tmp_path / "theirs.pt", "utils.convert"], list_images, "theirs.pt")
    assert_fails(capsys, [tmp_path / "nothere", "<class>/<image>"], list_images, "nothere")
    assert_fails(capsys, ["--dataset mine", tmp_path / "mine"], look, "mine", "x")
    for name in "cifar10", "imagenet":
        assert_fails(capsys, [tmp_path / "x" / name, "--data-dir"], find_split, name, "x", "train")


def test_a_class_folder_without_images_says_what_is_in_it(tmp_path, capsys):
    (make_folder(tmp_path) / "train/emu").mkdir()
    (tmp_path / "train/emu/readme.txt").write_text("x")
    assert_fails(capsys, ["train/emu", "1 other"], list_images, tmp_path / "train")
