"""The presets are the tables of the paper, every setting has a flag and every flag a reader."""
import argparse
import itertools
import os
import re
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

import train_eval
from utils import PHASES, cli
from utils.presets import BEST, METHODS, PRESETS, preset_values

ROOT = Path(__file__).resolve().parents[1]
DATASETS = "cifar10", "cifar100", "tiny", "imagenet"
SMALL = "resnet18 convnet_w128 mobilenetv2_05 wrn16_2 shufflenetv2_05".split()
LARGE = "resnet18 mobilenetv2 efficientnet_b0 shufflenetv2_05".split()
RESNETS = "resnet18 resnet50 resnet101".split()
BY_ADAMW = "swin_t=adamw deit_tiny=adamw squeezenet=adamw".split()           # ours
SLOWLY = "swin_t=0.001 deit_tiny=0.001 squeezenet=0.001".split()
DECAYED = "swin_t=0.01 deit_tiny=0.01 squeezenet=0.01".split()

# arXiv:2311.17950, Tables 7-9 and Appendix A, and where they are silent the release; a row: cifar10,
# cifar100, tiny, imagenet. "-": the phase is skipped there, ImageNet's backbones come trained.
PAPER = {
    "squeeze backbones":           (SMALL, SMALL, SMALL, LARGE),
    "squeeze pretrained":          (False, False, False, True),
    "squeeze lr":                  (0.05, 0.05, 0.1, "-"),
    "squeeze momentum":            (0.9, 0.9, 0.9, "-"),
    "squeeze batch_size":          (64, 64, 128, "-"),
    "squeeze epochs":              (5, 50, 50, "-"),
    "squeeze schedule":            ("constant", "constant", "cosine", "-"),
    "squeeze weight_decay":        (0.0, 0.0, 0.0, "-"),
    "squeeze crop":                ("pad4", "pad4", "pad8", "-"),
    "collect_stats backbones":     (SMALL, SMALL, SMALL, LARGE),
    "collect_stats crop":          ("pad4", "pad4", "pad8", "resized"),
    "recover backbones":           (SMALL, SMALL, SMALL, LARGE),
    "recover lr":                  (0.05, 0.05, 0.05, 0.1),
    "recover iterations":          (4000, 4000, 4000, 4000),
    "recover batch_size":          (50, 50, 50, 40),
    "recover crop":                ("resized", "resized", "resized", "resized"),
    "recover flip":                (False, False, False, False),
    "recover dd_on":               ("pixels", "pixels", "pixels", "pixels"),
    "recover roll":                (0, 0, 0, 0),
    "recover alpha":               (0.8, 0.8, 0.8, 0.4),
    "recover drop_rate":           (0.4, 0.4, 0.4, 0.4),
    "recover choice":              ("uniform", "uniform", "uniform", "uniform"),
    "recover loop":                ("reorder", "reorder", "reorder", "reorder"),
    "recover bn_weight":           (0.01, 0.01, 0.01, 0.01),
    "recover conv_weight":         (0.01, 0.01, 0.01, 0.01),
    "recover dd_weight":           (1, 1, 1, 1),
    "recover first_multiplier":    (10, 10, 10, 10),
    "relabel backbones":           (SMALL, SMALL, SMALL, LARGE),
    "relabel epochs":              (1000, 1000, 100, 300),
    "relabel batch_size":          (64, 64, 128, 1024),
    "relabel whole_up_to":         (100, 100, 0, 0),
    "relabel mix":                 ("cutmix", "cutmix", "cutmix", "cutmix"),
    "relabel logit_norm":          (True, True, True, True),
    "train_eval epochs":           (1000, 1000, 100, 300),
    "train_eval batch_size":       (64, 64, 128, 1024),
    "train_eval whole_up_to":      (100, 100, 0, 0),
    "train_eval optimizer":        (["adamw"], ["sgd", *BY_ADAMW], ["sgd", *BY_ADAMW], ["adamw"]),
    "train_eval lr":               (["0.001"], ["0.1", *SLOWLY], ["0.1", "resnet18=0.2", *SLOWLY], ["0.001"]),
    "train_eval momentum":         (0.9, 0.9, 0.9, 0.9),
    "train_eval weight_decay":     (["0.0"], ["0.0005", *DECAYED], ["0.0005", *DECAYED], ["0.01"]),
    "train_eval schedule":         ("cosine", "cosine", "cosine", "cosine"),
    "train_eval loss":             ("mse_gt", "mse_gt", "mse_gt", "mse_gt"),
    "train_eval gamma":            (0.15, 0.15, 0.1, 0.1),
    "train_eval students":         (["convnet_w128", "resnet18"], ["convnet_w128", "resnet18"], RESNETS,
                                    [*RESNETS, "mobilenetv2", "swin_t", "deit_tiny"]),
}
RELEASE = {  # the rows where it differs
    "recover batch_size":          (100, 100, 100, 80),
    "recover crop":                ("pad4", "pad4", "pad8", "resized"),
    "recover flip":                (True, True, True, True),
    "recover dd_on":               ("view", "view", "view", "view"),
    "recover roll":                (32, 32, 32, 32),
    "recover choice":              ("cycle", "cycle", "cycle", "cycle"),
    "recover drop_rate":           (0.4, 0.4, 0.4, 0.0),
    "relabel batch_size":          (100, 64, 100, 1024),
    "relabel whole_up_to":         (0, 0, 0, 0),
    "relabel logit_norm":          (False, False, False, True),
    "train_eval batch_size":       (100, 64, 100, 1024),
    "train_eval whole_up_to":      (0, 0, 0, 0),
    "train_eval lr":               (["0.001"], ["0.1", *SLOWLY], ["0.1", *SLOWLY], ["0.001"]),
}


def actions(phase):
    return {action.dest: action for action in import_module(phase).get_parser()._actions if action.dest
            != "help"}


def parsed(phase, monkeypatch, *argv):
    """The arguments that main(argv) would run with, whatever squeeze.py has chosen in ./runs."""
    module, seen = import_module(phase), []

    def stop(args):
        seen.append(args)
        raise InterruptedError

    monkeypatch.setattr(module, "begin", stop)
    with pytest.raises(InterruptedError):
        module.main(["--device", "cpu", "--run-dir", os.devnull, *argv])
    return seen[0]


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("preset", ["paper", "release"])
def test_what_runs_are_the_settings_of_the_paper_or_of_the_release(preset, dataset, monkeypatch):
    table = PAPER | RELEASE if preset == "release" else PAPER
    for phase in PHASES:
        args = vars(parsed(phase, monkeypatch, "--dataset", dataset, "--preset", preset, "--ipc", "50"))
        column = {row: values[DATASETS.index(dataset)] for row, values in table.items()}
        rows = {row.split()[1]: value for row, value in column.items() if row.split()[0] == phase and value
                != "-"}
        assert {flag: args[flag] for flag in rows} == rows


def test_teachers_that_are_typed_count_and_are_named_to_the_next_phase_though_the_parser_would_take_them(
        monkeypatch):
    best = "--dataset", "cifar10", "--preset", "best"
    for words, teachers, named in ((), "annealed", False), (("--teachers", "supervised"), "supervised", True):
        args = parsed("relabel", monkeypatch, *best, *words)
        assert args.teachers == teachers and ("--teachers supervised" in cli.call("train_eval.py", args)) == named


@pytest.mark.parametrize("phase", PHASES)
def test_a_preset_sets_nothing_that_is_not_in_the_tables(phase):
    known = {row.split()[1] for row in PAPER if row.split()[0] == phase}
    known |= {"squeeze": {"score_trials", "score_epochs", "score_lr", "score_batch_size", "probe_lr",
                          # see below
                          "probe_epochs", "probe_weight_decay"}, "collect_stats": {"batch_size"},
              "train_eval": {"mix", "backbones"}}.get(phase, set())
    for preset in PRESETS:
        for dataset in DATASETS:
            chosen = {flag for (place, flag), row in BEST.items()
                      if place in ("*", phase) and preset == "best"
                      and row[DATASETS.index(dataset)] is not None}
            assert preset_values(preset, dataset, phase).keys() == known | chosen


@pytest.mark.parametrize("dataset", DATASETS)
def test_statistics_and_samples_are_made_as_in_the_phase_before(dataset):
    for preset in PRESETS:
        values = {phase: preset_values(preset, dataset, phase) for phase in PHASES}
        for flag in "batch_size", "crop":
            assert values["collect_stats"][flag] == values["squeeze"][flag]
        for flag in ("batch_size", "whole_up_to") * (preset != "best") + ("mix", "epochs", "backbones"):
            assert values["train_eval"][flag] == values["relabel"][flag]


@pytest.mark.parametrize("method", METHODS)
def test_transformers_and_the_squeezenet_get_adamw_wherever_others_get_sgd(method):
    for preset, dataset in itertools.product(PRESETS, (*DATASETS, "shapes")):
        values = preset_values(preset, dataset, "train_eval", 10, method)
        args = argparse.Namespace(**values)
        for name in "swin_t", "deit_tiny", "squeezenet":
            own = train_eval.for_student(args, name)
            assert own.optimizer == "adamw" and float(own.lr[0]) <= 0.005 and own.students == [name]
            if train_eval.for_student(args, "resnet18").optimizer == "sgd":
                assert (own.lr, own.weight_decay) == (["0.001"], 0.01)
    tiny = argparse.Namespace(**preset_values("paper", "tiny", "train_eval"))
    owns = [train_eval.for_student(tiny, name) for name in ("resnet18", "resnet50")]
    assert [(own.optimizer, own.lr, own.weight_decay) for own in owns] == [("sgd", ["0.2"], 5e-4),
                                                                           ("sgd", ["0.1"], 5e-4)]


def test_nothing_is_dropped_on_imagenet_at_ipc_10_alone():
    rates = {(dataset, ipc): preset_values("paper", dataset, "recover", ipc)["drop_rate"]
             for dataset in DATASETS for ipc in (1, 10, 50)}
    assert {key for key, rate in rates.items() if rate
            == 0} == {("imagenet", 10)} and set(rates.values()) == {0, 0.4}


def test_best_is_paper_but_for_what_cifar10_showed_shared_but_for_teachers_and_iterations_of_shapes():
    for dataset, column in zip((*DATASETS, "shapes"), zip(*BEST.values())):
        changed = {(phase, flag) for phase in PHASES for ipc in (1, 10, 50)
                   for flag, value in preset_values("best", dataset, phase, ipc).items()
                   if value != preset_values("paper", dataset, phase, ipc).get(flag)}
        at_fifty = {("squeeze", "epochs"), ("collect_stats", "class_statistics"),
                    ("recover", "class_statistics")}
        assert changed == {(phase, flag) for (place, flag), value in zip(BEST, column) if value is not None
                           for phase in PHASES if place in ("*", phase)} | (at_fifty if dataset == "cifar10"
                                                                            else set())
    teachers = {("*", "teachers"), ("squeeze", "schedule")}
    precision = {place for place in BEST if place[1] == "precision"}
    batches = {place for place in BEST if place[1] in ("batch_size", "whole_up_to")}  # of shapes in `paper` too
    assert all(row[2] is row[3] is None for place, row in BEST.items() if place not in precision)
    assert [place for place, row in BEST.items() if place not in teachers | precision | batches
            and row[0] != row[4]] == [("recover", "iterations")]
    for phase, flag in batches:
        assert BEST[phase, flag][0] == preset_values("paper", "shapes", phase)[flag]
        assert BEST[phase, flag][4] is None
    assert all(row[:5] == (*["auto"] * 4, None) for place, row in BEST.items() if place in precision)
    assert all(row[0] and not any(row[1:5]) for place, row in BEST.items() if place in teachers)
    for phase in "recover", "relabel", "train_eval":
        assert preset_values("best", "cifar10", phase) == preset_values("best", "cifar100",
                                                                        phase) | {"teachers": "annealed"}


def test_best_has_stronger_teachers_and_class_statistics_at_fifty_images_a_class_of_cifar10_alone():
    changed = {(dataset, phase, flag, value) for dataset in (*DATASETS, "shapes") for phase in PHASES
               for flag, value in preset_values("best", dataset, phase, 50).items()
               if not isinstance(value, list)
               and value != preset_values("best", dataset, phase, 10).get(flag)}
    assert changed - {("imagenet", "recover", "drop_rate", 0.4)} == {
        *(("cifar10", phase, "teachers", "annealed20") for phase in PHASES),
        ("cifar10", "squeeze", "epochs", 20),
        ("cifar10", "collect_stats", "class_statistics", True),
        ("cifar10", "recover", "class_statistics", True)}


def typed(flag, value):
    """The words of a command line that give a flag a value."""
    word = f"--{flag.replace('_', '-')}"
    if isinstance(value, bool):
        return [word if value else word.replace("--", "--no-")]
    return [word, *map(str, value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("phase", PHASES)
def test_every_value_of_every_preset_has_a_flag_that_accepts_it(phase, monkeypatch):
    for preset, dataset, method in itertools.product(PRESETS, (*DATASETS, "shapes"), METHODS):
        values = preset_values(preset, dataset, phase, 10, method)
        assert values.keys() <= actions(phase).keys()
        told = vars(parsed(phase, monkeypatch, *itertools.chain(*itertools.starmap(typed, values.items()))))
        silent = vars(parsed(phase, monkeypatch, "--dataset", dataset, "--preset", preset, "--method",
                             method))
        assert all(told[flag] == silent[flag] == value for flag, value in values.items())


@pytest.mark.parametrize("phase", PHASES)
def test_every_flag_has_a_reader(phase):
    rooms = ("run", "checkpoint", "cli", "teachers", "protocols", "recorder", "labels", "distilled", "pool",
             "moco", "scores", "adopt", "selection")
    files = [f"{phase}.py", *(f"utils/{room}.py" for room in rooms)]
    source = "".join((ROOT / file).read_text() for file in files)
    shared = re.findall(r"known\.(\w+)", (ROOT / "utils/cli.py").read_text())
    read = set(re.findall(r"\bargs\.(\w+)", source)) | set(shared)
    assert actions(phase).keys() <= read


@pytest.mark.parametrize("phase", PHASES)
def test_every_flag_is_explained(phase):
    assert all(action.help and len(action.help) > 5 for action in actions(phase).values())


@pytest.mark.parametrize("phase", PHASES)
def test_help_shows_what_would_run_and_needs_neither_data_nor_a_network(phase, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    texts = []
    for argv in ["--help"], ["--dataset", "tiny", "--help"], ["-h", "--dataset", "imagenet", "--preset",
                                                              "release"]:
        with pytest.raises(SystemExit) as end:
            import_module(phase).main(argv)
        texts.append(capsys.readouterr().out)
        assert end.value.code == 0 and f"python {phase}.py --dataset" in texts[-1]
    for text, preset, dataset in zip(texts, ("paper", "paper", "release"), ("shapes", "tiny", "imagenet"),
                                     strict=True):
        for flag, value in preset_values(preset, dataset, phase, 10).items():
            entry = re.search(rf"\n  --(\[no-\])?{flag.replace('_', '-')}\b(.|\n(?!  --))*", text)[0]
            shown = {True: "on", False: "off"}[value] if isinstance(value, bool) else (
                " ".join(value) if isinstance(value, list) else value)
            assert f"({shown})" in " ".join(entry.split())
        assert len(text.splitlines()) < 170
        assert text.index("--dataset NAME") < text.index("run:") < text.index("method:")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("phase, flag, words, value", [
    ("squeeze", "epochs", "--epochs 7", 7), ("squeeze", "pretrained", "--no-pretrained", False),
    ("collect_stats", "crop", "--crop none", "none"), ("recover", "drop_rate", "--drop-rate 0.2", 0.2),
    ("recover", "flip", "--flip", True), ("relabel", "logit_norm", "--no-logit-norm", False),
    ("train_eval", "lr", "--lr 3", ["3"]), ("train_eval", "backbones", "--backbones vgg11_bn", ["vgg11_bn"])])
def test_the_command_line_beats_the_preset(phase, flag, words, value, monkeypatch):
    preset = parsed(phase, monkeypatch, "--dataset", "imagenet", "--ipc", "10")
    told = parsed(phase, monkeypatch, "--dataset", "imagenet", "--ipc", "10", *words.split())
    assert getattr(told, flag) == value != getattr(preset, flag)
    assert {key for key, old in vars(preset).items() if vars(told)[key] != old} - {"given", "typed",
                                                                                   "data_set"} == {flag}


@pytest.mark.parametrize("sizes, flags, column", [
    ([(16, 16)], "", "cifar10"), ([(64, 64)], "", "cifar10"), ([(65, 65)], "", "cifar10"),
    ([(97, 97)], "", "imagenet"),
    ([(32, 16), (20, 20)], "", "cifar10"), ([(200, 100)], "--image-size 32", "cifar10"),
    ([(16, 16)], "--image-size 96", "imagenet")])
@pytest.mark.parametrize("classes", [2, 21])
def test_a_folder_takes_the_settings_of_its_size_and_number_of_classes(classes, sizes, flags, column,
                                                                       tmp_path, monkeypatch):
    for split, name in itertools.product(("train", "val"), map(str, range(classes))):
        (tmp_path / split / name).mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.new("RGB", size).save(tmp_path / split / name / f"{number}.png")
    for phase in PHASES:
        args = vars(parsed(phase, monkeypatch, "--dataset", str(tmp_path), *flags.split()))
        if column != "imagenet" and classes > 20:
            column = "cifar100" if args["image_size"] <= 32 else "tiny"
        expected = preset_values("paper", column, phase, 10,
                                 own=(classes * len(sizes), classes) if column != "imagenet" else None)
        if phase == "squeeze":
            expected["pretrained"] = False  # torchvision's weights are of ImageNet's classes
        assert {flag: args[flag] for flag in expected} == expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("column", ["cifar10", "cifar100", "tiny"])
def test_no_student_of_a_folder_of_ones_own_trains_by_sgd(preset, column):
    values = preset_values(preset, column, "train_eval", own=(40, 2))
    assert (values["optimizer"], values["lr"]) == (["adamw"], ["0.001"])


@pytest.mark.parametrize("preset", ["paper", "release"])
@pytest.mark.parametrize("phase, train, classes, epochs", [
    ("squeeze", 20, 2, 200), ("squeeze", 320, 20, 40), ("squeeze", 640, 40, 40), ("squeeze", 10 ** 5, 20, 5),
    *((phase, 10 ** 4, classes, epochs) for phase in ("relabel", "train_eval")
      for classes, epochs in ((3, 1000), (16, 500), (300, 200)))])
def test_epochs_on_a_folder_go_by_the_number_of_images(preset, phase, train, classes, epochs):
    assert preset_values(preset, "cifar10", phase, 2, own=(train, classes))["epochs"] == epochs


@pytest.mark.parametrize("column, phase, train, classes, ipc, expected", [
    ("cifar10", "squeeze", 4500, 10, 10, (30, 64)), ("cifar100", "squeeze", 100, 30, 1, (200, 64)),
    ("cifar10", "squeeze", 45000, 10, 1, (5, 64)), ("tiny", "squeeze", 4500, 30, 1, (5, 32)),
    ("cifar10", "train_eval", 4500, 10, 10, (300, 25)), ("cifar10", "train_eval", 4500, 10, 50, (200, 25))])
def test_best_trains_longer_on_a_folder(column, phase, train, classes, ipc, expected):
    values = preset_values("best", column, phase, ipc, own=(train, classes))
    assert (values["epochs"], values["batch_size"]) == expected
    assert values["backbones"] == (["convnet_w64", "wrn10_1"] if column == "tiny" else
                                   ["convnet_w128", "wrn16_2"])


@pytest.mark.parametrize("preset, column, own, method, stay", [
    ("best", "cifar10", (4500, 10), "gvbsm", 0.5), ("best", "cifar100", (4500, 90), "gvbsm", 0.5),
    ("best", "cifar10", (4500, 10), "cda", 0.0), ("best", "cifar10", (4500, 10), "dm", 0.0),
    ("best", "cifar10", None, "gvbsm", None),
    ("best", "tiny", (4500, 10), "gvbsm", None), ("paper", "cifar10", (4500, 10), "gvbsm", None)])
def test_best_leaves_half_of_the_images_of_a_small_folder_as_they_are(preset, column, own, method, stay):
    assert preset_values(preset, column, "recover", 10, method, own).get("stay") == stay


def test_pretrained_weights_are_the_default_at_the_size_they_are_of(monkeypatch):
    for size, expected in ([], True), (["--image-size", "128"], True), (["--image-size", "64"], False):
        assert parsed("squeeze", monkeypatch, "--dataset", "imagenet", *size).pretrained is expected


@pytest.mark.parametrize("size, objective, column", [("64", "moco", "tiny"), ("128", "probe", "imagenet")])
def test_scdd_has_the_coefficients_of_the_objective_that_runs_at_a_size(size, objective, column, monkeypatch):
    flags = "--dataset", "imagenet", "--method", "scdd", "--image-size", size
    assert parsed("squeeze", monkeypatch, *flags).objective == objective
    args = parsed("recover", monkeypatch, *flags)
    expected = preset_values("paper", column, "recover", 10, "scdd")
    assert (args.bn_weight, args.lr) == (expected["bn_weight"], expected["lr"])
    ours, random = (parsed("train_eval", monkeypatch, *flags, *more) for more in
                    ([], ["--method", "random", "--recipe", "scdd"]))
    assert (random.epochs, random.lr, random.batch_size) == (ours.epochs, ours.lr, ours.batch_size)


def test_a_long_tail_and_held_out_images_are_told_in_the_first_line(monkeypatch):
    for flags, words in (["--imbalance", "8"], "long tail (--imbalance 8)"), (["--holdout"], "(--holdout)"):
        assert words in cli.describe_choice(parsed("squeeze", monkeypatch, *flags))
        assert words not in cli.describe_choice(parsed("squeeze", monkeypatch))


@pytest.mark.parametrize("phase", PHASES)
def test_flags_are_never_abbreviated(phase, capsys):
    last = f"--{list(actions(phase))[-1].replace('_', '-')[:-1]}"  # one of the phase's own
    for short, *values in ["--ip", "3"], ["--data-d", "x"], ["--back", "resnet18"], ["--overwr"], [last]:
        with pytest.raises(SystemExit) as end:
            import_module(phase).main([short, *values])
        assert end.value.code == 2 and short in capsys.readouterr().err


@pytest.mark.parametrize("flags, expected", [
    ("--dataset shapes", "auto tf32 tf32 auto auto"),
    ("--dataset cifar10 --preset best", "auto tf32 tf32 auto auto"),
    ("--dataset cifar10", "tf32 tf32 tf32 tf32 tf32"),
    ("--dataset cifar10 --preset release", "tf32 tf32 tf32 tf32 tf32"),
    ("--dataset cifar10 --precision auto", "auto tf32 tf32 auto auto")])
def test_best_and_shapes_let_the_device_choose_but_never_for_statistics_and_pixels(flags, expected,
                                                                                   monkeypatch):
    assert [parsed(phase, monkeypatch, *flags.split()).precision for phase in PHASES] == expected.split()
