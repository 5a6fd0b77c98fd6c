"""A mistake of the user's ends in one line that names the flag or file, the value and the remedy, with exit
code 2; nothing is written or destroyed by it (`Project.mistake` sees to all of this but the words)."""
import io
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import collect_stats
import recover
import relabel
import squeeze
import train_eval
from models import build_model
from tests.conftest import FLAGS
from utils import PHASES, distilled, provenance, run
from utils.cli import parse_args
from utils.data import folder_name

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
    ("relabel", "--method random --tag a", ["run: python recover.py --dataset ",
                                            " --ipc 2 --method random --tag a"]),
    ("train_eval", "--holdout --tag a --images its",
     ["run: python relabel.py --dataset ", " --ipc 2 --tag a", " --holdout", " --images its"]),
    ("recover", "--teachers other", ["other/convnet_w8.pt", "squeeze.py", "--teachers other",
                                     "name one of the --teachers that are there: supervised"]),
    ("collect_stats", "--backbones resnet81", ["--backbones resnet81: unknown model", "resnet18 is near"]),
    ("collect_stats", "--backbones resnet18", ["resnet18.pt", "squeeze.py"])])
def test_without_images(phase, flags, words, project):
    tells(project.mistake(phase, flags), *words)


def follow(phase, words, followed):
    """Call a phase, and first the command that its mistake names, as often as there is one."""
    err = io.StringIO()
    with redirect_stderr(err), redirect_stdout(io.StringIO()):
        try:
            return import_module(phase).main(words)
        except SystemExit:
            pass
    script, *flags = shlex.split(err.getvalue().partition("run: python ")[2])
    followed.append(script)
    assert len(followed) < 9
    follow(script.removesuffix(".py"), flags + FLAGS[script.removesuffix(".py")].split(), followed)
    return follow(phase, words, followed)


@pytest.mark.slow
@pytest.mark.parametrize("flags, phases", [
    ("--tag a --holdout --preset best --teachers others",
     ["relabel.py", "squeeze.py", "recover.py", "collect_stats.py"]),
    ("--method random --recipe sre2l", ["relabel.py", "squeeze.py", "recover.py"]),
    ("--method herding --labels online", ["recover.py", "squeeze.py", "squeeze.py"])])
def test_the_remedies_lead_from_nothing_to_a_result(flags, phases, bare):
    followed = []
    follow("train_eval", bare.arguments("train_eval", flags), followed)
    assert followed == phases
    assert len(list(bare.root.glob("runs/*/*/eval/*.json"))) == 1
    bare.call("train_eval", flags)
    assert "already done" in bare.printed


def test_without_statistics(project):
    (project.teachers / "wrn10_1.stats.pt").unlink()
    tells(project.mistake("recover"), "wrn10_1.stats.pt is missing", "collect_stats.py",
          "--backbones wrn10_1")


def test_images_of_an_unfinished_run_are_not_labelled(recovered):
    (recovered.run() / "result.json").unlink()
    tells(recovered.mistake("relabel"), "result.json is missing", "recover.py")


def test_unfinished_work_is_not_called_missing(project, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(recover, "matching_gradient", interrupted)
        project.call("recover", "--overwrite")
    error = project.mistake("relabel")
    tells(error, "result.json is unfinished; run again: python recover.py --ipc 2 ", "--iterations 6")
    assert "--overwrite" not in error                                # it would start anew
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(squeeze, "train", interrupted)
        project.call("squeeze", "--backbones convnet_w4")
    error = project.mistake("collect_stats", "--backbones convnet_w4")
    tells(error, "convnet_w4.pt is unfinished; run again: python squeeze.py ", "--epochs")


def interrupted(*_, **__):
    raise InterruptedError


@pytest.mark.parametrize("phase, flags", [("train_eval", "--labels hard"), ("relabel", "")])
def test_images_made_of_data_that_has_changed(phase, flags, bare):
    run = "--method random --backbones convnet_w8"
    bare.call("recover", run)
    os.replace(bare.dataset / "train/10", bare.root / "aside")
    os.replace(bare.dataset / "train/9", bare.dataset / "train/10")
    os.replace(bare.root / "aside", bare.dataset / "train/9")
    bare.call("squeeze", run)
    tells(bare.mistake(phase, run, flags), "images of --dataset", "have changed since", "result.json")


# Flags

IMPOSSIBLE = {
    PHASES: ["--ipc 0", "--nonsense 1"],
    ("squeeze",): ["--backbones resnet81", "--backbones convnet_w8 wrn10_1 convnet_w8", "--epochs 0",
                   "--epochs 1.5", "--batch-size 0", "--lr -1", "--lr nan",
                   "--lr inf", "--lr fast", "--momentum 1.5", "--weight-decay -1", "--schedule linear",
                   "--crop pad",
                   "--crop padx", "--crop pad²", "--crop pad1000", "--crop random",
                   "--backbones convnet_w10000", "--weight-decay 1e39"],
    ("collect_stats",): ["--batch-size 1", "--patch 0", "--patch 2.5", "--crop pad-4"],
    ("recover",): ["--ipc -1", "--ipc 1.5", "--ipc ten", "--tag ../x", "--tag a/b", "--tag ..",
                   "--teachers a/b", "--method sre3l", "--preset good", "--seed -1", "--workers -1",
                   "--image-size 4", "--device nonsense", "--ipc 10000000", "--image-size 100000",
                   "--dataset nonsense", "--precision fp8", "--checkpoint-minutes -1",
                   "--checkpoint-minutes soon",                      # which all phases have
                   "--alpha 1.1", "--alpha -0.1", "--alpha nan", "--drop-rate 1.1", "--drop-rate some",
                   "--bn-weight -1", "--conv-weight -1", "--dd-weight inf", "--dd-scale max",
                   "--loop fast", "--choice last", "--roll -1", "--roll 1.5", "--iterations 0",
                   "--batch-size 0",
                   "--lr inf", "--groups-per-step 0", "--groups-per-step all", "--statistics fast"],
    ("relabel",): ["--epochs 0", "--batch-size 0", "--whole-up-to -1", "--mix cutup"],
    ("train_eval",): ["--students resnet81", "--students convnet_w8 convnet_w8", "--student-seeds 1 0 1",
                      "--student-seeds -1", "--student-seeds one", "--labels soft",
                      "--loss mse", "--gamma -1", "--temperature 0", "--epochs 0", "--evaluations 0",
                      "--lr -1", "--lr nan", "--lr inf", "--lr fast", "--lr resnet18=0.1", "--lr 0.1 0.2",
                      "--lr 0.1 resnet18=fast", "--lr 0.1 resnet18=-1", "--lr 0.1 resnet81=0.1", "--optimizer adam",
                      "--optimizer swin_t=adamw", "--optimizer sgd swin_t=adam", "--weight-decay -1",
                      "--weight-decay 0 resnet81=0.1",
                      "--protocol fast", "--steps 0", "--orders 0", "--sparsity 1", "--sparsity -0.1",
                      "--l1 -1"],
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


def test_a_name_too_long_for_a_folder(bare):
    tells(bare.mistake("recover", f"--tag {300 * 'x'}"), "--tag", "up to 100 letters")


def test_patches_larger_than_the_images(bare):
    bare.call("squeeze")
    tells(bare.mistake("collect_stats", "--patch 17"), "--patch 17", "16 pixels")


def test_graphs_need_a_gpu(relabelled):
    for phase in "squeeze", "recover", "train_eval":
        tells(relabelled.mistake(phase, "--cuda-graphs --device cpu"), "--cuda-graphs", "needs a GPU",
              "leave it out")


def test_squeeze_takes_a_gpu_for_each_process(bare, monkeypatch):
    monkeypatch.setattr(squeeze, "begin", lambda args: (torch.device("cuda"), None))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    tells(bare.mistake("squeeze"), "--nproc-per-node", "1 GPUs")


def test_a_network_too_deep_for_the_images(bare):
    tells(bare.mistake("squeeze", "--backbones convnet_w8 convnet_w8_d5"), "--backbones convnet_w8_d5",
          "32 pixels")


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
    tells(relabelled.mistake(phase, flags), *words, "--overwrite",
          "--tag" if phase in PHASES[2:] else "--teachers")


# Images, labels and backbones that do not belong together

@pytest.mark.parametrize("phase, flags, made", [
    ("relabel", "--backbones wrn10_1 --overwrite", "gvbsm-ipc2/result.json"),
    ("train_eval", "--backbones wrn10_1", "labels"),
    ("train_eval", "--backbones wrn10_1 convnet_w8 other", "labels"),
    ("train_eval", "--labels online --backbones wrn10_1", "gvbsm-ipc2/result.json")])
def test_another_list_of_backbones(phase, flags, made, relabelled):
    tells(relabelled.mistake(phase, flags), made, "name the same", "convnet_w8")


@pytest.mark.slow
@pytest.mark.parametrize("phase, flags", [("relabel", "--overwrite"), ("relabel", ""),
                                          ("train_eval", "--labels online")])
def test_teachers_trained_anew_since_the_images_were_made(phase, flags, relabelled):
    relabelled.call("squeeze", "--seed 1 --overwrite --backbones wrn10_1")
    tells(relabelled.mistake(phase, flags), "gvbsm-ipc2/result.json was made from other weights (wrn10_1)",
          "--overwrite")


@pytest.mark.slow
def test_a_backbone_trained_anew_since_it_chose_the_images(relabelled):
    relabelled.call("recover", "--method herding")
    relabelled.call("squeeze", "--seed 1 --overwrite --backbones convnet_w8")
    tells(relabelled.mistake("relabel", "--method herding"),
          "herding-ipc2/result.json was made from other weights (convnet_w8)", "--overwrite")


def test_images_of_other_backbones(relabelled):
    relabelled.call("recover", "--tag one --backbones convnet_w8")
    tells(relabelled.mistake("relabel", "--tag one"),
          "was made from weights of convnet_w8, not of convnet_w8 wrn10_1; name the same --backbones")


def test_labels_of_another_precision_tell_how_to_repeat_them(relabelled):
    tells(relabelled.mistake("relabel", "--precision bf16"), "repeat the command with --precision ", "tf32",
          "--tag in all phases from recover.py on")


def test_a_damaged_summary_stops_before_the_work_and_can_be_removed(project):
    for phase, name in ("squeeze", "squeeze.json"), ("collect_stats", "collect_stats.json"):
        (project.teachers / name).write_text("x")
        tells(project.mistake(phase, "--overwrite --backbones wrn10_1"), name, "remove it")
        (project.teachers / name).unlink()
        project.call(phase, "--overwrite --backbones wrn10_1")


def test_a_recovery_from_teachers_or_statistics_made_anew_is_not_repeated(relabelled):
    relabelled.call("collect_stats", "--seed 1 --overwrite")
    tells(relabelled.mistake("recover"), "result.json was made from other statistics (convnet_w8 wrn10_1)",
          "--overwrite")


@pytest.mark.parametrize("phase, flags", [
    ("relabel", "--overwrite"), ("train_eval", ""), ("train_eval", "--labels hard"),
    ("train_eval", "--labels online")])
def test_other_images_than_were_recovered(phase, flags, relabelled):
    CHANGES["pixels"](relabelled.run() / "images")
    tells(relabelled.mistake(phase, flags), "images holds other images than recover.py wrote",
          "recover.py --overwrite")


@pytest.mark.parametrize("phase, flags", [
    ("relabel", "--overwrite"), ("train_eval", "--labels hard"), ("train_eval", "--labels online")])
def test_images_recovered_for_another_order_of_the_classes(phase, flags, relabelled):
    path = relabelled.run() / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"classes": result["classes"][::-1]}))
    tells(relabelled.mistake(phase, flags), "class 'bee' stands where '10' does", "same data set")


def test_distilled_images_of_unknown_origin(relabelled):
    (relabelled.run() / "result.json").unlink()
    tells(relabelled.mistake("recover"), ".png has no metadata that says how it was made", "--overwrite")
    relabelled.call("recover", "--overwrite")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty", "half", "text"])
def test_damaged_unfinished_work(damage, project, monkeypatch):
    gradient = recover.matching_gradient
    monkeypatch.setattr(recover, "matching_gradient",
                        lambda *args: (os.kill(os.getpid(), signal.SIGTERM), gradient(*args))[1])
    with pytest.raises(SystemExit):
        recover.main(project.arguments("recover"))
    monkeypatch.undo()
    folder = project.run() / ".result.json.unfinished"
    for file in "batch0.pt", "begun.json":
        whole = (folder / file).read_bytes()
        DAMAGE[damage](folder / file)
        with pytest.raises(SystemExit) as end:  # the lock and the log are written meanwhile
            recover.main(project.arguments("recover"))
        assert end.value.code == 2
        (folder / file).write_bytes(whole)
    project.call("recover")


# Numbers that are not finite

@pytest.mark.parametrize("phase, flags, words", [
    ("squeeze", "--lr 1e30 --overwrite", ["convnet_w8", "the loss is not finite in step 2", "--lr"]),
    ("recover", "--conv-weight 1e30 --first-multiplier 1e30 --backbones wrn10_1 --tag x",
     ["conv is not finite in iteration 0, backbone wrn10_1"]),
    ("squeeze", "--lr 1e30 --weight-decay 1e30 --epochs 1 --batch-size 48 --overwrite",
     ["squeeze convnet_w8: ", ".weight is not finite after the last step", "--lr"]),
    ("train_eval", "--lr 1e30 --optimizer sgd", ["convnet_w8 seed 0", "the loss is not finite in step 2",
                                                 "--lr"])])
def test_numbers_that_go_wrong(phase, flags, words, relabelled, capsys):
    with pytest.raises(SystemExit) as end:
        import_module(phase).main(relabelled.arguments(phase, flags))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    tells(line, *words)


def test_the_last_good_state_stays_when_a_pixel_goes_wrong(project, monkeypatch, capsys):
    gradient, calls = recover.matching_gradient, []

    def broken(*args):
        calls.append(1)
        pixels, *rest = gradient(*args)
        return (pixels * float("nan") if len(calls) == 4 else pixels, *rest)

    monkeypatch.setattr(recover, "matching_gradient", broken)
    with pytest.raises(SystemExit) as end:
        recover.main(project.arguments("recover", "--checkpoint-minutes 0 --iterations 400"))
    assert end.value.code == 2
    tells(capsys.readouterr().err, "pixel is not finite in iteration 3, backbone ", "batches [0]")
    kept = torch.load(project.run() / ".result.json.unfinished/batch0.pt", weights_only=True)["state"]
    assert kept["iterations"] == 3 and kept["pixels"].isfinite().all()


def test_labels_that_are_not_finite(relabelled, capsys):
    path = relabelled.teachers / "wrn10_1.pt"
    weights = torch.load(path, weights_only=True)["weights"]
    edit(path, weights={key: value * (1e30 if key.startswith("fc") else 1) for key, value in weights.items()})
    with pytest.raises(SystemExit) as end:
        relabel.main(relabelled.arguments("relabel", "--tag x", "--images", relabelled.run() / "images"))
    assert end.value.code == 2
    tells(capsys.readouterr().err, "the logits of wrn10_1 are not finite in float16 in epoch 0", "squeeze.py")


def test_statistics_that_are_not_finite(bare, capsys):
    bare.call("squeeze")
    path = bare.teachers / "wrn10_1.pt"
    weights = torch.load(path, weights_only=True)["weights"]
    edit(path, weights={key: value * (float("nan") if "running" in key else 1) for key,
                        value in weights.items()})
    with pytest.raises(SystemExit) as end:
        collect_stats.main(bare.arguments("collect_stats"))
    assert end.value.code == 2 and not path.with_name("wrn10_1.stats.pt").exists()
    tells(capsys.readouterr().err, "wrn10_1.stats.pt", "not finite", "train the backbone again")


def test_a_teacher_whose_logits_rule_the_labels_is_named(relabelled, capsys):
    def rms(tag):
        return relabelled.call("relabel", f"--overwrite --tag {tag} --images",
                               relabelled.run() / "images")["teacher_logit_rms"]

    before, quiet = rms("before"), capsys.readouterr().err
    weights = torch.load(relabelled.teachers / "wrn10_1.pt", weights_only=True)["weights"]
    edit(relabelled.teachers / "wrn10_1.pt", weights=weights
         | {key: 1000 * weights[key] for key in ("fc.weight", "fc.bias")})
    after, warned = rms("after"), capsys.readouterr().err
    assert "warning" not in quiet and after["convnet_w8"] == before["convnet_w8"]
    assert after["wrn10_1"] == pytest.approx(1000 * before["wrn10_1"], rel=1e-4)
    tells(warned, "warning: the logits of wrn10_1", f"of size {after['wrn10_1']:.3g}", "--schedule")


def test_a_teacher_that_knows_nothing_is_named(project, capsys):
    recover.main(project.arguments("recover"))
    before = capsys.readouterr().err
    for name, top1 in ("convnet_w8", 25.0), ("wrn10_1", 90.0):
        edit(project.teachers / f"{name}.pt", top1=top1)
        edit(project.teachers / f"{name}.stats.pt",
             checkpoint=provenance.fingerprint(project.teachers / f"{name}.pt"))
    recover.main(project.arguments("recover", "--tag weak"))
    warned = capsys.readouterr().err
    assert warned.count("warning: convnet_w8 is right on 25.0 % of ") == 1
    tells(warned, "test images, which a guess (25.0 %) may reach too")
    assert "wrn10_1" not in warned and before.count("\n") <= 2


def test_a_teacher_that_learned_nothing_is_told_where_it_is_trained(project, capsys, monkeypatch):
    monkeypatch.setattr(squeeze, "split_accuracy", lambda *_, **__: (25.0, []))
    squeeze.main(project.arguments("squeeze", "--teachers weak --backbones convnet_w8 --epochs 1"))
    tells(capsys.readouterr().err, "warning: convnet_w8 is right on", "which a guess (25.0 %) may reach",
          "squeeze.py", "--epochs")


# Names that could lead elsewhere

CLASSES = ["../x", "/etc", "a/b", "bee"]


def test_class_names_cannot_lead_out_of_the_run(project, tmp_path):
    for name in "convnet_w8", "wrn10_1":
        path = project.teachers / f"{name}.pt"
        edit(path, data=torch.load(path, weights_only=True)["data"] | {"classes": CLASSES})
        edit(path.with_name(f"{name}.stats.pt"), checkpoint=provenance.fingerprint(path), classes=CLASSES)
    before = project.files()
    project.call("recover")
    project.call("relabel")
    new = [name for name in project.files().keys() - before.keys()]
    assert all(name.startswith("runs/beasts/gvbsm-ipc2") for name in new)
    assert sorted(path.name for path in (project.run() / "images").iterdir()) == ["%2E.%2Fx", "%2Fetc",
                                                                                  "a%2Fb", "bee"]
    assert json.loads((project.run() / "labels/result.json").read_text())["classes"] == CLASSES
    flags = "--backbones convnet_w8 wrn10_1 --epochs 1".split()
    args = parse_args(train_eval.get_parser(), "train_eval", flags)
    paths = SimpleNamespace(run=project.run(), labels=project.run() / "labels",
                            images=project.run() / "images")
    sources = distilled.load_sources(args, paths, torch.device("cpu"))
    expected = sources.hashes[args.students[0]]["images"]
    _, classes = distilled.load_images(args, paths.images, sources.data, expected, paths.labels)
    assert classes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name, folder", [
    ("ant", "ant"), ("Egyptian cat", "Egyptian cat"), ("été", "été"), ("..", "%2E."), (".", "%2E"), ("", "%"),
    ("a/b", "a%2Fb"), ("../x", "%2E.%2Fx"), ("x\0", "x%00"), ("c:", "c:"), ("50%", "50%")])
def test_folder_names_are_safe_and_plain_ones_stay(name, folder):
    assert folder_name(name) == folder


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


@pytest.mark.slow
@pytest.mark.parametrize("phase, flags, remedy", [
    ("squeeze", [], "--overwrite"), ("collect_stats", [], "squeeze.py"),
    ("recover", ["--tag new"], "squeeze.py"),
    ("relabel", ["--overwrite"], "squeeze.py"), ("train_eval", ["--labels online"], "squeeze.py")])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint(damage, phase, flags, remedy, relabelled):
    DAMAGE[damage](relabelled.teachers / "wrn10_1.pt")
    tells(relabelled.mistake(phase, *flags), "wrn10_1.pt", remedy)
    assert not (relabelled.teachers / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["collect_stats", "recover"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_statistics(damage, phase, project):
    DAMAGE[damage](project.teachers / "wrn10_1.stats.pt")
    tells(project.mistake(phase), "wrn10_1.stats.pt",
          "--overwrite" if phase == "collect_stats" else "collect_stats.py")
    assert not (project.teachers / "ran").exists()


@pytest.mark.parametrize("phase, flags", [("collect_stats", ""), ("recover", "--tag new"),
                                          ("relabel", "--overwrite")])
def test_weights_of_another_architecture(phase, flags, relabelled):
    edit(relabelled.teachers / "convnet_w8.pt", weights=build_model("convnet_w16", 4, 16).state_dict())
    line = relabelled.mistake(phase, flags)
    tells(line, "convnet_w8.pt does not hold weights of convnet_w8", "squeeze.py --overwrite")


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["collect_stats", "recover", "relabel"])
@pytest.mark.parametrize("change, key", [
    ({"classes": ["10", "9", "ant", "cow"]}, "classes"), ({"classes": ["9", "10", "ant", "bee"]}, "classes"),
    ({"mean": [0.5, 0.5, 0.5]}, "mean")])
def test_teachers_of_different_data(change, key, phase, project):
    path = project.teachers / "wrn10_1.pt"
    edit(path, data=torch.load(path, weights_only=True)["data"] | change)
    tells(project.mistake(phase), "wrn10_1.pt", "convnet_w8.pt", key, "squeeze.py --overwrite")


@pytest.mark.parametrize("phase, flags", [
    ("relabel", "--overwrite"), ("train_eval", ""), ("train_eval", "--labels hard"),
    ("train_eval", "--labels online")])
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
    tells(relabelled.mistake("train_eval"), "other images than recover.py wrote", "recover.py --overwrite")


@pytest.mark.slow
@pytest.mark.parametrize("phase, remade, words", [
    ("relabel", "recover", ["labels", "other images"]),
    ("train_eval", "relabel", ["convnet_w8.json", "other labels"])])
def test_a_result_of_images_or_labels_that_have_been_made_anew_is_not_repeated(phase, remade, words,
                                                                               relabelled):
    relabelled.call("train_eval")
    relabelled.call(remade, "--seed 1 --overwrite")
    tells(relabelled.mistake(phase), *words, "--overwrite")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logits", "crop", "flip", "partner", "box", "ratio"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "text", "bare code"])
def test_damaged_labels(damage, name, relabelled):
    path = relabelled.run() / "labels" / f"{name}.npy"
    DAMAGE.get(damage, Path.unlink)(path)
    tells(relabelled.mistake("train_eval"), "labels", "relabel.py --overwrite")
    assert not path.with_name("ran").exists()


JSON_DAMAGE = {kind: DAMAGE[kind] for kind in ("empty", "half", "an image")} | {
    "a list": lambda path: path.write_text("[]"), "an empty dict": lambda path: path.write_text("{}")}


@pytest.mark.slow
@pytest.mark.parametrize("phase, file, remedy", [
    ("recover", "result.json", "--overwrite"), ("relabel", "labels/result.json", "--overwrite"),
    ("train_eval", "labels/result.json", "relabel.py"),
    ("train_eval", "eval/convnet_w8-hard.json", "--overwrite")])
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
    tells(bare.mistake("collect_stats"), "--dataset", "changed", "supervised", "squeeze.py", "--overwrite")


@pytest.mark.slow
@pytest.mark.parametrize("phase, flags, file", [
    ("squeeze", "", "train/ant/7.png"), ("squeeze", "", "test/ant/3.png"),
    ("collect_stats", "", "train/ant/7.png"),
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
        tells(relabelled.mistake(phase, flags, "--images", relabelled.root / "nowhere"), "nowhere",
              "<class>/<image>")


def test_a_single_class(bare):
    for split in "train", "test":
        for name in "10", "9", "ant":
            shutil.rmtree(bare.root / "beasts" / split / name)
    for phase, flags in ("squeeze", ""), ("recover", "--method random"):
        tells(bare.mistake(phase, flags), "only one class, bee", "add another")
    for split in "train", "test":
        (bare.root / "beasts" / split).rename(bare.root / "bee")
        (bare.root / "beasts" / split).mkdir()
        (bare.root / "bee").rename(bare.root / "beasts" / split / "images")
    tells(bare.mistake("squeeze"), "only one class, images", "such as bee, one level up")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_class(split, bare):
    for file in (bare.root / "beasts" / split / "ant").iterdir():
        file.unlink()
    error = bare.mistake("squeeze")
    tells(error, split, "ant holds no image", "fill or remove it\n")
    (bare.root / "beasts" / split / "ant" / "0.heif").write_text("")
    tells(bare.mistake("squeeze"), "1 other files such as", "ant/0.heif", "convert or rename them to .png")


def test_a_folder_one_level_too_deep_and_a_test_folder_of_another_name(bare):
    data = bare.root / "beasts"
    tells(bare.mistake("squeeze", "--dataset", data / "train"), "name the folder above", data)
    for name in "9", "ant":
        shutil.rmtree(data / "test" / name)
    tells(bare.mistake("squeeze"), "beasts/test lacks class 9 and 1 more of train: add or remove")
    (data / "test").rename(data / "valid")
    tells(bare.mistake("squeeze"), "neither val/ nor test/: rename valid to val", "--holdout")


def test_selections_need_as_many_images_as_ipc_asks_for(bare):
    tells(bare.mistake("squeeze", "--method herding --ipc 99"), "--ipc 99 is more than the", "use at most")


@pytest.mark.slow
def test_a_damaged_streamed_test_image_is_told_before_the_training(bare, capsys):
    file = bare.root / "beasts/test/ant/3.png"
    content = file.read_bytes()
    file.write_bytes(content[:60] + bytes(40) + content[100:])       # its end is whole
    with pytest.raises(SystemExit):
        squeeze.main(bare.arguments("squeeze", "--image-size 65 --crop resized"))
    printed, error = capsys.readouterr()
    assert "replace or remove" in error and "epoch" not in printed


def test_a_network_of_nearly_that_name(bare):
    tells(bare.mistake("squeeze", "--backbones resnet19"), "unknown model 'resnet19', resnet18 is near")


def test_an_image_of_too_many_pixels(bare, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 127)  # the images have 256
    tells(bare.mistake("squeeze", "--image-size 16"), "train/10/0.png", "bomb", "replace or remove")


# Places that cannot be written

@pytest.mark.slow
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


@pytest.mark.parametrize("phase", PHASES)
def test_what_the_system_refuses_is_told_in_one_line(phase, bare, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [phase, *bare.arguments(phase, "--run-dir", 300 * "x")])
    with pytest.raises(SystemExit) as end:
        run.script(import_module(phase).main)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 300 * "x" in error and "File name too long" in error


@pytest.mark.slow
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


def test_pretrained_weights_of_other_classes_are_told_before_they_are_fetched(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for flags in "", " --download":
        error = bare.mistake("squeeze", f"--pretrained --backbones shufflenetv2_05{flags}")
        tells(error, "of 1000 classes, the data has 4", "--no-pretrained")
    tells(bare.mistake("squeeze", "--pretrained"), "--pretrained", "convnet_w8", "--no-pretrained")


@pytest.mark.parametrize("damage", ["empty", "half", "text", "a tensor", "code", "of other classes",
                                    "missing"])
def test_pretrained_weights_that_do_not_fit(damage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path, model = tmp_path / "checkpoints" / WEIGHTS, build_model("shufflenetv2_05", 1000, 224)
    path.parent.mkdir()
    torch.save(build_model("shufflenetv2_05", 7, 224).state_dict(), path)
    {**DAMAGE, "missing": Path.unlink}.get(damage, str)(path)
    with pytest.raises(SystemExit) as end:
        squeeze.load_pretrained("shufflenetv2_05", model, download=False)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    tells(error, WEIGHTS, "--download")
    assert not path.with_name("ran").exists()


# As a process

@pytest.mark.slow
def test_a_script_ends_with_one_line_and_code_2(bare):
    script = Path(squeeze.__file__).with_name("relabel.py")
    command = [sys.executable, script, *bare.arguments("relabel")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=bare.root)
    assert ended.returncode == 2 and ended.stdout.count("\n") == ended.stderr.count("\n") == 1
    tells(ended.stderr, "convnet_w8.pt is missing", "squeeze.py")
