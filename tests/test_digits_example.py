"""What the example of the README prints and draws: who wins, and lines that can be told
apart."""

import itertools

import numpy as np
import pytest

from examples import digits
from examples.digits import plt


def run(loss, accuracy):
    return digits.Run([2.0, loss], [0.0, 1.0], 2, accuracy)


def test_every_optimizer_has_a_look_of_its_own():
    looks = [tuple(look.values()) for look in digits.LOOKS.values()]
    assert digits.LOOKS.keys() == digits.OPTIMIZERS.keys()
    assert len(set(looks)) == len(looks)
    assert set(digits.STORY) < set(digits.OPTIMIZERS)
    assert len(set(digits.STORY)) == len(digits.STORY) == 10


def test_the_winner_has_the_lowest_loss_and_its_own_accuracy():
    runs = {"sgd": run(np.nan, 0.1), "adam": run(0.2, 0.98), "lbfgs": run(0.1, 0.97)}
    said = digits.winner(runs)
    assert said.startswith(
        "Winner: lbfgs, with the lowest training loss, 0.100000, and a test accuracy of 0.9700;"
    )
    assert said.endswith("0.9800, by adam.")
    assert digits.winner(runs | {"lbfgs": run(0.1, 0.98)}).endswith(
        "0.9800, by adam and lbfgs."
    )


@pytest.mark.parametrize(
    "ends",
    [np.full(19, 1e-3), np.geomspace(1e-7, 1.0, 19), [1e-7], [1.0, np.nan, 1e-5, 1e-5]],
)
def test_names_at_the_ends_of_lines_do_not_overlap(ends):
    figure, ax = plt.subplots(figsize=(7, 5.5))
    ax.set_yscale("log")
    for index, end in enumerate(ends):
        ax.plot([0, 1], [2.0, end], label=str(index))
    digits.label_ends(ax)
    figure.canvas.draw()
    boxes = sorted(
        (text.get_window_extent() for text in ax.texts), key=lambda box: box.y0
    )
    assert sorted(text.get_text() for text in ax.texts) == sorted(
        map(str, range(len(ends)))
    )
    # pixels
    assert all(low.y1 <= high.y0 + 1.5 for low, high in itertools.pairwise(boxes))
    assert all(0 <= text.get_position()[1] <= 1 for text in ax.texts)
    plt.close(figure)
