"""Distribution matching: its loss and augmentation, BiLP's effects and thresholds, and recover.py --method
dm."""
import json
import math
import os
import shutil
import signal
from statistics import NormalDist, fmean

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import recover
from models import build_model
from tests.helpers import assert_near, randn
from tests.rank_error import leave_one_out_norms, rank_error
from utils import dm, recorder
from utils.augment import SIAMESE, apply_siamese, draw_siamese, to_uint8
from utils.data import Split, describe, load_split
from utils.dm import dm_loss, ite_norms, new_pruning, prune
from utils.presets import preset_values
from utils.run import generator


pytestmark = pytest.mark.usefixtures("seed")


def draws(family, count, size=9):
    """Draws of one family."""
    found, number = [], 0
    while len(found) < count:
        draw = draw_siamese(size, generator("test", number))
        found += [draw] if family in draw else []
        number += 1
    return found


# The augmentation

def test_every_family_is_drawn_as_often_as_the_others():
    draw = generator("families")
    counts = [next(iter(draw_siamese(8, draw))) for _ in range(3000)]
    assert all(counts.count(family) == pytest.approx(500, abs=80) for family in SIAMESE)


@pytest.mark.parametrize("family", SIAMESE)
def test_real_and_synthetic_images_get_the_same_parameters(family):
    images = randn(5, 3, 8, 8)
    changed = 0
    for draw in draws(family, 5, 8):
        together = apply_siamese(images, draw)
        assert_near(torch.cat([apply_siamese(image[None], draw) for image in images]), together, 1e-12)
        changed += not torch.equal(together, images)
    assert changed


@pytest.mark.parametrize("family", SIAMESE)
def test_the_augmentation_has_its_first_and_second_derivatives(family):
    images = randn(2, 3, 4, 4).requires_grad_()
    for draw in draws(family, 2, 4):
        assert torch.autograd.gradcheck(lambda x: apply_siamese(x, draw), images)
        assert torch.autograd.gradgradcheck(lambda x: apply_siamese(x, draw), images)


def test_colours_are_shifted_then_saturated_then_contrasted():
    images, lows, highs = randn(3, 3, 4, 4), torch.full((3,), math.inf), torch.zeros(3) - math.inf
    for draw in draws("colour", 100):
        shift, saturation, contrast = draw["colour"].double().tolist()
        lows, highs = lows.minimum(draw["colour"]), highs.maximum(draw["colour"])
        for image, result in zip(images, apply_siamese(images, draw), strict=True):
            image = image.clone() + shift
            for y in range(4):
                for x in range(4):
                    grey = image[:, y, x].mean().item()
                    image[:, y, x] = grey + saturation * (image[:, y, x] - grey)
            assert_near(result, image.mean() + contrast * (image - image.mean()), 1e-6)
    assert torch.allclose(lows, torch.tensor([-0.5, 0, 0.5]), atol=0.1)
    assert torch.allclose(highs, torch.tensor([0.5, 2, 1.5]), atol=0.1)


def test_a_crop_moves_by_up_to_an_eighth_and_zeros_enter():
    images, seen = randn(2, 3, 16, 16), set()
    for draw in draws("crop", 150, 16):
        down, right = draw["crop"][0].tolist()
        seen.add((down, right))
        padded = F.pad(images, (2, 2, 2, 2))[:, :, 2 - down:18 - down, 2 - right:18 - right]
        assert torch.equal(apply_siamese(images, draw), padded)
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


@pytest.mark.parametrize("size", [8, 9])
def test_a_cutout_is_half_as_wide_as_the_image_and_is_cut_at_the_border(size):
    images, side, corners = randn(2, 3, size, size), int(size / 2 + 0.5), set()
    for draw in draws("cutout", 200, size):
        top, left, bottom, right = draw["cutout"].tolist()
        corners.add((top, bottom))
        expected = images.clone()
        expected[:, :, top:bottom, left:right] = 0
        assert torch.equal(apply_siamese(images, draw), expected)
    centres = range(size + 1 - side % 2)
    assert corners == {(max(0, c - side // 2), min(size, c - side // 2 + side)) for c in centres}


def test_half_of_the_flips_mirror_all_images():
    images, mirrored = randn(2, 3, 8, 8), 0
    for draw in draws("flip", 100):
        result = apply_siamese(images, draw)
        mirrored += torch.equal(result, images.flip(-1))
        assert torch.equal(result, images.flip(-1) if draw["flip"] else images)
    assert 35 < mirrored < 65


@pytest.mark.parametrize("family", ["scale", "rotate"])
def test_scaling_and_rotation_read_where_torchs_affine_grid_does(family):
    images = randn(2, 3, 9, 9)
    for draw in draws(family, 20):
        theta = F.pad(draw[family].double(), (0, 1)).expand(2, -1, -1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        assert_near(apply_siamese(images, draw), F.grid_sample(images, grid, align_corners=False), 1e-6)


def test_rotation_is_torchvisions_and_by_up_to_15_degrees():
    images, angles = randn(2, 3, 9, 9), []
    for draw in draws("rotate", 100):
        angles.append(math.degrees(math.atan2(draw["rotate"][1, 0], draw["rotate"][0, 0])))
        expected = TF.rotate(images, angles[-1], InterpolationMode.BILINEAR)
        assert_near(apply_siamese(images, draw), expected, 1e-4)
    assert -15 <= min(angles) < -13 and 13 < max(angles) <= 15


def test_scales_lie_between_1_in_1_2_and_1_2_for_each_axis():
    matrices = torch.stack([draw["scale"] for draw in draws("scale", 150)])
    factors = matrices.diagonal(dim1=1, dim2=2)
    assert matrices.count_nonzero() == 300 and factors.min() == pytest.approx(1 / 1.2, abs=0.02)
    assert factors.max() == pytest.approx(1.2, abs=0.02) and factors.max() <= 1.2 and (factors[:, 0]
                                                                                       != factors[:, 1]).all()


# The loss and the effects

def test_the_loss_is_the_squared_distance_of_the_means():
    real, synthetic = randn(5, 4), randn(3, 4)
    expected = 0
    for k in range(4):
        expected += (sum(real[:, k].tolist()) / 5 - sum(synthetic[:, k].tolist()) / 3) ** 2
    assert dm_loss(real, synthetic).item() == pytest.approx(expected, rel=1e-12)


def effects(N, n, size=16, width=32, family="colour"):
    """Features of N related real images, n synthetic ones, and the function between: a random ConvNet behind
    a view."""
    net = nn.Sequential(*list(build_model(f"convnet_w{width}", 2,
                                          size).children())[:-1]).double().requires_grad_(False)
    draw, coarse = draws(family, 1, size)[0], F.interpolate(randn(N + n, 3, 4, 4), size=size, mode="bilinear")
    images = coarse + 0.3 * randn(N + n, 3, size, size)

    def embed(x):
        return net(apply_siamese(x, draw))
    return embed, images[N:], embed(images[:N])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("family", SIAMESE)
def test_the_taylor_form_in_all_directions_is_leaving_one_out(family, n):
    embed, synthetic, features = effects(8, n, family=family)
    exact = leave_one_out_norms(embed, synthetic, features)
    assert_near(ite_norms(embed, synthetic, features, products=7), exact, 1e-9)
    assert_near(ite_norms(embed, synthetic, features, products=100), exact, 1e-9)


def test_leaving_one_out_is_the_difference_of_two_gradients_by_hand():
    weight, synthetic, features = randn(12, 5), randn(2, 3, 2, 2), randn(4, 5)
    norms = leave_one_out_norms(lambda x: x.flatten(1) @ weight, synthetic, features)
    # a linear embedding: d m_s / d s_j = W / n, so the gradient at each s_j is -2/n W (m_r - m_s)
    for i in range(4):
        others = torch.stack([features[j] for j in range(4) if j != i])
        difference = 2 / 2 * weight @ (features.mean(0) - others.mean(0))
        assert norms[i].item() == pytest.approx(math.sqrt(2) * difference.norm().item(), rel=1e-12)


@pytest.mark.parametrize("n", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_ranks_of_the_effects_are_those_of_leaving_one_out_within_a_few_percent(n):
    found = {products: [] for products in (2, 16, 32)}
    for _ in range(4):
        embed, synthetic, features = effects(48, n)
        exact = leave_one_out_norms(embed, synthetic, features)
        for products, errors in found.items():
            norms = ite_norms(embed, synthetic, features, products)
            errors.append(rank_error(norms, exact))
            assert products < 32 or (norms / exact - 1).abs().max() < 0.1
        assert rank_error(torch.rand(48), exact) > 0.15 and rank_error(features.norm(dim=1),
                                                                       exact) > fmean(found[16])
    assert fmean(found[32]) < 0.02 < fmean(found[2]) and fmean(found[16]) < 0.05


@pytest.mark.parametrize("n, products, passes", [(2, 5, [10]), (20, 7, [60, 60, 20]), (70, 2, [70, 70])])
def test_effects_cost_copies_of_the_synthetic_images_whatever_the_number_of_real_ones(n, products, passes):
    calls = []
    embed, synthetic, features = effects(24, n, width=4)
    norms = ite_norms(lambda x: calls.append(len(x)) or embed(x), synthetic, features, products)
    assert calls == passes and (norms / leave_one_out_norms(embed, synthetic, features) - 1).abs().max() < 0.3


def test_over_networks_of_other_scale_the_ratio_falls_out_on_average():
    state, shares = new_pruning(1, 500), []
    for _ in range(300):
        scale = 1 + 0.1 * torch.randn(())
        shares.append(prune(state, 0, torch.arange(500), scale * (5 + 0.5 * torch.randn(500)),
                            0.3).double().mean().item())
    assert fmean(shares[50:]) == pytest.approx(0.7, abs=0.04)


def test_a_single_real_image_has_no_effect_to_compare():
    assert ite_norms(None, randn(1, 3, 8, 8), randn(1, 4)).tolist() == [0]


def test_the_rank_error_is_0_for_the_same_order_and_a_third_for_a_random_one():
    scores = torch.tensor([3.0, 1, 2, 9])
    assert rank_error(scores, scores ** 2) == 0
    assert rank_error(scores, torch.tensor([1.0, 3, 2, 9])) == (2 + 2) / 12
    assert fmean(rank_error(torch.rand(200), torch.rand(200)) for _ in range(20)) == pytest.approx(1 / 3,
                                                                                                   abs=0.02)


# The pruning

def test_running_statistics_move_by_a_tenth_and_their_normal_quantiles_decide():
    state, index = new_pruning(3, 400), torch.arange(100, 300)
    mean = var = None
    for step in range(4):
        norms = 5 + 0.1 * step + (1 + 0.2 * step) * torch.rand(200)
        values = norms.tolist()
        mean = fmean(values) if step == 0 else 0.9 * mean + 0.1 * fmean(values)
        spread = fmean((value - mean) ** 2 for value in values)
        var = spread if step == 0 else 0.9 * var + 0.1 * spread
        kept = prune(state, 1, index, norms, 0.3)
        assert state["mean"][1].item() == pytest.approx(mean, rel=1e-6)
        assert state["var"][1].item() == pytest.approx(var, rel=1e-6)
        low, high = (NormalDist(mean, math.sqrt(var)).inv_cdf(share) for share in (0.15, 0.85))
        assert kept.tolist() == [low <= value <= high for value in values]
        assert torch.equal(state["keep"][index],
                           kept) and state["keep"][:100].all() and state["keep"][300:].all()
    assert state["mean"][[0, 2]].isnan().all() and 0 < kept.sum() < 200


def test_both_tails_fall_out_and_together_they_are_the_ratio():
    state, norms = new_pruning(1, 4000), 7 + 2 * torch.randn(4000)
    kept = prune(state, 0, torch.arange(4000), norms, 0.3)
    assert kept.double().mean() == pytest.approx(0.7, abs=0.02)
    below, above = norms < norms[kept].min(), norms > norms[kept].max()
    for cut in below, above:
        assert cut.double().mean() == pytest.approx(0.15, abs=0.02)
    assert not kept[below | above].any() and (kept | below | above).all()


def test_where_none_would_be_kept_all_are_and_what_fell_out_can_return():
    state, index = new_pruning(1, 20), torch.arange(20)
    first = prune(state, 0, index, torch.arange(20.0), 0.3)
    assert 0 < first.sum() < 20
    assert prune(state, 0, index[:5], torch.full((5,), 1e6), 0.3).all()
    assert state["keep"][:5].all() and not first[:3].any() and torch.equal(state["keep"][5:], first[5:])


# recover.py --method dm

DM = "--method dm --iterations 6 --lr 1 --batch-size 8 --ipc 2 --adaptive-period 2"


@pytest.mark.slow
def test_the_loss_falls_below_that_of_the_real_images_and_writes_a_grid(project):
    losses = {}
    for lr in 0, 1:
        result = project.call("recover", DM, f"--iterations 25 --lr {lr} --tag lr{lr} --adaptive-ratio 0 "
                              f"--batch-size 12")
        lines = project.log(f"dm-ipc2-lr{lr}")[1:]
        losses[lr] = [line["dm"] for line in lines]
        assert len(lines) == 25 and all(line["kept"] == 1 for line in lines)
    # the same networks
    assert losses[0][0] == losses[1][0] and fmean(losses[1][10:]) < 0.9 * fmean(losses[0][10:])
    assert result["images"] == 8 and "teacher_top1" not in result and set(result["made_from"]) == {"data"}
    assert (project.run("dm-ipc2-lr1") / "grid.png").exists()


def test_the_images_of_two_steps_are_the_real_ones_less_the_gradients_with_momentum(project, monkeypatch):
    """Written down again: class by class, through autograd, from the same draws."""
    seen, make = [], dm.random_embedding
    monkeypatch.setattr(dm, "random_embedding",
                        lambda *args: seen.append((args[2], make(*args))) or seen[-1][1])
    project.call("recover", DM, "--iterations 2 --lr 3 --adaptive-ratio 0 --batch-size 8 --seed 4")
    assert [key for key, _ in seen] == [("dm network", 4, 0), ("dm network", 4, 1)]
    data = describe(str(project.dataset), None)
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
    train = load_split(str(project.dataset), None, "train")
    for label in range(4):
        real, moving = (train.images[train.labels == label] / 255 - mean) / std, 0
        synthetic = real[torch.randperm(12, generator=generator("init", 4, label))[:2]]
        for t, (_, embed) in enumerate(seen):
            draw = generator("dm", 4, t, label)
            view, synthetic = draw_siamese(16, draw), synthetic.detach().requires_grad_()
            some = real[torch.randperm(12, generator=draw)[:8]]
            loss = dm_loss(embed(apply_siamese(some, view)), embed(apply_siamese(synthetic, view)))
            slope, = torch.autograd.grad(loss, synthetic)
            moving = 0.5 * moving + slope
            synthetic = synthetic - 3 * moving
            assert slope.abs().max() > 0.01
        expected = (synthetic.detach() * std + mean).clamp(0, 1) * 255
        found = torch.tensor(project.images("dm-ipc2")[2 * label:2 * label + 2]).permute(0, 3, 1, 2)
        assert (found - expected).abs().max() < 0.51


def test_an_iteration_that_prunes_matches_only_what_it_keeps(project, monkeypatch):
    counts, loss = [], dm.dm_loss
    monkeypatch.setattr(dm, "prune", lambda state, label, index, *_: torch.arange(len(index)) < 3)
    monkeypatch.setattr(dm, "dm_loss",
                        lambda real, synthetic: counts.append(len(real)) or loss(real, synthetic))
    project.call("recover", DM, "--iterations 1 --adaptive-ratio 0.3 --batch-size 8")
    assert counts == [3] * 4


def test_distribution_matching_needs_no_teacher(bare):
    assert bare.call("recover", DM, "--iterations 1")["images"] == 8


def test_networks_are_fresh_in_every_iteration_and_leave_torchs_generator_alone():
    x = randn(1, 3, 16, 16).float()
    before = torch.get_rng_state()
    a, b, c = (dm.random_embedding(2, 16, ("dm network", 0, t), torch.device("cpu"))(x) for t in (0, 1, 0))
    assert torch.equal(a, c) and not torch.allclose(a, b, atol=0.01) and a.shape == (1, 128 * 4)
    assert torch.equal(before, torch.get_rng_state())
    shapes = {size: dm.random_embedding(2, size, ("x",), torch.device("cpu"))(
        torch.zeros(1, 3, size, size)).shape[1] for size in (32, 64, 128)}
    assert shapes == {32: 2048, 64: 2048, 128: 2048}                 # depth 3, 4, 5


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 4, 6])
@pytest.mark.parametrize("ratio", [0, 0.3])
def test_interrupted_matching_goes_on_to_the_same_bytes(at, ratio, squeezed, new_project, monkeypatch):
    flags, (whole,
            stopped) = f"{DM} --adaptive-ratio {ratio} --adaptive-period 3", (new_project(squeezed.dataset)
                                                                              for _ in "ab")
    for one in whole, stopped:
        shutil.copytree(squeezed.root / "runs", one.root / "runs")
    whole.call("recover", flags)
    make, calls = dm.random_embedding, []

    def interrupting(*args):
        calls.append(args)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(*args)

    monkeypatch.setattr(dm, "random_embedding", interrupting)
    with pytest.raises(SystemExit) as end:
        stopped.call("recover", flags)
    assert end.value.code == 143 and len(calls) == at
    stopped.call("recover", flags)
    assert len(calls) == 6 and stopped.outputs() == whole.outputs()


@pytest.mark.slow
def test_pruning_changes_what_is_matched_and_is_lazy(project, monkeypatch):
    read, scored = [], []
    score, split_read = dm.prune, Split.read
    monkeypatch.setattr(dm, "prune", lambda state, label, index, *rest: (
        scored.append((len(read), label, index)), score(state, label, index, *rest))[1])
    monkeypatch.setattr("utils.data.Split.read", lambda self, index: (
        read.append(index.tolist()), split_read(self, index))[1])
    project.call("recover", DM, "--iterations 5 --adaptive-period 3 --adaptive-ratio 0.5 --batch-size 100")
    assert len(read) == 4 + 5 * 4 and [label for _, label, _ in scored] == 2 * [0, 1, 2, 3]
    batches = [read[4 + 4 * t:8 + 4 * t] for t in range(5)]
    for label in range(4):
        everything = set(range(12 * label, 12 * label + 12))
        assert set(batches[0][label]) == set(batches[3][label]) == everything            # scored: of all
        kept = set(batches[1][label])
        assert kept == set(batches[2][label]) and kept < everything  # in between: of those kept
    shares = [line["kept"] for line in project.log("dm-ipc2")[1:]]
    assert shares[0] == shares[1] == shares[2] == fmean(len(batches[1][label]) / 12 for label in range(4)) < 1
    pruned = project.images("dm-ipc2")
    project.call("recover", DM, "--iterations 5 --adaptive-ratio 0 --batch-size 100 --tag all")
    plain = project.images("dm-ipc2-all")
    assert (pruned != plain).any()


def test_a_state_is_plain_and_read_back(tmp_path):
    state = new_pruning(2, 5)
    prune(state, 0, torch.arange(3), torch.rand(3), 0.3)
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(again[key].nan_to_num(), state[key].nan_to_num()) for key in state)


@pytest.mark.parametrize("flags, told", [("--ipc 13", "--ipc 13 is more than the 12"),
                                         ("--adaptive-ratio 1", "--adaptive-ratio"),
                                         ("--lr 1e30 --iterations 3", "not finite")])
def test_mistakes_end_in_a_line(flags, told, project, capsys):
    with pytest.raises(SystemExit) as end:
        project.call("recover", DM, flags)
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_distilled_images_train_a_student_by_their_classes(project):
    project.call("recover", DM)
    result = project.call("train_eval", "--method dm --labels hard")
    assert result["method"] == "dm" and result["labels"] == "hard"
    assert json.loads((project.run("dm-ipc2")
                       / "eval/convnet_w8-hard.json").read_text())["top1"] == result["top1"]


@pytest.mark.slow
def test_streamed_images_are_matched_too(bare):
    bare.call("squeeze", "--image-size 72 --crop resized --epochs 1 --backbones convnet_w8")
    bare.call("recover", DM, "--iterations 2 --image-size 72 --batch-size 3 --adaptive-ratio 0.3")
    assert bare.images("dm-ipc2").shape == (8, 72, 72, 3)


def test_images_that_squeezing_pruned_are_never_matched(bare, monkeypatch):
    bare.call("squeeze", "--prune-ratio 0.5 --score-trials 1 --score-epochs 1")
    read, split_read = set(), Split.read
    monkeypatch.setattr(Split, "read", lambda split,
                        index: (read.update(index.tolist()), split_read(split, index))[1])
    bare.call("recover", DM, "--batch-size 100")
    assert read == set(torch.load(bare.teachers / "convnet_w8.pt",
                                  weights_only=True)["kept"].tolist()) and len(read) == 24


def test_matching_may_start_from_noise_and_then_shows_it(project):
    project.call("recover", DM, "--init noise --iterations 1 --lr 0")
    data = describe(str(project.dataset), None)
    expected = to_uint8(torch.stack([recover.noise(label, index, 16, 0) for label in range(4)
                                     for index in range(2)]),
                                data["mean"], data["std"])
    assert torch.equal(expected.permute(0, 2, 3, 1).long(), torch.tensor(project.images("dm-ipc2")))


def test_the_settings_are_those_of_table_12():
    expected = {("cifar10", 1): (0.1, 10), ("cifar10", 10): (0.3, 5), ("cifar10", 50): (0.1, 5),
                ("cifar100", 1): (0.6, 10), ("cifar100", 10): (0.4, 10)}
    for (dataset, ipc), (alpha, period) in expected.items():
        squeezing, recovering = (preset_values("paper", dataset, phase, ipc, "bilp")
                                 for phase in ("squeeze", "recover"))
        assert (squeezing["prune_ratio"], recovering["adaptive_ratio"],
                recovering["adaptive_period"]) == (alpha, 0.3, period)
        assert squeezing["teachers"] == recovering["teachers"] == f"bilp-{alpha}"
    plain = recover.get_parser().parse_args([])
    assert plain.adaptive_ratio == 0 and "adaptive_ratio" not in preset_values("paper", "cifar10", "recover",
                                                                               10, "dm")


def test_dm_images_that_are_written_are_not_made_again(project, monkeypatch):
    def killed(self, *others):
        raise InterruptedError

    with pytest.raises(InterruptedError), monkeypatch.context() as patched:
        patched.setattr(recorder.Recorder, "finish", killed)
        project.call("recover", "--method dm --iterations 2")
    monkeypatch.setattr(dm, "random_embedding", None)
    assert project.call("recover", "--method dm --iterations 2")["images"] == 8


@pytest.mark.parametrize("flags", ["--method random --mosaic 3", "--method dm --stay 0.5 --iterations 1"])
def test_flags_of_starts_are_no_mistake_where_nothing_starts_so(flags, project):
    project.call("recover", flags)
    assert "has no effect without --method" in project.printed
