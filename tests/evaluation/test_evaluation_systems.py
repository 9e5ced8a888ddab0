"""Systems side by side: how sure a difference is, in the table, in sentences and as in the test; what a model is."""

import re
from dataclasses import replace

import numpy as np
import pytest
from transformers import CLIPVisionConfig, LlamaConfig

from evaluation.multimodal_llm import MultimodalLLMConfig
from evaluation.protocols import Task
from evaluation.report import table_markdown
from evaluation.significance import LEVEL, RESAMPLES, holm, paired_test, queries_needed
from evaluation.systems import (
    Measured,
    System,
    compare,
    comparison_table,
    knows_nothing,
    measure,
    say_differences,
    say_knows_nothing,
    say_parts,
    slice_table,
)
from modeling_notellm2 import NoteLLM2Config


def measured_tables(size: int) -> list[Measured]:
    """Systems that find one note of each query first: "first" all of them, the others some."""
    scores = np.random.default_rng(0).random((size, size))
    np.fill_diagonal(scores, -1)
    related = [np.array([best]) for best in scores.argmax(axis=1)]
    nearly = np.where(np.arange(size)[:, None] < size - 3, scores, -scores)  # 3 queries differ
    tables = {"first": scores, "missed": -scores, "again": scores, "nearly": nearly}
    systems = [System(name, "-", lambda rows, table=table: table[rows], {}, {}) for name, table in tables.items()]
    return measure(systems, Task(related), (1,), intervals=True)


def test_the_least_p_value_is_shown_as_a_bound() -> None:
    reference, *others = measured_tables(60)
    table = comparison_table(compare([reference, *others], reference, "recall@1"), "first", "recall@1")
    shown = {
        line.split(" | ")[0]: line.strip(" |").split(" | ")[-2:] for line in table_markdown(table).splitlines()[2:]
    }
    assert shown["| missed"] == ["≤\u00a00.0010", "≤\u00a00.0030"] and shown["| again"] == ["1.0000", "1.0000"]
    assert table.rows[0][-2:] == pytest.approx([2 / (RESAMPLES + 1), 6 / (RESAMPLES + 1)])  # in JSON they are numbers
    assert 0.05 < float(shown["| nearly"][0]) < 1  # control: no bound
    assert [row[-1] for row in table.rows] == holm([row[-2] for row in table.rows])
    assert "none of the random exchanges, 2000 at least" in table.note


def test_what_comes_of_a_bound_is_a_bound_of_others_too() -> None:
    """Holm lets no raised p-value fall below the one before it, which here is known by its bound alone."""
    bound = paired_test(np.ones(50), np.zeros(50))
    above = replace(bound, p_value=1.1 * bound.p_value, is_bound=False)
    far = replace(above, p_value=0.3)
    lines = table_markdown(comparison_table({"a": bound, "b": above, "c": far}, "r", "mrr")).splitlines()[2:]
    assert [line.strip(" |").split(" | ")[-2:] for line in lines] == [
        ["≤\u00a00.0010", "≤\u00a00.0030"],
        ["0.0011", "≤\u00a00.0030"],
        ["0.3000", "0.3000"],
    ]
    many = comparison_table(dict.fromkeys(map(str, range(1100)), bound), "r", "mrr")
    assert table_markdown(many).splitlines()[2].endswith("| ≤\u00a00.0010 | 1.0000 |")  # all p-values are at most 1


def test_so_many_systems_that_their_number_alone_would_make_all_luck() -> None:
    first, missed, *_ = measured_tables(40)
    assert 60 * 2 / (RESAMPLES + 1) > LEVEL  # by the exchanges of one test nothing could be more than luck
    copies = [Measured(missed.system._replace(name=f"s{n}"), missed.ranks, missed.per_query, {}) for n in range(60)]
    better, _rule = say_differences(compare([first, *copies], first, "recall@1"), "first", "recall@1")
    assert better.startswith("By recall@1, worse than first, and by more than luck: s0 (by 1.0000)")
    assert "probability of 80" not in _rule  # there are no numbers of queries


def test_sentences_say_which_differences_are_luck() -> None:
    first, missed, again, nearly = measured_tables(60)
    tests = compare([first, missed, again, nearly], first, "recall@1")
    worse, luck, same, rule = say_differences(tests, "first", "recall@1")
    assert worse == "By recall@1, worse than first, and by more than luck: missed (by 1.0000)."
    needed = queries_needed(tests["nearly"].deviation, tests["nearly"].difference, LEVEL / 3)
    assert luck == (
        "Perhaps luck alone, beside first on 60 queries: nearly (0.0500 worse; if true, about "
        f"{round(needed, -1)} queries would show it)."
    )
    assert needed > 60 and same == "The same as first on every query: again."
    assert "raised for 3 comparisons (Holm), is at most 0.05" in rule
    assert rule.endswith("would show such a difference with a probability of 80\u00a0%.")
    better, *_ = say_differences(compare([first, missed], missed, "recall@1"), "missed", "recall@1")
    assert better == "By recall@1, better than missed, and by more than luck: first (by 1.0000)."


def test_many_comparisons_are_held_to_more() -> None:
    """What is more than luck alone is perhaps luck in company."""
    test = paired_test(np.repeat([1.0, 0.0], [7, 20]), np.zeros(27))
    assert LEVEL / 8 < test.p_value < LEVEL
    (better, rule) = say_differences({"a": test}, "r", "mrr")
    assert better == "By mrr, better than r, and by more than luck: a (by 0.2593)." and "one comparison" in rule
    (luck, rule) = say_differences(dict.fromkeys("abcdefgh", test), "r", "mrr")
    assert luck.startswith("Perhaps luck alone, beside r on 27 queries: a (0.2593 better; ") and "8 comparisons" in rule


def test_systems_that_differ_and_are_equal_on_average() -> None:
    tests = {"a": paired_test(np.resize([1.0, -1.0], 30), np.zeros(30)), "b": paired_test(np.ones(30), np.ones(30))}
    luck, same, _rule = say_differences(tests, "r", "mrr")
    assert luck == "Perhaps luck alone, beside r on 30 queries: a (equal on average)."
    assert same == "The same as r on every query: b."


def test_differences_that_take_far_more_queries_are_too_small_to_matter() -> None:
    test = paired_test(np.resize([1.0, -1.0], 30), np.zeros(30))
    shown, small = replace(test, difference=0.1), replace(test, difference=0.02)
    assert 30 < queries_needed(test.deviation, 0.1, LEVEL / 2) < 3000 < queries_needed(test.deviation, 0.02, LEVEL / 2)
    luck, rule = say_differences({"a": shown, "b": small}, "r", "mrr")
    assert re.search(r"a \(0.1000 better; if true, about [\d,]+ queries would show it\), b \(0.0200 better; ", luck)
    assert luck.endswith("b (0.0200 better; too small to matter for these queries).") and "probability of 80" in rule
    _luck, rule = say_differences({"b": small}, "r", "mrr")
    assert "probability of 80" not in rule


RELATED = [np.array([1]), np.array([0, 2]), np.array([1]), np.array([], dtype=np.int64)]


@pytest.mark.parametrize("kind", ["embeddings", "function"])
def test_what_scores_a_pool_alike_knows_nothing(kind: str) -> None:
    def ask(scores: np.ndarray, candidates: np.ndarray | None = None) -> bool:
        given = scores if kind == "embeddings" else lambda rows: scores[rows] @ scores.T
        return knows_nothing(System("any", "text", given, {}, {}), Task(RELATED, candidates))

    rng = np.random.default_rng(0)
    assert ask(np.zeros((4, 3), np.float32)) and ask(np.ones((4, 3), np.float32))
    assert not ask(rng.normal(size=(4, 3)).astype(np.float32))  # control
    only_one = np.zeros((4, 3), np.float32)
    only_one[2] = 1  # which finds itself alone
    assert ask(only_one)
    no_query = np.zeros((4, 3), np.float32)
    no_query[3] = rng.normal(size=3)
    assert ask(no_query)
    alike = rng.normal(size=(4, 3)).astype(np.float32)
    alike[2:] = alike[1]
    assert not ask(alike)
    # Queries of the paper's protocol are in no pool.
    assert ask(alike, np.array([False, True, True, True]))
    with pytest.raises(ValueError, match="scores\\['any'\\] of note 0 contain NaN"):
        ask(np.full((4, 3), np.nan, np.float32))


def test_why_a_row_is_missing() -> None:
    system = System("popularity", "-", lambda rows: np.zeros((len(rows), 4)), {"cold_notes": 4}, {})
    assert say_knows_nothing(system, 4) == (
        "popularity knows nothing here and has no row: nobody viewed any of the 4 notes in training, so it is chance; "
        "split by time to measure it."
    )
    system = System("frozen-text", "text", np.zeros((4, 2), np.float32), {"blank_notes": 0}, {})
    assert say_knows_nothing(system, 4) == (
        "frozen-text (text) knows nothing here and has no row: it scores all notes of a pool alike, so it is chance."
    )


def test_one_query_is_perhaps_luck_and_has_no_interval() -> None:
    scores = np.array([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    related = [np.array([1]), np.array([], dtype=int), np.array([], dtype=int)]
    systems = [System(name, "-", lambda rows, s=s: s[rows], {}, {}) for name, s in {"a": scores, "b": -scores}.items()]
    first, second = measure(systems, Task(related), (1,), intervals=True)
    assert first.intervals == {} == first.row.intervals
    tests = compare([first, second], first, "recall@1")
    assert say_differences(tests, "a", "recall@1") == [
        "One query cannot tell any difference from a from luck: evaluate more of them."
    ]
    line = table_markdown(comparison_table(tests, "a", "recall@1")).splitlines()[2]
    assert line == "| b | −1.0000 | - | - | 1.0000 | 1.0000 |"
    assert measured_tables(5)[0].intervals  # control


def test_a_slice_without_a_pair_has_no_line() -> None:
    measured = measured_tables(6)
    table = slice_table(measured, {"all": np.ones(6, dtype=bool)}, "recall@1", (1,))
    assert table.rows == [["all", 6, 6, 1.0, 0.0, 1.0, 0.5]]
    assert "without a pair has no line" in table.note


def test_parts_are_said_by_name_and_kind() -> None:
    vision, text = CLIPVisionConfig(), LlamaConfig()
    config = NoteLLM2Config(text, vision)
    assert say_parts(config, {}) == "LLM llama, tower clip_vision_model"
    names = {"llm": "/models/SmolLM2-135M", "vision": "org/tower", "multimodal_llm": None}
    assert say_parts(config, names) == "LLM SmolLM2-135M (llama), tower org/tower (clip_vision_model)"
    assert say_parts(NoteLLM2Config(text), names) == "LLM SmolLM2-135M (llama)"
    text.name_or_path = "org/llm"  # as of a model of the Hub
    assert say_parts(NoteLLM2Config(text), {}) == "LLM org/llm (llama)"
    assert say_parts(MultimodalLLMConfig(), {"multimodal_llm": "org/vl"}) == "multimodal LLM org/vl (qwen2_vl)"
    assert say_parts(object(), {}) == ""
