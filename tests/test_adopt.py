"""Weights of other people's: classifiers and self-supervised encoders in the layouts they are published in,
and bad files."""
import argparse
from copy import deepcopy
from functools import cache
from urllib.error import URLError

import pytest
import torch
import torchvision

import squeeze
from models import build_model
from tests.conftest import write_images
from utils.adopt import adopt, has_large_stem, load_pretrained, read_weights, strip_prefix

PROBE = "--objective probe --probe-epochs 2 --probe-lr 0.5 --backbones resnet18"


@cache
def trained_like(name="resnet18", classes=4, seed=0):
    """torchvision's network with statistics that no fresh one has; nobody changes it."""
    torch.manual_seed(seed)
    model = getattr(torchvision.models, name)(num_classes=classes)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.8, 1.2)
    return model.eval()


@cache
def fresh():
    """A network of ours to copy."""
    return build_model("resnet18", 4, 72)


def body(model):
    return {key: value for key, value in model.state_dict().items() if not key.startswith("fc.")}


def prefixed(tensors, prefix):
    return {prefix + key: value for key, value in tensors.items()}


def layouts(model):
    """{name: what is stored} of an encoder, as the authors' own code saves it."""
    other = trained_like(seed=1)
    return {
        "moco v2": {"epoch": 200, "arch": "resnet18", "optimizer": {"param_groups": []}, "state_dict": {
            **prefixed(body(model), "module.encoder_q."),
            "module.encoder_q.fc.0.weight": torch.zeros(512, 512),
            "module.encoder_q.fc.2.weight": torch.zeros(128, 512),
            **prefixed(body(other), "module.encoder_k."),
            "module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}},
        "moco v3": {"epoch": 300, "state_dict": {
            **prefixed(body(model), "module.base_encoder."),
            "module.base_encoder.fc.0.weight": torch.zeros(8, 512),
            **prefixed(body(other), "module.momentum_encoder."),
            "module.predictor.0.weight": torch.zeros(8, 8)}},
        "swav": {**prefixed(body(model), "module."), "module.projection_head.0.weight": torch.zeros(8, 512),
                 "module.prototypes.weight": torch.zeros(3, 8)},
        "dino": {"student": prefixed(body(other), "module.backbone."), "epoch": 100,
                 "args": argparse.Namespace(lr=1.0),
                 "teacher": {**prefixed(body(model), "backbone."), "head.mlp.0.weight": torch.zeros(8, 512)}},
    }


WRAPPED = {
    "plain": lambda tensors: tensors,
    "DataParallel": lambda tensors: prefixed(tensors, "module."),
    "state_dict": lambda tensors: {"state_dict": prefixed(tensors, "module."), "epoch": 3, "optimizer": {}},
    "model": lambda tensors: {"model": tensors, "args": argparse.Namespace(lr=0.1)},
    "backbone": lambda tensors: {"state_dict": prefixed(tensors, "model.backbone.")},
    "without counters": lambda tensors: {key: value for key,
                                         value in tensors.items() if "num_batches" not in key}}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_classifier_is_found_under_any_wrapping(wrapping, tmp_path):
    theirs, images = trained_like(), torch.randn(2, 3, 72, 72)
    torch.save(WRAPPED[wrapping](theirs.state_dict()), tmp_path / "theirs.pt")
    mine = deepcopy(fresh())
    adopt(mine, tmp_path / "theirs.pt")
    assert torch.equal(mine.eval()(images), theirs(images))


@pytest.mark.parametrize("layout", ["moco v2", "moco v3", "swav", "dino"])
def test_an_encoder_is_found_in_each_layout_and_its_head_is_left(layout, tmp_path):
    theirs = trained_like()
    torch.save(layouts(theirs)[layout], tmp_path / "theirs.pt")
    mine = deepcopy(fresh())
    head = mine.fc.weight.clone()
    adopt(mine, tmp_path / "theirs.pt", encoder=True)
    assert all(torch.equal(mine.state_dict()[key], value) for key, value in body(theirs).items())
    assert torch.equal(mine.fc.weight, head)


def test_a_prefix_is_that_of_the_network_with_most_names():
    names = build_model("wrn10_1", 4, 16).state_dict()
    few = dict(list(names.items())[:2])
    found = strip_prefix(prefixed(few, "teacher.") | prefixed(names, "student.net."), names)
    assert found.keys() == names.keys()


@pytest.mark.parametrize("stored, told", [
    (lambda net: body(net), "fc.weight is missing; name the --backbones that it is of, or --objective probe"),
    (lambda net: {**net.state_dict(), "extra.weight": torch.zeros(1)}, "extra.weight is left over"),
    (lambda net: trained_like(classes=1000).state_dict(),
     "fc.weight is 1000x512, not 4x512: it has other classes"),
    (lambda net: trained_like("resnet34").state_dict(), "layer1.2.conv1.weight is left over"),
    (lambda net: {**net.state_dict(), "bn1.bias": torch.full((64,), torch.nan)}, "bn1.bias is not finite"),
    (lambda net: {"epoch": 3, "state_dict": {}}, "there is no state dict in it"),
    (lambda net: {0: torch.zeros(1)}, "there is no state dict in it"),
    (lambda net: "text", "is no whole checkpoint of plain weights (torch.save did not write it)"),
    (lambda net: torch.zeros(3), "(it holds a Tensor, not a dict)"),
    (lambda net: net, "(it would run torchvision.models.resnet.ResNet); name another --weights, or save")])
def test_a_file_that_does_not_fit_ends_in_a_line(stored, told, tmp_path, capsys):
    path, value = tmp_path / "theirs.pt", stored(trained_like())
    path.write_text(value) if isinstance(value, str) else torch.save(value, path)
    with pytest.raises(SystemExit) as end:
        adopt(deepcopy(fresh()), path)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and str(path) in error and told in error


def test_pretrained_weights_of_other_classes_name_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = build_model("shufflenetv2_05", 1000, 224).state_dict()
    torch.save(file, tmp_path / "checkpoints/shufflenetv2_x0.5-f707e7126e.pth")
    with pytest.raises(SystemExit):
        load_pretrained("shufflenetv2_05", build_model("shufflenetv2_05", 3, 224), download=False)
    error = capsys.readouterr().err
    assert ("are of 1000 classes, the data has 3; use --no-pretrained, or --weights FILE with "
            "--objective probe") in error


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("invalid hash value")])
def test_pretrained_weights_that_cannot_be_fetched_are_told(error, tmp_path, monkeypatch, capsys):
    def fetch(*args, **more):
        raise error
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(SystemExit):
        load_pretrained("shufflenetv2_05", build_model("shufflenetv2_05", 1000, 224), download=True)
    said = capsys.readouterr().err
    assert said.startswith("--pretrained: https://") and "cannot be fetched" in said and said.count("\n") == 1


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_a_file_runs_nothing(tmp_path, capsys):
    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(SystemExit):
        read_weights(tmp_path / "harmful.pt")
    told = capsys.readouterr()
    assert not told.out and told.err.count("\n") == 1 and "(it would run print)" in told.err


@pytest.mark.parametrize("name, large", [("resnet18", True), ("wrn10_1", False), ("vgg11_bn", False)])
def test_only_a_resnet_is_asked_to_take_a_large_stem(name, large, tmp_path):
    torch.save(trained_like().state_dict(), tmp_path / "theirs.pt")
    assert has_large_stem(build_model(name, 4, 32), tmp_path / "theirs.pt") == large


# squeeze.py

@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_an_adopted_classifier_is_a_teacher_like_a_trained_one(size, bare):
    theirs = trained_like()
    torch.save(theirs.state_dict(), bare.root / "theirs.pt")
    flags = f"--backbones resnet18 --image-size {size}"
    result = bare.call("squeeze", flags, "--weights", bare.root / "theirs.pt")
    record = torch.load(bare.teachers / "resnet18.pt", weights_only=True)
    assert record["backbone"] == "resnet18_stem7" and record["tested"] == 24
    assert result["top1"]["resnet18"] == record["top1"]
    assert all(torch.equal(value, record["weights"][key]) for key, value in theirs.state_dict().items())
    assert record["args"]["pretrained"] is False and record["args"]["weights"].startswith("sha256:")
    (bare.root / "theirs.pt").rename(bare.root / "moved.pt")
    bare.call("squeeze", flags, "--weights", bare.root / "moved.pt")
    assert "already done" in bare.printed
    assert "--weights sha256:" in bare.mistake("squeeze", flags)  # a trained one is another
    for phase in "collect_stats", "recover", "relabel", "train_eval":
        bare.call(phase, flags, "--iterations 1" * (phase == "recover"))


def test_a_network_for_small_images_is_adopted_as_it_is(bare):
    model = build_model("wrn10_1", 4, 16)
    torch.save({"model": model.state_dict()}, bare.root / "theirs.pt")
    bare.call("squeeze", "--backbones wrn10_1 --weights", bare.root / "theirs.pt")
    record = torch.load(bare.teachers / "wrn10_1.pt", weights_only=True)
    assert record["backbone"] == "wrn10_1" and "forgetting" not in record
    assert all(torch.equal(value, record["weights"][key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("flags, told", [
    ("--weights theirs.pt --backbones wrn10_1 convnet_w8", "theirs.pt: no such file"),
    ("--objective probe", "--weights FILE"), ("--weights {} --backbones wrn10_1 convnet_w8",
                                              "--backbones names 2"),
    ("--weights {} --objective moco --backbones wrn10_1 --batch-size 16", "use --objective probe"),
    ("--weights {} --backbones wrn10_1 --pruned 1", "leave out --save-epochs and --pruned")])
def test_what_weights_do_not_go_with_is_told(flags, told, bare):
    torch.save(build_model("wrn10_1", 4, 16).state_dict(), bare.root / "theirs.pt")
    assert told in bare.mistake("squeeze", flags.format(bare.root / "theirs.pt"))


def test_self_supervised_distillation_of_imagenet_names_the_flag_that_makes_it_run(bare):
    flags = "--method scdd --image-size 224 --backbones resnet18 --teachers moco"
    assert "--weights FILE" in bare.mistake("squeeze", flags)
    assert "--objective probe --weights FILE" in bare.mistake("squeeze", flags, "--objective moco --epochs 2")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["moco v2", "moco v3", "swav", "dino"])
def test_a_probe_on_a_frozen_encoder_at_224_pixels_serves_all_phases(layout, tmp_path, new_project):
    write_images(tmp_path / "large/train", 4, 80)
    write_images(tmp_path / "large/test", 2, 80)
    project, theirs = new_project(tmp_path / "large"), trained_like()
    torch.save(layouts(theirs)[layout], tmp_path / "theirs.pt")
    project.call("squeeze", PROBE, "--crop resized --image-size 224 --weights", tmp_path / "theirs.pt")
    record = torch.load(project.teachers / "resnet18.pt", weights_only=True)
    assert record["backbone"] == "resnet18" and record["args"]["objective"] == "probe"
    assert all(torch.equal(record["weights"][key], value) for key, value in body(theirs).items())
    torch.manual_seed(squeeze.generator("weights", 0, "resnet18").initial_seed())
    assert not torch.equal(record["weights"]["fc.weight"], build_model("resnet18", 4, 224).fc.weight)
    if layout == "moco v3":
        shared = "--method scdd --teachers supervised --backbones resnet18 --image-size 224 --ipc 1"
        project.call("recover", shared, "--iterations 1")
        project.call("relabel", shared, "--epochs 1")
        project.call("train_eval", shared, "--epochs 1 --students resnet18")
