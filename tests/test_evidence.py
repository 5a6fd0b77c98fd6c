"""The result files of tests/evidence and the page that is made of them."""
import hashlib
import json
import math
import re
import shlex
import zipfile
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch

import train_eval
from tests.evidence import make_readme, teacher_views
from utils import report
from utils.cli import parse_args
from utils.data import DATASETS
from utils.provenance import relevant

CELLS, FOLDER = make_readme.read_cells(), make_readme.FOLDER


@pytest.fixture
def evidence(tmp_path, monkeypatch, capsys):
    """evidence(folder): the page after `make_readme folder`, in tmp_path/evidence."""
    folder = tmp_path / "evidence"
    folder.mkdir()
    monkeypatch.setattr(make_readme, "FOLDER", folder)

    def call(*folders):
        make_readme.main(list(map(str, folders)))
        assert f"{len(list(folder.glob('*.json')))} result files" in capsys.readouterr().out
        return (folder / "README.md").read_text()
    return call


def read_cells(tmp_path):
    return make_readme.read_cells(tmp_path / "evidence")


def lines_of(text, header):
    """The cells of the lines of a table."""
    block = text[re.search(rf"^\| {header} ", text, re.M).start():].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block[2:]]


# The files and the page

def test_the_page_is_made_of_the_files():
    assert (make_readme.FOLDER / "README.md").read_text() == make_readme.page(CELLS)


def test_result_files_tell_no_path_of_a_machine():
    assert [name for name in CELLS if '"/' in (make_readme.FOLDER / f"{name}.json").read_text()] == []


@pytest.mark.parametrize("name", CELLS)
def test_each_number_of_a_result_file_stands_in_its_row(name):
    cell = CELLS[name]
    text = make_readme.page({name: cell} | {other: base for other,
                                            base in CELLS.items() if base["tag"] in report.BASES})
    section = text[text.index(f"## {cell['dataset']}\n"):].split("\n## ")[0].split("<details>")[0]
    family = (cell["tag"] or "").startswith("family") and cell["distilled"]
    run = report.run_name(cell["method"], cell["tag"])
    run = run.replace("-family", "") if family else run
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in section.splitlines()
            if f"| {run} " in line]
    numbers = [report.accuracy(result) for side in ("distilled", "real")[:1 if family else 2]
               for result in cell[side].values()]
    assert numbers and any(all(number in ", ".join(row) for number in numbers) for row in rows)
    assert all(report.accuracy(result) in section for result in cell["real"].values())


def test_no_table_has_more_than_eight_columns():
    lines = (make_readme.FOLDER / "README.md").read_text().splitlines()
    assert 2 < max(line.count("|") - 1 for line in lines if line.startswith("|")) <= 8


@pytest.mark.parametrize("name", CELLS)
def test_the_commands_of_a_cell_give_the_arguments_it_was_measured_with(name):
    cell = CELLS[name]
    results = [result for side in ("distilled", "real") for result in cell[side].values()]
    assert results and all({"top1_per_seed", "seeds", "versions", "hardware", "upstream"} <= result.keys()
                           for result in results)
    assert_repeatable(cell, results)


def assert_repeatable(cell, results):
    """Each step of each result is one of the cell's commands."""
    understood = []
    for line in make_readme.commands([cell]):
        _, script, *words = shlex.split(line)
        phase = script.removesuffix(".py")
        args = parse_args(import_module(phase).get_parser(), phase, words + make_readme.NO_RUNS,
                          make_readme.data_of)
        args = train_eval.for_student(args, args.students[0]) if phase == "train_eval" else args
        understood.append((phase, relevant(args)))
    for result in results:
        for phase, args in report.chain(result):
            assert any(other == phase and same_settings(phase, now, args) for other, now in understood), phase


def same_settings(phase, now, then):
    """Of two runs of a phase. A named data set has one image size, whether it was written down or not."""
    size = DATASETS.get(now["dataset"], {}).get("image_size")
    pairs = {key: (now[key], report.setting(phase, then, key)) for key in now}
    return all(one == other or key == "image_size" and {one, other} == {None, size}
               for key, (one, other) in pairs.items() if (phase, key) != ("collect_stats", "patch"))


def test_a_result_older_than_a_flag_was_made_without_it_whatever_a_preset_says_now():
    words = "--dataset cifar10 --preset best".split()
    args = relevant(parse_args(import_module("recover").get_parser(), "recover", words + make_readme.NO_RUNS,
                               make_readme.data_of))
    assert make_readme.command("recover",
                               args) == "python recover.py --dataset cifar10 --ipc 10 --preset best"
    assert args.pop("init") == "herding"
    assert make_readme.command("recover", args).endswith(" --preset best --init noise")


@pytest.mark.slow
def test_a_cell_holds_the_results_the_costs_and_the_bytes_of_its_run(project, evidence, tmp_path):
    for method in "random", "gvbsm":
        project.chain(f"--method {method}", first="recover")
        project.call("train_eval", f"--method {method} --labels hard --student-seeds 0 1")
    evidence(project.results)
    (name, cell), = read_cells(tmp_path).items()
    assert name == "beasts-gvbsm-ipc2-convnet_w8" and (cell["dataset"], cell["ipc"],
                                                       cell["tag"]) == ("beasts", 2, None)
    assert cell["distilled"].keys() == cell["real"].keys() == {"stored", "hard"}
    stored = json.loads((project.run() / "eval/convnet_w8.json").read_text())
    stored["data_set"]["path"] = "beasts"                            # a page tells no path of a machine
    assert cell["distilled"]["stored"] == stored and cell["real"]["hard"]["method"] == "random"
    squeezed = json.loads((project.teachers / "squeeze.json").read_text())
    assert cell["costs"]["squeeze"]["seconds"] == pytest.approx(sum(squeezed["costs"][b]["seconds"]
                                                                    for b in ("convnet_w8", "wrn10_1")))
    assert cell["costs"]["train_eval"]["seconds"] == stored["seconds"]
    assert all(cost["seconds"] >= 0 and cost["mib"] > 100 for cost in cell["costs"].values())
    assert cell["bytes"]["images"] == sum(path.stat().st_size for path in project.run().glob("images/*/*"))
    assert cell["bytes"]["labels"] == sum(path.stat().st_size for path in project.run().glob("labels/*.npy"))
    assert cell["bytes"]["teachers"] == sum((project.teachers / f"{b}.pt").stat().st_size
                                            for b in ("convnet_w8", "wrn10_1"))
    assert cell["bytes"]["statistics"] > 0


def test_random_images_alone_are_kept_in_the_row_of_gvbsm(project, evidence, tmp_path):
    project.chain("--method random", first="recover")
    line, = lines_of(evidence(project.results), "IPC")
    (name, cell), = read_cells(tmp_path).items()
    assert name == "beasts-gvbsm-ipc2-convnet_w8" and cell["distilled"] == {}
    assert list(cell["real"]) == ["stored"]
    assert cell["costs"]["recover"] is None and cell["bytes"]["images"] == 0
    assert line[2:4] == ["gvbsm",
                         "not run"] and float(line[4]) == pytest.approx(cell["real"]["stored"]["top1"],
                                                                        abs=0.05)


def test_images_that_match_no_statistics_cost_none(project, evidence, tmp_path):
    project.chain("--method herding", first="recover")
    evidence(project.results)
    (_, cell), = read_cells(tmp_path).items()
    assert cell["costs"]["collect_stats"] is None and cell["bytes"]["statistics"] == 0
    assert cell["costs"]["squeeze"]["mib"] > 100


def test_what_a_backbone_cost_is_unknown_where_its_result_does_not_say(project, evidence, tmp_path):
    project.chain(first="recover")
    path = project.teachers / "squeeze.json"
    path.write_text(json.dumps({key: value for key,
                                value in json.loads(path.read_text()).items() if key != "costs"}))
    line, = lines_of(evidence(project.results), "run +\\| squeeze")
    assert line[1] == "–" and line[3] != "–"


def test_a_row_names_the_hardware_of_its_phases_in_turn(project, evidence, tmp_path):
    project.chain(first="recover")
    path = project.run() / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"hardware": "abacus"}))
    here = result["hardware"]
    assert lines_of(evidence(project.results), "run +\\| squeeze")[-1][-1] == f"{here}, then abacus"
    (kept,) = (tmp_path / "evidence").glob("*.json")
    cell = json.loads(kept.read_text())
    cell["costs"] = {phase: {key: cost[key] for key in ("seconds", "mib")} for phase,
                     cost in cell["costs"].items()}
    assert make_readme.hardware(cell) == here                            # files from before the costs told it


@pytest.mark.slow
def test_the_commands_of_a_cell_repeat_every_phase_of_it(relabelled, evidence, tmp_path):
    relabelled.call("squeeze", "--backbones wrn10_1 --epochs 1 --teachers other --save-epochs 1:1:1")
    relabelled.call("collect_stats", "--backbones wrn10_1@1 --teachers other")
    odd = "--teachers other --backbones wrn10_1@1 --tag odd"
    relabelled.call("recover", odd, "--method sre2l --alpha 0.25 --no-flip")
    relabelled.call("relabel", odd, "--method sre2l --recipe gvbsm --no-logit-norm")
    relabelled.call("train_eval", odd, "--method sre2l --recipe gvbsm --student-seeds 3 4")
    relabelled.call("train_eval", "--labels hard")
    evidence(relabelled.results)
    cells = read_cells(tmp_path)
    assert len(cells) == 2
    for cell in cells.values():
        assert_repeatable(cell, list(cell["distilled"].values()))
    lines = make_readme.commands([cells["beasts-sre2l-ipc2-odd-convnet_w8"]])
    # no Eq. 9 in SRe2L
    assert [line.split()[1] for line in lines] == ["squeeze.py", "recover.py", "relabel.py", "train_eval.py"]
    assert "--recipe gvbsm" in lines[2] and "--no-logit-norm" in lines[2] and "--alpha 0.25" in lines[1]


def test_the_students_of_a_run_share_its_commands_and_its_row_of_costs(relabelled, evidence, tmp_path):
    relabelled.call("train_eval", "--students convnet_w8 wrn10_1")
    text = evidence(relabelled.results)
    block, = re.findall("Commands of every run(.*?)</details>", text, re.S)
    assert "\n# gvbsm-ipc2\n" in block and [line.split()[1] for line in block.splitlines()
                                            if line.startswith("python")] == [
        "squeeze.py", "collect_stats.py", "recover.py", "relabel.py", "train_eval.py", "train_eval.py"]
    (name, *_, costs, _), = lines_of(text, r"run +\| squeeze")
    assert name == "gvbsm-ipc2" and re.fullmatch(r"convnet_w8 \d+ s, [\d.]+ GiB; wrn10_1 \d+ s, [\d.]+ GiB",
                                                 costs)


def test_every_number_of_the_paper_without_an_untagged_run_is_listed():
    name = "cifar10-gvbsm-ipc10-best-convnet_w128"
    text = make_readme.page({name: CELLS[name],
                             "cifar10-gvbsm-ipc10-resnet18": CELLS["cifar10-gvbsm-ipc10-resnet18"]})
    missing = {tuple(line[:3]): line[3] for line in lines_of(text, "data set")}
    assert len(missing) == 4 + 6 + 6 + 9 + 3 - 1 and missing["imagenet", "resnet101", "50"] == "61.0 ± 0.4"
    assert missing["cifar10", "convnet_w128", "10"] == "46.5 ± 0.7" and missing["tiny", "resnet50",
                                                                                "100"] == "52.1 ± 0.3"
    assert ("cifar10", "resnet18", "10") not in missing
    assert [line[-1] for line in lines_of(text, "IPC")] == ["46.5 ± 0.7", "53.5 ± 0.6"]


@pytest.fixture
def made_up():
    """made_up(method, tag, top1, dataset=): a cell whose student reached top1 with soft labels and 10 less
    with hard ones."""
    def make(method, tag, top1, dataset="cifar10", **recover):
        cell = json.loads(json.dumps(CELLS["cifar10-gvbsm-ipc10-ablation-convnet_w128"]))
        cell |= {"method": method, "tag": tag, "dataset": dataset}
        result = cell["distilled"]["stored"] | {"method": method, "tag": tag, "dataset": dataset,
                                                "top1": top1}
        result["upstream"] = result["upstream"] | {"recover": result["upstream"]["recover"] | {"tag": tag}
                                                   | recover}
        cell["distilled"] = {"stored": result, "hard": result | {"labels": "hard", "top1": top1 - 10}}
        cell["real"] = {labels: cell["real"]["stored"] | {"top1": 42.0 if labels == "stored" else 30.0}
                        for labels in cell["distilled"]}
        return cell
    return make


def test_methods_of_the_tag_family_stand_in_one_table_the_best_first(made_up):
    cells = [made_up("gvbsm", "family", 50), made_up("gvbsm", "family-fast", 60, iterations=5),
             made_up("dm", "family", 55)]
    text = make_readme.page({f"cifar10-{i}-convnet_w128": cell for i, cell in enumerate(cells)})
    assert "### Every method under one recipe: cifar10, IPC 10, convnet_w128" in text
    assert "\n| IPC " not in text
    lines = lines_of(text, r"run +\| soft")
    assert [line[:5] for line in lines] == [
        ["gvbsm-fast", "60.0 ± 0.4", "+18.0", "50.0 ± 0.4", "+20.0"],
        ["dm", "55.0 ± 0.4", "+13.0", "45.0 ± 0.4", "+15.0"],
        ["gvbsm", "50.0 ± 0.4", "+8.0", "40.0 ± 0.4", "+10.0"],
        ["random real", "42.0 ± 0.3", "", "30.0 ± 0.3", ""]]
    assert [line[6] for line in lines] == ["46.5 ± 0.7 (soft)", "48.9 ± 0.6 (hard)", "46.5 ± 0.7 (soft)", ""]
    assert lines[0][5] == "211" and lines[0][7].endswith(", `--iterations 5`")
    assert lines[2][7].startswith("resnet18 convnet_w128")


def test_a_data_set_and_a_tag_that_nobody_knows_get_their_rows(made_up):
    text = make_readme.page({"cifar100-x-holdout-gvbsm-ipc10-odd-convnet_w128": made_up("gvbsm", "odd", 50,
                                                                                        "cifar100-x-holdout"),
                             "zoo-gvbsm-ipc10-ablation-odd-convnet_w128": made_up("gvbsm", "ablation-odd", 51,
                                                                                  "zoo")})
    rows = ("cifar100-x-holdout", "gvbsm-odd", "50.0 ± 0.4"), ("zoo", "gvbsm-ablation-odd", "51.0 ± 0.4")
    for dataset, run, top1 in rows:
        line, = lines_of(text[text.index(f"## {dataset}\n"):], "IPC")
        assert line[2:4] == [run, top1]
    assert "# gvbsm-ipc10-odd\n" in text


def test_margins_on_the_transfer_sets_stand_in_one_table_with_their_mean_and_deviation(made_up):
    cells = {f"cifar100-{name}-holdout-gvbsm": made_up("gvbsm", "odd", top1, f"cifar100-{name}-holdout")
             for name, top1 in (("b", 50), ("a", 44))}                       # random real: 42
    for cell, top1 in zip(cells.values(), (62.25, 43)):
        cell["teachers"] = {"wrn16_2": 90, "convnet_w128": top1}
    line, = lines_of(make_readme.page(cells), "IPC, student +\\| run +\\| cifar100-a-holdout")
    assert line == ["10, convnet_w128", "gvbsm-odd", "+2.0 (1.0)", "+8.0 (20.2)", "+5.0 ± 3.0"]
    assert ("Over the 2 cells of gvbsm with both numbers, their correlation is 1.00, and the sum of "
            "margins is 47% of the sum of gaps.") in make_readme.page(cells)


def test_a_command_on_a_folder_that_is_not_here_takes_it_for_ten_classes_of_small_images(made_up):
    args = made_up("gvbsm", "odd", 50)["distilled"]["stored"]["args"] | {"dataset": "gone/cifar100-x",
                                                                         "backbones": ["wrn16_2"]}
    line = make_readme.command("train_eval", args)
    assert line.startswith("python train_eval.py --dataset gone/cifar100-x --ipc 10 --tag ")
    assert "--backbones wrn16_2" in line


@pytest.mark.slow
def test_a_comparison_names_what_each_cell_changes_and_what_that_is_worth(relabelled, evidence, tmp_path):
    base = "--tag ablation"
    for method in "random", "gvbsm":
        relabelled.chain(base, f"--method {method}", first="recover")
    alpha = "--tag ablation-alpha0"
    # nothing to a recover.py without that flag
    relabelled.call("collect_stats", "--class-statistics --overwrite")
    relabelled.call("recover", alpha, "--alpha 0")
    relabelled.call("relabel", alpha)
    relabelled.call("train_eval", alpha)
    images = relabelled.run("gvbsm-ipc2-ablation") / "images"
    kl = f"--tag ablation-kl --images {images}"
    relabelled.call("relabel", kl)
    relabelled.call("train_eval", kl, "--loss kl")
    relabelled.call("squeeze", "--backbones convnet_w4 --save-epochs 1:1:1 --ipc 3")  # nothing to a teacher
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
    found = {line[1]: [line[2], line[5], line[4]] for line in lines_of(text, r"run +\| change")}
    assert list(found) == ["base", "`recover.py --alpha 0.0`", "`train_eval.py --loss kl`", f"`{more}`",
                           f"`{theirs}`",
                           "`--method herding`", "`--method herding`, `train_eval.py --loss kl`"]
    top1 = {tag: json.loads((relabelled.run(f"{run}-ipc2-{tag}")
                             / "eval/convnet_w8.json").read_text())["top1"]
            for run, tag in (("gvbsm", "ablation"), ("gvbsm", "ablation-alpha0"), ("gvbsm", "ablation-kl"))}
    herding = json.loads((relabelled.run("herding-ipc2-ablation")
                          / "eval/convnet_w8.json").read_text())["top1"]
    real = json.loads((relabelled.run("random-ipc2-ablation") / "eval/convnet_w8.json").read_text())["top1"]
    assert found["base"] == [f"{top1['ablation']:.1f}", "", f"{top1['ablation'] - real:+.1f}"]
    assert found["`recover.py --alpha 0.0`"] == [f"{top1['ablation-alpha0']:.1f}",
                                                 f"{top1['ablation-alpha0'] - top1['ablation']:+.1f}",
                                                  f"{top1['ablation-alpha0'] - real:+.1f}"]
    assert found["`--method herding`"] == [f"{herding:.1f}", f"{herding - top1['ablation']:+.1f}",
                                           f"{herding - real:+.1f}"]
    assert found[f"`{theirs}`"] == found["`recover.py --alpha 0.0`"]
    assert found["`train_eval.py --loss kl`"][2] == ""                   # no random images under that loss
    kept = {cell["tag"]: cell for cell in read_cells(tmp_path).values() if cell["method"] == "gvbsm"}
    assert kept["ablation-kl"]["bytes"]["images"] == kept["ablation"]["bytes"]["images"] > 0
    assert kept["ablation-kl"]["costs"]["recover"] == kept["ablation"]["costs"]["recover"] is not None
    assert "\n| IPC " not in text                                         # no row but those of the comparison


@pytest.mark.parametrize("archive", sorted((FOLDER / "images").glob("*.zip")), ids=lambda path: path.stem)
def test_an_archive_of_distilled_images_is_whole_and_belongs_to_a_result_file(archive):
    told, name = Path(f"{archive}.sha256").read_text().split()
    assert (told, name) == (hashlib.sha256(archive.read_bytes()).hexdigest(), archive.name)
    cell = json.loads(next(FOLDER.glob(f"{archive.stem}-*.json")).read_text())
    classes = next(iter(cell["distilled"].values()))["classes"]
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        images = [entry for entry in file.namelist() if entry.endswith(".png")]
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())
    assert Counter(entry.split("/")[1] for entry in images) == dict.fromkeys(classes, cell["ipc"])


def test_teachers_that_know_a_set_find_its_classes_and_are_sure(monkeypatch):
    """Two teachers of two classes: one finds the brighter images on every view, one says nothing."""
    images = torch.tensor([40, 200], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8).contiguous()
    monkeypatch.setattr(teacher_views, "VIEWS", 20)
    models = {"knows": lambda views: torch.stack([-9 * views.mean((1, 2, 3)), 9 * views.mean((1, 2, 3))], 1),
              "silent": lambda views: torch.zeros(len(views), 2)}
    units = torch.tensor([[0.5] * 3, [0.25] * 3])
    found = teacher_views.knowledge(images, torch.tensor([0, 1]), units, models)
    assert found["knows"] == found["mean"] == 100 and found["silent"] == 50 and found["entropy"] < 0.01
    alone = teacher_views.knowledge(images, torch.tensor([0, 1]), units, {"silent": models["silent"]})
    assert alone["entropy"] == pytest.approx(math.log(2))
