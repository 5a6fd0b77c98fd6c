"""Bookkeeping: whole files, generators, fingerprints, comparison of arguments, accuracy, time."""
import argparse
import copy
import json
import operator
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers import assert_near
from utils import checkpoint, cli, device, fail, files, parser, provenance, run, teachers, train

ROOT = Path(run.__file__).parents[1]


@pytest.fixture(autouse=True)
def no_data_set(monkeypatch):
    """`begin` says nothing of a data set that these arguments do not have."""
    monkeypatch.setattr(run, "describe_choice", lambda args: "")


def arguments(**changes):
    values = dict(alpha=0.8, backbones=["a", "b"], logit_norm=True, tag=None, workers=2, device="cpu")
    return argparse.Namespace(**values | changes)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("broken"),
                                   KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_that_was_not_written_to_the_end_leaves_the_old_one(error, old, tmp_path, capsys):
    path = tmp_path / "result.json"
    if old:
        path.write_text(old)
    with pytest.raises(SystemExit if isinstance(error, OSError) else type(error)):
        with files.whole_file(path) as temporary:
            temporary.write_text("ne")
            assert path.exists() == bool(old)
            raise error
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"] * bool(old)
    assert not old or path.read_text() == "old"
    if isinstance(error, OSError):
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and str(path) in told and "No space left on device" in told


def test_a_whole_file_appears_in_new_folders_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "a" / "b" / "result.json"
    for text in "old", "new":
        with files.whole_file(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("save", [files.save_json, checkpoint.save_torch])
def test_a_place_that_cannot_be_written_is_told_in_one_line(save, tmp_path, capsys):
    for name in ".result.tmp", f".result.{os.getpid()}.tmp":
        (tmp_path / name).mkdir()                   # in the way: not even root can open a file there
    with pytest.raises(SystemExit) as end:
        save(tmp_path / "result", {})
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert f"{tmp_path / 'result'} cannot be written" in error


@pytest.mark.slow
def test_a_process_that_is_killed_while_writing_leaves_no_half_file(tmp_path):
    child = os.fork()
    if not child:
        try:
            with files.whole_file(tmp_path / "result.json") as temporary:
                temporary.write_text("ne")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "result.json").exists() and len(list(tmp_path.iterdir())) == 1
    checkpoint.save_torch(tmp_path / "result.json", 1)            # the next attempt clears it away
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("norm, expected", [(torch.nn.BatchNorm2d, True),
                                            (lambda width: torch.nn.GroupNorm(width, width), False)])
def test_channels_come_last_unless_there_are_group_norms(norm, expected):
    outputs = train.channels_last(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm(8)))(torch.rand(2, 3, 9,
                                                                                                     9))
    assert outputs.is_contiguous(memory_format=torch.channels_last) == expected
    assert outputs.is_contiguous() != expected


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_precision_is_that_of_the_layers_and_not_of_weights_or_outputs(precision):
    seen, model = [], torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    keys = list(model.state_dict())
    model[1].register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    model = train.with_precision(model, torch.device("cpu"), precision)
    outputs = model(torch.rand(5, 3, 3, 3))
    outputs.sum().backward()
    assert seen == [torch.bfloat16 if precision == "bf16"
                    else torch.float32] and outputs.dtype == torch.float32
    assert list(model.state_dict()) == keys and all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("groups, training", [(8, True), (8, False), (2, True)])
def test_only_depthwise_convolutions_in_training_run_in_float32_under_bfloat16(groups, training):
    layer, images = torch.nn.Conv2d(8, 8, 3, groups=groups).train(training), torch.rand(2, 8, 9, 9).bfloat16()
    expected = copy.deepcopy(layer)
    train.with_precision(torch.nn.Sequential(layer), torch.device("cpu"), "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    output.sum().backward()
    wide = expected(images.float()).bfloat16()
    wide.sum().backward()
    assert output.dtype == torch.bfloat16 and torch.equal(output, wide) == (groups == 8 and training)
    assert_near(layer.weight.grad, expected.weight.grad, 0.05)
    assert list(layer.state_dict()) == list(expected.state_dict())


def test_the_device_is_timed_without_a_random_number():
    before = torch.get_rng_state()
    assert all(0 < device.conv_step_seconds(narrow) < 10 for narrow in (False, True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("native, seconds, chosen",
                         [(True, 0.5, "bf16"), (True, 0.9, "tf32"), (False, 0.5, "tf32")])
def test_auto_precision_is_bfloat16_only_where_the_device_multiplies_it_and_that_is_faster(native, seconds,
                                                                                           chosen,
                                                                                           monkeypatch):
    for unit in "avx512_bf16", "amx_tile":
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: native and unit == "amx_tile",
                            raising=False)
    monkeypatch.setattr(device, "conv_step_seconds", lambda narrow: seconds if narrow else 1.0)
    for asked, expected in ("auto", chosen), ("bf16", "bf16"), ("fp32", "fp32"):
        args = arguments(device="cpu", precision=asked, dataset="shapes", run_dir="runs", holdout=False,
                         method="gvbsm", ipc=1, teachers="a", imbalance=1)
        run.begin(args)
        assert args.precision == expected


@pytest.mark.parametrize("processes, local_rank, asked, device", [
    (1, 0, "auto", None), (1, 0, "cuda", None), (1, 0, "cuda:1", 1), (8, 1, "auto", 1), (8, 2, "cuda", 0),
    (8, 7, "auto", 1)])
def test_processes_are_dealt_two_gpus_and_one_alone_takes_the_one_it_names(processes, local_rank, asked,
                                                                           device, monkeypatch):
    taken = []
    for name, value in dict(WORLD_SIZE=processes, LOCAL_RANK=local_rank).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # no device without one
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: taken.append(operator.index(index)))
    monkeypatch.setattr(run.dist, "init_process_group", lambda *args, **more: None)
    monkeypatch.setattr(run, "pick_device", lambda name,
                        precision: torch.device(name.replace("auto", "cuda")))
    args = arguments(device=asked, precision="tf32", dataset="shapes", run_dir="runs", holdout=False,
                     method="gvbsm", ipc=1, teachers="a", imbalance=1)
    assert run.begin(args)[0] == torch.device("cuda", device) and taken == [device or 0]


def test_what_is_sent_to_a_device_arrives_there():
    device, one = torch.device("meta"), torch.ones(2)
    sent = run.send({"a": one, "b": torch.zeros(3)}, device)
    assert list(sent) == ["a", "b"] and all(part.is_meta
                                            for part in sent.values()) and run.send(one, device).is_meta
    assert run.send(one, torch.device("cpu")) is one


@pytest.mark.slow
def test_a_generator_depends_on_its_key_alone():
    torch.manual_seed(1)
    first = torch.rand(9, generator=run.generator("noise", 0, 1))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = torch.rand(9, generator=run.generator("noise", 0, 1))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)
    code = ("import torch; from utils.run import generator\n"
            "print(torch.rand(9, generator=generator('noise', 0, 1)).tolist())")
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(other.stdout) == first.tolist()  # nor on the process's hash seed


def test_generators_of_other_keys_draw_other_numbers():
    keys = ["noise", 0, 1], ["noise", 1, 0], ["noise", 0, 11], ["noise", 0], ["view", 0, 1], ["noise", 0,
                                                                                              2 ** 70]
    assert len({torch.rand((), generator=run.generator(*key)).item() for key in keys}) == len(keys)


def test_a_fingerprint_is_of_the_contents_of_all_parts_in_their_order(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    assert provenance.fingerprint(one) == provenance.fingerprint(two) == provenance.fingerprint("abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")  # FIPS 180-2, appendix B.1
    two.write_bytes(b"abd")
    pixels = np.arange(6, dtype=np.uint8)
    parts = [(one,), (two,), ("abc", pixels), ("abd", pixels), ("abc", pixels + 1), (pixels, "abc")]
    assert len({provenance.fingerprint(*part) for part in parts}) == len(parts)


@pytest.mark.parametrize("changes, told", [
    ({}, None), ({"workers": 0, "device": "cuda"}, None), ({"alpha": 0.4}, "--alpha 0.8 (now 0.4);"),
    ({"logit_norm": False, "tag": "x"}, "--logit-norm True (now False), --tag None (now x);"),
    ({"backbones": ["b", "a"]}, "--backbones ['a', 'b'] (now ['b', 'a']);")])
def test_other_arguments_are_told_by_flag_and_both_values(changes, told, capsys):
    stored = json.loads(json.dumps(provenance.relevant(arguments())))
    if not told:
        provenance.check_same(stored, provenance.relevant(arguments(**changes)), Path("here"))
        assert capsys.readouterr().err == ""
        return
    with pytest.raises(SystemExit):
        provenance.check_same(stored, provenance.relevant(arguments(**changes)), Path("here"))
    error = capsys.readouterr().err
    assert error.startswith("here ") and told in error and "--overwrite" in error and error.count("\n") == 1


def test_arguments_of_any_type_become_plain_values():
    plain = provenance.relevant(arguments(images=Path("some/where")))
    assert json.loads(json.dumps(plain)) == plain
    assert plain == {"alpha": 0.8, "backbones": ["a", "b"], "logit_norm": True, "tag": None,
                     "images": "some/where"}


def test_a_folder_of_images_may_move_and_keeps_its_name(capsys):
    provenance.check_same({"dataset": "a/mine"}, {"dataset": "../b/mine/"}, Path("here"))
    with pytest.raises(SystemExit):
        provenance.check_same({"dataset": "a/mine"}, {"dataset": "a/other"}, Path("here"))
    assert "--dataset a/mine (now a/other)" in capsys.readouterr().err


def test_a_flag_that_is_new_since_a_result_was_written_does_not_void_it():
    provenance.check_same({"alpha": 0.8}, provenance.relevant(arguments()), Path("here"))


@pytest.mark.parametrize("found, told", [
    (["a", "b", "c"], None), (["a", "c", "b"], "class 'c' stands where 'b' does"),
    (["a", "b"], "2 classes, not 3"), (["a", "b", "c", "d"], "4 classes, not 3")])
def test_classes_must_agree_in_their_order(found, told, capsys):
    if told:
        with pytest.raises(SystemExit):
            provenance.check_classes(found, ["a", "b", "c"], "here", "there")
        assert f"here and there differ in their classes ({told})" in capsys.readouterr().err
    else:
        provenance.check_classes(found, ["a", "b", "c"], "here", "there")


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00:00"), (59.9, "0:00:59"), (61, "0:01:01"), (3599, "0:59:59"), (86400 + 3661, "25:01:01")])
def test_clock_shows_hours_minutes_seconds(seconds, text):
    assert run.clock(seconds) == text


def test_accuracy_is_the_share_of_images_whatever_the_batches_and_in_eval_mode():
    class Model(torch.nn.Module):
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            return torch.nn.functional.one_hot(x.flatten().round().long(), 4).float()

    guesses, labels = torch.tensor([0, 1, 2, 3, 3, 3, 0]), torch.tensor([0, 1, 2, 3, 0, 0, 1])
    units = torch.tensor([[0.0], [1 / 255]])                         # the network sees the numbers themselves
    for size in 1, 3, 7:
        split = SimpleNamespace(classes="abcd", batches=lambda _: zip(guesses[:, None].split(size),
                                                                      labels.split(size)))
        assert train.split_accuracy(Model().train(), split, units)[0] == pytest.approx(400 / 7)


def test_a_mistake_is_one_line_whatever_the_message(capsys):
    with pytest.raises(SystemExit) as end:
        fail("--ipc 0\n is  \t wrong:\r\nuse 1")
    assert end.value.code == 2 and capsys.readouterr() == ("", "--ipc 0 is wrong: use 1\n")


@pytest.mark.parametrize("dataset, tag, expected", [
    ("tiny", None, ("runs/tiny/teachers/e20", "runs/tiny/gvbsm-ipc3")),
    ("some/where/", "x", ("runs/where/teachers/e20", "runs/where/gvbsm-ipc3-x"))])
def test_a_run_is_named_by_data_set_method_ipc_and_tag(dataset, tag, expected):
    args = argparse.Namespace(dataset=dataset, run_dir="runs", method="gvbsm", ipc=3, tag=tag, teachers="e20",
                              holdout=False, imbalance=1)
    paths = run.run_paths(args)
    assert (paths.teachers.as_posix(), paths.run.as_posix()) == expected
    assert all(getattr(paths, name) == paths.run / name for name in ("images", "labels", "eval"))


def test_progress_off_a_terminal_is_a_plain_line_now_and_then_and_at_the_end(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "time", lambda: now[0])
    progress = run.Progress("work", 100, "images")
    for _ in range(100):
        now[0] += 1
        progress.step(lambda: "loss 1.0")
    lines = capsys.readouterr().out.split("\n")
    assert [line.split("  ")[:3] for line in lines[:-1]] == [
        ["work", "30/100 images", "0:00:30, 0:01:10 left"],
        ["work", "60/100 images", "0:01:00, 0:00:40 left"],
        ["work", "90/100 images", "0:01:30, 0:00:10 left"],
        ["work", "100/100 images", "0:01:40, 0:00:00 left"]]
    assert lines[-1] == "" and all(line.endswith("loss 1.0") and "\r" not in line for line in lines[:-1])


def screen(text, columns):
    """The rows that a terminal of this width shows of a text."""
    rows, column = [""], 0
    for sign in text:
        if sign in "\r\n":
            rows += [""] * (sign == "\n")
            column = 0
            continue
        if column == columns:                                        # in the last column: on to the next row
            rows.append("")
            column = 0
        rows[-1] = rows[-1][:column] + sign + rows[-1][column + 1:]
        column += 1
    return [row.rstrip() for row in rows]


@pytest.mark.parametrize("columns, expected", [
    (120, "squeeze convnet_w128  123456/123456 images  0:00:10, 0:00:00 left  loss 1.2346  top1 43.21"),
    (80, "squeeze convnet_w128  123456/123456 images  0:00:10, 0:00:00 left"),
    (60, "squeeze convnet_w128  123456/123456 images, 0:00:00 left"),
    (40, "123456/123456 images, 0:00:00 left"), (20, "123456/123456 image")])
def test_progress_on_a_terminal_is_one_row_whatever_its_width(columns, expected, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "time", lambda: now[0])
    monkeypatch.setattr(run.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = run.Progress("squeeze convnet_w128", 123456, "images")
    for _ in range(10):
        now[0] += 1
        progress.step(lambda: "loss 1.2346  top1 43.21", 12345.6)
    shown = capsys.readouterr().out
    assert shown.count("\r") == 10 and screen(shown, columns) == [expected, ""]


def test_progress_counts_what_an_earlier_process_did_but_not_for_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "time", lambda: now[0])
    progress = run.Progress("work", 100, "epochs")
    progress.skip(40)
    now[0] = 30
    progress.step(count=30)
    assert capsys.readouterr().out == "work  70/100 epochs  0:00:30, 0:00:30 left\n"


def test_a_learning_rate_beyond_all_presets_is_noted():
    args = parser.Parser("").parse_args([])
    args.lr, args.probe_lr = ["0.1", "convnet_w8=1e9", "word"], 30.0
    assert [line.split(" is ")[0] for line in cli.high_rates(args)] == ["note: --lr convnet_w8=1e9"]


@pytest.mark.parametrize("phase, flags, notes", [
    ("squeeze", "--queue 8 --epochs 2", ["--queue has no effect without --objective moco"]),
    ("squeeze", "--objective probe --lr=1 --probe-lr 1",
     ["--lr has no effect without --objective supervised or moco"]),
    ("squeeze", "--score-trials 2", ["--score-trials has no effect without --prune-ratio"]),
    ("squeeze", "--score-trials 2 --method bilp", []),
    ("squeeze", "--dataset imagenet --epochs 2", ["--epochs has no effect with --pretrained"]),
    ("squeeze", "--weights x --schedule step --tag lr", ["--schedule has no effect with --weights"]),
    ("squeeze", "--dataset imagenet --pruned 2 --crop none", []),
    ("recover", "--method dm --lr 1 --no-flip",
     ["--flip has no effect without --method gvbsm or sre2l or cda or scdd or teddy"]),
    ("recover", "--adaptive-ratio 0.1 --stay 0.5",
     ["--adaptive-ratio has no effect without --method dm or bilp"]),
    ("recover", "--dd-on view --dd-weight 0", ["--dd-on has no effect without --dd-weight"]),
    ("recover", "--method sre2l --dd-on view --drop-rate 0", [
        "--dd-on has no effect without --loop reorder", "--drop-rate has no effect without --conv-weight"]),
    ("recover", "--method teddy --choice cycle", ["--choice has no effect without --subset 0"]),
    ("recover", "--adaptive-period 5", ["--adaptive-period has no effect without --method dm or bilp"]),
    ("train_eval", "--steps 2 --no-flip --gamma 1",
     ["--flip has no effect without --labels online or hard",
      "--steps has no effect without --protocol continual"]),
    ("train_eval", "--protocol prune --l1 0 --labels online --no-flip", [])])
def test_a_typed_flag_without_effect_is_noted(phase, flags, notes):
    args = cli.parse_args(import_module(phase).get_parser(), phase, flags.split())
    assert sorted(cli.idle_flags(args)) == [f"note: {line}" for line in notes]


def test_every_flag_that_may_be_idle_exists():
    for phase, rows in cli.NEEDS.items():
        known = {action.dest: action for action in import_module(phase).get_parser()._actions}
        for flags, other, values in rows:
            assert {flag.replace("-", "_") for flag in flags.split()} <= set(known)
            assert set(values) - {None, False, 0} <= set(known[other.replace("-", "_")].choices or [])


@pytest.mark.parametrize("threads, load, now, noted", [
    (1, 9.0, 9, False), (2, 1.2, 9, False), (2, 2.9, 3, True),
    (2, 2.9, 1, False)])                                             # the load is that of the phase before
def test_busy_cores_are_noted_where_threads_would_wait(threads, load, now, noted, monkeypatch):
    monkeypatch.setattr(device.Path, "read_text", lambda path: f"{load} 0.00 0.00 {now}/321 12345\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    line = device.busy_cores()
    assert bool(line) == noted and (not noted or "3 processes" in line and "2 cores" in line
                                    and "OMP_NUM_THREADS=1" in line)


@pytest.mark.parametrize("path, remedy", [
    ("runs/shapes/teachers/supervised/convnet_w8.pt", "choose another --teachers,"),
    ("runs/shapes/gvbsm-ipc2/result.json", "choose another --tag,"),
    ("runs/shapes/gvbsm-ipc2/eval/convnet_w8.json", "choose another --tag in all phases from recover.py on,")])
def test_the_remedy_names_the_flag_that_the_path_depends_on(path, remedy, capsys):
    with pytest.raises(SystemExit):
        provenance.check_same({"alpha": 1}, {"alpha": 2}, Path(path))
    assert remedy in capsys.readouterr().err


@pytest.mark.parametrize("typed, told", [
    (["--crop", "pad4"], "--crop pad2 (now pad4);"),                       # batch_size is of another preset
    ([], "--crop pad2 (now pad4), --batch-size 256 (now 64);")])
def test_unfinished_work_is_told_with_the_command_that_began_it_and_the_flags_typed(typed, told, capsys):
    begun = ["python", "squeeze.py", "--dataset", "my images"]
    stored, settings = {"crop": "pad2", "batch_size": 256}, {"crop": "pad4", "batch_size": 64}
    with pytest.raises(SystemExit):
        provenance.check_same(stored, settings, Path("teachers/supervised/a.pt"), begun, [*begun, *typed])
    line = capsys.readouterr().err
    assert "a.pt is unfinished: `python squeeze.py --dataset 'my images'` began it with " + told in line
    assert "repeat that command" in line and "--overwrite" in line and "was made" not in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("top1, tested, expected", [(10, 100, True), (15.9, 100, True), (16.1, 100, False),
                                                    (16.1, 50, True), (5, 10000, True)])
def test_chance_is_at_most_two_standard_errors_away(top1, tested, expected):
    assert teachers.at_chance(top1, 10, tested) == expected  # one standard error of 100: 3


def test_a_phase_starts_without_torchvision_which_is_as_slow_to_import_as_torch():
    phases = "squeeze, collect_stats, recover, relabel, train_eval"
    code = f"import sys, {phases}; print('torchvision' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


def test_every_epoch_trains_in_train_mode_whatever_was_tested_in_between():
    model, modes = torch.nn.Linear(1, 1), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train_epoch(epoch, batches, rng):
        modes.append(model.training)
        optimizer.step()
        yield torch.zeros(())

    draws = train.shuffled(torch.arange(4), 4, lambda epoch: run.generator("x"))
    schedule = train.learning_rates(optimizer, "constant", 3)
    for _ in train.fit((model, optimizer, schedule), draws, train_epoch, epochs=3, name="x"):
        model.eval()
    assert modes == [True] * 3
