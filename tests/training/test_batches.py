"""batches.py: each example once; nobody sees padding; both layouts hold the same examples."""

import numpy as np
import pytest
import torch

from crystallm_kit.errors import EmptyInput, ReadError
from crystallm_kit.tokens.drawing import Examples, StoredInfo, VocabularyInfo
from crystallm_kit.training.batches import (
    IGNORED,
    ArraySource,
    DeviceExamples,
    Layout,
    open_source,
    write_arrays,
)

INFO = StoredInfo(VocabularyInfo(50, 0, 1, None, {"Na": 5}), "wyckoff", {"decimals": 4}, "kit-1", "ab" * 32)


def ragged(texts: list[list[int]], prompts: list[int]) -> Examples:
    offsets = np.concatenate(([0], np.cumsum([len(text) for text in texts])))
    return Examples(np.concatenate([np.array(text) for text in texts]), offsets, np.array(prompts))


def random_examples(n: int, seed: int) -> Examples:
    random = np.random.default_rng(seed)
    texts = [random.integers(2, 50, random.integers(5, 60)).tolist() for _ in range(n)]
    return ragged(texts, [3] * n)


def layout(packed: bool, **changes) -> Layout:
    settings = {"batch_tokens": 512, "micro_tokens": 512, "max_length": 64, "loss_on_prompt": True, **changes}
    return Layout(packed=packed, **settings)


def pairs_of(examples: Examples, layout: Layout, order=None) -> list[tuple[int, int, int]]:
    """Return (input, position, label) of every position with a loss, over an epoch."""
    device = DeviceExamples(
        examples, torch.device("cpu"), pad_token_id=0, loss_on_prompt=layout.loss_on_prompt
    )
    found: list[tuple[int, int, int]] = []
    for step in layout.epoch(examples, order):
        for group in step.groups:
            batch = device.batch(group)
            positions = batch.positions.expand_as(batch.inputs)
            paid = batch.labels != IGNORED
            columns = (batch.inputs[paid], positions[paid], batch.labels[paid])
            found.extend(zip(*(column.tolist() for column in columns), strict=True))
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_two_examples_become_these_inputs_and_labels(packed, loss_on_prompt):
    examples = ragged([[7, 8, 9, 1], [5, 6, 1]], [2, 1])
    found = pairs_of(examples, layout(packed, loss_on_prompt=loss_on_prompt))
    # by hand: (input, position, label); the first example's second token is prompt
    expected = [(7, 0, 8), (8, 1, 9), (9, 2, 1), (5, 0, 6), (6, 1, 1)]
    assert sorted(found) == sorted(expected if loss_on_prompt else expected[1:])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_processes", [1, 2])
def test_an_epoch_holds_every_pair_of_tokens_once(packed, n_processes):
    examples = random_examples(200, seed=1)
    found = pairs_of(examples, layout(packed, n_processes=n_processes), np.random.default_rng(3))
    expected = []
    for start, end in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        text = examples.tokens[start:end].tolist()
        expected.extend(zip(text[:-1], range(len(text)), text[1:], strict=False))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("packed", [False, True])
def test_the_seed_fixes_the_steps_and_another_shuffles_them(packed):
    examples = random_examples(100, seed=1)

    def rows(seed: int) -> list[list[int]]:
        steps = layout(packed).epoch(examples, np.random.default_rng(seed))
        return [[row for group in step.groups for row in group.rows.tolist()] for step in steps]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


@pytest.mark.parametrize("packed", [False, True])
def test_steps_are_alike_in_tokens_and_count_their_targets(packed):
    examples = random_examples(400, seed=2)
    steps = list(layout(packed, loss_on_prompt=False).epoch(examples, np.random.default_rng(1)))
    tokens = [step.n_tokens for step in steps]
    assert sum(tokens) == len(examples.tokens) - 400
    assert sum(step.n_targets for step in steps) == len(examples.tokens) - 400 - 2 * 400
    assert max(tokens) - min(tokens) < 3 * 60
    assert max(tokens) < 1.25 * 512


def test_packs_have_one_shape_whatever_they_hold():
    examples = random_examples(300, seed=3)
    groups = [g for step in layout(True).epoch(examples) for g in step.groups]
    assert {g.n_positions for g in groups} == {512}
    assert len({len(g.rows) for g in groups}) == 1
    assert all(int(g.lengths.sum()) == 512 and g.lengths.max() <= g.longest for g in groups)


def test_padded_groups_waste_less_than_a_tenth_on_lengths_like_those_of_crystals():
    random = np.random.default_rng(1)
    lengths = np.clip(random.lognormal(3.75, 0.35, 5_000), 16, 250).astype(int)
    examples = Examples(
        np.full(lengths.sum(), 7), np.concatenate(([0], np.cumsum(lengths))), np.zeros(5_000, int)
    )
    wide = layout(False, batch_tokens=65_536, micro_tokens=65_536, max_length=256)
    steps = list(wide.epoch(examples, random))
    padded = sum(group.n_padded for step in steps for group in step.groups)
    assert sum(step.n_tokens for step in steps) / padded > 0.9


def test_each_process_gets_as_many_groups_of_the_same_shape():
    examples = random_examples(123, seed=4)
    for packed in (False, True):
        two = layout(packed, n_processes=2)
        for step in two.epoch(examples, np.random.default_rng(1)):
            first, second = ([(len(g.rows), g.n_positions) for g in two.own(step, i)] for i in (0, 1))
            assert first == second


def test_groups_fit_into_memory():
    narrow = layout(False, micro_tokens=128)
    groups = [g for step in narrow.epoch(random_examples(200, seed=5)) for g in step.groups]
    assert max(group.n_padded for group in groups) <= 128


def test_long_examples_are_left_out_whole():
    examples = ragged([[7, 8, 1], [9] * 100], [0, 0])
    assert pairs_of(examples, layout(True)) == [(7, 0, 8), (8, 1, 1)]
    with pytest.raises(EmptyInput, match="no example of 2 to 64 tokens among 1"):
        list(layout(True).epoch(ragged([[9] * 100], [0])))


def test_arrays_come_back_as_they_were_written_and_epochs_repeat(tmp_path):
    epochs = [random_examples(5, seed=i) for i in range(2)]
    write_arrays(tmp_path / "a.npz", epochs, random_examples(3, seed=9), INFO)
    source = open_source(tmp_path / "a.npz")
    assert isinstance(source, ArraySource)
    assert source.info == INFO
    for epoch in range(4):
        for read, written in zip(source.examples(epoch), epochs[epoch % 2], strict=True):
            np.testing.assert_array_equal(read, written)
    np.testing.assert_array_equal(source.validation().tokens, random_examples(3, seed=9).tokens)
    assert len(source.sha256) == 64


def test_a_file_that_is_no_corpus_is_refused_by_name(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(ReadError, match=r"x\.npz: not a corpus"):
        open_source(tmp_path / "x.npz")
    with pytest.raises(ReadError, match=r"none\.npz: not a corpus"):
        open_source(tmp_path / "none.npz")
    np.savez(tmp_path / "y.npz", a=np.zeros(1))
    with pytest.raises(ReadError, match=r"y\.npz: not a corpus of token arrays"):
        open_source(tmp_path / "y.npz")
