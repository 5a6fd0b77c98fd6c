"""What the figures show, against slow loops; and that each is drawn, where matplotlib and scikit-learn are
there."""
import json
import math
import re
import shutil
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_model
from utils import figures
from utils.augment import apply_epoch
from utils.losses import ensemble_logits
from utils.stats import matched_layers

README = (Path(__file__).resolve().parents[1] / "utils" / "README.md").read_text()


def parsed(name, *words):
    return figures.get_parser(name).parse_args([str(word) for word in words])


def told(capsys, function, *words):
    """A mistake's one line."""
    with pytest.raises(SystemExit) as end:
        function(*words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    return error


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def mean_and_variance(values):
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.fixture
def selected(relabelled):
    """A project with distilled and random images."""
    relabelled.call("recover", "--method random")
    return relabelled


# Numbers

def test_mean_similarity_is_that_of_all_pairs():
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) + 0.5
    pairs = [cosine(a, b) for a, b in combinations(rows.tolist(), 2)]
    assert figures.mean_similarity(rows) == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)
    assert figures.mean_similarity(torch.tensor([[1.0, 0], [0, 0], [3, 0]])) == pytest.approx(1 / 3)
    assert figures.mean_similarity(torch.tensor([[1.0, 2], [-2, -4]])) == pytest.approx(-1)


def test_similarity_is_of_the_normalised_pixels_of_each_class(selected):
    names, found = figures.similarities(parsed("similarity", selected.run("random-ipc2"), selected.run()))
    data = torch.load(selected.teachers / "wrn10_1.pt", weights_only=True)["data"]
    assert names == list(selected.classes) and list(found) == ["random-ipc2", "gvbsm-ipc2"]
    pixels = (selected.images() / 255 - data["mean"]) / data["std"]
    expected = [cosine(pixels[i].flatten(), pixels[i + 1].flatten()) for i in range(0, 8, 2)]
    assert found["gvbsm-ipc2"] == pytest.approx(expected, abs=1e-5)


def test_similarity_of_a_backbones_logits(selected):
    _, found = figures.similarities(parsed("similarity", selected.run(), "--backbone", "wrn10_1", "--device",
                                           "cpu"))
    logits = teacher_logits(selected, "wrn10_1", selected.images()).tolist()
    assert found["gvbsm-ipc2"] == pytest.approx([cosine(logits[i], logits[i + 1]) for i in range(0, 8, 2)],
                                                abs=1e-5)


def teacher_logits(project, name, pixels):
    """pixels [N, S, S, 3] of 0..255"""
    record = torch.load(project.teachers / f"{name}.pt", weights_only=True)
    model = build_model(name, 4, 16)
    model.load_state_dict(record["weights"])
    images = (torch.tensor(pixels) / 255
              - torch.tensor(record["data"]["mean"])) / torch.tensor(record["data"]["std"])
    with torch.no_grad():
        return model.eval()(images.permute(0, 3, 1, 2).float())


def test_statistics_are_the_mean_and_variance_over_channels_behind_a_sigmoid(squeezed):
    found = figures.teacher_statistics(parsed("statistics", squeezed.teachers))
    assert list(found) == ["convnet_w8", "wrn10_1"] and list(found["convnet_w8"]) == ["convolutions"]
    for name in found:
        record = torch.load(squeezed.teachers / f"{name}.pt", weights_only=True)
        stored = torch.load(squeezed.teachers / f"{name}.stats.pt", weights_only=True)["statistics"]
        layers = matched_layers(build_model(name, 4, 16))
        of = {"convolutions": [stored[layer][:2] for layer in layers if layer in stored],
              "BatchNorms": [[record["weights"][f"{layer}.running_{what}"] for what in ("mean", "var")]
                             for layer in layers if layer not in stored]}
        for kind, values in found[name].items():
            expected = [[sigmoid(part) for vector in pair for part in mean_and_variance(vector.tolist())]
                        for pair in of[kind]]
            assert len(expected) > 2 and values == pytest.approx(np.array(expected), abs=1e-6)
    assert list(figures.teacher_statistics(parsed("statistics", squeezed.teachers, "--backbones",
                                                  "wrn10_1"))) == ["wrn10_1"]


def test_losses_are_means_over_batches_for_each_backbone():
    entries = [{"iteration": 5, "batches": [0, 1], "backbone": "a", "ce": 1.0, "bn": 0.0, "dd": 4.0},
               {"iteration": 0, "batches": [0], "backbone": "b", "ce": 5.0, "bn": 2.0, "dd": 0.0},
               {"iteration": 5, "batches": [2], "backbone": "a", "ce": 4.0, "bn": 0.0, "dd": 1.0},
               {"iteration": 9, "batches": [0], "backbone": "a", "ce": 7.0, "bn": 0.0, "dd": 0.0}]
    found = {key: curve.tolist() for key, curve in figures.loss_curves(entries).items()}
    assert found == {("ce", "a"): [[5, 2], [9, 7]], ("ce", "b"): [[0, 5]], ("bn", "b"): [[0, 2]],
                     ("dd", ""): [[0, 0], [5, 3], [9, 0]]}
    assert list(figures.loss_curves([{"iteration": 0, "batches": [0], "backbone": "a+b",
                                      "ce": 1}])) == [("ce", "")]
    assert list(figures.loss_curves([{"iteration": 0, "batches": [0], "dm": 1.5, "kept": 9}])) == [("dm", "")]


def test_losses_are_those_of_the_log(labelled):
    curves = figures.loss_curves(figures.read_log(labelled.run()))
    entries = labelled.log()[1:]
    for (term, backbone), curve in curves.items():
        for iteration, value in curve:
            mine = [entry for entry in entries if entry["iteration"] == iteration]
            assert value == pytest.approx(sum(entry[term] for entry in mine) / len(mine))
            assert backbone in ("", mine[0]["backbone"])
    assert {term for term, _ in curves} == {"ce", "bn", "conv", "dd", "gradient"}


def test_curves_of_accuracy_are_by_student_labels_and_run_without_comparisons():
    cells = [(50, "stored", None, 60, [0, 1]), (1, "stored", None, 20, [0, 1]), (1, "stored", "kl", 21, [0]),
             (1, "hard", None, 9, [0, 1]), (1, "stored", "ablation-kl", 21, [0])]
    results = {(ipc, "resnet18", labels, "gvbsm", tag): {"top1": top1, "top1_std": 0.5, "seeds": seeds}
               for ipc, labels, tag, top1, seeds in cells}
    found = figures.ipc_curves(results)
    assert list(found) == [("resnet18", "stored", "gvbsm"), ("resnet18", "stored", "gvbsm-kl"),
                           ("resnet18", "hard", "gvbsm")]
    assert found["resnet18", "stored", "gvbsm"].tolist() == [[1, 20, 0.5], [50, 60, 0.5]]
    assert np.isnan(found["resnet18", "stored", "gvbsm-kl"][0, 2])


def test_continual_learning_is_plotted_over_the_classes_so_far(relabelled, capsys):
    with pytest.raises(SystemExit):
        figures.continual_curves(parsed("continual", relabelled.run()))
    assert "--protocol continual" in capsys.readouterr().err
    relabelled.call("train_eval", "--protocol continual --steps 3 --orders 2")
    (label, points), = figures.continual_curves(parsed("continual", relabelled.run())).items()
    path, = (relabelled.run() / "eval").glob("*-continual3.json")
    result = json.loads(path.read_text())
    count, seen = len(result["classes"]), [0]
    for left in 3, 2, 1:                                             # as equal as possible, larger ones first
        seen.append(seen[-1] + math.ceil((count - seen[-1]) / left))
    assert label == f"{relabelled.run().name}, {result['student']}, soft labels, 3 steps"
    assert points.tolist() == [list(point) for point in zip(seen[1:], result["curve"], result["curve_std"])]


def test_tiles_stand_in_rows_and_groups():
    groups = [torch.randint(256, (2, columns, 3, 4, 4), dtype=torch.uint8) for columns in (3, 1)]
    canvas, centres, rows = figures.tile(groups, gap=1)
    assert canvas.shape == (9, 14 + 4 + 4, 3) and centres == [6.5, 19.5] and rows == [1.5, 6.5]
    expected = np.full(canvas.shape, 255)
    for left, group in zip((0, 18), groups):
        for r, c, channel, y, x in np.ndindex(*group.shape):
            expected[5 * r + y, left + 5 * c + x, channel] = group[r, c, channel, y, x]
    assert (canvas == expected).all()


def test_images_are_the_first_of_each_class_and_source(selected):
    names, groups = figures.image_groups(parsed("images", selected.run("random-ipc2"), selected.run(),
                                                "--classes", 3))
    assert names == list(selected.classes[:3]) and list(groups) == ["real", "random-ipc2", "gvbsm-ipc2"]
    distilled = selected.images().reshape(4, 2, 16, 16, 3)[:3]
    assert (groups["gvbsm-ipc2"].permute(0, 1, 3, 4, 2).numpy() == distilled).all()
    assert groups["real"].shape == (3, 5, 3, 16, 16)
    real = np.asarray(Image.open(Path(selected.dataset) / "train" / "ant" / "1.png"))
    assert (groups["real"][2, 1].permute(1, 2, 0).numpy() == real).all()
    assert list(figures.image_groups(parsed("images", selected.run(), "--no-real"))[1]) == ["gvbsm-ipc2"]
    named = parsed("images", selected.run("random-ipc2"), selected.run(), "--names", "random", "paper")
    assert list(figures.image_groups(named)[1]) == ["real", "random", "paper"]


def test_small_images_are_enlarged_by_a_whole_number_and_large_ones_averaged():
    small = torch.randint(256, (2, 1, 3, 20, 20), dtype=torch.uint8)
    assert (figures.resized(small)[..., 1::3, 2::3]
            == small).all() and figures.resized(small).shape[-2:] == (60, 60)
    large = torch.full((1, 2, 3, 192, 192), 255, dtype=torch.uint8)
    large[..., ::2, :] = 0
    assert figures.resized(large).shape == (1, 2, 3, 96,
                                            96) and figures.resized(large).unique().tolist() == [128]


def test_channels_are_the_running_statistics_of_one_batchnorm(squeezed):
    (name, (mean, variance)), = figures.channel_statistics(parsed("channels", squeezed.teachers,
                                                                  "--batchnorm", 3)).items()
    weights = torch.load(squeezed.teachers / "wrn10_1.pt", weights_only=True)["weights"]
    keys = [key for key in weights if key.endswith("running_mean")]
    assert name == "wrn10_1, supervised" and (mean == weights[keys[2]]).all()
    assert (variance == weights[keys[2].replace("mean", "var")]).all()


def test_channels_of_folders_of_one_name_are_told_apart_and_scores_are_no_backbone(squeezed, tmp_path):
    other = shutil.copytree(squeezed.teachers, tmp_path / squeezed.teachers.name)
    torch.save({"scores": torch.zeros(3)}, Path(other, "scores.pt"))
    found = figures.channel_statistics(parsed("channels", squeezed.teachers, other))
    assert list(found) == [f"wrn10_1, {squeezed.teachers}", f"wrn10_1, {other}"]


def test_the_training_images_have_a_name_of_their_own(selected, capsys):
    assert "--names real" in told(capsys, figures.image_groups,
                                  parsed("images", selected.run(), "--names", "real"))


def test_a_data_set_is_found_from_anywhere_and_missed_by_its_place(selected, tmp_path, monkeypatch, capsys):
    path = selected.run() / "result.json"
    result = json.loads(path.read_text())
    for dataset, place, found in (("beasts", selected.dataset, True), ("beasts", tmp_path / "gone", False)):
        changed = {"args": result["args"] | {"dataset": dataset}, "data_set": {"path": str(place)}}
        path.write_text(json.dumps(result | changed))
        for figure, function in ("similarity", figures.similarities), ("images", figures.image_groups):
            if found:
                function(parsed(figure, selected.run()))
            else:
                assert f"{place}, the data set" in told(capsys, function, parsed(figure, selected.run()))


def test_tsne_embeds_the_logits_of_all_runs_together(selected, monkeypatch):
    monkeypatch.setattr(figures, "embed", lambda rows, seed: rows[:, :2].numpy() + seed)
    args = parsed("tsne", selected.run("random-ipc2"), selected.run(), "--backbone", "wrn10_1", "--seed", 3,
                  "--device", "cpu")
    names, ((first, *_), (run, labels, points)) = figures.tsne_points(args)
    assert names == list(selected.classes) and (first, run) == ("random-ipc2", "gvbsm-ipc2")
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert points == pytest.approx(teacher_logits(selected, "wrn10_1", selected.images())[:, :2].numpy() + 3,
                                   abs=1e-5)


def test_tsne_separates_what_is_far_apart():
    pytest.importorskip("sklearn")
    rows = torch.randn(40, 10) + 50 * (torch.arange(40) >= 20)[:, None]
    points = figures.embed(rows, 0)
    assert points.shape == (40, 2)
    inside = np.linalg.norm(points[:20] - points[:20].mean(0), axis=1).max()
    assert np.linalg.norm(points[:20].mean(0) - points[20:].mean(0)) > 2 * inside


# Drawing

@pytest.mark.parametrize("name", figures.FIGURES)
def test_each_figure_is_drawn(name, selected, capsys):
    pytest.importorskip("matplotlib")
    if name == "tsne":
        pytest.importorskip("sklearn")
    if name == "ipc":
        selected.call("train_eval", "--student-seeds 0 1")
    if name == "continual":
        selected.call("train_eval", "--protocol continual --steps 2 --orders 2")
    folders = {"statistics": [selected.teachers], "channels": [selected.teachers], "ipc": [selected.results],
               "losses": [selected.run()], "continual": [selected.run()]}.get(
        name, [selected.run("random-ipc2"), selected.run()])
    figures.main([name, *map(str, folders)])
    assert capsys.readouterr().out == f"{selected.results / name}.png\n"
    picture = np.asarray(Image.open(selected.results / f"{name}.png"))
    assert min(picture.shape[:2]) > 200 and len(np.unique(picture)) > 10


@pytest.fixture
def panels():
    """panels(name, args): a figure's axes and legends, drawn into nothing."""
    def draw(name, args):
        figure = pytest.importorskip("matplotlib.figure").Figure
        drawn = figure(layout="constrained")
        figures.FIGURES[name](args, drawn)
        drawn.draw_without_rendering()
        return drawn.axes, drawn.legends
    return draw


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_no_label_of_the_images_is_cut_off_and_none_is_huge(columns, selected, tmp_path):
    pytest.importorskip("matplotlib")
    figures.main(["images", str(selected.run()), "--no-real", "--columns", str(columns), "--out",
                  str(tmp_path / "a.png")])
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    edges = picture[0], picture[:, 0], picture[-1], picture[:, -1]
    assert all((edge > 250).all() for edge in edges) and max(picture.shape) < 600


def test_every_panel_of_losses_has_ticks_in_plain_numbers_and_the_legend_names_each_backbone_once(labelled,
                                                                                                  panels):
    axes, (legend,) = panels("losses", parsed("losses", labelled.run()))
    assert len(axes) == 6  # five terms, and one that is left over
    for panel in axes[:5]:
        for axis in panel.xaxis, panel.yaxis:
            words = [label.get_text() for label in axis.get_ticklabels()]
            assert any(words) and not any("10^" in word for word in words)
    lines = ["convnet_w8", "wrn10_1", "all backbones"]
    assert [text.get_text() for text in legend.get_texts()] == lines
    shutil.copytree(labelled.run(), labelled.root / "copy")
    axes, (legend,) = panels("losses", parsed("losses", labelled.run(), labelled.root / "copy"))
    assert {text.get_text() for text in legend.get_texts()} == {
        *lines, *(line.replace("gvbsm-ipc2", "copy") for line in lines)}


def test_accuracies_begin_at_0_and_bars_stand_where_there_are_several_seeds(relabelled, panels):
    relabelled.call("train_eval")
    (axes,), (legend,) = panels("ipc", parsed("ipc", relabelled.results))
    assert axes.get_ylim()[0] == 0 and not any(len(bars.get_segments()) for bars in axes.collections)
    assert [type(handle).__name__ for handle in legend.legend_handles] == ["Line2D"]
    relabelled.call("train_eval", "--student-seeds 0 1 --overwrite")
    (axes,), _ = panels("ipc", parsed("ipc", relabelled.results))
    assert any(len(bars.get_segments()) for bars in axes.collections)


def test_many_classes_and_other_files(selected, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "MANY", 3)
    figures.main(["similarity", str(selected.run()), "--out", str(tmp_path / "new" / "a.png")])
    assert Image.open(tmp_path / "new" / "a.png").size[0] > 200


# Mistakes

@pytest.mark.parametrize("name", figures.FIGURES)
def test_without_matplotlib(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in told(capsys, figures.main, [name, str(tmp_path)])


def test_without_scikit_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "scikit-learn" in told(capsys, figures.main, ["tsne", str(tmp_path)])


@pytest.mark.parametrize("words, named", [
    (["pie", "x"], ["pie", "similarity"]), (["losses"], ["losses", "runs/DATASET/RUN"]),
    (["losses", "gone"], ["gone", "runs/DATASET/RUN"]), (["ipc", "gone"], ["gone", "runs/DATASET"]),
    (["tsne", ".", "--columns", "3"], ["--columns"]),
    (["images", ".", "--names", "a", "b"], ["--names", "1 runs"]), (["channels", "."], [".", "squeeze.py"]),
    (["images", ".", "--columns", "0"], ["--columns", "0"]), (["losses", ".", "."], ["twice"]),
    (["losses", ".", "--out", "a.pdf"], ["--out", "a.pdf", ".png"])])
def test_command_lines_that_cannot_be(words, named, capsys):
    if words[0] == "channels":
        pytest.importorskip("matplotlib")
    error = told(capsys, figures.main, words)
    assert all(name in error for name in named)


def test_folders_that_hold_something_else(labelled, tmp_path, capsys):
    for name, function in (("similarity", figures.similarities), ("tsne", figures.tsne_points),
                           ("images", figures.image_groups)):
        for folder in tmp_path, labelled.results, labelled.run() / "labels":
            error = told(capsys, function, parsed(name, folder))
            assert str(folder) in error and "name a folder that recover.py has finished" in error
    assert "collect_stats.py" in told(capsys, figures.teacher_statistics,
                                      parsed("statistics", labelled.run()))
    assert "--backbones" in told(capsys, figures.teacher_statistics,
                                 parsed("statistics", labelled.teachers, "--backbones", "vgg"))
    error = told(capsys, figures.tsne_points, parsed("tsne", labelled.run(), "--backbone", "resnet18",
                                                     "--device", "cpu"))
    assert "resnet18.pt is missing" in error and "squeeze.py" in error
    assert "--classes 1" in told(capsys, figures.tsne_points,
                                 parsed("tsne", labelled.run(), "--classes", 1, "--device", "cpu"))
    pytest.importorskip("matplotlib")
    assert "train_eval.py" in told(capsys, figures.draw_ipc, parsed("ipc", tmp_path), None)
    assert "log.jsonl" in told(capsys, figures.draw_losses, parsed("losses", tmp_path), None)


def test_runs_that_cannot_be_compared(selected, capsys):
    path = selected.run() / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": ["a", "b"]}))
    error = told(capsys, figures.image_groups, parsed("images", selected.run("random-ipc2"), selected.run()))
    assert "gvbsm-ipc2 and" in error and "classes" in error
    path.write_text("{")
    assert "result.json" in told(capsys, figures.image_groups, parsed("images", selected.run()))


def test_images_of_other_classes_than_the_run_has(selected, capsys):
    for path in selected.run().glob("images/ant/*"):
        path.rename(path.parent.parent / "bee" / f"other-{path.name}")
    (selected.run() / "images" / "ant").rmdir()
    assert "differ in their classes" in told(capsys, figures.similarities,
                                             parsed("similarity", selected.run()))


def test_runs_of_one_name_are_told_apart(selected):
    args = parsed("losses", selected.run(), selected.root / "other" / "gvbsm-ipc2")
    assert figures.titles(args) == list(map(str, args.folders))


def test_one_image_a_class_has_no_pair(selected, capsys):
    for path in selected.run().glob("images/*/00001.png"):
        path.unlink()
    assert "--ipc" in told(capsys, figures.similarities, parsed("similarity", selected.run()))


# The snippets of utils/README.md

def snippet(word, project):
    """What a python block of the page defines, with the project's run in the place of its example."""
    block, = [block for block in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if word in block]
    space = {}
    exec(block.replace("runs/cifar10/gvbsm-ipc10", str(project.run())), space)
    return space


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
def test_numpy_alone_reproduces_the_mixed_samples_and_their_labels(mix, relabelled):
    if mix != "cutmix":
        relabelled.call("relabel", f"--mix {mix} --overwrite")
    space = snippet("logits.npy", relabelled)
    pixels = relabelled.images()
    draw = {key: torch.tensor(np.load(relabelled.run() / "labels" / f"{key}.npy"))
            for key in ("crop", "flip", "partner", "box", "ratio")}
    for epoch in range(3):
        samples, labels = zip(*(space["sample"](epoch, i) for i in range(8)))
        drawn = {key: value[epoch].long() if value.dtype != torch.float32 else value[epoch] for key,
                 value in draw.items()}
        drawn["flip"] = drawn["flip"].bool()
        expected = apply_epoch(torch.tensor(pixels).permute(0, 3, 1, 2).double(), drawn, torch.arange(8),
                               mix).permute(0, 2, 3, 1)
        assert np.stack(samples) == pytest.approx(expected.numpy(), abs=1e-6 if mix != "mixup" else 1e-4)
        logits = [teacher_logits(relabelled, name, np.stack(samples)) for name in ("convnet_w8", "wrn10_1")]
        soft = ensemble_logits(torch.stack(logits), True)
        assert np.stack(labels) == pytest.approx(soft.softmax(1).numpy(), abs=2e-3)


def test_an_image_folder_of_torchvision(labelled):
    images = snippet("ImageFolder", labelled)["images"]
    assert images.classes == list(labelled.classes) and len(images) == 8
    assert (np.asarray(images[5][0]) == labelled.images()[5]).all() and images[5][1] == 2
