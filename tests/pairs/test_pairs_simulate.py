"""The simulated world: the text tells the subject only, the picture the look only, views follow both."""

import colorsys
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from pairs.build import build_pairs
from pairs.ceilings import ceilings
from pairs.files import read_table
from pairs.pictures import LOOKS
from pairs.query import PairOptions
from pairs.simulate import START, SimulationOptions, main, simulate
from pairs.tables import load_notes, related_indices
from pairs.vocabulary import COMMON_WORDS, SUBJECTS

SMALL = SimulationOptions(notes=480, users=400, subjects=6, looks=8)


@pytest.fixture(scope="module")
def world():
    return simulate(SMALL)


def words_of(note):
    return re.findall(r"\w+", " ".join([note["title"], *note["topics"], note["content"]]).lower())


def test_vocabularies_share_no_word_and_no_subject_is_named():
    words = Counter(word for vocabulary in (*SUBJECTS.values(), COMMON_WORDS) for word in vocabulary)
    assert max(words.values()) == 1
    assert not set(SUBJECTS) & set(words)
    assert len(set(LOOKS)) == len(LOOKS)


def test_text_tells_the_subject_without_naming_it(world):
    for note in world.notes:
        words = words_of(note)
        assert len(words) == SMALL.subject_words + SMALL.common_words
        assert sum(word in SUBJECTS[note["subject"]] for word in words) == SMALL.subject_words
        assert sum(word in COMMON_WORDS for word in words) == SMALL.common_words
        assert not set(words) & {*SUBJECTS, *note["look"].split()}


def test_two_notes_of_a_subject_share_few_words(world):
    by_subject = sorted(world.notes, key=lambda note: note["subject"])
    shared = [
        len(set(words_of(a)) & set(words_of(b)) & set(SUBJECTS[a["subject"]]))
        for a, b in pairwise(by_subject)
        if a["subject"] == b["subject"]
    ]
    assert 0.3 < np.mean(shared) < 1.0  # 5 * 5 / 40 = 0.625 are expected
    assert np.mean(np.array(shared) == 0) > 0.3


def hue_histogram(picture, bins=24):
    """How many pixels have each hue, weighted by how colourful they are; sums to 1."""
    pixels = np.asarray(picture).reshape(-1, 3) / 255
    hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels[::4]])
    histogram = np.histogram(hsv[:, 0], bins, (0, 1), weights=hsv[:, 1] ** 2)[0]
    return histogram / histogram.sum()


def accuracy_of_nearest_mean(features, labels):
    """Share of the second half of the rows whose nearest class mean, made of the first half, is their own."""
    half = len(features) // 2
    labels = np.asarray(labels)
    names = np.unique(labels)
    means = np.stack([features[:half][labels[:half] == name].mean(axis=0) for name in names])
    distances = np.linalg.norm(features[half:, None] - means, axis=-1)
    return np.mean(names[distances.argmin(axis=1)] == labels[half:])


def test_picture_tells_the_look_and_not_the_subject(world):
    features = np.stack([hue_histogram(picture) for picture in world.pictures])
    assert accuracy_of_nearest_mean(features, world.notes["look"][:]) > 0.8
    assert accuracy_of_nearest_mean(features, world.notes["subject"][:]) < 1 / 6 + 0.1


def test_no_two_pictures_are_the_same(world):
    assert len({picture.tobytes() for picture in world.pictures}) == len(world.pictures)
    assert {(picture.size, picture.mode) for picture in world.pictures} == {((32, 32), "RGB")}


def test_subject_and_look_are_crossed_evenly_and_ids_do_not_tell(world):
    cells = list(zip(world.notes["subject"], world.notes["look"], strict=True))
    assert set(Counter(cells).values()) == {10}
    assert sum(a == b for a, b in pairwise(cells)) < 30  # 479 / 48 = 10 are expected


def test_views_follow_the_cells_and_popularity_has_a_long_tail(world):
    options = PairOptions(score="cosine", min_count=2)
    notes, pairs = world.notes, build_pairs(world.views, options)
    cell_of = dict(zip(notes["note_id"], zip(notes["subject"], notes["look"], strict=True), strict=True))
    true = np.mean([cell_of[a] == cell_of[b] for a, b in zip(pairs["note_id"], pairs["related_note_id"], strict=True)])
    assert true > 0.8  # by chance: 9 / 479
    views = sorted(Counter(world.views["note_id"]).values(), reverse=True)
    assert sum(views[: len(notes) // 10]) > 0.2 * len(world.views)
    times = np.array(world.views["timestamp"])
    assert np.all(np.diff(times) >= 0) and times[0] >= START and times[-1] < START + (SMALL.weeks + 1) * 7 * 86_400


def test_the_ceilings_are_apart(world):
    pairs = build_pairs(world.views, PairOptions(score="cosine", min_count=2))
    related = related_indices(world.notes["note_id"][:], pairs)
    best = {
        name: values["recall@10"]
        for name, values in ceilings(world.notes["subject"][:], world.notes["look"][:], related, [10]).items()
    }
    assert best["text"] < 0.3 and best["image"] < 0.3 and best["both"] > 0.8


def test_same_seed_same_world():
    options = SimulationOptions(notes=96, users=20, seed=4)
    one, two = simulate(options), simulate(options)
    assert one.notes[:] == two.notes[:] and one.views[:] == two.views[:]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one.pictures, two.pictures, strict=True))
    more_users = simulate(SimulationOptions(notes=96, users=30, seed=4))
    assert more_users.notes[:] == one.notes[:] and more_users.views[:] != one.views[:]
    other = simulate(SimulationOptions(notes=96, users=20, seed=5))
    assert other.notes[:] != one.notes[:] and other.pictures[0].tobytes() != one.pictures[0].tobytes()


def test_written_world_loads_again(tmp_path, capsys):
    main(["--output", str(tmp_path), "--notes", "96", "--users", "20", "--seed", "4"])
    world = simulate(SimulationOptions(notes=96, users=20, seed=4))
    notes = load_notes(tmp_path / "notes.jsonl")
    assert notes.remove_columns("image")[:] == world.notes.remove_columns("image")[:]
    assert notes["image"][0] == str(tmp_path / world.notes["image"][0])
    assert read_table(tmp_path / "views.csv", ("user_id", "note_id"))[:] == world.views[:]
    assert "96 notes" in capsys.readouterr().out


@pytest.mark.parametrize(("field", "value"), [("subjects", 17), ("looks", 0), ("notes", 10), ("noise", 1.5)])
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        SimulationOptions(**{field: value})
