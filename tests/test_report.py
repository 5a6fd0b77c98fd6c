"""The results table, from result files written by hand."""
import json

import pytest

from utils import report


@pytest.fixture
def write(tmp_path):
    """write(method=, labels=, ..., top1=): a result file below tmp_path/cifar10."""
    def write(method="gvbsm", labels="stored", ipc=10, tag=None, student="resnet18", dataset="cifar10",
              **metrics):
        run = tmp_path / dataset / f"{method}-ipc{ipc}{f'-{tag}' if tag else ''}"
        path = run / "eval" / f"{student}-{labels}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        identity = dict(method=method, labels=labels, ipc=ipc, tag=tag, student=student)
        path.write_text(json.dumps(identity | dict(top1_std=0.0, seeds=[0], args={}, upstream={},
                                                   made_from={"images": "0"}) | metrics))
    return write


def cells(tmp_path, capsys, dataset="cifar10"):
    """The printed table without its header and notes.   -> list of lists of cells"""
    report.main([str(tmp_path / dataset)])
    text = capsys.readouterr().out.partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["ipc", "student", "labels", "run", "top-1", "random real", "margin", "published"]
    assert all(set(cell) == {"-"} for cell in lines[1]) and {len(line) for line in lines} == {8}
    return lines[2:]


def test_synthetic_and_random_images_stand_side_by_side_under_soft_and_under_hard_labels(write, tmp_path,
                                                                                         capsys):
    write(top1=61.04, top1_std=0.25, seeds=[0, 1])
    write(top1=30, labels="hard")
    write(top1=67.1, method="random")
    write(top1=35.55, method="random", labels="hard", top1_std=1.04, seeds=[0, 1, 2])
    assert cells(tmp_path, capsys) == [
        ["10", "resnet18", "soft", "gvbsm", "61.0 ± 0.2", "67.1", "-6.1 [1]", "53.5 ± 0.6"],
        ["10", "resnet18", "hard", "gvbsm", "30.0", "35.5 ± 1.0", "-5.5 [1]", ""]]


def test_a_row_for_each_result_and_random_images_alone_where_no_row_shows_them(write, tmp_path, capsys):
    write(top1=50)
    write(top1=30, method="random", labels="hard")
    write(top1=20, method="random", ipc=50)
    assert cells(tmp_path, capsys) == [
        ["10", "resnet18", "soft", "gvbsm", "50.0", "not run", "", "53.5 ± 0.6"],
        ["10", "resnet18", "hard", "random", "30.0", "", "", ""],
        ["50", "resnet18", "soft", "random", "20.0", "", "", ""]]


def test_a_tagged_run_is_compared_with_the_random_images_of_its_tag_or_else_with_the_untagged(write, tmp_path,
                                                                                              capsys):
    for tag, top1 in (None, 50), ("kl", 51), ("sgd", 52):
        write(top1=top1, tag=tag)
    write(top1=40, method="random")
    write(top1=45, method="random", tag="kl")
    soft = [line[3:7] for line in cells(tmp_path, capsys) if line[2] == "soft"]
    assert soft == [["gvbsm", "50.0", "40.0", "+10.0"], ["gvbsm-kl", "51.0", "45.0", "+6.0"],
                    ["gvbsm-sgd", "52.0", "40.0", "+12.0"]]


@pytest.mark.parametrize("labels, other, same", [
    ("stored", dict(args={"epochs": 9}), False), ("stored", dict(args={"loss": "kl"}), False),
    ("stored", dict(upstream={"relabel": {"mix": "mixup"}}), False),
    ("stored", dict(made_from={"images": "0", "weights": {"a": "0"}}), False),
    ("stored", dict(args={"student_seeds": [1]}, upstream={"recover": {"lr": 1}}, made_from={"images": "1"}),
     True),
    ("stored", dict(args={"crop_floor": 0.08}), True),              # older than a flag
    ("stored", dict(args={"crop_floor": 0.25}), False),
    ("stored", dict(upstream={"relabel": {"flip": False}}), False),
    ("hard", dict(args={"flip": False}), False),
    ("hard", dict(args={"lr": ["1"]}), False), ("hard", dict(args={"loss": "kl", "seed": 1}), True),
    ("online", dict(args={"logit_norm": False}), False)])
def test_only_random_images_of_the_same_labels_and_training_are_compared(labels, other, same, write, tmp_path,
                                                                         capsys):
    write(top1=50, labels=labels, method="sre2l")
    write(top1=40, labels=labels, method="random", **other)
    line, = [line for line in cells(tmp_path, capsys) if line[3:5] == ["sre2l", "50.0"]]
    assert line[5:7] == (["40.0", "+10.0"] if same else ["not run [1]", ""])


def test_a_note_says_how_the_recipe_of_random_images_differs(write, tmp_path, capsys):
    write(top1=50, args={"epochs": 60}, upstream={"relabel": {"epochs": 60}})
    write(top1=51, tag="kl", args={"epochs": 60, "loss": "kl"}, upstream={"relabel": {"epochs": 60}})
    write(top1=52, tag="other", args={"epochs": 60}, upstream={"relabel": {"epochs": 60}},
          made_from={"images": "0", "weights": {"a": "0"}})
    write(top1=40, method="random", args={"epochs": 200}, upstream={"relabel": {"epochs": 200}})
    report.main([str(tmp_path / "cifar10")])
    text = capsys.readouterr().out
    assert [line.split("|")[6].strip() for line in text.splitlines()[2:5]] == ["not run [1]", "not run [2]",
                                                                               "not run [3]"]
    assert "\n[1] random real has another recipe (epochs 200, not 60)\n" in text
    assert "\n[2] random real has another recipe (epochs 200, not 60; loss mse_gt, not kl)\n" in text
    assert "\n[3] random real has another recipe (epochs 200, not 60; other teachers)\n" in text


def test_a_note_says_where_distilling_does_not_pay(write, tmp_path, capsys):
    for method, top1 in ("gvbsm", 50), ("sre2l", 49.9), ("cda", 50.1), ("herding", 40), ("random", 50):
        write(top1=top1, method=method)
    report.main([str(tmp_path / "cifar10")])
    table, _, notes = capsys.readouterr().out.partition("\n\n")
    margins = {line.split("|")[4].strip(): line.split("|")[7].strip() for line in table.splitlines()[2:6]}
    assert margins == {"gvbsm": "+0.0 [1]", "sre2l": "-0.1 [1]", "cda": "+0.1", "herding": "-10.0"}
    assert notes.startswith("[1] no better than random real images: take those, or --method herding, "
                            "with the same")


@pytest.mark.parametrize("top1, note", [        # two standard errors of a difference: 14.1 and 1.4 points
    (50.0, "{LOST} (with 100 test images a margin below 14.1 points may be chance)"),
    (64, "with 100 test images a margin below 14.1 points"), (65, None)])
def test_a_margin_that_so_few_test_images_cannot_tell_is_noted(top1, note, write, tmp_path, capsys):
    write(top1=top1, tested=100)
    write(top1=50, tested=100, method="random")
    report.main([str(tmp_path / "cifar10")])
    text = capsys.readouterr().out
    assert (f"\n[1] {note.format(LOST=report.LOST)}" in text) if note else "[1]" not in text


def test_where_random_images_are_always_right_no_margin_of_zero_points_is_told(write, tmp_path, capsys):
    for method in "gvbsm", "random":
        write(top1=100, tested=12, method=method)
    report.main([str(tmp_path / "cifar10")])
    assert capsys.readouterr().out.endswith(f"[1] {report.LOST}\n")


def test_the_flags_that_a_run_changes_stand_below_the_table(write, tmp_path, capsys):
    for tag, alpha, epochs in (None, 0.8, 60), ("alpha0", 0.0, 60), ("short", 0.8, 30):
        recover, trained = {"alpha": alpha, "tag": tag}, {"epochs": epochs, "tag": tag, "student_seeds": [0]}
        write(top1=50, tag=tag, args=trained, upstream={"recover": recover, "relabel": trained})
    report.main([str(tmp_path / "cifar10")])
    assert capsys.readouterr().out.partition("\n\n")[2].splitlines() == [
        "ipc 10, gvbsm-alpha0 against gvbsm: recover.py --alpha 0.0",
        "ipc 10, gvbsm-short against gvbsm: --epochs 30"]


def test_a_flag_that_a_run_leaves_out_is_told(write, tmp_path, capsys):
    for tag, reused in (None, 2), ("all", None):
        write(top1=50, tag=tag, args={"label_epochs": reused, "tag": tag})
    report.main([str(tmp_path / "cifar10")])
    assert "gvbsm-all against gvbsm: train_eval.py without --label-epochs\n" in capsys.readouterr().out


def test_all_methods_stand_side_by_side_with_what_each_paper_published(write, tmp_path, capsys):
    for method in "teddy", "herding", "gvbsm", "sre2l":
        write(top1=1, method=method, dataset="imagenet")
    write(top1=2, method="random", dataset="imagenet")
    found = [[line[3], line[5], line[7]] for line in cells(tmp_path, capsys, "imagenet") if line[2] == "soft"]
    assert found == [["gvbsm", "2.0", "31.4 ± 0.5"], ["sre2l", "2.0", "21.3"], ["teddy", "2.0", "34.1 ± 0.1"],
                     ["herding", "2.0", ""]]


@pytest.mark.parametrize("method, dataset, ipc, student, labels, published", [
    ("sre2l", "cifar100", 50, "resnet18", "stored", "49.5 ± 0.3"),
    ("cda", "tiny", 50, "resnet18", "stored", "48.7"),
    ("scdd", "cifar100", 50, "resnet18", "stored", "53.4 ± 1.1"),
    ("herding", "cifar10", 10, "convnet_w128", "hard", "31.6 ± 0.7"),
    ("dm", "cifar10", 50, "convnet_w128", "hard", "63.0 ± 0.4"),
    ("kcenter", "cifar100", 10, "convnet_w128", "hard", "17.3 ± 0.3"),
    ("forgetting", "cifar10", 10, "convnet_w128", "stored", "")])
def test_each_methods_published_number(method, dataset, ipc, student, labels, published, write, tmp_path,
                                       capsys):
    write(top1=1, method=method, dataset=dataset, ipc=ipc, student=student, labels=labels)
    line, = [line for line in cells(tmp_path, capsys, dataset) if line[4] == "1.0"]
    assert line[7] == published


def test_rows_are_in_order_and_online_labels_stand_where_there_are_any(write, tmp_path, capsys):
    for ipc, student in (50, "resnet18"), (10, "resnet18"), (10, "convnet_w128"):
        write(top1=1, ipc=ipc, student=student)
    write(top1=2, labels="online")
    found = [line[:3] for line in cells(tmp_path, capsys)]
    assert found == [["10", "convnet_w128", "soft"], ["10", "resnet18", "soft"],
                     ["10", "resnet18", "soft, online"], ["50", "resnet18", "soft"]]


@pytest.mark.parametrize("dataset, ipc, student, published", [
    ("cifar10", 10, "convnet_w128", "46.5 ± 0.7"), ("cifar100", 10, "convnet_w128", "38.7 ± 0.2"),
    ("cifar100", 10, "resnet18", "59.5 ± 0.4"), ("tiny", 50, "resnet18", "47.6 ± 0.3"),
    ("imagenet", 10, "resnet18", "31.4 ± 0.5"), ("imagenet", 10, "convnet_w128", ""),
    ("shapes", 10, "resnet18", "")])
def test_the_papers_number_stands_beside_soft_labels_alone(dataset, ipc, student, published, write, tmp_path,
                                                           capsys):
    write(top1=1, dataset=dataset, ipc=ipc, student=student)
    write(top1=1, dataset=dataset, ipc=ipc, student=student, labels="hard")
    assert [line[7] for line in cells(tmp_path, capsys, dataset)] == [published, ""]


def test_random_images_with_a_tag_alone_are_shown_too(write, tmp_path, capsys):
    write(top1=40, method="random", tag="kl")
    assert cells(tmp_path, capsys) == [["10", "resnet18", "soft", "random-kl", "40.0", "", "", ""]]


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_nothing_to_show_is_told_in_one_line(content, tmp_path, capsys):
    if content:
        (tmp_path / "gvbsm-ipc10" / "eval").mkdir(parents=True)
        (tmp_path / "gvbsm-ipc10" / "eval" / "resnet18.json").write_text(content)
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "train_eval.py" in error
    assert ("resnet18.json" in error) == bool(content)


def test_the_table_shows_what_train_eval_wrote(project, capsys):
    for method in "random", "gvbsm":
        project.chain(f"--method {method}", first="recover")
    report.main([str(project.results)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("|") for line in lines) == 3 and "not run" not in lines[2]
    assert "| 2   | convnet_w8 | soft   | gvbsm |" in lines[2]


def test_a_variant_is_not_missed_under_hard_labels(write, tmp_path):
    write(top1=50, tag="ablation-kl")
    assert {row[2] for row in report.rows("cifar10",
                                          report.read_results(tmp_path / "cifar10"))[0]} == {"soft"}


def test_a_number_whose_data_set_the_paper_does_not_name_is_not_shown():
    assert ("teddy", "imagenet", "resnet50", "stored") not in report.PUBLISHED


def test_a_folder_that_is_not_there_is_answered_by_those_beside_it(tmp_path, capsys):
    for folder in "mine-holdout/teachers", "images/train":
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        report.main([str(tmp_path / "mine")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(tmp_path / "mine-holdout") in error and "images" not in error
