"""Eqs. 1, 3-6, 8, 10 and 11 against slow loops over numbers, in value and gradient, and at their edges."""
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from tests.helpers import assert_near, gradient, randn
from utils.losses import (class_members, data_densification, densification_closed_form, ensemble_logits,
                          kl_loss, mse_gt_loss, pooled_rows, sds_match)

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("seed")


# Eqs. 1, 6, 10 and 12-15: matching of a statistic

def sds_loop(history, target, alpha):
    """One group's statistics up to now, lists of numbers -> loss, its gradient at the last of them, moving
    average."""
    ema = history[0]
    for current in history[1:]:
        ema = [alpha * past + (1 - alpha) * now for past, now in zip(ema, current)]
    norm = math.sqrt(sum((e - t) ** 2 for e, t in zip(ema, target)))
    return norm, [(e - t) / norm for e, t in zip(ema, target)], ema


@pytest.mark.parametrize("alpha", (0.0, 0.4, 0.8))
@pytest.mark.parametrize("groups", (1, 3))
def test_sds_match_is_eq_6_over_many_batches_and_its_gradient_eq_15(groups, alpha):
    target, ema, history = randn(5), None, []
    for _ in range(5):
        history.append(randn(groups, 5))
        before = None if ema is None else ema.clone()
        leaf = history[-1].clone().requires_grad_()
        loss, new = sds_match(leaf, target, ema, alpha)
        assert ema is None or torch.equal(ema, before)
        ema = new
        norms, units, emas = zip(*(sds_loop([h[g].tolist() for h in history], target.tolist(), alpha)
                                   for g in range(groups)))
        assert_near(loss, sum(norms), 1e-12)
        assert_near(torch.autograd.grad(loss, leaf)[0], units, 1e-12)       # of weight 1, not 1 - alpha
        assert_near(ema, emas, 1e-12)
        assert not ema.requires_grad


def test_the_value_of_sds_match_is_the_distance_of_the_average_and_the_gradient_a_unit_vector():
    current, target, past = randn(1, 6), randn(6), randn(1, 6)
    (value, ema), slope = sds_match(current, target, past, 0.8), gradient(
        lambda x: sds_match(x, target, past, 0.8)[0], current)[1]
    assert_near(value, (0.8 * past + 0.2 * current - target).norm(), 1e-12)
    assert_near(slope.norm(), 1.0, 1e-12)


def test_alpha_0_is_eq_1_whatever_the_past():
    current, target = randn(2, 4), randn(4)
    eq_1 = gradient(lambda x: sum((row - target).square().sum().sqrt() for row in x), current)
    for past in None, randn(2, 4):
        for actual, expected in zip(gradient(lambda x: sds_match(x, target, past, 0.0)[0], current), eq_1):
            assert_near(actual, expected, 1e-12)
    assert gradcheck(lambda x: sds_match(x, target, past, 0.0)[0], current.requires_grad_())


def test_the_first_batch_is_its_own_average():
    current, target = randn(2, 4), randn(4)
    first, ema = sds_match(current, target, None, 0.8)
    assert torch.equal(ema, current)
    assert_near(first, sds_match(current, target, None, 0.0)[0], 1e-12)


def test_at_norm_0_value_and_gradient_of_sds_match_are_0():
    target, other = randn(4), randn(4)
    current = torch.stack([target, other])  # the second group is not there yet
    value, slope = gradient(lambda x: sds_match(x, target, None, 0.8)[0], current)
    assert_near(value, (other - target).norm(), 1e-12)
    assert torch.equal(slope[0], torch.zeros(4, dtype=torch.float64))
    assert_near(slope[1], (other - target) / (other - target).norm(), 1e-12)


# Eqs. 4 and 5: densification

def pooled_loop(images):
    """Eq. 4, one window after the other: of n along H, window i has the rows from i H / n, rounded down, to
    (i + 1) H / n, rounded up."""
    rows, columns = ([slice(i * side // n, -(-(i + 1) * side // n)) for i in range(n)]
                     for side in images.shape[2:] for n in [min(side, 32)])
    windows = [images[:, :, row, column].mean((2, 3)) for row in rows for column in columns]
    return torch.stack(windows, dim=2).flatten(1)


def softmax(values):
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def densification_loop(images, labels, tau, scale, target=None):
    """Eq. 5, class after class; `target` are the images of the term under stop_grad, by default the same."""
    def spectrum(rows):
        gram = np.array([[a @ b for b in rows] for a in rows]) / (rows.shape[1] if scale == "mean" else 1)
        return sorted(np.linalg.eigvals(gram).real.tolist())

    total, moved = 0.0, pooled_loop(images).numpy()
    held = moved if target is None else pooled_loop(target).numpy()
    for label in set(labels.tolist()):
        mine = (labels == label).numpy()
        p, q = softmax([value / tau for value in spectrum(held[mine])]), softmax(spectrum(moved[mine]))
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))
    return total


def both_densifications(images, labels, tau=4.0, scale="sum"):
    """(value, gradient) of the plain and of the closed form."""
    members = class_members(labels)
    return (gradient(lambda x: data_densification(x, labels, tau, scale), images),
            gradient(lambda x: densification_closed_form(x, members, tau, scale), images))


@pytest.mark.parametrize("size", (8, 32, 48, 64, 72, 224))
def test_eq_4_averages_down_to_32_pixels_and_keeps_smaller_images(size):
    images = randn(2, 3, size, size)
    assert_near(pooled_rows(images), pooled_loop(images), 1e-13)
    if size <= 32:
        assert torch.equal(pooled_rows(images), images.flatten(1))


def test_scale_mean_divides_the_gram_matrix_by_the_length_of_its_rows():
    images = randn(3, 3, 64, 64)
    whole, mean = pooled_rows(images), pooled_rows(images, "mean")
    assert_near(mean @ mean.T, whole @ whole.T / 3072, 1e-13)


@pytest.mark.parametrize("size, scale, contrast", [
    (8, "sum", 0.1), (32, "sum", 0.02), (64, "sum", 0.04), (32, "mean", 1.0), (64, "mean", 2.0)])
@pytest.mark.parametrize("tau", (1.0, 2.0, 4.0))
def test_densification_is_eq_5_and_pulls_at_the_side_without_stop_grad(size, scale, contrast, tau):
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    images = contrast * (randn(6, 3, size, size) + randn(1, 3, size, size))  # alike, as images of a class are
    value, slope = gradient(lambda x: data_densification(x, labels, tau, scale), images)
    assert abs(value.item() - densification_loop(images, labels, tau, scale)) < 1e-10
    if tau == 1:                                                                    # both sides are the same
        assert slope.abs().max() < 1e-12
        return
    assert value > 1e-3
    for _ in range(2):
        step = 1e-5 * contrast * randn(*images.shape)
        ahead, behind = (densification_loop(images + sign * step, labels, tau, scale, images)
                         for sign in (1, -1))
        assert (slope * step).sum().item() == pytest.approx((ahead - behind) / 2, rel=1e-4)


@pytest.mark.parametrize("size, scale", [(16, "sum"), (32, "sum"), (64, "sum"), (32, "mean"), (64, "mean")])
@pytest.mark.parametrize("labels", [
    (0, 0, 0, 0), (3, 1, 0, 3, 2, 1, 3, 2, 3, 1), (0, 0, 1, 1, 2, 2), (5, 5, 5, 9)], ids=str)
def test_the_closed_form_is_eq_5_in_value_and_gradient_for_classes_of_any_size(size, scale, labels):
    images = randn(len(labels), 3, size, size) * (0.03 if scale == "sum" else 1)
    for plain, closed in zip(*both_densifications(images, torch.tensor(labels), 4.0, scale)):
        assert_near(closed, plain, 1e-9)


def test_equal_eigenvalues_have_the_gradient_of_the_closed_form():
    images, norms = torch.zeros(3, 3, 4, 4, dtype=torch.float64), torch.tensor([1.0, 1.0, 2.0],
                                                                               dtype=torch.float64)
    images.flatten(1)[:, :3] = norms.diag()                                         # eigenvalues 1, 1, 4
    weight = norms.square().softmax(0) - (norms.square() / 4).softmax(0)
    for value, slope in both_densifications(images, torch.zeros(3)):
        assert_near(value, densification_loop(images, torch.zeros(3), 4.0, "sum"), 1e-12)
        assert_near(slope, 2 * weight[:, None, None, None] * images, 1e-12)


def test_one_image_a_class_is_exactly_0_with_gradient_0():
    images, labels = randn(4, 3, 8, 8), torch.tensor([3, 0, 2, 1])
    value, slope = gradient(lambda x: data_densification(x, labels), images)
    assert value == 0 and not slope.any()
    assert class_members(labels) == []
    value, slope = gradient(lambda x: densification_closed_form(x, [torch.arange(4)[:, None]]), images)
    assert value == 0 and not slope.any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("scale", ("sum", "mean"))
def test_identical_images_stay_finite_and_the_same_in_both_forms(scale, dtype):
    images = torch.randn(1, 3, 32, 32, dtype=dtype).expand(6, -1, -1, -1) * 0.5
    plain, closed = both_densifications(images, torch.zeros(6), 4.0, scale)
    for a, b in zip(plain, closed):
        assert a.isfinite().all() and b.isfinite().all()
        assert_near(b, a, 1e-3 if dtype == torch.float32 else 1e-9)


def test_as_written_eq_5_vanishes_in_float32_for_images_that_share_half_their_variance():
    images = (torch.randn(10, 3, 32, 32) + torch.randn(1, 3, 32, 32)) / 2 ** 0.5
    for value, slope in both_densifications(images, torch.zeros(10)):
        assert value == 0 and not slope.any()  # the two largest eigenvalues are 15,000 apart
    for value, slope in both_densifications(images, torch.zeros(10), scale="mean"):
        assert value > 0.1 and slope.abs().max() > 0


def test_the_gradients_of_classes_and_of_a_weight_add_up():
    images, labels = 0.03 * randn(6, 3, 16, 16), torch.tensor([0, 1, 0, 1, 0, 1])
    members = class_members(labels)
    value, slope = gradient(lambda x: 3 * densification_closed_form(x, members), images)
    parts = [gradient(lambda x: data_densification(x, labels[labels == y]), images[labels == y])
             for y in (0, 1)]
    assert_near(value, 3 * (parts[0][0] + parts[1][0]), 1e-9)
    for y in 0, 1:
        assert_near(slope[labels == y], 3 * parts[y][1], 1e-9)


def test_class_members_holds_each_image_of_a_shared_class_once_and_classes_of_one_size_together():
    labels = torch.tensor([7, 3, 7, 1, 3, 9, 7, 2, 2, 1, 8, 8, 8])
    members = class_members(labels)
    assert sorted(index.shape for index in members) == [(2, 3), (3, 2)]             # 7 and 8; 1, 2 and 3
    rows = sorted(row for index in members for row in index.tolist())
    assert rows == sorted([[0, 2, 6], [10, 11, 12], [1, 4], [3, 9], [7, 8]])


# Eqs. 3, 8 and 11: labels and losses of the student

def ensemble_loop(logits, normalize):
    K, B, C = len(logits), len(logits[0]), len(logits[0][0])
    norms = [math.sqrt(sum(value ** 2 for row in backbone for value in row)) for backbone in logits]
    weights = [sum(norms) / (K * norm) if normalize else 1 for norm in norms]
    return [[sum(weights[k] * logits[k][b][c] / K for k in range(K)) for c in range(C)] for b in range(B)]


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("K", (1, 4))
def test_ensemble_logits_is_eq_8(K, normalize):
    logits = randn(K, 3, 5) * torch.arange(1, K + 1)[:, None, None]
    assert_near(ensemble_logits(logits, normalize), ensemble_loop(logits.tolist(), normalize), 1e-12)
    assert gradcheck(lambda z: ensemble_logits(z, normalize), logits.requires_grad_())


def test_logit_normalisation_gives_each_backbone_the_same_say():
    first, second = randn(1, 3, 5), randn(1, 3, 5)
    direction = ensemble_logits(torch.cat([first, second]), True)
    louder = ensemble_logits(torch.cat([first, 100 * second]), True)
    assert_near(louder / louder.norm(), direction / direction.norm(), 1e-12)
    assert_near(ensemble_logits(first, True), first[0], 1e-12)


@pytest.mark.parametrize("gamma", (0.0, 0.15))
def test_mse_gt_is_eq_11_with_the_mean_over_images_and_classes(gamma):
    student, soft, labels = randn(4, 5), randn(4, 5), torch.tensor([0, 3, 3, 1])
    squares = sum((f - z) ** 2 for f, z in zip(student.flatten().tolist(), soft.flatten().tolist())) / 20
    entropy = -sum(math.log(softmax(row)[y]) for row, y in zip(student.tolist(), labels.tolist())) / 4
    assert_near(mse_gt_loss(student, soft, labels, gamma), squares + gamma * entropy, 1e-12)
    assert gradcheck(lambda f: mse_gt_loss(f, soft, labels, gamma), student.requires_grad_())


@pytest.mark.parametrize("T", (1.0, 20.0))
def test_kl_loss_is_the_divergence_from_the_labels_of_eq_3_without_a_factor_T_squared(T):
    student, soft = 3 * randn(4, 5), 3 * randn(4, 5)
    total, slopes = 0.0, []
    for f, z in zip(student.tolist(), soft.tolist()):
        p, q = softmax([value / T for value in z]), softmax([value / T for value in f])
        total += sum(a * math.log(a / b) for a, b in zip(p, q)) / 4
        slopes.append([(b - a) / (T * 4) for a, b in zip(p, q)])
    value, slope = gradient(lambda f: kl_loss(f, soft, T), student)
    assert_near(value, total, 1e-11)
    assert_near(slope, slopes, 1e-11)
    assert gradcheck(lambda f, z: kl_loss(f, z, T), (student.requires_grad_(), soft.requires_grad_()))


# These files can be taken away one by one

@pytest.mark.slow
def test_equations_and_architectures_work_in_a_folder_without_the_project(tmp_path):
    paths = [ROOT / "utils" / f"{name}.py" for name in ("losses", "stats", "augment")]
    paths += [path for path in sorted((ROOT / "models").glob("*.py")) if path.stem != "__init__"]
    program = (f"import sys\nimport {', '.join(path.stem for path in paths)}\n"
               "sys.exit(any(name.split('.')[0] in ('utils', 'models') for name in sys.modules))")
    for path in paths:
        (tmp_path / path.name).write_text(path.read_text())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment,
                            stderr=subprocess.PIPE)
    assert result.returncode == 0, result.stderr.decode()
