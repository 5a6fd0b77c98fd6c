"""A mistake of the user's ends in one line that names the flag or file, the value and the remedy, with exit code 2;
nothing is written or destroyed by it (`Project.mistake` sees to all of this but the words)."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import squeeze
from models import build_model

PHASES = "squeeze", "collect_stats", "recover", "relabel", "train_eval"
RUN = "gvbsm-ipc2"


def tells(line, *words):
    missing = [word for word in words if str(word) not in line]
    assert not missing, f"{line!r} lacks {missing}"


def edit(path, **changes):
    """Change entries of a checkpoint; None removes one."""
    record = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in record.items() if value is not None}, path)


# A phase before its predecessor

@pytest.mark.parametrize("phase, flags, words", [
    ("collect_stats", "", ["convnet_w8.pt is missing", "squeeze.py"]),
    ("recover", "", ["convnet_w8.pt is missing", "squeeze.py"]),
    ("relabel", "", ["convnet_w8.pt is missing", "squeeze.py"]),
    ("train_eval", "", ["result.json is missing", "relabel.py"]),
    ("train_eval", "--labels hard", ["result.json is missing", "recover.py"]),
    ("train_eval", "--labels online --images beasts/train", ["convnet_w8.pt is missing", "squeeze.py"])])
def test_without_backbones(phase, flags, words, bare):
    tells(bare.mistake(phase, flags), *words)


@pytest.mark.parametrize("phase, flags, words", [
    ("relabel", "", ["result.json is missing", "recover.py", "--ipc 2"]),
    ("train_eval", "", ["result.json is missing", "relabel.py", "--ipc 2"]),
    ("train_eval", "--labels hard", ["result.json is missing", "recover.py"]),
    ("train_eval", "--labels online", ["result.json is missing", "recover.py"]),
    ("recover", "--teachers other", ["other/convnet_w8.pt", "squeeze.py", "--teachers other"]),
    ("collect_stats", "--backbones resnet81", ["resnet81.pt", "squeeze.py"])])
def test_without_images(phase, flags, words, project):
    tells(project.mistake(phase, flags), *words)


def test_without_statistics(project):
    (project.teachers / "wrn10_1.stats.pt").unlink()
    tells(project.mistake("recover"), "wrn10_1.stats.pt is missing", "collect_stats.py", "--backbones wrn10_1")


def test_images_of_an_unfinished_run_are_not_labelled(project):
    project.call("recover")
    (project.run() / "result.json").unlink()
    tells(project.mistake("relabel"), "result.json is missing", "recover.py")


# Flags

IMPOSSIBLE = {
    PHASES: ["--ipc 0", "--ipc -1", "--ipc 1.5", "--ipc ten", "--tag ../x", "--tag a/b", "--tag ..", "--teachers a/b",
             "--method sre3l", "--preset good", "--seed -1", "--workers -1", "--image-size 4", "--device nonsense",
             "--dataset nonsense", "--precision fp8", "--nonsense 1"],
    ("squeeze",): ["--backbones resnet81", "--epochs 0", "--epochs 1.5", "--batch-size 0", "--lr -1", "--lr nan",
                   "--lr inf", "--lr fast", "--momentum 1.5", "--weight-decay -1", "--schedule linear", "--crop pad",
                   "--crop padx", "--crop random"],
    ("collect_stats",): ["--batch-size 1", "--patch 0", "--patch 2.5", "--crop pad-4"],
    ("recover",): ["--alpha 1.1", "--alpha -0.1", "--alpha nan", "--drop-rate 1.1", "--drop-rate some",
                   "--bn-weight -1", "--conv-weight -1", "--dd-weight inf", "--tau 0.5", "--dd-scale max",
                   "--loop fast", "--choice last", "--roll -1", "--roll 1.5", "--iterations 0", "--batch-size 0",
                   "--lr inf", "--groups-per-step 0", "--groups-per-step all", "--statistics fast", "--log-every 0"],
    ("relabel",): ["--epochs 0", "--batch-size 0", "--whole-up-to -1", "--mix cutup"],
    ("train_eval",): ["--students resnet81", "--student-seeds -1", "--student-seeds one", "--labels soft",
                      "--loss mse", "--gamma -1", "--temperature 0", "--epochs 0", "--evaluations 0", "--lr -1",
                      "--lr nan", "--lr inf", "--lr fast", "--lr resnet18=0.1", "--lr 0.1 resnet18=fast",
                      "--lr 0.1 resnet18=-1", "--lr 0.1 resnet81=0.1", "--optimizer adam"],
}


@pytest.mark.parametrize("phase, flags", [
    (phase, flags) for phases, many in IMPOSSIBLE.items() for phase in phases for flags in many])
def test_a_value_that_cannot_be(phase, flags, relabelled):
    flag, *values = flags.split()
    tells(relabelled.mistake(phase, flags), flag, values[-1])


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(phase, bare):
    tells(bare.mistake(phase, "--device cuda"), "--device cuda", "cpu")


def test_graphs_need_a_gpu(relabelled):
    for phase in "recover", "train_eval":
        tells(relabelled.mistake(phase, "--cuda-graphs --device cpu"), "--cuda-graphs", "needs a GPU", "leave it out")


def test_a_network_too_deep_for_the_images(bare):
    tells(bare.mistake("squeeze", "--backbones convnet_w8 convnet_w8_d5"), "--backbones convnet_w8_d5", "32 pixels")


def test_a_student_too_deep_for_the_images(relabelled):
    line = relabelled.mistake("train_eval", "--students convnet_w8 convnet_w8_d5")
    tells(line, "--students convnet_w8_d5", "32 pixels")


def test_more_epochs_than_labels(relabelled):
    tells(relabelled.mistake("train_eval", "--epochs 4"), "--epochs 4", "3", "relabel.py --epochs 4")


def test_padding_needs_images_in_memory(bare):
    tells(bare.mistake("squeeze", "--image-size 80 --backbones convnet_w8"), "--crop pad2", "--crop resized")


@pytest.mark.parametrize("overwrite", ["", "--overwrite"])
def test_more_random_images_than_a_class_has(overwrite, bare):
    bare.call("recover", "--method random --ipc 12")
    (bare.root / "beasts/train/bee/3.png").unlink()                                     # the last class
    if not overwrite:
        bare.results.rename(bare.root / "elsewhere")
    tells(bare.mistake("recover", "--method random --ipc 12", overwrite), "--ipc 12", "11", "bee")


# Files of other arguments

@pytest.mark.parametrize("phase, flags, words", [
    ("squeeze", "--lr 0.5", ["convnet_w8.pt", "--lr 0.05 (now 0.5)"]),
    ("squeeze", "--seed 1 --epochs 3", ["--seed 0 (now 1)", "--epochs 2 (now 3)"]),
    ("squeeze", "--schedule cosine", ["--schedule constant (now cosine)"]),
    ("collect_stats", "--batch-size 8", ["convnet_w8.stats.pt", "--batch-size 20 (now 8)"]),
    ("collect_stats", "--patch 8", ["--patch 4 (now 8)"]),
    ("recover", "--alpha 0.5 --no-flip --roll 3", ["--alpha 0.8 (now 0.5)", "--roll 0 (now 3)"]),
    ("recover", "--backbones wrn10_1", ["--backbones"]),
    ("relabel", "--mix none", ["--mix cutmix (now none)"]),
    ("relabel", "--no-logit-norm", ["--logit-norm True (now False)"]),
    ("train_eval", "--gamma 0.5", ["--gamma 0.15 (now 0.5)"]),
    ("train_eval", "--student-seeds 1 2", ["--student-seeds [0] (now [1, 2])"])])
def test_other_arguments_than_those_of_the_files_there(phase, flags, words, relabelled):
    relabelled.call("train_eval")
    tells(relabelled.mistake(phase, flags), *words, "--overwrite", "--tag" if phase in PHASES[2:] else "--teachers")


# Files that are damaged, or are not what they should be

class Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
    "without its end": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "text": lambda path: path.write_text("404: Not Found\n"),
    "a cut pickle": lambda path: path.write_bytes(b"\x80\x02."),
    "an image": lambda path: Image.new("RGB", (4, 4)).save(path, format="png"),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a list": lambda path: torch.save([1, 2], path),
    "an empty dict": lambda path: torch.save({}, path),
    "plain weights": lambda path: torch.save(build_model("wrn10_1", 4, 16).state_dict(), path),
    "a pickled module": lambda path: torch.save(build_model("wrn10_1", 4, 16), path),
    "code": lambda path: torch.save({"weights": Trap(path.with_name("ran"))}, path),
    "bare code": lambda path: path.write_bytes(pickle.dumps(Trap(path.with_name("ran")), 2)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("phase, flags, remedy", [
    ("squeeze", [], "--overwrite"), ("collect_stats", [], "squeeze.py"), ("recover", ["--tag new"], "squeeze.py"),
    ("relabel", ["--overwrite"], "squeeze.py"), ("train_eval", ["--labels online"], "squeeze.py")])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(damage, phase, flags, remedy, relabelled):
    DAMAGE[damage](relabelled.teachers / "wrn10_1.pt")
    tells(relabelled.mistake(phase, *flags), "wrn10_1.pt", remedy)
    assert not (relabelled.teachers / "ran").exists()


@pytest.mark.parametrize("phase", ["collect_stats", "recover"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_statistics(damage, phase, project):
    DAMAGE[damage](project.teachers / "wrn10_1.stats.pt")
    tells(project.mistake(phase), "wrn10_1.stats.pt", "--overwrite" if phase == "collect_stats" else "collect_stats.py")
    assert not (project.teachers / "ran").exists()


@pytest.mark.parametrize("phase, flags", [("collect_stats", ""), ("recover", "--tag new"), ("relabel", "--overwrite")])
def test_weights_of_another_architecture(phase, flags, relabelled):
    edit(relabelled.teachers / "convnet_w8.pt", weights=build_model("convnet_w16", 4, 16).state_dict())
    line = relabelled.mistake(phase, flags)
    tells(line, "convnet_w8.pt does not hold weights of convnet_w8", "squeeze.py --overwrite")


@pytest.mark.parametrize("phase", ["collect_stats", "recover"])
def test_statistics_of_other_weights(phase, project):
    project.call("squeeze", "--seed 1 --overwrite")
    tells(project.mistake(phase), "convnet_w8.stats.pt", "other weights than convnet_w8.pt", "--overwrite")


def test_statistics_of_another_network_or_patch(project):
    path = project.teachers / "wrn10_1.stats.pt"
    whole = torch.load(path, weights_only=True)
    edit(path, statistics={"conv": whole["statistics"]["conv"]})
    tells(project.mistake("recover"), "wrn10_1.stats.pt", "collect_stats.py", "--overwrite")
    torch.save(whole, path)
    project.call("collect_stats", "--backbones wrn10_1 --patch 8 --overwrite")
    tells(project.mistake("recover"), "wrn10_1.stats.pt", "--patch 8", "4", "--overwrite")


@pytest.mark.parametrize("phase", ["collect_stats", "recover", "relabel"])
@pytest.mark.parametrize("change, key", [
    ({"classes": ["10", "9", "ant", "cow"]}, "classes"), ({"classes": ["9", "10", "ant", "bee"]}, "classes"),
    ({"mean": [0.5, 0.5, 0.5]}, "mean")])
def test_teachers_of_different_data(change, key, phase, project):
    path = project.teachers / "wrn10_1.pt"
    edit(path, data=torch.load(path, weights_only=True)["data"] | change)
    tells(project.mistake(phase), "wrn10_1.pt", "convnet_w8.pt", key, "squeeze.py --overwrite")


@pytest.mark.parametrize("phase, flags", [
    ("relabel", "--overwrite"), ("train_eval", ""), ("train_eval", "--labels hard"), ("train_eval", "--labels online")])
def test_images_of_other_classes(phase, flags, relabelled):
    (relabelled.run() / "images" / "bee").rename(relabelled.run() / "images" / "cow")
    tells(relabelled.mistake(phase, flags), "images", "'cow'", "'bee'", "same data set")


CHANGES = {
    "pixels": lambda images: Image.new("RGB", (16, 16)).save(images / "bee/00001.png"),
    "removed": lambda images: (images / "bee/00001.png").unlink(),
    "renamed": lambda images: (images / "bee/00001.png").rename(images / "bee/00002.png"),
    "moved": lambda images: (images / "bee/00001.png").rename(images / "ant/00002.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_labels_of_other_images(change, relabelled):
    CHANGES[change](relabelled.run() / "images")
    tells(relabelled.mistake("train_eval"), "labels", "other images", "relabel.py --overwrite")


@pytest.mark.parametrize("phase, remade, words", [
    ("relabel", "recover", ["labels", "other images"]), ("train_eval", "relabel", ["convnet_w8.json", "other labels"])])
def test_a_result_of_images_or_labels_that_have_been_made_anew_is_not_repeated(phase, remade, words, relabelled):
    relabelled.call("train_eval")
    relabelled.call(remade, "--seed 1 --overwrite")
    tells(relabelled.mistake(phase), *words, "--overwrite")


@pytest.mark.parametrize("name", ["logits", "crop", "flip", "partner", "box", "ratio"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "text", "bare code"])
def test_damaged_labels(damage, name, relabelled):
    path = relabelled.run() / "labels" / f"{name}.npy"
    DAMAGE.get(damage, Path.unlink)(path)
    tells(relabelled.mistake("train_eval"), "labels", "relabel.py --overwrite")
    assert not path.with_name("ran").exists()


JSON_DAMAGE = {kind: DAMAGE[kind] for kind in ("empty", "half", "an image")} | {
    "a list": lambda path: path.write_text("[]"), "an empty dict": lambda path: path.write_text("{}")}


@pytest.mark.parametrize("phase, file, remedy", [
    ("recover", "result.json", "--overwrite"), ("relabel", "labels/result.json", "--overwrite"),
    ("train_eval", "labels/result.json", "relabel.py"), ("train_eval", "eval/convnet_w8-hard.json", "--overwrite")])
@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_a_damaged_result(damage, phase, file, remedy, relabelled):
    relabelled.call("train_eval", "--labels hard")
    JSON_DAMAGE[damage](relabelled.run() / file)
    tells(relabelled.mistake(phase, "--labels hard" if "hard" in file else ""), file, remedy)


# Data

def test_a_folder_without_a_training_split(bare):
    (bare.root / "beasts/train").rename(bare.root / "beasts/training")
    for phase in PHASES:
        tells(bare.mistake(phase), f"--dataset {bare.dataset}", "train/")


def test_a_folder_without_a_test_split(bare):
    (bare.root / "beasts/test").rename(bare.root / "beasts/testing")
    tells(bare.mistake("squeeze"), "beasts", "val/", "test/")


def test_statistics_of_data_whose_classes_have_changed(bare):
    bare.call("squeeze")
    for split in "train", "test":
        (bare.root / "beasts" / split / "bee").rename(bare.root / "beasts" / split / "cow")
    tells(bare.mistake("collect_stats"), "--dataset", "'cow'", "'bee'", "supervised")


@pytest.mark.parametrize("phase, flags, file", [
    ("squeeze", "", "train/ant/7.png"), ("squeeze", "", "test/ant/3.png"), ("collect_stats", "", "train/ant/7.png"),
    ("recover", "--method random", "train/ant/7.png"), ("train_eval", "--labels hard", "test/ant/3.png")])
@pytest.mark.parametrize("damage", ["empty", "half", "text"])
def test_an_unreadable_image(damage, phase, flags, file, bare):
    if phase == "collect_stats":
        bare.call("squeeze")
    if phase == "train_eval":
        bare.call("recover", "--method random")
        flags += " --method random"
    DAMAGE[damage](bare.root / "beasts" / file)
    tells(bare.mistake(phase, flags), file, "replace or remove")


def test_an_unreadable_distilled_image(relabelled):
    DAMAGE["half"](relabelled.run() / "images/ant/00001.png")
    for phase, flags in ("relabel", "--overwrite"), ("train_eval", ""), ("train_eval", "--labels hard"):
        tells(relabelled.mistake(phase, flags), "ant/00001.png", "replace or remove")


def test_images_that_are_not_there(relabelled):
    for phase, flags in ("relabel", "--tag new"), ("train_eval", "--labels hard --tag new"):
        tells(relabelled.mistake(phase, flags, "--images", relabelled.root / "nowhere"), "nowhere", "<class>/<image>")


# Places that cannot be written

@pytest.mark.parametrize("phase, file", [
    ("squeeze", ""), ("squeeze", "beasts"), ("squeeze", "beasts/teachers"), ("recover", f"beasts/{RUN}"),
    ("relabel", f"beasts/{RUN}/labels"), ("train_eval", f"beasts/{RUN}/eval")])
def test_a_file_where_a_folder_should_be(phase, file, bare):
    for earlier in PHASES[:PHASES.index(phase)]:
        bare.call(earlier)
    path = bare.root / "runs" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    tells(bare.mistake(phase), f"runs/{file}", "--run-dir")


@pytest.mark.skipif(os.access("/", os.W_OK), reason="root may write anywhere")
@pytest.mark.parametrize("phase", PHASES)
def test_a_folder_that_may_not_be_written(phase, bare):
    for earlier in PHASES[:PHASES.index(phase)]:
        bare.call(earlier)
    folders = [folder for folder in (bare.root, *bare.root.rglob("*")) if folder.is_dir()]
    for folder in folders:
        folder.chmod(0o500)
    try:
        tells(bare.mistake(phase), "cannot be written", "--run-dir")
    finally:
        for folder in folders:
            folder.chmod(0o700)


# Pretrained weights

WEIGHTS = "shufflenetv2_x0.5-f707e7126e.pth"                # as torchvision names the file


def test_pretrained_weights_that_are_not_there(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    tells(bare.mistake("squeeze", "--pretrained --backbones shufflenetv2_05"), WEIGHTS, "--download")
    tells(bare.mistake("squeeze", "--pretrained"), "--pretrained", "convnet_w8", "--no-pretrained")


@pytest.mark.parametrize("damage", ["empty", "half", "text", "a tensor", "code", "of other classes"])
def test_pretrained_weights_that_do_not_fit(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path, model = tmp_path / "checkpoints" / WEIGHTS, build_model("shufflenetv2_05", 1000, 224)
    path.parent.mkdir()
    torch.save(build_model("shufflenetv2_05", 7, 224).state_dict(), path)
    DAMAGE.get(damage, str)(path)
    with pytest.raises(SystemExit) as end:
        squeeze.load_pretrained("shufflenetv2_05", model, download=False)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    tells(error, WEIGHTS)
    assert not path.with_name("ran").exists()


# As a process

def test_a_script_ends_with_one_line_and_code_2(bare):
    script = Path(squeeze.__file__).with_name("relabel.py")
    command = [sys.executable, script, *bare.arguments("relabel")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=bare.root)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
    tells(ended.stderr, "convnet_w8.pt is missing", "squeeze.py")
