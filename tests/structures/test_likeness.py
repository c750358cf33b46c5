"""Likeness of elements: what votes are, and that learning tells the types of left-out crystals better."""

import math
from itertools import permutations

import numpy as np
import pytest

from crystallm_kit.structures.likeness import Family, count_weights, learn_likeness, log_votes, orders

NA, CL, K, BR, RB, CS = 11, 17, 19, 35, 37, 55


def halides():
    """AB with halogens: the alkali decides the type, 0 or 1; formulas all differ."""
    rows = [((a, x), int(a == CS)) for a in (NA, K, RB, CS) for x in (9, CL, BR, 53)]
    number = np.arange(len(rows))
    elements, kinds = np.array([r for r, _ in rows]), np.array([k for _, k in rows])
    return Family((1, 1), elements, kinds, number, number, 225 - 4 * kinds)


def left_out_log_share(kernel, family):
    """Return the mean log share of the true types, crystal by crystal, without numpy's broadcasting."""
    total = 0.0
    for row, elements in enumerate(family.elements):
        true = every = 0.0
        for order in permutations(elements.tolist()):
            for other in range(len(family.elements)):
                if other == row:
                    continue
                weights = count_weights(family.counts)
                vote = sum(
                    w * kernel[a, b] for w, a, b in zip(weights, order, family.elements[other], strict=True)
                )
                vote = math.exp(vote) + math.exp(-12)
                every += vote
                same = family.kinds[other] == family.kinds[row] and list(order) == elements.tolist()
                true += vote * same
        total += math.log(true / every)
    return total / len(family.elements)


def test_learning_raises_the_log_share_of_the_true_types():
    family = halides()
    before, after = learn_likeness([family], steps=0), learn_likeness([family], steps=60)
    gain = left_out_log_share(after.log_kernel, family) - left_out_log_share(before.log_kernel, family)
    assert gain > 0.1
    assert after.log_kernel[NA, K] > after.log_kernel[NA, CS]


def test_votes_are_what_the_definition_gives_one_by_one():
    family = halides()
    kernel = learn_likeness([family], steps=0).log_kernel
    ways = np.array(list(orders({CS: 1, CL: 1})))
    votes = log_votes(kernel, ways, family)
    for way, row in ((0, 0), (1, 5), (0, 13)):
        a, b = family.elements[row]
        plain = kernel[ways[way, 0], a] + kernel[ways[way, 1], b]  # equal counts weigh 1 each
        assert votes[way, row] == pytest.approx(math.log(math.exp(plain) + math.exp(-12)))


def test_likeness_is_symmetric_and_greatest_with_itself():
    kernel = learn_likeness([halides()], steps=20).log_kernel
    assert np.allclose(kernel, kernel.T)
    assert (np.diag(kernel) == 0).all()
    assert kernel[1:, 1:][~np.eye(103, dtype=bool)].max() < 0


def test_orders_arrange_the_elements_of_one_count():
    assert set(orders({8: 3, 22: 1, 56: 1})) == {(22, 56, 8), (56, 22, 8)}
