"""Modalities: what is dropped, what becomes of a note with nothing left, and what is said of models that are known to
read the one, the other or both."""

import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import modality
from evaluation.lexical import note_text
from evaluation.metrics import chance_metrics, rank_related, tie_order
from evaluation.modality import (
    ALL_PAIRS,
    CONDITIONS,
    MODALITIES,
    Reliance,
    Swap,
    asymmetric_scores,
    conclude,
    draw_donors,
    encode_with_modality,
    fusion_weights,
    plot_fusion_weights,
    reliance,
    reliance_tables,
    say_alone,
    say_exchange,
    say_swap,
    say_use,
    with_fields_of_others,
    with_modality,
)
from evaluation.report import Percent
from evaluation.significance import PairedTest, paired_test
from modeling_notellm2 import NoteLLM2Model
from tests.backbones import random_picture
from train.features import VisionFeatureStore, VisionFeatureTable

NOTES: list[dict[str, Any]] = [
    {"note_id": "a", "title": "Vase", "topics": ["glass"], "content": "Blue.", "image": "a.jpg"},
    {"note_id": "b", "title": " ", "topics": [], "content": None, "image": "b.jpg"},
    {"note_id": "c", "content": "No picture.", "image": None},
]


class LengthModel:
    """Embeds a note as (has an image, length of its text)."""

    config = SimpleNamespace(vision_config="any")

    def __init__(self) -> None:
        self.seen: list[Mapping[str, Any]] = []

    def encode(
        self,
        notes: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        show_progress_bar: bool,
        vision_features: VisionFeatureTable | None = None,
    ) -> np.ndarray:
        self.seen = list(notes)
        return np.array([[note.get("image") is not None, len(note_text(note))] for note in notes], dtype=np.float32)


def test_with_modality_drops_the_other() -> None:
    assert with_modality(NOTES, "both") == NOTES
    assert [note.get("image") for note in with_modality(NOTES, "text")] == [None] * 3
    assert [note_text(note) for note in with_modality(NOTES, "text")] == [note_text(note) for note in NOTES]
    assert with_modality(NOTES, "image")[0] == {"note_id": "a", "image": "a.jpg"}
    assert NOTES[0]["title"] == "Vase"  # the notes given are left as they were
    with pytest.raises(ValueError, match="'audio'.*both, text, image"):
        with_modality(NOTES, "audio")  # type: ignore[arg-type]


@pytest.mark.parametrize(("modality", "blank"), [("both", []), ("text", [1]), ("image", [2])])
def test_blank_notes_get_a_zero_embedding_and_are_counted(modality: Any, blank: list[int]) -> None:
    model = LengthModel()
    embeds, num_blank = encode_with_modality(model, NOTES, modality)
    assert num_blank == len(blank)
    assert [position for position in range(3) if not embeds[position].any()] == blank
    assert [note["note_id"] for note in model.seen] == ["abc"[i] for i in range(3) if i not in blank]
    assert embeds.dtype == np.float32


def test_a_modality_that_no_note_has_is_refused() -> None:
    with pytest.raises(ValueError, match="'image'.*columns"):
        encode_with_modality(LengthModel(), NOTES[2:], "image")


# Sixteen kinds of notes, five of each: a text "t0" … "t3" and a picture "p0" … "p3" make a kind, and notes of a kind
# are related.
KINDS = np.repeat(np.arange(16), 5)
WORLD: list[dict[str, Any]] = [
    {"note_id": str(number), "title": f"t{kind // 4}", "image": f"p{kind % 4}"} for number, kind in enumerate(KINDS)
]
RELATED = [np.setdiff1d(np.flatnonzero(KINDS == kind), number) for number, kind in enumerate(KINDS)]


class SignalModel:
    """A vector for a text, one for a picture, each by its weight, and some noise of each note's own."""

    config = SimpleNamespace(vision_config="any")

    def __init__(self, text: float, image: float, noise: float = 0.05) -> None:
        self.text, self.image, self.noise = text, image, noise
        self.calls = 0

    def encode(
        self,
        notes: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        show_progress_bar: bool,
        vision_features: VisionFeatureTable | None = None,
    ) -> np.ndarray:
        self.calls += 1
        embeds = np.zeros((len(notes), 24), dtype=np.float32)
        for row, note in zip(embeds, notes, strict=True):
            if text := note_text(note):
                row[int(text[1:])] += self.text
            if image := note.get("image"):
                row[8 + int(image[1:])] += self.image
            row[16:] = self.noise * np.random.default_rng(int(note["note_id"])).normal(size=8)
        return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def measure(model: Any, **settings: Any) -> Reliance:
    return reliance(model, WORLD, RELATED, ks=(4, 20), **settings)


def test_a_model_of_both_uses_both_and_each_alone_finds_part() -> None:
    model = SignalModel(1.0, 1.0)
    found = measure(model)
    assert model.calls == 5
    assert list(found.per_query) == [ALL_PAIRS] and tuple(found.per_query[ALL_PAIRS]) == CONDITIONS
    assert found.metrics("both")["recall@4"] == 1.0
    for condition in CONDITIONS[1:]:
        assert found.metrics(condition)["recall@4"] < 0.6
        assert found.change(condition).high < 0 and found.change(condition).queries == 80
    # With the text alone every fourth kind looks the same: 4 of the 19 notes that share a text are related.
    assert found.metrics("text")["recall@4"] == pytest.approx(4 / 19, abs=0.08)
    assert found.metrics("text")["recall@20"] > 0.99
    assert found.blank_notes == {"both": 0, "text": 0, "image": 0}
    assert found.fusion_weights is None
    use, exchange, alone, use_text, exchange_text, alone_text, swap, swap_text = found.conclusion
    assert use.startswith("Without images recall@4 falls from 1.0000 to 0.") and use.endswith("uses its images.")
    assert exchange.startswith("With other notes' images recall@4 falls from 1.0000 to 0.")
    assert exchange.endswith("the model reads what they show.")
    assert alone.startswith("The image alone reaches") and alone.endswith("more than chance.")
    assert use_text.endswith("uses its text.") and alone_text.endswith("more than chance.")
    assert exchange_text.endswith("the model reads what it says.")
    assert swap.endswith("neither more than the other.") and swap_text.endswith("neither more than the other.")


def test_embeddings_that_are_known_are_not_made_again() -> None:
    model, expected = SignalModel(1.0, 1.0), measure(SignalModel(1.0, 1.0))
    embeds = {modality: encode_with_modality(model, WORLD, modality)[0] for modality in ("both", "text", "image")}
    found = measure(model, embeds=embeds)
    assert model.calls == 5
    assert found.conclusion == expected.conclusion
    embeds["text"] = np.random.default_rng(0).normal(size=embeds["text"].shape).astype(np.float32)
    assert measure(model, embeds=embeds).metrics("text") != expected.metrics("text")  # control: they are used


def test_ranks_that_are_known_are_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(*arguments: Any) -> Any:
        made.append(1)
        return rank_related(*arguments)

    monkeypatch.setattr(modality, "rank_related", counted)
    model = SignalModel(1.0, 1.0)
    embeds = {name: encode_with_modality(model, WORLD, name)[0] for name in MODALITIES}
    ranks = {name: rank_related(embeds[name], RELATED) for name in MODALITIES}
    expected = measure(model, embeds=embeds)
    assert len(made) == 7 + 4  # the conditions, and two notes that each kind of swapped query may follow
    found = measure(model, embeds=embeds, ranks=ranks)
    assert len(made) == 11 + 4 + 4
    assert found.conclusion == expected.conclusion
    for condition in CONDITIONS:
        assert found.metrics(condition) == expected.metrics(condition)
    ranks["text"] = rank_related(np.random.default_rng(0).normal(size=(80, 3)), RELATED)
    assert measure(model, embeds=embeds, ranks=ranks).metrics("text") != expected.metrics("text")  # control: are used
    ranks["text"] = rank_related(embeds["text"], [positions[:1] for positions in RELATED])
    with pytest.raises(ValueError, match=r"ranks\['text'\] is of other pairs"):
        measure(model, embeds=embeds, ranks=ranks)


def test_one_query_tells_nothing() -> None:
    one, none = np.ones(1), np.zeros(1)
    for without in (one, none):
        sentence = say_use("images", one, without, "mrr")
        assert sentence.endswith("%): one query is too little to tell whether it uses its images.")
        alone = say_alone("image", without, 0.5, 1.0, "mrr")
        assert alone.endswith("(chance 0.5000): one query is too little to tell it from chance.")
        swap = say_swap(Swap({"mrr": one}, {"mrr": without}), "image", "mrr")
        assert swap.endswith("; one query that has something to find of both): it follows neither more than the other.")
        assert "nan" not in sentence + alone + swap
    two = say_use("images", np.ones(2), np.zeros(2), "mrr")
    assert two.endswith("the model uses its images.")  # control


def test_a_model_that_ignores_images_neglects_them() -> None:
    found = measure(SignalModel(1.0, 0.0))
    values = found.per_query[ALL_PAIRS]
    for condition in ("text", "image shuffled", "image swapped"):
        for name in values["both"]:
            np.testing.assert_array_equal(values[condition][name], values["both"][name])
    for condition in ("image", "text shuffled", "text swapped"):  # the control
        assert found.change(condition).high < 0
    assert found.conclusion[0].startswith("Without images recall@4 stays at")
    assert found.conclusion[0].endswith(
        "(+0.0\u00a0%, 95\u00a0% interval +0.0\u00a0% … +0.0\u00a0%): the model neglects them."
    )
    assert found.conclusion[1].endswith("the model neglects what they show.")
    assert found.conclusion[2].endswith("80 queries are too few to tell it from chance.")
    assert found.conclusion[6].endswith("it follows the text.") and found.conclusion[7].endswith("follows the text.")


def test_a_model_of_images_alone_follows_the_swapped_picture() -> None:
    found = measure(SignalModel(0.0, 1.0))
    assert found.conclusion[3].endswith("the model neglects it.")
    assert found.conclusion[4].endswith("the model neglects what it says.")
    assert found.conclusion[6].endswith("it follows the image.") and found.conclusion[7].endswith("follows the image.")
    # It asks with the other note's picture, and so finds what that note finds: 4 of 19.
    swap = found.swaps["image"]
    assert swap.other["recall@20"].mean() > 0.99
    assert swap.own["recall@20"].mean() < 0.6  # only where the two pictures happen to be the same
    assert found.swaps["text"].own["recall@20"].mean() > 0.99


def test_images_that_mislead_harm() -> None:
    """Pictures of the wrong kind, the same ones in every run: the notes are related by their text."""
    kinds = np.repeat(np.arange(4), 20)
    rng = np.random.default_rng(0)
    notes = [{"note_id": str(n), "title": f"t{kind}", "image": f"p{rng.integers(4)}"} for n, kind in enumerate(kinds)]
    related = [np.setdiff1d(np.flatnonzero(kinds == kind), n) for n, kind in enumerate(kinds)]
    found = reliance(SignalModel(1.0, 2.0), notes, related, ks=(20,))
    assert found.conclusion[0].startswith("Without images recall@20 rises from")
    assert found.conclusion[0].endswith("they harm the model.")
    assert found.conclusion[1].endswith("80 queries are too few to tell whether it reads what they show.")
    assert found.conclusion[2].endswith("80 queries are too few to tell it from chance.")


QUERIES = np.random.default_rng(0).random(400)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (np.full(400, -0.2), "falls from .*: the model uses its images."),
        (np.full(400, 0.2), "rises from .*: they harm the model."),
        (np.full(400, -0.004), "falls from .*: the model neglects them."),
        (np.full(400, 0.004), "rises from .*: the model neglects them."),
        (np.zeros(400), "stays at .*: the model neglects them."),
        (np.resize([0.02, -0.02], 400), "the model neglects them."),
        (np.resize([0.5, -0.5], 400), ": 400 queries are too few to tell whether it uses its images."),
    ],
)
def test_the_rule_of_use(change: np.ndarray, verdict: str) -> None:
    sentence = say_use("images", QUERIES, QUERIES + change, "mrr")
    assert sentence.startswith("Without images mrr ")
    assert re.search(verdict, sentence)
    assert f"({Percent(change.mean() / QUERIES.mean())}," in sentence
    assert not re.search(r"\d %", sentence)  # a line break parts no number from its sign


def test_the_rule_speaks_of_the_text_too() -> None:
    assert say_use("text", QUERIES, QUERIES + 0.2, "mrr").endswith("it harms the model.")
    assert say_use("text", QUERIES, QUERIES - 0.2, "mrr").endswith("the model uses its text.")
    too_few = say_use("text", QUERIES, QUERIES + np.resize([0.5, -0.5], 400), "mrr")
    assert too_few.endswith("400 queries are too few to tell whether it uses its text.")


def drawn(seed: int, mean: float, deviation: float) -> np.ndarray:
    """400 random differences of just this mean and deviation: their 95 % interval is the mean ± 0.098 deviations."""
    values = np.random.default_rng(seed).normal(size=400)
    return mean + deviation * (values - values.mean()) / values.std()


@pytest.mark.parametrize(
    ("without", "exchanged", "verdict"),
    [
        # Each verdict, and beside it what is not sure enough for it. QUERIES have the mean 0.49: 2 % are 0.0098.
        (drawn(1, -0.05, 0.4), drawn(2, -0.05, 0.4), "the model reads what they show"),
        (drawn(1, -0.03, 0.4), drawn(2, -0.03, 0.4), "400 queries are too few to tell whether it reads what they show"),
        (drawn(1, -0.05, 0.4), drawn(2, 0.05, 0.4), "other notes' do better than its own"),
        (drawn(1, 0.03, 0.4), drawn(2, 0.03, 0.4), "400 queries are too few to tell whether it reads what they show"),
        (drawn(1, -0.05, 0.4), drawn(2, -0.004, 0.03), "the model neglects what they show"),
        (drawn(1, -0.05, 0.4), drawn(2, -0.008, 0.03), "the model reads what they show"),
        # Without images it loses; with another note's it surely loses less.
        (drawn(1, -0.2, 0.4), drawn(2, 0.0, 0.4), "that there are images matters more than what they show"),
        # Perhaps not less, however little is known of the loss with others'.
        (drawn(1, -0.05, 0.4), drawn(2, -0.01, 0.4), "400 queries are too few to tell whether it reads what they show"),
        # Less, but perhaps it loses nothing without.
        (
            drawn(1, -0.03, 0.4),
            drawn(1, -0.03, 0.4) + drawn(2, 0.04, 0.1),
            "400 queries are too few to tell whether it reads what they show",
        ),
    ],
)
def test_the_rule_of_exchange(without: np.ndarray, exchanged: np.ndarray, verdict: str) -> None:
    sentence = say_exchange("images", QUERIES, QUERIES + without, QUERIES + exchanged, "mrr")
    assert sentence.startswith("With other notes' images mrr ") and sentence.endswith(f": {verdict}.")
    in_report = conclude(
        {
            "both": QUERIES,
            "text": QUERIES + without,
            "image": QUERIES / 2,
            "image shuffled": QUERIES + exchanged,
            "text shuffled": QUERIES / 2,
        },
        0.1,
        "mrr",
    )
    assert in_report[1] == sentence and in_report[4].endswith("the model reads what it says.")


def test_no_more_than_all_is_said_to_be_lost() -> None:
    both = (np.arange(30) < 3).astype(float)  # so few hits that the interval of their mean is wide
    lost = paired_test(np.zeros(30), both).low / both.mean()
    assert lost < -1.5 and "95\u00a0% interval −100.0\u00a0% … " in say_use("text", both, np.zeros(30), "recall@1")


@pytest.mark.parametrize(
    ("chance", "both", "verdict"),
    [
        (0.1, 1.0, "more than chance"),
        (0.9, 1.0, "less than chance"),
        (0.53, 1.0, "400 queries are too few to tell it from chance"),
        (0.53, 2.0, "no more than chance"),  # beside what both find, the interval is narrow
    ],
)
def test_the_rule_of_one_modality_alone(chance: float, both: float, verdict: str) -> None:
    assert say_alone("image", QUERIES, chance, both, "mrr").endswith(f"chance {chance:.4f}): {verdict}.")


@pytest.mark.parametrize(
    ("more", "verdict"), [(0.3, "the image"), (-0.3, "the text"), (0.0, "neither more than the other")]
)
def test_the_rule_of_swapped_queries(more: float, verdict: str) -> None:
    swap = Swap({"mrr": QUERIES}, {"mrr": QUERIES + more})
    assert say_swap(swap, "image", "mrr").endswith(f"it follows {verdict}.")
    mirrored = {"the image": "the text", "the text": "the image"}.get(verdict, verdict)
    assert say_swap(swap, "text", "mrr").endswith(f"it follows {mirrored}.")


def test_the_sentence_of_swapped_queries_says_whose_is_what() -> None:
    swap = Swap({"mrr": QUERIES}, {"mrr": QUERIES - drawn(1, 0.05, 0.2)})
    for lent, kept in (("image", "text"), ("text", "image")):
        sentence = say_swap(swap, lent, "mrr")
        own, other = f"{QUERIES.mean():.4f}", f"{QUERIES.mean() - 0.05:.4f}"
        assert sentence.startswith(
            f"With its own {kept} and another note's {lent}, a query reaches mrr {own} of its own note's related notes "
            f"and {other} of the lender's (difference 0.0500, 95\u00a0% interval 0.0"
        )
        assert sentence.endswith(f"; 400 queries that have something to find of both): it follows the {kept}.")


def test_a_model_that_reads_both_leans_on_one() -> None:
    swap = Swap({"mrr": QUERIES}, {"mrr": QUERIES - 0.3})
    assert say_swap(swap, "image", "mrr", {"image", "text"}).endswith("it leans on the text.")
    assert say_swap(swap, "text", "mrr", {"text"}).endswith("it leans on the image.")
    assert say_swap(swap, "text", "mrr", {"image"}).endswith("it follows the image.")  # what it follows, it may read
    values = {"both": QUERIES, "text": QUERIES / 2, "image": QUERIES / 2, "text shuffled": QUERIES / 2}
    for shuffled, verdict in ((QUERIES / 2, "leans on"), (QUERIES, "follows")):
        (*_others, said) = conclude({**values, "image shuffled": shuffled}, 0.1, "mrr", {"image": swap})
        assert said.endswith(f"it {verdict} the text.")


def test_no_test_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each resamples the queries thousands of times."""
    asked: list[bytes] = []

    def count(first: np.ndarray, second: np.ndarray) -> PairedTest:
        asked.append(first.tobytes() + second.tobytes())
        return paired_test(first, second)

    values = {"both": QUERIES, "text": QUERIES + drawn(1, -0.2, 0.4), "image": QUERIES + drawn(2, -0.3, 0.4)}
    values |= {"image shuffled": QUERIES + drawn(3, 0.0, 0.4), "text shuffled": QUERIES + drawn(4, -0.1, 0.4)}
    expected = conclude(values, 0.1, "mrr")
    monkeypatch.setattr(modality, "paired_test", count)
    assert conclude(values, 0.1, "mrr") == expected
    # Two of each modality, and of images one more, whether exchanging them costs less than leaving them out.
    assert len(asked) == len(set(asked)) == 5
    alone = say_exchange("images", QUERIES, values["text"], values["image shuffled"], "mrr")
    assert alone == expected[1] and len(asked) == 8  # control: without what was found before


def test_of_a_model_that_finds_nothing_nothing_is_concluded() -> None:
    none = np.zeros(9)
    (sentence,) = conclude({"both": none, "text": none, "image": none}, 0.1, "recall@10")
    assert sentence.endswith("cannot be told.")


@pytest.mark.parametrize("seed", range(3))
def test_donors_are_others_each_once(seed: int) -> None:
    has_image = np.random.default_rng(seed).random(50) < 0.6
    donors = draw_donors(has_image, np.random.default_rng(seed), "an image")
    np.testing.assert_array_equal(donors == np.arange(50), ~has_image)
    assert sorted(donors) == list(range(50))
    np.testing.assert_array_equal(donors, draw_donors(has_image, np.random.default_rng(seed), "an image"))
    assert (donors != draw_donors(has_image, np.random.default_rng(seed + 1), "an image")).any()  # control


def test_all_text_fields_come_from_the_donor() -> None:
    mixed = with_fields_of_others(NOTES, np.array([2, 1, 0]), ("title", "topics", "content"))
    assert mixed[0] == {"note_id": "a", "content": "No picture.", "image": "a.jpg"}
    assert mixed[1] == NOTES[1]
    assert mixed[2] == {"note_id": "c", "title": "Vase", "topics": ["glass"], "content": "Blue.", "image": None}


def test_asymmetric_scores_rank_as_embeddings_do_where_queries_are_the_pool() -> None:
    rng = np.random.default_rng(0)
    embeds, others = rng.normal(size=(2, 80, 16)).astype(np.float32)
    embeds[40:50] = embeds[0]  # ties
    expected = rank_related(embeds, RELATED).rank
    np.testing.assert_array_equal(rank_related(asymmetric_scores(embeds, embeds), RELATED).rank, expected)
    swapped = rank_related(asymmetric_scores(others, embeds), RELATED).rank
    assert (swapped != expected).any()  # control
    row = others[3].astype(np.float64) @ embeds.T.astype(np.float64)
    row[3] = -np.inf
    row, ties = row.astype(np.float32), tie_order(80)
    counted = [1 + ((row > row[t]) | ((row == row[t]) & (ties < ties[t]))).sum() for t in RELATED[3]]
    np.testing.assert_array_equal(swapped[rank_related(embeds, RELATED).query == 3], counted)


def test_swapped_queries_leave_out_both_notes_that_they_are_made_of() -> None:
    """Recounted one by one, with candidates."""
    model, candidates = SignalModel(1.0, 0.9, noise=0.3), np.ones(80, dtype=bool)
    candidates[::5] = False
    related = [positions[candidates[positions]] for positions in RELATED]
    found = reliance(model, WORLD, related, ks=(4,), candidates=candidates, seed=3)
    donors = draw_donors(np.ones(80, dtype=bool), np.random.default_rng(3), "an image")
    encode = {"batch_size": 32, "show_progress_bar": False}
    pool = model.encode(WORLD, **encode)
    queries = model.encode(with_fields_of_others(WORLD, donors, ("image",)), **encode)
    own, other = [], []
    for query, donor in enumerate(donors):
        order = [n for n in np.argsort(-(queries[query] @ pool.T)) if candidates[n] and n not in (query, donor)]
        wanted = [np.setdiff1d(related[query], donor), np.setdiff1d(related[donor], query)]
        own.append(np.isin(order[:4], wanted[0]).sum() / len(wanted[0]))
        other.append(np.isin(order[:4], wanted[1]).sum() / len(wanted[1]))
    np.testing.assert_allclose(found.swaps["image"].own["recall@4"], own)
    np.testing.assert_allclose(found.swaps["image"].other["recall@4"], other)
    assert found.swaps["image"].own["recall@4"].mean() != found.metrics("image swapped")["recall@4"]  # control
    assert found.chance == chance_metrics(related, (4,), candidates) != chance_metrics(related, (4,))


def test_a_swap_that_leaves_nothing_to_find_is_left_out() -> None:
    related = [np.array([], dtype=np.int64) for _ in range(4)]
    related[0], related[1] = np.array([1]), np.array([0])
    notes = [WORLD[0], WORLD[1], {**WORLD[2], "image": None}, {**WORLD[3], "image": None}]
    found = reliance(SignalModel(1.0, 1.0), notes, related, ks=(1,))
    assert "image" not in found.swaps  # 0 and 1 get each other's picture, and neither may find the other
    assert found.blank_notes == {"both": 0, "text": 0, "image": 2}


def test_slices_are_measured_alone_in_whole_pools() -> None:
    model = SignalModel(1.0, 0.9, noise=0.3)
    query = np.repeat(np.arange(80), 4)
    mask = query % 3 == 0
    found = measure(model, slices={"third": mask})
    assert list(found.per_query) == [ALL_PAIRS, "third"]
    for condition in CONDITIONS:
        whole = found.per_query[ALL_PAIRS][condition]["ndcg@4"]
        np.testing.assert_array_equal(found.per_query["third"][condition]["ndcg@4"], whole[::3])
    assert found.metrics("text", "third") != found.metrics("text")  # control
    assert found.change("text", "third").queries == 27
    with pytest.raises(ValueError, match=r"slices\['third'\] has shape \(80,\).*pair_slices"):
        measure(model, slices={"third": np.ones(80, dtype=bool)})
    with pytest.raises(ValueError, match="0 pairs"):
        measure(model, slices={"none": np.zeros(320, dtype=bool)})


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 notes have a text.*exchange takes two"):
        reliance(SignalModel(1.0, 1.0), [{**WORLD[0]}, *({"image": "p0"},) * 2], [np.array([1]), *[np.array([])] * 2])
    model = SignalModel(1.0, 0.0)
    model.config = SimpleNamespace(vision_config=None)
    with pytest.raises(ValueError, match="vision_config is None"):
        measure(model)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_fusion_weights_are_those_of_forward(
    compose: Callable[..., NoteLLM2Model], notes: list[dict[str, Any]], tmp_path: Path, gate: str
) -> None:
    model = compose(late_fusion=gate)
    notes = notes + [{**note, "image": random_picture(9 + row)} for row, note in enumerate(notes)]
    with torch.no_grad():
        weight = model(**model.processor(notes)).fusion_weight.mean(1).numpy()
    expected = weight[[note.get("image") is not None for note in notes]]
    assert len(expected) == 11 and len(np.unique(expected)) == 11  # control: no order can be mixed up unseen
    np.testing.assert_allclose(fusion_weights(model, notes, batch_size=4), expected, atol=1e-6)
    features = VisionFeatureStore(tmp_path, model).table(notes)
    np.testing.assert_allclose(fusion_weights(model, notes, 3, features), expected, atol=1e-6)
    assert not model.training


def test_reliance_of_a_real_model_is_the_same_with_kept_features(
    compose: Callable[..., NoteLLM2Model], tmp_path: Path
) -> None:
    """Where every note has one text and a picture of its own, embeddings go with the pictures."""
    model = compose(processor={"prompt": "text"}, connector=None, late_fusion_initial_weight=0.9)
    notes = [{"note_id": str(n), "title": f"oak shelf {n % 3}", "image": random_picture(n)} for n in range(24)]
    related = [np.array([(row + 1) % 24, (row + 5) % 24]) for row in range(24)]
    found = reliance(model, notes, related, ks=(2, 5), batch_size=4, seed=1)
    features = VisionFeatureStore(tmp_path, model).table(notes)
    kept = reliance(model, notes, related, ks=(2, 5), batch_size=4, vision_features=features, seed=1)
    for condition in CONDITIONS:
        for name, values in found.per_query[ALL_PAIRS][condition].items():
            np.testing.assert_array_equal(kept.per_query[ALL_PAIRS][condition][name], values)
    whole = found.per_query[ALL_PAIRS]
    for condition in CONDITIONS[1:]:  # control: every condition is another one
        assert (whole[condition]["mrr"] != whole["both"]["mrr"]).any()
    assert found.conclusion == kept.conclusion
    assert found.fusion_weights is not None and kept.fusion_weights is not None
    np.testing.assert_allclose(kept.fusion_weights, found.fusion_weights, atol=1e-6)
    weights = reliance_tables(found)[-1]
    assert weights.rows[0][:2] == [24, float(found.fusion_weights.mean())]
    assert weights.columns[3] == "least" and weights.rows[0][3] == found.fusion_weights.min()
    assert weights.columns[-1] == "most" and weights.rows[0][-1] == found.fusion_weights.max()


def test_notes_of_every_kind_with_a_real_model(shared_tiny_model: NoteLLM2Model, notes: list[dict[str, Any]]) -> None:
    related = [np.array([(row + 1) % len(notes)]) for row in range(len(notes))]
    found = reliance(shared_tiny_model, notes, related, ks=(2,), batch_size=4)
    assert found.fusion_weights is not None and len(found.fusion_weights) == 5
    assert found.blank_notes == {"both": 0, "text": 1, "image": 1}
    assert all(len(values["recall@2"]) == 6 for values in found.per_query[ALL_PAIRS].values())


def test_no_late_fusion_no_weights(compose: Callable[..., NoteLLM2Model], notes: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="late_fusion=None"):
        fusion_weights(compose(late_fusion=None), notes)


def test_tables_of_a_report() -> None:
    found = measure(SignalModel(1.0, 1.0), slices={"half": np.arange(320) < 160})
    main, swaps, slices = reliance_tables(found)  # a stub has no fusion weights
    assert [row[0] for row in main.rows] == [*CONDITIONS, "chance"]
    assert main.columns[:8] == ["condition", "change", "low", "high", "relative", "recall@4", "ndcg@4", "hit_rate@4"]
    assert main.rows[0][1:5] == main.rows[-1][1:5] == [None] * 4
    assert main.rows[1][5] == found.metrics("text")["recall@4"]
    change, low, high, relative = main.rows[1][1:5]
    assert change == pytest.approx(main.rows[1][5] - main.rows[0][5]) and low < change < high < 0
    assert relative == pytest.approx(change / main.rows[0][5]) and str(relative).startswith("−")
    assert [row[:2] for row in swaps.rows] == [["image", 80], ["text", 80]]
    assert slices.rows[0][:2] == ["half", 40] and slices.columns[2] == "change"
    assert slices.rows[0][2] == found.change("text", "half").difference
    assert slices.rows[0][6] == found.metrics("both", "half")["recall@4"]


@pytest.mark.parametrize("weights", [np.random.default_rng(0).beta(2, 8, 500), np.full(9, 0.1), np.array([1.0])])
def test_the_plot_of_weights_counts_all_notes(weights: np.ndarray) -> None:
    figure = plot_fusion_weights(weights)
    assert sum(patch.get_height() for patch in figure.axes[0].patches) == len(weights)
    assert all(tick == int(tick) for tick in figure.axes[0].get_yticks())
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    assert Image.open(buffer).size[0] == 1200
    with pytest.raises(ValueError, match="weights is empty"):
        plot_fusion_weights(np.zeros(0))
