"""MoCo and its probe against loops written out; squeeze --objective moco from end to end."""
import copy
import itertools
import json
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import squeeze
from models import NAMES, build_model
from tests.conftest import Project
from tests.helpers import assert_near, gradient
from utils import moco as moco_module
from utils.moco import MoCo, Probe, SplitBatchNorm, as_encoder, knn_top1, last_linear, with_norms

FLAGS = ("--objective moco --backbones wrn10_1 --batch-size 16 --queue 32 --epochs 2 --probe-epochs 2 --lr "
         "0.06 "
         "--schedule cosine --weight-decay 5e-4")
TOLERANCE = 1e-12


pytestmark = pytest.mark.usefixtures("seed")


def randomised(norm):
    for value in norm.weight, norm.bias, norm.running_mean:
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


# BatchNorm in splits

@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_eighth_of_a_batch_has_a_batchnorm_of_its_own(memory_format):
    norm = randomised(SplitBatchNorm(3).double())
    alone = [nn.BatchNorm2d(3).double() for _ in range(8)]
    for one in alone:
        one.load_state_dict(norm.state_dict())
    images = torch.randn(24, 3, 2, 5, dtype=torch.float64).contiguous(memory_format=memory_format)
    for _ in range(2):
        before = copy.deepcopy(norm.state_dict())
        for one in alone:
            one.load_state_dict(before)
        parts = torch.empty_like(images)
        for j, one in enumerate(alone):
            parts[j::8] = one(images[j::8]).detach()
        assert_near(norm(images).detach(), parts, TOLERANCE)
        for name in "running_mean", "running_var":
            assert_near(getattr(norm, name), torch.stack([getattr(one, name) for one in alone]).mean(0),
                        TOLERANCE)
    assert norm.num_batches_tracked == 2


def test_the_gradients_are_those_of_the_separate_batchnorms():
    norm, weight = randomised(SplitBatchNorm(3).double()), torch.randn(16, 3, 2, 2, dtype=torch.float64)
    plain, images = nn.BatchNorm2d(3).double(), torch.randn(16, 3, 2, 2, dtype=torch.float64)
    plain.load_state_dict(norm.state_dict())
    results = []
    for layer, total in (norm, lambda x: (norm(x) * weight).sum()), \
                        (plain, lambda x: sum((plain(x[j::8]) * weight[j::8]).sum() for j in range(8))):
        leaf = images.clone().requires_grad_()
        results.append(torch.autograd.grad(total(leaf), [leaf, layer.weight, layer.bias]))
    for mine, theirs in zip(*results, strict=True):
        assert_near(mine, theirs, TOLERANCE)


def test_turned_into_splits_and_back_a_model_is_what_it_was():
    model = build_model("wrn10_1", 4, 16).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            randomised(layer)
    plain, images = copy.deepcopy(model), torch.randn(16, 3, 16, 16, dtype=torch.float64)
    with_norms(model, SplitBatchNorm)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model.eval()(images), plain.eval()(images))
    assert not torch.allclose(model.train()(images), plain.train()(images))
    plain.load_state_dict(with_norms(model, nn.BatchNorm2d).state_dict())
    assert torch.equal(model(images), plain(images))
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in plain.modules()]


# Contrast

def encoders(size=16, **how):
    """A MoCo in float64 of linear maps, whose outputs do not depend on the batch: [N, 6] -> [N, 4]."""
    return MoCo(nn.Linear(6, 4), nn.Linear(6, 4), dim=4, size=size, **how).double()


def views(n, *shape):
    return torch.randn(2, n, *shape, dtype=torch.float64)


def test_the_loss_is_the_cross_entropy_of_each_query_against_its_key_and_the_queue():
    moco, (one, other) = encoders(temperature=0.2), views(5, 6)
    queue, key = moco.queue.clone(), copy.deepcopy(moco.key)
    loss, total = moco(one, other, torch.randperm(5)), 0
    for mine, theirs in zip(one, other):
        query, positive = (F.normalize(net(x), dim=0) for net, x in ((moco.query, mine), (key, theirs)))
        logits = [query @ positive / 0.2] + [query @ column / 0.2 for column in queue.T]
        total += torch.stack(logits).exp().sum().log() - logits[0]
    assert_near(loss.detach(), total.detach() / 5, TOLERANCE)
    assert_near(queue.norm(dim=0), torch.ones(16), 1e-6)                         # drawn in float32


def test_only_the_query_encoder_has_gradients_and_they_are_those_of_the_loss():
    moco, (one, other) = encoders(), views(5, 6)
    start = copy.deepcopy(moco)
    moco(one, other, torch.arange(5)).backward()
    assert all(value.grad is None and not value.requires_grad for value in moco.key.parameters())

    def loss(weight):
        query = F.normalize(F.linear(one, weight, start.query.bias))
        key = F.normalize(start.key(other))
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ start.queue], 1) / 0.1
        return -logits.log_softmax(1)[:, 0].mean()

    assert_near(moco.query.weight.grad, gradient(loss, start.query.weight)[1], TOLERANCE)


def test_the_loss_does_not_depend_on_the_order_of_the_keys_unless_the_encoder_sees_the_batch():
    one, other = views(16, 6)
    start = encoders()
    losses = [copy.deepcopy(start)(one, other, torch.randperm(16)) for _ in range(3)]
    assert_near(torch.stack(losses), losses[0].expand(3), TOLERANCE)
    images, (first, *rest) = views(16, 3, 16, 16), [torch.arange(16), torch.randperm(16), torch.arange(16)]
    start = MoCo(*(as_encoder(build_model("wrn10_1", 4, 16)) for _ in range(2)), size=32).double()
    plain, shuffled, again = (copy.deepcopy(start)(*images, order) for order in (first, *rest))
    assert plain == again and plain != shuffled


@pytest.mark.parametrize("size", [12, 16, 10, 3])
def test_the_queue_takes_every_key_in_turn_and_the_key_encoder_follows(size):
    moco = encoders(size=size, momentum=0.9)
    queue, place, key = moco.queue.clone(), 0, copy.deepcopy(moco.key)
    optimizer = torch.optim.SGD(moco.parameters(), 1.0)
    for _ in range(5):
        one, other = views(4, 6)
        for mine, theirs in zip(key.parameters(), moco.query.parameters()):
            mine.data = 0.9 * mine.data + 0.1 * theirs.data
        for image in other:
            queue[:, place % size] = F.normalize(key(image), dim=0).detach()
            place += 1
        optimizer.zero_grad()
        moco(one, other, torch.randperm(4)).backward()
        optimizer.step()
        assert_near(moco.queue, queue, TOLERANCE)
        assert moco.pointer == place % size
        for mine, theirs in zip(moco.key.parameters(), key.parameters()):
            assert_near(mine.data, theirs.data, TOLERANCE)


def test_the_key_encoder_keeps_buffers_of_its_own():
    moco = MoCo(*(as_encoder(build_model("wrn10_1", 4, 16)) for _ in range(2)), size=32).double()
    key, query = moco.key.state_dict(), moco.query.state_dict()
    assert all(torch.equal(key[name], query[name]) for name in query)
    moco(*views(16, 3, 16, 16), torch.randperm(16))
    assert moco.key.bn.num_batches_tracked == 1
    assert not torch.allclose(moco.key.bn.running_mean, moco.query.bn.running_mean)
    assert torch.equal(moco.key.fc.weight, moco.query.fc.weight)


def test_the_state_dict_holds_all_that_a_next_step_depends_on():
    moco, other = encoders(size=10), encoders(size=10)
    moco(*views(4, 6), torch.arange(4))
    other.load_state_dict(copy.deepcopy(moco.state_dict()))
    batch = views(4, 6)
    assert all(moco(*batch, torch.arange(4)) == other(*batch, torch.arange(4)) for _ in range(3))


# The monitor

@pytest.mark.parametrize("k, chunk", [(3, 4), (200, 7), (1, 100)])
def test_nearest_neighbours_vote_as_in_a_loop(k, chunk):
    bank, queries = torch.randn(30, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    bank_labels, labels, right = torch.randint(4, (30,)), torch.randint(4, (20,)), 0
    for query, label in zip(queries, labels):
        near = sorted(zip((F.cosine_similarity(query, row, dim=0) for row in bank), bank_labels.tolist()),
                      reverse=True)
        votes = [sum((similarity / 0.1).exp() for similarity, of in near[:k] if of == number)
                 for number in range(4)]
        right += max(range(4), key=votes.__getitem__) == label
    assert 0 < right < 20
    assert knn_top1(bank, bank_labels, queries, labels, 4, k=k, chunk=chunk) == 100 * right / 20


# The probe

# no nn.Linear
@pytest.mark.parametrize("name", ["convnet_w8", "wrn10_1",
                                  *(name for name in NAMES[2:] if name != "squeezenet")])
def test_any_model_becomes_an_encoder_and_a_classifier_again(name):
    with torch.device("meta"):
        model, plain = build_model(name, 10, 64), build_model(name, 7, 64)
        images = torch.empty(16, 3, 64, 64)
        place = last_linear(model)
        assert as_encoder(model)(images).shape == (16, 128)
        assert sum(isinstance(layer, SplitBatchNorm) for layer in model.modules()) == sum(
            isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())
        probe = Probe(with_norms(model, nn.BatchNorm2d), 7)
        assert probe(images).shape == (16, 7)
    classifier = probe.classifier()
    assert classifier is model and classifier.get_submodule(place) is probe.linear
    assert {key: value.shape for key, value in classifier.state_dict().items()} == \
        {key: value.shape for key, value in plain.state_dict().items()}


@pytest.mark.parametrize("name", ["wrn10_1", "convnet_w8"])
def test_training_the_probe_leaves_the_features_as_they_are(name):
    model, images = build_model(name, 10, 16).double(), views(16, 3, 16, 16)[0]
    probe = Probe(model, 4)
    before = copy.deepcopy(probe.state_dict())
    features = model.eval()(images)
    optimizer = torch.optim.SGD(probe.parameters(), 30.0, momentum=0.9)
    for _ in range(3):
        probe.train()
        F.cross_entropy(probe(images), torch.arange(16) % 4).backward()
        optimizer.step()
    changed = {key for key, value in probe.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"linear.weight",
                       "linear.bias"} and probe.training and not any(m.training for m in model.modules())
    weight, bias = probe.linear.weight.detach(), probe.linear.bias.detach()
    assert_near(probe.classifier()(images).detach(), features @ weight.T + bias, 1e-10)


# squeeze --objective moco

@pytest.fixture(scope="module")
def contrasted(beasts, new_project):
    """A project with a backbone squeezed without labels, what squeeze gave, and what it printed."""
    project = new_project(beasts)
    return project, project.call("squeeze", FLAGS), project.printed


def weights(project):
    return torch.load(project.teachers / "wrn10_1.pt", weights_only=True)


def test_a_backbone_squeezed_without_labels_is_one_for_the_other_phases(contrasted, tmp_path):
    done, result, printed = contrasted
    project = Project(tmp_path, done.dataset)
    shutil.copytree(done.root / "runs", tmp_path / "runs")
    record = weights(project)
    model = build_model("wrn10_1", 4, 16)
    model.load_state_dict(record["weights"])
    assert record["top1"] == result["top1"]["wrn10_1"] and record["tested"] == 24
    assert record["args"]["objective"] == "moco" and record["args"]["queue"] == 32
    assert len([line for line in printed.splitlines() if "nearest neighbours" in line]) == 2
    project.call("collect_stats", "--backbones wrn10_1")
    project.call("recover", "--backbones wrn10_1 --iterations 2")
    assert len(project.images()) == 8


def test_the_saved_classifier_is_the_probe_on_the_encoder_that_moco_left(bare, contrasted, monkeypatch):
    seen = []

    def watched(model, *rest):
        if isinstance(model, Probe):
            seen.append(copy.deepcopy(model.features.state_dict()))
        yield from train(model, *rest)
        seen.append(model)

    train = squeeze.train
    monkeypatch.setattr(squeeze, "train", watched)
    bare.call("squeeze", FLAGS)
    (before, probe), saved = seen, weights(bare)["weights"]
    assert not any(isinstance(layer, SplitBatchNorm) for layer in probe.modules())
    assert all(torch.equal(saved[key], value) for key, value in before.items())
    assert saved.keys() - before.keys() == {"fc.weight", "fc.bias"} and torch.equal(saved["fc.bias"],
                                                                                    probe.linear.bias)
    fresh, images = build_model("wrn10_1", 4, 16), torch.randn(5, 3, 16, 16)
    fresh.load_state_dict(saved)
    assert_near(fresh.eval()(images), probe.classifier().eval()(images), 1e-4)  # another memory layout
    initial = build_model("wrn10_1", 4, 16).state_dict()
    assert not torch.equal(saved["conv.weight"], initial["conv.weight"])


def test_the_learning_rate_is_a_cosine_with_epochs_counted_from_1(bare, monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def noting(self, *rest):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    bare.call("squeeze", FLAGS, "--epochs 4 --probe-epochs 4")
    expected = [0.06 * (1 + torch.tensor(torch.pi * epoch / 4).cos().item()) / 2 for epoch in range(1, 5)
                for _ in range(3)]
    # the probe's
    expected += [30 * (1 + torch.tensor(torch.pi * epoch / 4).cos().item()) / 2 for epoch in range(4)]
    assert rates == [pytest.approx(rate, abs=1e-6) for rate in expected]


def test_moco_sees_two_views_of_each_image_with_colours_of_their_own(bare, monkeypatch):
    seen, forward, coloured = [], MoCo.forward, []
    monkeypatch.setattr(MoCo, "forward", lambda self, *views: seen.append(views) or forward(self, *views))
    colour = moco_module.apply_colour
    monkeypatch.setattr(moco_module, "apply_colour", lambda images,
                        draw: coloured.append((images, colour(images, draw))) or coloured[-1][1])
    bare.call("squeeze", FLAGS)
    mean, std = (torch.tensor(weights(bare)["data"][key])[:, None, None] for key in ("mean", "std"))
    assert len(seen) == 6 and len(coloured) == 12
    for step, (query, key, order) in enumerate(seen):
        assert not torch.allclose(query, key, atol=0.1) and sorted(order.tolist()) == list(range(16))
        for view, (cropped, painted) in zip((query, key), coloured[2 * step:2 * step + 2], strict=True):
            assert_near(view, (painted - mean) / std, 1e-4)
            assert ((cropped - painted).abs().amax((1, 2, 3)) > 0.01).sum() > 8  # four of five, on average


def test_the_test_images_are_those_whose_neighbours_are_sought_among_the_training_images(bare, monkeypatch):
    asked = []
    monkeypatch.setattr(moco_module, "knn_top1", lambda *found: asked.append(found) or 50.0)
    bare.call("squeeze", FLAGS, "--prune-ratio 0.25 --score-trials 1 --score-epochs 1")
    for bank, bank_labels, queries, labels, classes in asked:
        assert bank.shape == (36, 128) and queries.shape == (24, 128) and classes == 4
        assert bank_labels.tolist() == sorted(9 * [0, 1, 2, 3]) and labels.tolist() == sorted(6
                                                                                              * [0, 1, 2, 3])
    assert len(asked) == 2


@pytest.mark.slow
@pytest.mark.parametrize("at, minutes", [(2, 0), (4, 60), (6, 60), (6, 0), (7, 60), (8, 0)])
def test_stopped_at_any_step_it_goes_on_to_the_same_weights(at, minutes, bare, contrasted, monkeypatch):
    steps, step = [], torch.optim.SGD.step                          # 6 of MoCo, then 2 of the probe

    def stopping(self, *rest):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", stopping)
    with pytest.raises(SystemExit) as end:
        squeeze.main(bare.arguments("squeeze", FLAGS, f"--checkpoint-minutes {minutes}"))
    assert end.value.code == 128 + signal.SIGTERM
    assert not (bare.teachers / "wrn10_1.pt").exists()
    bare.call("squeeze", FLAGS)
    assert_same_weights(bare, contrasted[0])
    assert len(steps) == 8                                           # none of them twice


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 7, 8])
def test_killed_between_two_kept_states_it_goes_on_to_the_same_weights(at, bare, contrasted, monkeypatch):
    kept, save = itertools.count(1), squeeze.Checkpoint.save

    def every_second(self, state, piece="state"):
        if (number := next(kept)) % 2:
            save(self, state, piece)
        if number == at:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(squeeze.Checkpoint, "save", every_second)
        squeeze.main(bare.arguments("squeeze", FLAGS, "--checkpoint-minutes 0"))
    bare.call("squeeze", FLAGS)
    assert_same_weights(bare, contrasted[0])


def assert_same_weights(project, other):
    mine, theirs = weights(project), weights(other)
    assert mine["weights"].keys() == theirs["weights"].keys() and mine["top1"] == theirs["top1"]
    assert all(torch.equal(mine["weights"][key], theirs["weights"][key]) for key in mine["weights"])


@pytest.mark.parametrize("flags, words", [
    ("--batch-size 20", ["--batch-size 20", "multiple of 8"]),
    ("--batch-size 8", ["--batch-size 8", "from 16 on"]),
    ("--pruned 2", ["--objective moco", "--pruned"]),
    ("--save-epochs 1:2:1", ["--objective moco", "--save-epochs"]),
    ("--batch-size 64", ["--batch-size 64", "48 training images"]),
    ("--image-size 72", ["--objective moco", "--image-size"]),
    ("--pretrained --backbones resnet18", ["--objective moco", "--no-pretrained"])])
def test_what_moco_cannot_do_is_told(flags, words, bare):
    line = bare.mistake("squeeze", FLAGS, flags)
    assert all(word in line for word in words)


def test_it_is_not_trained_by_several_processes(bare, monkeypatch):
    monkeypatch.setattr(moco_module, "world_size", lambda: 2)
    assert "without torchrun" in bare.mistake("squeeze", FLAGS)


def test_one_objective_is_not_taken_for_the_other(contrasted, squeezed):
    done, *_ = contrasted
    plain = FLAGS.replace("--objective moco", "")
    assert "--objective moco (now supervised)" in done.mistake("squeeze", plain)
    assert "--queue 32 (now 64)" in done.mistake("squeeze", FLAGS, "--queue 64")
    assert "--objective supervised (now moco)" in squeezed.mistake("squeeze",
                                                                   "--objective moco --backbones wrn10_1")
    printed = done.call("squeeze", FLAGS, "--crop none") and done.printed  # which it does not use
    assert "already done" in printed


def test_unfinished_work_of_one_objective_is_not_the_others(bare, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(moco_module, "knn_top1", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 0)
        squeeze.main(bare.arguments("squeeze", FLAGS))
    assert "--objective moco (now supervised)" in bare.mistake("squeeze",
                                                               FLAGS.replace("--objective moco", ""))


def test_a_supervised_result_from_before_there_was_another_objective_stays(bare):
    bare.call("squeeze")
    for name in "convnet_w8", "wrn10_1":
        path = bare.teachers / f"{name}.pt"
        record = torch.load(path, weights_only=True)
        del record["args"]["objective"], record["args"]["queue"]
        torch.save(record, path)
    path = bare.teachers / "squeeze.json"
    result = json.loads(path.read_text())
    del result["args"]["objective"], result["first_bn_variance"]
    path.write_text(json.dumps(result))
    assert bare.call("squeeze") == result
    assert "--objective supervised (now moco)" in bare.mistake("squeeze", "--objective moco")


# Table 2's figure of merit

def test_the_variance_of_the_first_batchnorms_means_is_told_for_every_backbone(bare):
    first = bare.call("squeeze", "--backbones wrn10_1")["first_bn_variance"]
    means = weights(bare)["weights"]["blocks.0.bn1.running_mean"].double()
    assert first == {"wrn10_1": pytest.approx(((means - means.mean()) ** 2).mean().item(), rel=1e-5)}
    assert f"vary by {first['wrn10_1']:.5f}" in bare.printed
    # one done before, one without
    assert bare.call("squeeze")["first_bn_variance"] == first | {"convnet_w8": None}


def test_a_probe_needs_a_linear_layer_to_replace(bare):
    weights = bare.root / "weights.pt"
    torch.save(build_model("squeezenet", 4, 16).state_dict(), weights)
    line = bare.mistake("squeeze", "--objective probe --backbones squeezenet --weights", weights)
    assert "--backbones squeezenet" in line and "it has none; name others" in line
