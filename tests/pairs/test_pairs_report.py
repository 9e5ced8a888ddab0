"""The report's figures equal plain Python, its sentences tell popularity from relatedness, its files can be read."""

import json
import math
import random
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pairs import report as report_module
from pairs.engines import connect
from pairs.query import PairOptions
from pairs.report import PLOTS, SCORES, DataReport, Popularity, main, report_views
from pairs.tables import write_table
from pairs.views import ViewOptions, broken_rules_text, read_views
from tests.pairs.reference import as_views, random_views, reference_pairs, reference_views

PERCENTS = {"p25": 25, "median": 50, "p75": 75, "p90": 90, "p99": 99}


@pytest.fixture(scope="module")
def engine():
    with connect(memory_gb=1) as opened:
        yield opened


def reported(engine, rows, options, scores=SCORES, k=2, view_options=None, note_ids=None):
    views = read_views(engine, as_views(rows), view_options, note_ids)
    return report_views(engine, views, options, scores, k)


def assert_spread(spread, values):
    ordered = sorted(values)
    assert spread.number == len(ordered)
    assert (spread.min, spread.max) == (ordered[0], ordered[-1])
    for name, percent in PERCENTS.items():
        assert getattr(spread, name) == ordered[math.ceil(percent * len(ordered) / 100) - 1], name
    assert spread.mean == pytest.approx(sum(ordered) / len(ordered), rel=1e-11)


def reference_recall(pairs, rows, note_ids, k):
    """Mean recall of the k most viewed other notes, and of the best k notes."""
    users = defaultdict(set)
    for user, note, _ in rows:
        users[note].add(user)
    ordered = sorted(note_ids, key=lambda note: (-len(users[note]), note))
    related = defaultdict(set)
    for note, other, *_ in pairs:
        related[note].add(other)
    recalls = [
        len(others & set([one for one in ordered if one != note][:k])) / len(others) for note, others in related.items()
    ]
    best = [min(k, len(others)) / len(others) for others in related.values()]
    return sum(recalls) / len(recalls), sum(best) / len(best)


CASES = [
    (PairOptions(window_days=1, top_k=3), 2),
    (PairOptions(window_days=1, direction="forward", top_k=2), 1),
    (PairOptions(window_days=1, min_count=2, max_as_related=2, max_swing_users=2), 3),
    (PairOptions(window_days=2.75, min_score=0.3, min_note_users=2, top_k=2), 2),
]


@pytest.mark.parametrize("with_notes", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_figures_equal_plain_python(engine, case, with_notes):
    options, k = CASES[case]
    rows = random_views(case, views=70)
    viewed = {note for _, note, _ in rows}
    note_ids = {*sorted(viewed)[1:], "never viewed", "0"} if with_notes else None
    report = reported(engine, rows, options, k=k, note_ids=note_ids)

    seconds = {second: second for *_, second in rows}
    views, broken = reference_views(rows, seconds, ViewOptions(), note_ids)
    assert (report.rows, report.views) == (len(rows), len(views))
    assert {rule: count for rule, count in report.broken.items() if count} == {r: len(p) for r, p in broken.items()}
    times = [second for *_, second in views]
    assert (report.first, report.last) == (min(times), max(times))

    distinct = {(user, note) for user, note, _ in views}
    counted = {
        "users per note": Counter(note for _, note in distinct),
        "views per note": Counter(note for _, note, _ in views),
        "notes per user": Counter(user for user, _ in distinct),
        "views per user": Counter(user for user, *_ in views),
    }
    assert list(report.activity) == list(counted)
    for name, counter in counted.items():
        assert_spread(report.activity[name], counter.values())
        assert report.curves[name] == list(enumerate(sorted(counter.values(), reverse=True), start=1))
    assert report.users == len(counted["views per user"])
    assert report.notes_viewed == len(counted["views per note"])
    assert report.top_notes == 1
    assert report.top_share == max(counted["views per note"].values()) / len(views)
    notes = note_ids or set(counted["users per note"])
    assert report.notes == len(notes)

    recalls, others = [], []
    for score in SCORES:
        found, pairs = report.scores[score], reference_pairs(views, replace(options, score=score))
        assert pairs
        assert found.pairs == len(pairs)
        per_note = Counter(note for note, *_ in pairs)
        assert found.notes_without == len(notes) - len(per_note)
        expected = Counter(per_note.values()) + Counter({0: found.notes_without})
        assert {number: count for number, count in found.notes_by_pairs.items() if count} == expected
        assert_spread(found.per_note, per_note.values())
        values = [value for *_, value, _ in pairs]
        assert_spread(found.scores, values)
        shown = found.histogram
        assert shown.zeros == values.count(0.0)
        assert shown.counts == tuple(
            sum(low <= value < high for value in values)
            for low, high in zip(shown.edges[:-1], shown.edges[1:], strict=True)
        )
        assert shown.zeros + sum(shown.counts) == len(pairs)
        recall, best = reference_recall(pairs, views, notes, k)
        assert found.popularity.recall == pytest.approx(recall, rel=1e-12)
        assert found.popularity.best == pytest.approx(best, rel=1e-12)
        assert found.popularity.chance == k / (len(notes) - 1)
        recalls.append(found.popularity.recall)
        others.append(reference_recall(pairs, views, notes, k + 1)[0])
    assert len(set(recalls)) > 1  # negative controls: another score, or another k, would be found out
    assert recalls != pytest.approx(others, abs=0.01)


def test_a_note_among_the_most_viewed_is_no_answer_to_itself(engine):
    # a, b and c are viewed by 4, 3 and 2 users; all are seen together by u0 and u1.
    rows = [(f"u{user}", note, 0) for note, users in (("a", 4), ("b", 3), ("c", 2)) for user in range(users)]
    report = reported(engine, rows, PairOptions(), ["count"], k=1)
    # a is answered b (1 of b, c), b and c are answered a (1 of 2 each): were a answered a, the mean would be 1 / 3.
    assert report.scores["count"].popularity == Popularity(recall=0.5, best=0.5, chance=0.5)


@pytest.mark.parametrize("fetched", [1_000_000, 40, 1])
def test_quantiles_of_values_that_are_too_many_to_fetch(engine, monkeypatch, fetched):
    monkeypatch.setattr(report_module, "_FETCHED_VALUES", fetched)
    rng = random.Random(0)
    tenth = math.nextafter(0.1, 1)
    many = [rng.lognormvariate(-3, 2) for _ in range(1500)]
    cases = [
        many,
        many + [0.0] * 500 + [0.25] * 700,
        [0.1] * 50 + [tenth] * 50 + [math.nextafter(tenth, 1)],  # neighbours among the floats
        [0.05144957554275265] * 3,
        [0.0] * 4,
        [7.5],
    ]
    for values in cases:
        table = engine.from_arrow(pa.table({"score": pa.array(values, pa.float64())}))
        spread, histogram = report_module._spread_on_engine(engine, table, "score", integers=False)
        assert_spread(spread, values)
        assert histogram.zeros == values.count(0.0)
        assert histogram.zeros + sum(histogram.counts) == len(values)
        counts, _ = np.histogram([value for value in values if value], histogram.edges or [0, 1])
        assert not histogram.edges or tuple(counts) == histogram.counts
    with pytest.raises(AssertionError):  # negative control
        assert_spread(spread._replace(p90=7.25), values)


def test_histograms_of_integers_have_whole_bounds():
    assert report_module._log_edges(3.0, 6.0, integers=True) == [3, 4, 5, 6, 7]
    assert report_module._log_edges(3.0, 47.0, integers=True) == [3, 6, 12, 24, 48]
    assert report_module._log_edges(3.0, 48.0, integers=True) == [3, 6, 12, 24, 48, 96]


@pytest.mark.parametrize("low, high", [(0.2, 1.1), (1, 3), (1, 2000), (5e-5, 80), (1, 10**8), (1e-9, 1e4)])
def test_log_axes_have_labels(low, high):
    axes = report_module._figure(3).subplots()
    axes.plot([low, high], [1, 1])
    axes.set_xscale("log")
    report_module._plain_log_ticks(axes.xaxis)
    axes.figure.canvas.draw()
    start, end = axes.get_xlim()
    labels = [one.get_text() for one in axes.get_xticklabels() if start <= one.get_position()[0] <= end]
    assert 2 <= len(labels) <= 10 and all(labels)


def test_bad_rows_are_told_by_rule(engine):
    rows = [("u", "a", 5), ("u", "b", 3), ("", "a", 1), ("v", "a", 1), ("v", "a", 1), ("v", "c", 2), ("v", "b", -1)]
    texts = {}
    for drop in (False, True):
        options = ViewOptions(drop_time_backwards=drop)
        views = read_views(engine, as_views(rows), options, ["a", "b"])
        report = report_views(engine, views, PairOptions(), ["count"], 1)
        told = {rule: count for rule, count in report.broken.items() if count}
        assert told == {
            "empty_user_id": 1,
            "timestamp_range": 1,
            "unknown_note": 1,
            "duplicate_view": 1,
            "time_backwards": 1,
        }
        assert report.views == (2 if drop else 3)
        assert report.kept_backwards is not drop
        assert report.record()["rules"]["time_backwards"]["dropped"] is drop
        assert report.record()["rules"]["duplicate_view"] == {
            "rows": 1,
            "dropped": True,
            "what": "the user, note and second of another row",
        }
        texts[drop] = report.text()
        for line in broken_rules_text(views, options).splitlines():
            assert f"- {line.strip()}\n" in texts[drop]
    assert "1 kept by time_backwards" in texts[False] and "1 dropped by time_backwards" in texts[True]


def popular_log():
    """Everyone views three hubs and two notes at random: only how often a note is viewed says what goes with it."""
    rng = random.Random(0)
    return [
        (f"u{user}", note, 60 * place)
        for user in range(40)
        for place, note in enumerate(["hub0", "hub1", "hub2", *rng.sample([f"n{i}" for i in range(20)], 2)])
    ]


def related_log():
    """Notes come in groups of four that are viewed together, all equally often."""
    return [(f"u{user}", f"n{user % 6}-{i}", 60 * i) for user in range(36) for i in range(4)]


def test_sentences_tell_popularity_from_relatedness(engine):
    options = PairOptions(top_k=3)
    popular = reported(engine, popular_log(), options, ["count"], k=3)
    related = reported(engine, related_log(), options, ["count"], k=3)
    assert popular.scores["count"].popularity.recall == pytest.approx(1.0, abs=0.1)
    assert popular.scores["count"].popularity.verdict == "popularity"
    assert "Pairs by count measure popularity: the 3 most viewed notes" in popular.text()
    # Ties by id: the answer is the group n0, which is right for 4 of 24 notes.
    assert related.scores["count"].popularity.recall == pytest.approx(4 / 24)
    assert related.scores["count"].popularity.verdict == "relatedness"
    assert "Pairs by count do not measure popularity" in related.text()
    assert "measure popularity:" not in related.text()
    # The thresholds stand in the text.
    assert "50% or more" in related.text() and "from 25%" in related.text()


@pytest.mark.parametrize(
    "recall, best, chance, verdict",
    [
        (0.55, 1.0, 0.1, "popularity"),
        (0.54, 1.0, 0.1, "mixed"),
        (0.325, 1.0, 0.1, "mixed"),
        (0.32, 1.0, 0.1, "relatedness"),
        (0.05, 1.0, 0.1, "relatedness"),
        (0.04, 1.0, 0.1, "rarity"),
        (0.32, 0.5, 0.1, "popularity"),
        (1.0, 1.0, 1.0, "unknown"),
        (0.1, 0.1, 0.2, "unknown"),
        (None, None, 0.1, "unknown"),
    ],
)
def test_verdicts(recall, best, chance, verdict):
    popularity = Popularity(recall, best, chance)
    assert popularity.verdict == verdict
    sentence = report_module._conclusion("lift", popularity, 3)
    marks = {
        "popularity": "measure popularity:",
        "mixed": "in part",
        "relatedness": "do not measure",
        "rarity": "favour what few viewed",
    }
    assert [name for name, mark in marks.items() if mark in sentence] == ([] if verdict == "unknown" else [verdict])
    assert ("less than chance" in sentence) == (verdict != "unknown" and recall < chance)
    assert sentence.count(".") == 1 + sentence.count("0.") + sentence.count("1.0")  # one sentence


def has_drawing(path):
    """Whether more than a hundredth of the pixels differ from the one in the corner, and it is 1,200 pixels wide."""
    pixels = np.asarray(Image.open(path).convert("L"))
    return pixels.shape[1] == 1200 and (pixels != pixels[0, 0]).mean() > 0.01


def test_files(engine, tmp_path):
    report = reported(engine, popular_log(), PairOptions(min_count=2), k=3)
    report.write(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.json", *PLOTS}
    for name in PLOTS:
        assert has_drawing(folder / name), name
    Image.new("RGB", (1200, 600), "white").save(tmp_path / "blank.png")
    assert not has_drawing(tmp_path / "blank.png")  # negative control

    written = (folder / "report.md").read_text(encoding="utf-8")
    assert written.startswith(report.text())
    assert all(f"]({name})" in written for name in PLOTS)
    lines = report.text().splitlines()
    for rule in (i for i, line in enumerate(lines) if line.startswith("| :-")):
        table = [lines[rule - 1], *(line for line in lines[rule : rule + 4] if line.startswith("|"))]
        assert len({line.count("|") for line in table}) == len({len(line) for line in table}) == 1
    record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert record["scores"]["cosine"]["popularity"]["recall"] == report.scores["cosine"].popularity.recall
    assert record["scores"]["swing"]["conclusion"] == report.scores["swing"].conclusion
    assert record["activity"]["users per note"]["max"] == 40
    assert record["first_view"] == "1970-01-01T00:00:00Z"
    assert record["pair_options"]["min_count"] == 2 and "score" not in record["pair_options"]


@pytest.mark.parametrize("rows", [[("u", "a", 0)], [("u", "a", 0), ("u", "b", 0), ("v", "a", 9)]])
def test_tiny_logs(engine, tmp_path, rows):
    """One note alone, which has no pairs; and pairs that swing scores 0."""
    report = reported(engine, rows, PairOptions())
    assert {one.popularity.verdict for one in report.scores.values()} == {"unknown"}
    assert report.scores["swing"].histogram == (None if len(rows) == 1 else (2, (), ()))
    report.write(tmp_path)
    assert all(has_drawing(tmp_path / name) for name in PLOTS)
    expected = "There are no pairs by lift" if len(rows) == 1 else "choose a smaller K"
    assert expected in report.text()


def test_swing_can_be_left_out(engine, monkeypatch):
    counted = []
    count_pairs = report_module.count_pairs

    def spy(log, options, *args, **kwargs):
        counted.append(options.score)
        return count_pairs(log, options, *args, **kwargs)

    monkeypatch.setattr(report_module, "count_pairs", spy)
    rows = random_views(1)
    full = reported(engine, rows, PairOptions(window_days=1))
    assert sorted(counted) == ["count", "swing"]  # one pass serves the other four
    counted.clear()
    some = reported(engine, rows, PairOptions(window_days=1), ["lift", "count"])
    assert counted == ["count"]
    assert list(some.scores) == ["lift", "count"]
    assert all(some.scores[name] == full.scores[name] for name in some.scores)


@pytest.mark.parametrize("k", [0, -3])
def test_bad_k_is_refused(engine, k):
    with pytest.raises(ValueError, match=f"k={k}: give 1 or more"):
        reported(engine, related_log(), PairOptions(), k=k)


@pytest.mark.parametrize("scores", [[], ["count", "fame"]])
def test_bad_scores_are_refused(engine, scores):
    with pytest.raises(ValueError, match="use some of count, inverse_activity, cosine, lift, swing"):
        reported(engine, related_log(), PairOptions(), scores)


def test_without_matplotlib(engine, monkeypatch, tmp_path):
    report = reported(engine, related_log(), PairOptions(), ["count"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"notellm2\[report\]"):
        report.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json"}


@pytest.fixture
def log_file(tmp_path):
    write_table(as_views(popular_log()), tmp_path / "views.csv")
    lines = ["note_id,title,topics,content,image", *(f"n{i},N,,," for i in range(20)), "hub0,H,,,", "new,N,,,"]
    (tmp_path / "notes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_command(log_file, capsys):
    views, notes, output = (str(log_file / name) for name in ("views.csv", "notes.csv", "report"))
    command = ["--views", views, "--notes", notes, "--output", output, "--k", "2", "--top-k", "4", "--memory-gb", "1"]
    main([*command, "--scores", "count", "cosine", "--max-user-views", "3"])
    printed = capsys.readouterr().out
    written = (log_file / "report" / "report.md").read_text(encoding="utf-8")
    text, plots = written.split("\n## Plots\n")
    assert printed.startswith(text)
    assert len(plots.split()) >= len(PLOTS)
    unseen = {f"n{i}" for i in range(20)} - {note for _, note, _ in popular_log()} | {"new"}
    assert "80 dropped by unknown_note" in printed and f"nobody viewed {len(unseen)} more" in printed
    record = json.loads((log_file / "report" / "report.json").read_text(encoding="utf-8"))
    assert record["k"] == 2 and record["pair_options"]["top_k"] == 4
    assert list(record["scores"]) == ["count", "cosine"]
    assert all(has_drawing(log_file / "report" / name) for name in PLOTS)


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--k", "0"], "k=0: give 1 or more"),
        (["--views", "nowhere.csv"], "nowhere.csv"),
        (["--scores", "fame"], "invalid choice: 'fame'"),
        (["--min-count", "0"], "min_count=0"),
        (["--refuse", "duplicate_view"], "duplicate_view"),
    ],
)
def test_the_command_refuses(log_file, capsys, changed, message):
    write_table(as_views([*popular_log(), ("u0", "hub0", 0)]), log_file / "views.csv")
    with pytest.raises(SystemExit) as stopped:
        main(["--views", str(log_file / "views.csv"), "--output", str(log_file / "report"), *changed])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (log_file / "report").exists()


def test_help_names_every_option_but_the_score(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    words = capsys.readouterr().out.replace("[", " ").split()
    others = ("engine", "k", "memory_gb", "notes", "output", "scores", "spark_master", "strict", "temp_dir", "views")
    for name in (*PairOptions.__dataclass_fields__, *ViewOptions.__dataclass_fields__, *others):
        assert ("--" + name.replace("_", "-") in words) == (name != "score"), name


def test_the_report_says_all_that_it_holds(engine):
    """No field of the report is missing from the JSON."""
    record = reported(engine, related_log(), PairOptions(), ["count"]).record()
    renamed = {"broken": "rules", "first": "first_view", "last": "last_view", "options": "pair_options"}
    told_otherwise = {"kept_backwards", "rules_text"}  # in "rules"
    for name in DataReport.__dataclass_fields__:
        assert name in told_otherwise or renamed.get(name, name) in record, name
