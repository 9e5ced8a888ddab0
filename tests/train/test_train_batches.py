"""What stands in a batch: every pair once an epoch, connected neighbourhoods, the same plans everywhere."""

from dataclasses import replace

import numpy as np
import pytest

from train.batches import BatchOptions, BatchPlan, BatchPlanner, distinct_notes, drawn_log_probability
from train.related import RelatedNotes


def random_graph(notes: int = 60, pairs: int = 150, seed: int = 0) -> tuple[np.ndarray, RelatedNotes]:
    draw = np.random.default_rng(seed)
    drawn = np.sort(draw.integers(0, notes, (pairs, 2)), axis=1)
    drawn = np.unique(drawn[drawn[:, 0] != drawn[:, 1]], axis=0)
    return drawn, RelatedNotes(drawn, notes + 5)  # five notes of no pair


def planner(options: BatchOptions, seed: int = 0, **further: object) -> BatchPlanner:
    pairs, related = random_graph(seed=seed)
    return BatchPlanner(pairs, related, options, **further)


def as_lists(plans: list[BatchPlan]) -> list[list[list[int]]]:
    return [[np.asarray(part).tolist() for part in vars(plan).values()] for plan in plans]


def unordered(plan: BatchPlan) -> set[frozenset[int]]:
    return {frozenset(plan.notes[pair].tolist()) for pair in plan.positives}


@pytest.mark.parametrize("kind", ["pairs", "graph"])
def test_notes_are_distinct_and_positives_are_pairs_both_ways(kind: str):
    pairs, related = random_graph()
    known = {frozenset(pair) for pair in pairs.tolist()}
    for plan in BatchPlanner(pairs, related, BatchOptions(kind=kind, pairs=8)).plans():
        assert len(set(plan.notes.tolist())) == len(plan.notes)
        assert unordered(plan) <= known and len(plan.positives) == 2 * len(unordered(plan))
        ways = {tuple(pair) for pair in plan.positives.tolist()}
        assert ways == {(b, a) for a, b in ways}


def test_every_pair_is_drawn_once_an_epoch_in_another_order_each_time():
    pairs, _related = random_graph()
    batches = planner(BatchOptions(pairs=16))
    epochs = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        epochs.append(list(batches.plans()))
        drawn = [pair for plan in epochs[-1] for pair in unordered(plan)]
        assert len(drawn) == len(pairs) and set(drawn) == {frozenset(pair) for pair in pairs.tolist()}
        assert len(epochs[-1]) == len(batches)
    assert as_lists(epochs[0]) != as_lists(epochs[1])


def test_graph_batches_are_of_one_size_and_hold_all_pairs_among_their_notes():
    pairs, related = random_graph()
    batches = planner(BatchOptions(kind="graph", pairs=8, neighborhood=4))
    plans = list(batches.plans())
    assert len(plans) == len(batches) and {len(plan.notes) for plan in plans} == {16}
    for plan in plans:
        among = {frozenset(pair) for pair in pairs.tolist() if set(pair) <= set(plan.notes.tolist())}
        assert unordered(plan) == among
    seen = np.concatenate([plan.notes for plan in plans])
    assert len(set(seen.tolist())) > 0.7 * np.count_nonzero(related.degrees)  # each about once an epoch
    # That is what they are for: more pairs a note than drawing pairs gives.
    density = [
        sum(len(plan.positives) for plan in some) / sum(len(plan.notes) for plan in some)
        for some in (plans, list(planner(BatchOptions(pairs=8)).plans()))
    ]
    assert density[0] > 1.3 * density[1]


def test_neighborhoods_are_connected_and_no_larger_than_asked():
    _pairs, related = random_graph()
    batches = planner(BatchOptions(kind="graph", neighborhood=5))
    stream = batches._neighborhoods(np.random.default_rng(0))
    sizes = []
    for members, _turn in zip(stream, range(200), strict=False):
        sizes.append(len(members))
        reached, frontier = {members[0]}, [members[0]]
        while frontier:
            near = set(related.of(frontier.pop()).tolist()) & set(members) - reached
            reached |= near
            frontier += near
        assert reached == set(members) and 2 <= len(members) <= 5
    assert max(sizes) == 5 and min(sizes) < 5


def test_a_small_graph_fills_one_batch():
    pairs, related = np.array([(0, 1), (1, 2)]), RelatedNotes(np.array([(0, 1), (1, 2)]), 4)
    (plan,) = BatchPlanner(pairs, related, BatchOptions(kind="graph", pairs=50)).plans()
    assert sorted(plan.notes.tolist()) == [0, 1, 2] and len(plan.positives) == 4


@pytest.mark.parametrize("kind", ["pairs", "graph"])
def test_plans_depend_on_seed_and_epoch_alone(kind: str):
    options = BatchOptions(kind=kind, pairs=8, text_dropout=0.2, image_dropout=0.2, seed=3)
    np.random.seed(0)
    first = as_lists(list(planner(options).plans()))
    np.random.seed(1)
    assert as_lists(list(planner(options).plans())) == first
    assert as_lists(list(planner(replace(options, seed=4)).plans())) != first


def test_text_and_image_are_withheld_as_often_as_asked_and_never_both():
    plans = list(planner(BatchOptions(pairs=4, text_dropout=0.3, image_dropout=0.2)).plans())
    text = np.concatenate([plan.withheld_text for plan in plans])
    image = np.concatenate([plan.withheld_image for plan in plans])
    assert text.mean() == pytest.approx(0.3, abs=0.06) and image.mean() == pytest.approx(0.2, abs=0.06)
    assert not (text & image).any()
    assert not any(
        plan.withheld_text.any() or plan.withheld_image.any() for plan in planner(BatchOptions(pairs=4)).plans()
    )


def test_hard_negatives_come_from_the_mined_and_are_new_to_the_batch():
    mined = np.random.default_rng(0).integers(-1, 65, (65, 6))
    asked = []

    def mine(epoch: int) -> np.ndarray:
        asked.append(epoch)
        return mined

    batches = planner(BatchOptions(pairs=6, hard_negatives=1), mine=mine)
    batches.set_epoch(2)
    plain = planner(BatchOptions(pairs=6))
    plain.set_epoch(2)
    for plan, without in zip(batches.plans(), plain.plans(), strict=True):
        count = len(without.notes)
        assert plan.notes[:count].tolist() == without.notes.tolist()
        assert plan.positives.tolist() == without.positives.tolist()
        added = plan.notes[count:]
        assert len(added) == (count + 1) // 2 and len(set(plan.notes.tolist())) == len(plan.notes)
        assert set(added.tolist()) <= set(mined[without.notes].ravel().tolist()) and (added >= 0).all()
    assert asked == [2]


def test_log_q_is_how_often_a_note_is_drawn():
    pairs, related = random_graph()
    expected = drawn_log_probability(related.degrees, 16, len(pairs))
    counts, batches = np.zeros(65), 300
    for epoch in range(batches):
        drawing = BatchPlanner(pairs, related, BatchOptions(pairs=16))
        drawing.set_epoch(epoch)
        counts[next(drawing.plans()).notes] += 1  # each epoch's first: drawn independently
    drawn = related.degrees > 0
    np.testing.assert_allclose(counts[drawn] / batches, np.exp(expected[drawn]), atol=0.1)
    shares = related.degrees[drawn] / related.degrees.sum()
    assert np.abs(counts[drawn] / batches - shares).max() > 0.2  # control: not the share of the degrees
    assert not drawn_log_probability(related.degrees, len(pairs), len(pairs)).any()


def test_distinct_notes_of_pairs():
    pairs = np.array([(7, 4), (4, 9)])
    notes, positives = distinct_notes(pairs)
    assert sorted(map(tuple, notes[positives].tolist())) == [(4, 7), (4, 9), (7, 4), (9, 4)]
