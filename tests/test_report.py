"""The results table, from result files written by hand."""
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import train_eval
from utils import report
from utils.cli import parse_args
from utils.data import preset_column
from utils.run import relevant

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def write(tmp_path):
    """write(method=, labels=, ..., top1=): a result file below tmp_path/cifar10."""
    def write(method="gvbsm", labels="stored", ipc=10, tag=None, student="resnet18", dataset="cifar10", **metrics):
        path = tmp_path / dataset / f"{method}-ipc{ipc}{f'-{tag}' if tag else ''}" / "eval" / f"{student}-{labels}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        identity = dict(method=method, labels=labels, ipc=ipc, tag=tag, student=student)
        path.write_text(json.dumps(identity | dict(top1_std=0.0, seeds=[0], args={}, upstream={}, made_from={}) | metrics))
    return write


def cells(tmp_path, capsys, dataset="cifar10"):
    """The printed table without its header.   -> list of lists of cells"""
    report.main([str(tmp_path / dataset)])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["ipc", "student", "labels", "run", "top-1", "random real", "margin", "published"]
    assert all(set(cell) == {"-"} for cell in lines[1]) and {len(line) for line in lines} == {8}
    return lines[2:]


def test_synthetic_and_random_images_stand_side_by_side_under_soft_and_under_hard_labels(write, tmp_path, capsys):
    write(top1=61.04, top1_std=0.25, seeds=[0, 1])
    write(top1=30, labels="hard")
    write(top1=67.1, method="random")
    write(top1=35.55, method="random", labels="hard", top1_std=1.04, seeds=[0, 1, 2])
    assert cells(tmp_path, capsys) == [
        ["10", "resnet18", "soft", "gvbsm", "61.0 ± 0.2", "67.1", "-6.1", "53.5 ± 0.6"],
        ["10", "resnet18", "hard", "gvbsm", "30.0", "35.5 ± 1.0", "-5.5", ""]]


def test_what_is_missing_is_not_run(write, tmp_path, capsys):
    write(top1=50)
    write(top1=20, method="random", ipc=50)
    assert cells(tmp_path, capsys) == [
        ["10", "resnet18", "soft", "gvbsm", "50.0", "not run", "", "53.5 ± 0.6"],
        ["10", "resnet18", "hard", "gvbsm", "not run", "not run", "", ""],
        ["50", "resnet18", "soft", "gvbsm", "not run", "20.0", "", "59.2 ± 0.4"],
        ["50", "resnet18", "hard", "gvbsm", "not run", "not run", "", ""]]


def test_a_tagged_run_is_compared_with_the_random_images_of_its_tag_or_else_with_the_untagged(write, tmp_path, capsys):
    for tag, top1 in (None, 50), ("kl", 51), ("sgd", 52):
        write(top1=top1, tag=tag)
    write(top1=40, method="random")
    write(top1=45, method="random", tag="kl")
    soft = [line[3:7] for line in cells(tmp_path, capsys) if line[2] == "soft"]
    assert soft == [["gvbsm", "50.0", "40.0", "+10.0"], ["gvbsm-kl", "51.0", "45.0", "+6.0"],
                    ["gvbsm-sgd", "52.0", "40.0", "+12.0"]]


@pytest.mark.parametrize("labels, other, same", [
    ("stored", dict(args={"epochs": 9}), False), ("stored", dict(args={"loss": "kl"}), False),
    ("stored", dict(upstream={"relabel": {"mix": "mixup"}}), False), ("stored", dict(made_from={"weights": {"a": "0"}}), False),
    ("stored", dict(args={"student_seeds": [1]}, upstream={"recover": {"lr": 1}}, made_from={"images": "0"}), True),
    ("stored", dict(args={"crop_floor": 0.08}), True),              # older than a flag
    ("stored", dict(args={"crop_floor": 0.25}), False),
    ("hard", dict(args={"lr": ["1"]}), False), ("hard", dict(args={"loss": "kl", "seed": 1}), True),
    ("online", dict(args={"logit_norm": False}), False)])
def test_only_random_images_of_the_same_labels_and_training_are_compared(labels, other, same, write, tmp_path, capsys):
    write(top1=50, labels=labels, method="sre2l")
    write(top1=40, labels=labels, method="random", **other)
    line, = [line for line in cells(tmp_path, capsys) if line[3:5] == ["sre2l", "50.0"]]
    assert line[5:7] == (["40.0", "+10.0"] if same else ["not run", ""])


def test_all_methods_stand_side_by_side_with_what_each_paper_published(write, tmp_path, capsys):
    for method in "teddy", "herding", "gvbsm", "sre2l":
        write(top1=1, method=method, dataset="imagenet")
    write(top1=2, method="random", dataset="imagenet")
    found = [[line[3], line[5], line[7]] for line in cells(tmp_path, capsys, "imagenet") if line[2] == "soft"]
    assert found == [["gvbsm", "2.0", "31.4 ± 0.5"], ["sre2l", "2.0", "21.3"], ["teddy", "2.0", "34.1 ± 0.1"], ["herding", "2.0", ""]]


@pytest.mark.parametrize("method, dataset, ipc, student, labels, published", [
    ("sre2l", "cifar100", 50, "resnet18", "stored", "49.5 ± 0.3"), ("cda", "tiny", 50, "resnet18", "stored", "48.7"),
    ("scdd", "cifar100", 50, "resnet18", "stored", "53.4 ± 1.1"), ("herding", "cifar10", 10, "convnet_w128", "hard", "31.6 ± 0.7"),
    ("dm", "cifar10", 50, "convnet_w128", "hard", "63.0 ± 0.4"), ("kcenter", "cifar100", 10, "convnet_w128", "hard", "17.3 ± 0.3"),
    ("forgetting", "cifar10", 10, "convnet_w128", "stored", "")])
def test_each_methods_published_number(method, dataset, ipc, student, labels, published, write, tmp_path, capsys):
    write(top1=1, method=method, dataset=dataset, ipc=ipc, student=student, labels=labels)
    line, = [line for line in cells(tmp_path, capsys, dataset) if line[4] == "1.0"]
    assert line[7] == published


def test_rows_are_in_order_and_online_labels_stand_where_there_are_any(write, tmp_path, capsys):
    for ipc, student in (50, "resnet18"), (10, "resnet18"), (10, "convnet_w128"):
        write(top1=1, ipc=ipc, student=student)
    write(top1=2, labels="online")
    found = [line[:3] for line in cells(tmp_path, capsys)]
    assert found == [["10", "convnet_w128", "soft"], ["10", "convnet_w128", "hard"], ["10", "resnet18", "soft"],
                     ["10", "resnet18", "soft, online"], ["10", "resnet18", "hard"], ["50", "resnet18", "soft"],
                     ["50", "resnet18", "hard"]]


@pytest.mark.parametrize("dataset, ipc, student, published", [
    ("cifar10", 10, "convnet_w128", "46.5 ± 0.7"), ("cifar100", 10, "convnet_w128", "38.7 ± 0.2"),
    ("cifar100", 10, "resnet18", "59.5 ± 0.4"), ("tiny", 50, "resnet18", "47.6 ± 0.3"),
    ("imagenet", 10, "resnet18", "31.4 ± 0.5"), ("imagenet", 10, "convnet_w128", ""), ("shapes", 10, "resnet18", "")])
def test_the_papers_number_stands_beside_soft_labels_alone(dataset, ipc, student, published, write, tmp_path, capsys):
    write(top1=1, dataset=dataset, ipc=ipc, student=student)
    write(top1=1, dataset=dataset, ipc=ipc, student=student, labels="hard")
    assert [line[7] for line in cells(tmp_path, capsys, dataset)] == [published, ""]


def test_random_images_with_a_tag_alone_are_shown_too(write, tmp_path, capsys):
    write(top1=40, method="random", tag="kl")
    assert ["gvbsm-kl", "not run", "40.0"] in [line[3:6] for line in cells(tmp_path, capsys)]


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
    assert len(lines) == 4 and "| 2   | convnet_w8 | soft   | gvbsm |" in lines[2] and "not run" not in lines[2]


# Evidence

@pytest.fixture
def evidence(tmp_path, monkeypatch, capsys):
    """evidence(folder): what --keep and then --evidence print; the files go to tmp_path/evidence."""
    monkeypatch.setattr(report, "EVIDENCE", tmp_path / "evidence")

    def call(*folders):
        for folder in folders:
            report.main([str(folder), "--keep"])
        capsys.readouterr()
        report.main(["--evidence"])
        return capsys.readouterr().out
    return call


def lines_of(text, header):
    """The cells of the lines of a printed table."""
    block = text[re.search(rf"^\| {header} ", text, re.M).start():].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block[2:]]


def test_the_readme_shows_what_the_files_hold():
    section = re.search(r"<!-- python -m utils.report --evidence -->\n(.*?)\n<!-- end -->", README.read_text(), re.S)[1]
    assert section == report.evidence(report.read_evidence(report.EVIDENCE))


@pytest.mark.parametrize("name", sorted(report.read_evidence(report.EVIDENCE)))
def test_the_commands_of_a_cell_give_the_arguments_it_was_measured_with(name):
    cell = report.read_evidence(report.EVIDENCE)[name]
    results = [result for side in ("distilled", "real") for result in cell[side].values()]
    assert results and all({"top1_per_seed", "seeds", "versions", "hardware", "upstream"} <= result.keys() for result in results)
    assert_repeatable(cell, results)


def assert_repeatable(cell, results):
    """Each step of each result is one of the cell's commands."""
    understood = []
    for line in report.commands([cell]):
        _, script, *words = shlex.split(line)
        phase = script.removesuffix(".py")
        args = parse_args(import_module(phase).get_parser(), phase, words, preset_column)
        args = train_eval.for_student(args, args.students[0]) if phase == "train_eval" else args
        understood.append((phase, relevant(args)))
    for result in results:
        for phase, args in report.chain(result):
            assert any(other == phase and all(now[key] == report.setting(phase, args, key) for key in now
                                              if (phase, key) != ("collect_stats", "patch"))
                       for other, now in understood), phase


def test_a_result_older_than_a_flag_was_made_without_it_whatever_a_preset_says_now():
    words = "--dataset cifar10 --preset best".split()
    args = relevant(parse_args(import_module("recover").get_parser(), "recover", words, preset_column))
    assert report.command("recover", args) == "python recover.py --dataset cifar10 --ipc 10 --preset best"
    assert args.pop("init") == "herding"
    assert report.command("recover", args).endswith(" --preset best --init noise")


def test_a_cell_holds_the_results_the_costs_and_the_bytes_of_its_run(project, evidence):
    for method in "random", "gvbsm":
        project.chain(f"--method {method}", first="recover")
        project.call("train_eval", f"--method {method} --labels hard --student-seeds 0 1")
    evidence(project.results)
    (name, cell), = report.read_evidence(report.EVIDENCE).items()
    assert name == "beasts-gvbsm-ipc2-convnet_w8" and (cell["dataset"], cell["ipc"], cell["tag"]) == ("beasts", 2, None)
    assert cell["distilled"].keys() == cell["real"].keys() == {"stored", "hard"}
    stored = json.loads((project.run() / "eval/convnet_w8.json").read_text())
    assert cell["distilled"]["stored"] == stored and cell["real"]["hard"]["method"] == "random"
    squeezed = json.loads((project.teachers / "squeeze.json").read_text())
    assert cell["costs"]["squeeze"]["seconds"] == pytest.approx(sum(squeezed["costs"][b]["seconds"] for b in ("convnet_w8", "wrn10_1")))
    assert cell["costs"]["train_eval"]["seconds"] == stored["seconds"]
    assert all(cost["seconds"] >= 0 and cost["mib"] > 100 for cost in cell["costs"].values())
    assert cell["bytes"]["images"] == sum(path.stat().st_size for path in project.run().glob("images/*/*"))
    assert cell["bytes"]["labels"] == sum(path.stat().st_size for path in project.run().glob("labels/*.npy"))
    assert cell["bytes"]["teachers"] == sum((project.teachers / f"{b}.pt").stat().st_size for b in ("convnet_w8", "wrn10_1"))
    assert cell["bytes"]["statistics"] > 0


def test_random_images_alone_are_kept_in_the_row_of_gvbsm(project, evidence):
    project.chain("--method random", first="recover")
    line = lines_of(evidence(project.results), "data set")[-1]
    (name, cell), = report.read_evidence(report.EVIDENCE).items()
    assert name == "beasts-gvbsm-ipc2-convnet_w8" and cell["distilled"] == {} and list(cell["real"]) == ["stored"]
    assert cell["costs"]["recover"] is None and cell["bytes"]["images"] == 0
    assert line[3:5] == ["gvbsm", "not run"] and float(line[5]) == pytest.approx(cell["real"]["stored"]["top1"], abs=0.05)


def test_images_that_match_no_statistics_cost_none(project, evidence):
    project.chain("--method herding", first="recover")
    evidence(project.results)
    (_, cell), = report.read_evidence(report.EVIDENCE).items()
    assert cell["costs"]["collect_stats"] is None and cell["bytes"]["statistics"] == 0 and cell["costs"]["squeeze"]["mib"] > 100


def test_what_a_backbone_cost_is_unknown_where_its_result_does_not_say(project, evidence):
    project.chain(first="recover")
    path = project.teachers / "squeeze.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "costs"}))
    assert lines_of(evidence(project.results), "data set")[-1][-2].startswith("–, ")


def test_a_row_names_the_hardware_of_its_phases_in_turn(project, evidence):
    project.chain(first="recover")
    path = project.run() / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"hardware": "abacus"}))
    here = result["hardware"]
    assert lines_of(evidence(project.results), "data set")[-1][-1] == f"{here}, then abacus"
    (kept,) = report.EVIDENCE.glob("*.json")
    cell = json.loads(kept.read_text())
    cell["costs"] = {phase: {key: cost[key] for key in ("seconds", "mib")} for phase, cost in cell["costs"].items()}
    assert report.hardware(cell) == here                            # files from before the costs told it


def test_the_commands_of_a_cell_repeat_every_phase_of_it(relabelled, evidence):
    relabelled.call("squeeze", "--backbones wrn10_1 --epochs 1 --teachers other --save-epochs 1:1:1")
    relabelled.call("collect_stats", "--backbones wrn10_1@1 --teachers other")
    odd = "--teachers other --backbones wrn10_1@1 --tag odd"
    relabelled.call("recover", odd, "--method sre2l --alpha 0.25 --no-flip")
    relabelled.call("relabel", odd, "--method sre2l --recipe gvbsm --no-logit-norm")
    relabelled.call("train_eval", odd, "--method sre2l --recipe gvbsm --student-seeds 3 4")
    relabelled.call("train_eval", "--labels hard")
    evidence(relabelled.results)
    cells = report.read_evidence(report.EVIDENCE)
    assert len(cells) == 2
    for cell in cells.values():
        assert_repeatable(cell, list(cell["distilled"].values()))
    lines = report.commands([cells["beasts-sre2l-ipc2-odd-convnet_w8"]])
    assert [line.split()[1] for line in lines] == ["squeeze.py", "recover.py", "relabel.py", "train_eval.py"]       # no Eq. 9 in SRe2L
    assert "--recipe gvbsm" in lines[2] and "--no-logit-norm" in lines[2] and "--alpha 0.25" in lines[1]


def test_the_students_of_a_run_share_its_commands_and_its_row_of_costs(relabelled, evidence):
    relabelled.call("train_eval", "--students convnet_w8 wrn10_1")
    text = evidence(relabelled.results)
    block, = re.findall("Commands of (.*?)</details>", text, re.S)
    assert block.startswith("beasts-gvbsm-ipc2<") and [line.split()[1] for line in block.splitlines() if line.startswith("python")] == [
        "squeeze.py", "collect_stats.py", "recover.py", "relabel.py", "train_eval.py", "train_eval.py"]
    (name, *_, costs), = lines_of(text, "run")
    assert name == "beasts-gvbsm-ipc2" and re.fullmatch(r"convnet_w8 \d+ s, [\d.]+ GiB; wrn10_1 \d+ s, [\d.]+ GiB", costs)


def test_every_number_of_the_paper_without_a_cell_is_not_run(project, evidence):
    project.chain(first="recover")
    lines = lines_of(evidence(project.results), "data set")
    assert lines[-1][:4] == ["beasts", "2", "convnet_w8", "gvbsm"] and lines[-1][5] == "not run" and lines[-1][4] != "not run"
    missing = {(dataset, ipc, student): paper for dataset, ipcs, student, _, ours, *_, papers, _, _ in lines[:-1]
               for ipc, paper in zip(ipcs.split(", "), papers.split(", ")) if ours == "not run"}
    assert len(missing) == 4 + 6 + 6 + 9 + 3 and missing["imagenet", "50", "resnet101"] == "61.0 ± 0.4"
    assert missing["cifar10", "10", "resnet18"] == "53.5 ± 0.6" and missing["tiny", "100", "resnet50"] == "52.1 ± 0.3"


def test_a_tagged_cell_leaves_the_papers_number_not_run():
    name = "cifar10-gvbsm-ipc10-best-convnet_w128"
    text = report.main_table({name: report.read_evidence(report.EVIDENCE)[name]})
    found = [(line[3], line[4] == "not run", line[9]) for line in lines_of(text, "data set") if line[0] == "cifar10" and line[2] == "convnet_w128"]
    assert found == [("gvbsm-best", False, "46.5 ± 0.7"), ("gvbsm", True, "46.5 ± 0.7, 54.3 ± 0.3")]


def test_a_comparison_names_what_each_cell_changes_and_what_that_is_worth(relabelled, evidence):
    base = "--tag ablation"
    for method in "random", "gvbsm":
        relabelled.chain(base, f"--method {method}", first="recover")
    alpha = "--tag ablation-alpha0"
    relabelled.call("collect_stats", "--class-statistics --overwrite")       # nothing to a recover.py without that flag
    relabelled.call("recover", alpha, "--alpha 0")
    relabelled.call("relabel", alpha)
    relabelled.call("train_eval", alpha)
    images = relabelled.run("gvbsm-ipc2-ablation") / "images"
    kl = f"--tag ablation-kl --images {images}"
    relabelled.call("relabel", kl)
    relabelled.call("train_eval", kl, "--loss kl")
    relabelled.call("squeeze", "--backbones convnet_w4 --save-epochs 1:1:1 --ipc 3")      # nothing to a teacher
    more = "--backbones convnet_w8 wrn10_1 convnet_w4"
    relabelled.call("relabel", f"--tag ablation-more --images {images} {more}")
    relabelled.call("train_eval", f"--tag ablation-more --images {images} {more}")
    theirs = f"--images {relabelled.run('gvbsm-ipc2-ablation-alpha0') / 'images'}"
    relabelled.call("relabel", "--tag ablation-theirs", theirs)
    relabelled.call("train_eval", "--tag ablation-theirs", theirs)
    relabelled.chain(base, "--method herding", first="recover")
    for phase, loss in ("recover", ""), ("relabel", ""), ("train_eval", "--loss kl"):
        relabelled.call(phase, "--method herding --tag ablation-kl", loss)
    text = evidence(relabelled.results)
    found = {line[0]: line[1:] for line in lines_of(text, "change")}
    assert list(found) == ["base", "`recover.py --alpha 0.0`", "`train_eval.py --loss kl`", f"`{more}`", f"`{theirs}`",
                           "`--method herding`", "`--method herding`, `train_eval.py --loss kl`"]
    top1 = {tag: json.loads((relabelled.run(f"{run}-ipc2-{tag}") / "eval/convnet_w8.json").read_text())["top1"]
            for run, tag in (("gvbsm", "ablation"), ("gvbsm", "ablation-alpha0"), ("gvbsm", "ablation-kl"))}
    herding = json.loads((relabelled.run("herding-ipc2-ablation") / "eval/convnet_w8.json").read_text())["top1"]
    real = json.loads((relabelled.run("random-ipc2-ablation") / "eval/convnet_w8.json").read_text())["top1"]
    assert found["base"] == [f"{top1['ablation']:.1f}", "", f"{top1['ablation'] - real:+.1f}"]
    assert found["`recover.py --alpha 0.0`"] == [f"{top1['ablation-alpha0']:.1f}", f"{top1['ablation-alpha0'] - top1['ablation']:+.1f}",
                                                  f"{top1['ablation-alpha0'] - real:+.1f}"]
    assert found["`--method herding`"] == [f"{herding:.1f}", f"{herding - top1['ablation']:+.1f}", f"{herding - real:+.1f}"]
    assert found[f"`{theirs}`"] == found["`recover.py --alpha 0.0`"]
    assert found["`train_eval.py --loss kl`"][2] == ""                   # no random images under that loss
    kept = {cell["tag"]: cell for cell in report.read_evidence(report.EVIDENCE).values() if cell["method"] == "gvbsm"}
    assert kept["ablation-kl"]["bytes"]["images"] == kept["ablation"]["bytes"]["images"] > 0
    assert kept["ablation-kl"]["costs"]["recover"] == kept["ablation"]["costs"]["recover"] is not None
    assert "ablation" not in str(lines_of(text, "data set"))             # no part of the main table
    rows = report.rows("beasts", report.read_results(relabelled.results))
    assert {row[2] for row in rows} == {"soft"}                          # and hard labels are not missed


@pytest.mark.parametrize("words, told", [([], "--evidence"), (["runs", "--evidence"], "--evidence"), (["--evidence", "x"], "no such cell")])
def test_what_cannot_be_shown_is_told_in_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as end:
        report.main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and told in error
