"""Selections against loops that compute everything anew, and at their edges."""
import math

import pytest
import torch

from tests.helpers import assert_near, randn
from tests import rank_error
from utils.selection import (count_forgetting, drop_largest, herding, k_center, last_epoch_weights,
                             lowest_loss_crops, mosaic, most_forgotten)


pytestmark = pytest.mark.usefixtures("seed")


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows)]


# Coresets

@pytest.mark.parametrize("n,d,count", ((1, 3, 1), (9, 2, 9), (15, 4, 6), (20, 1, 7)))
def test_herding_is_greedy_in_the_distance_of_the_means(n, d, count):
    rows = (randn(n, d) + 3).tolist()
    chosen = []
    for _ in range(count):
        chosen.append(min((i for i in range(n) if i not in chosen),
                          key=lambda i: math.dist(mean(rows), mean([rows[j] for j in (*chosen, i)]))))
    assert herding(torch.tensor(rows, dtype=torch.float64), count).tolist() == chosen


@pytest.mark.parametrize("n,d,count", ((1, 3, 1), (9, 2, 9), (15, 4, 6), (20, 1, 7)))
def test_k_center_starts_at_the_mean_and_goes_to_the_farthest(n, d, count):
    rows = (randn(n, d) + 3).tolist()
    chosen = [min(range(n), key=lambda i: math.dist(rows[i], mean(rows)))]
    while len(chosen) < count:
        chosen.append(max((i for i in range(n) if i not in chosen),
                          key=lambda i: min(math.dist(rows[i], rows[j]) for j in chosen)))
    assert k_center(torch.tensor(rows, dtype=torch.float64), count).tolist() == chosen


@pytest.mark.parametrize("select", (herding, k_center))
def test_of_equal_images_the_first_is_chosen_and_none_twice(select):
    features = torch.tensor([[0.0], [1.0], [1.0], [1.0], [2.0], [2.0], [0.0]])
    assert select(features, 1).tolist() == [1]
    assert sorted(select(features, 7).tolist()) == list(range(7))
    assert select(torch.ones(4, 2), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("select", (herding, k_center, lowest_loss_crops))
def test_more_images_than_there_are_or_none_cannot_be_selected(select):
    for count in 0, 6:
        with pytest.raises(ValueError, match=f"cannot select {count} of 5"):
            select(randn(5, 2), count)


# Forgetting

def test_forgetting_events_of_four_images_over_six_epochs():
    history = torch.tensor([[1, 1, 1, 1, 1, 1],             # never forgotten
                            [1, 0, 1, 0, 0, 1],             # twice
                            [0, 0, 0, 0, 0, 0],             # never learned
                            [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    events, learned, before = torch.zeros(4, dtype=torch.long), torch.zeros(4).bool(), torch.zeros(4).bool()
    for right in history.T:
        events, learned = count_forgetting(events, learned, before, right)
        before = right
    assert events.tolist() == [0, 2, 0, 1] and learned.tolist() == [True, True, False, True]
    assert most_forgotten(events, learned, 4).tolist() == [2, 1, 3, 0]


def test_the_most_forgotten_come_first_and_those_never_learned_before_them():
    events = torch.randint(4, (60,))
    learned = torch.rand(60) > 0.2
    expected = sorted(range(60), key=lambda i: (-math.inf if not learned[i] else -int(events[i]), i))
    assert most_forgotten(events, learned, 60).tolist() == expected
    assert most_forgotten(events, learned, 25).tolist() == expected[:25]
    with pytest.raises(ValueError, match="cannot select 61 of 60"):
        most_forgotten(events, learned, 61)


# BiLP

def smoothed(curve, sigma):
    """The whole curve through a Gaussian filter of 4 sigma, mirrored at its ends as often as needed."""
    radius = int(4 * sigma + 0.5)
    kernel = [math.exp(-o * o / (2 * sigma ** 2)) for o in range(-radius, radius + 1)]
    ends = list(curve)
    while len(ends) < len(curve) + 2 * radius:
        ends = [*ends, *ends[::-1]]
    mirrored = [ends[-1 - i] for i in range(radius)][::-1] + ends   # ends starts and ends with curve[0]
    return [sum(k * mirrored[t + i] for i, k in enumerate(kernel)) / sum(kernel) for t in range(len(curve))]


@pytest.mark.parametrize("sigma", (0.5, 3.0))
@pytest.mark.parametrize("epochs", (1, 2, 5, 12, 13, 40))
def test_last_epoch_weights_give_the_last_value_of_the_filtered_curve(epochs, sigma):
    curve, weights = randn(epochs), last_epoch_weights(epochs, sigma)
    assert_near((weights * curve).sum(), smoothed(curve.tolist(), sigma)[-1], 1e-12)
    assert_near(weights.sum(), 1.0, 1e-12)


def test_the_filter_is_scipys():
    # scipy.ndimage.gaussian_filter1d([1, 4, 9, 16, 25], 1.0)[-1], by its definition: d c b a | a b c d e | e
    # d c b
    g = [math.exp(-o * o / 2) for o in range(5)]
    expected = (g[0] * 25 + g[1] * (16 + 25) + g[2] * (9 + 16) + g[3] * (4 + 9) + g[4]
                * (1 + 4)) / (2 * sum(g) - 1)
    assert_near((last_epoch_weights(5, 1.0) * torch.arange(1, 6).square()).sum(), expected, 1e-12)


def test_the_last_eight_epochs_have_99_percent_of_the_weight():
    weights = last_epoch_weights(100)
    assert round(weights[-8:].sum().item(), 3) == 0.992
    assert (weights[1:] >= weights[:-1]).all()


@pytest.mark.parametrize("ratio", (0.0, 0.1, 0.3, 0.75, 1.0))
def test_drop_largest_drops_the_floor_of_the_ratio_of_each_class(ratio):
    labels = torch.randint(4, (50,)) * 3                                # uneven classes, not numbered through
    scores = torch.randint(6, (50,)).double()                           # many equal
    kept = []
    for label in set(labels.tolist()):
        members = sorted((i for i in range(50) if labels[i] == label), key=lambda i: (-scores[i], i))
        kept += members[math.floor(ratio * len(members)):]
    assert drop_largest(scores, labels, ratio).tolist() == sorted(kept)


# RDED

@pytest.mark.parametrize("factor", [1, 2, 3])
def test_a_mosaic_has_each_image_once_small_in_its_place(factor):
    images = torch.randn(factor ** 2 * 4, 3, 12, 12, dtype=torch.float64)
    size, out = 12 // factor, mosaic(images, factor)
    assert out.shape == (4, 3, 12, 12)
    for n in range(4):
        for row in range(factor):
            for column in range(factor):
                image = images[(row * factor + column) * 4 + n]
                for y in range(size):
                    for x in range(size):
                        mean = image[:, y * factor:(y + 1) * factor, x * factor:(x + 1) * factor].mean((1, 2))
                        assert torch.allclose(out[n, :, row * size + y, column * size + x], mean)


def test_lowest_loss_crops_are_each_images_best_in_ascending_order():
    losses = torch.randint(8, (12, 5)).double()
    best = [min(range(5), key=lambda crop: losses[i, crop]) for i in range(12)]
    order = sorted(range(12), key=lambda i: (losses[i, best[i]], i))[:7]
    images, crops = lowest_loss_crops(losses, 7)
    assert images.tolist() == order and crops.tolist() == [best[i] for i in order]


@pytest.mark.slow
def test_the_rank_error_of_the_taylor_form_is_printed_and_small_and_none_with_enough_directions(capsys):
    rank_error.main(["--ipc", "2", "--batch", "12", "--products", "11", "--classes", "2", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("mean")
    assert float(lines[-1].split()[1]) <= 2.0  # of equal ranks up to rounding: 11 directions are all
