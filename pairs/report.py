"""A report of the data: are the logs and the pairs made of them any good?

How many views there are and why rows were dropped, how they spread over notes and users, how scores and pairs spread,
and how far "always answer the most viewed notes" gets: where that gets far, pairs measure popularity, and a model that
is trained and judged on them learns what a counter knows.

    DIR/report.md     the text that the command prints
    DIR/report.json   all figures
    DIR/*.png         PLOTS

    python -m pairs.report --views views.csv --notes notes.csv --min-count 3 --output DIR

The engine computes; what comes into memory are counts of equal values, histograms and single figures.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import ibis
import numpy as np
import pyarrow as pa
from ibis import _
from ibis.expr import types as ir
from tqdm.auto import tqdm

from pairs.build import add_engine_options, add_view_options, opened_engine, parsed_view_options
from pairs.command import CommandParser, interruption_said
from pairs.engines import Engine
from pairs.options import add_options, parsed_options
from pairs.query import SECONDS_PER_DAY, PairOptions, Score, ViewLog, count_pairs, exactly, rank_pairs
from pairs.tables import ANYWHERE, load_notes
from pairs.views import RULES, ReadViews, Rule, ViewOptions, broken_rules_text, read_views

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SCORES: tuple[Score, ...] = get_args(Score)

Verdict = Literal["popularity", "mixed", "relatedness", "rarity", "unknown"]

# Of the way from chance to the best recall that any answer of K notes can have, the most viewed notes go so far.
POPULARITY_FROM = 0.5
RELATEDNESS_BELOW = 0.25
# Pairs are of rarely viewed notes where the most viewed ones reach less than this part of chance.
RARITY_BELOW = 0.5

PLOTS = {
    "views.png": "Views per note and per user, by rank",
    "scores.png": "Scores of the pairs",
    "pairs_per_note.png": "Pairs per note",
    "popularity.png": "Recall of the most viewed notes",
}

_PERCENTS = (25, 50, 75, 90, 99)
_HISTOGRAM_BINS = 32
_CURVE_POINTS = 200
_FETCHED_VALUES = 1_000_000


class Distribution(NamedTuple):
    """How values spread. A quantile is the lowest value such that so many per cent of all are at most that.

    Attributes:
        number: how many values there are, at least 1.
        min, p25, median, p75, p90, p99, max: quantiles.
        mean: the mean, of scores to 12 digits.
    """

    number: int
    min: float
    p25: float
    median: float
    p75: float
    p90: float
    p99: float
    max: float
    mean: float


class Histogram(NamedTuple):
    """Values counted in bins with log-spaced bounds; integer values have integer bounds.

    Attributes:
        zeros: how many values are 0, which have no place on a log scale.
        edges: (bins + 1) bounds; a bin holds its lower bound, and not its upper one.
        counts: (bins) values in each bin.
    """

    zeros: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Popularity:
    """What "always answer the K most viewed notes" reaches against pairs. Recalls are means over notes that have pairs.

    Attributes:
        recall: part of a note's related notes among the K most viewed other notes, by number of users, then by id; None
            where there are no pairs.
        best: the same for the best K notes: below 1 where notes have more than K related ones.
        chance: the same for K random other notes, K / (notes - 1), at most 1.
    """

    recall: float | None
    best: float | None
    chance: float

    @property
    def way(self) -> float | None:
        """The part of the way from chance to the best that the most viewed notes go; None where there is no way."""
        if self.recall is None or self.best is None or self.best <= self.chance:
            return None
        return (self.recall - self.chance) / (self.best - self.chance)

    @property
    def verdict(self) -> Verdict:
        """What the pairs measure, by the thresholds of this module."""
        if self.recall is None or self.way is None:
            return "unknown"
        if self.recall < RARITY_BELOW * self.chance:
            return "rarity"
        if self.way >= POPULARITY_FROM:
            return "popularity"
        return "relatedness" if self.way < RELATEDNESS_BELOW else "mixed"


@dataclass(frozen=True)
class ScoreReport:
    """The pairs that one score gives.

    Attributes:
        pairs: how many there are, (a, b) and (b, a) being two.
        notes_without: notes that have none.
        scores: how the scores of the pairs spread; None without pairs.
        histogram: the same; None without pairs.
        per_note: how the numbers of pairs spread over the notes that have any; None without pairs.
        notes_by_pairs: for each number of pairs, 0 included, how many notes have so many.
        popularity: what the most viewed notes reach.
        conclusion: one sentence about that.
    """

    pairs: int
    notes_without: int
    scores: Distribution | None
    histogram: Histogram | None
    per_note: Distribution | None
    notes_by_pairs: dict[int, int]
    popularity: Popularity
    conclusion: str


@dataclass(frozen=True)
class DataReport:
    """What `report_views` found.

    Attributes:
        rows: rows that were read.
        views: rows that were kept.
        broken: for each of `RULES` how many rows broke it.
        kept_backwards: whether the rows that broke time_backwards were kept; all others were dropped.
        users: who viewed anything.
        notes: notes that there are: those of the table of notes if one was given, else those that were viewed.
        notes_viewed: those that were viewed.
        first: time of the first view, seconds since 1970 (UTC).
        last: time of the last view, the same.
        activity: how these spread: "users per note" and "views per note" over the notes that were viewed, "notes per
            user" and "views per user" over the users. A user who views a note twice is one user and two views.
        curves: of the same, (rank, value) at up to 200 log-spaced ranks, the highest value having rank 1.
        top_notes: how many notes 1 % of those viewed are, rounded up.
        top_share: the share of all views that the `top_notes` most viewed notes have, 0 to 1.
        options: what made notes related; its `score` means nothing here.
        k: how many of the most viewed notes are answered.
        scores: what each score gives.
    """

    rows: int
    views: int
    broken: dict[Rule, int]
    kept_backwards: bool
    users: int
    notes: int
    notes_viewed: int
    first: int
    last: int
    activity: dict[str, Distribution]
    curves: dict[str, list[tuple[int, int]]] = field(repr=False)
    top_notes: int
    top_share: float
    options: PairOptions
    k: int
    scores: dict[Score, ScoreReport]
    rules_text: str = field(repr=False)

    def text(self) -> str:
        """The report as Markdown that a terminal can show."""
        return "\n".join([*_views_text(self), *_pairs_text(self), *_popularity_text(self)]) + "\n"

    def record(self) -> dict[str, Any]:
        """All figures, for JSON."""
        options = asdict(self.options)
        del options["score"]
        kept = {"time_backwards"} if self.kept_backwards else set()
        rules = {
            rule: {"rows": rows, "dropped": rule not in kept, "what": RULES[rule][0]}
            for rule, rows in self.broken.items()
        }
        return {
            "rows": self.rows,
            "views": self.views,
            "rules": rules,
            "users": self.users,
            "notes": self.notes,
            "notes_viewed": self.notes_viewed,
            "first_view": _time(self.first),
            "last_view": _time(self.last),
            "activity": {name: spread._asdict() for name, spread in self.activity.items()},
            "curves": self.curves,
            "top_notes": self.top_notes,
            "top_share": self.top_share,
            "pair_options": options,
            "k": self.k,
            "thresholds": {
                "popularity_from": POPULARITY_FROM,
                "relatedness_below": RELATEDNESS_BELOW,
                "rarity_below": RARITY_BELOW,
            },
            "scores": {name: _score_record(score) for name, score in self.scores.items()},
        }

    def write(self, directory: str | Path) -> None:
        """Writes report.md, report.json and the plots into `directory`, which is made if it is not there.

        Raises:
            ImportError: matplotlib is not installed; the two texts are written all the same.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        images = "\n".join(f"![{title}]({name})\n" for name, title in PLOTS.items())
        (folder / "report.md").write_text(f"{self.text()}\n## Plots\n\n{images}", encoding="utf-8")
        record = json.dumps(self.record(), indent=2, allow_nan=False)
        (folder / "report.json").write_text(record + "\n", encoding="utf-8")
        _need_matplotlib()
        for name, draw in _DRAWN.items():
            # No pyplot: it keeps figures in a global list, and would look for a display.
            draw(self).savefig(folder / name)


def report_views(
    engine: Engine, views: ReadViews, options: PairOptions, scores: Iterable[Score] = SCORES, k: int = 100
) -> DataReport:
    """Describes a log of views, and the pairs that each of the scores makes of it.

    Args:
        engine: the engine of the views.
        views: from `pairs.views.read_views`.
        options: what makes two notes related. Its `score` is not used; its thresholds hold for each of the scores.
        scores: which to try; all but "swing" are served by one count of the pairs, and "swing" costs most.
        k: how many of the most viewed notes are answered, 1 or more.

    Raises:
        ValueError: k is below 1, or scores are none or unknown.
    """
    scores = tuple(dict.fromkeys(scores))
    if k < 1:
        raise ValueError(f"k={k}: give 1 or more.")
    if not scores or not set(scores) <= set(SCORES):
        raise ValueError(f"scores={scores}: use some of {', '.join(SCORES)}.")
    log = views.log
    counts = {name: _value_counts(engine, *column) for name, column in _activity(log).items()}
    notes = engine.count(log.notes)
    # A rule other than time_backwards drops what it counts, so that what is left says whether that did, too.
    kept_backwards = views.kept + sum(views.broken.values()) > views.rows
    per_note = counts["views per note"]
    notes_viewed = sum(per_note.values())
    top_notes = -(-notes_viewed // 100)
    return DataReport(
        rows=views.rows,
        views=views.kept,
        broken=dict(views.broken),
        kept_backwards=kept_backwards,
        users=log.num_users,
        notes=notes,
        notes_viewed=notes_viewed,
        first=int(views.first),
        last=int(views.last),
        activity={name: _spread(values) for name, values in counts.items()},
        curves={name: _curve(values) for name, values in counts.items()},
        top_notes=top_notes,
        top_share=_sum_of_top(per_note, top_notes) / views.kept,
        options=options,
        k=k,
        scores=_report_scores(engine, log, options, scores, k, notes),
        rules_text=broken_rules_text(views, ViewOptions(drop_time_backwards=not kept_backwards)),
    )


def _activity(log: ViewLog) -> dict[str, tuple[ir.Table, str]]:
    """The tables and columns whose values tell how notes are viewed and users view."""
    views = {key: log.spans.group_by(key).aggregate(views=_.times.sum()) for key in ("note", "person")}
    return {
        "users per note": (log.notes.filter(_.users > 0), "users"),
        "views per note": (views["note"], "views"),
        "notes per user": (log.people, "activity"),
        "views per user": (views["person"], "views"),
    }


def _report_scores(
    engine: Engine, log: ViewLog, options: PairOptions, scores: Sequence[Score], k: int, notes: int
) -> dict[Score, ScoreReport]:
    top = _most_viewed(engine, log, k)
    counted = None
    reports = {}
    for score in tqdm(scores, desc="scores", unit="score", disable=not engine.show_progress):
        chosen = replace(options, score=score)
        if score == "swing":
            ranked = rank_pairs(count_pairs(log, chosen, engine), log, chosen, engine)
        else:
            if counted is None:
                plain = replace(options, score="count")
                counted = count_pairs(log, plain, engine, weigh_activity="inverse_activity" in scores)
            ranked = rank_pairs(counted, log, chosen, engine)
        reports[score] = _report_score(engine, score, ranked, top, k, notes)
    return reports


def _most_viewed(engine: Engine, log: ViewLog, k: int) -> ir.Table:
    """note, place (int64, from 0) of the k + 1 most viewed notes: among them are any note's k most viewed others."""
    ordered = log.notes.order_by(ibis.desc("users"), ibis.asc("note")).select("note").limit(k + 1)
    first = engine.fetch(ordered)
    return engine.from_arrow(first.append_column("place", pa.array(np.arange(len(first)))))


def _report_score(engine: Engine, score: Score, ranked: ir.Table, top: ir.Table, k: int, notes: int) -> ScoreReport:
    # A note that is itself among the k most viewed makes room for the next one.
    placed = ranked.left_join(top.select(related="note", place="place"), "related").select("note", "place")
    placed = placed.left_join(top.select(note="note", own="place"), "note").select("note", "place", "own")
    hit = (_.place < k) | ((_.place == k) & (_.own < k))
    per_note = placed.mutate(hit=hit.fill_null(False).cast("int64")).group_by("note")
    per_note = per_note.aggregate(pairs=_.count(), hits=_.hit.sum())
    # Rows: what notes with the same figures have in common, so that there are few, however many notes there are.
    rows = engine.fetch(per_note.group_by("pairs", "hits").aggregate(notes=_.count())).to_pylist()
    by_pairs: dict[int, int] = {}
    for row in rows:
        by_pairs[row["pairs"]] = by_pairs.get(row["pairs"], 0) + row["notes"]
    having = sum(by_pairs.values())
    recall = best = scores = histogram = None
    if having:
        # fsum rounds once, at the end: the order in which an engine gives the rows does not matter.
        recall = math.fsum(row["notes"] * row["hits"] / row["pairs"] for row in rows) / having
        best = math.fsum(count * min(k, pairs) / pairs for pairs, count in by_pairs.items()) / having
        scores, histogram = _spread_on_engine(engine, ranked, "score", integers=score == "count")
    popularity = Popularity(recall, best, min(1.0, k / (notes - 1)) if notes > 1 else 1.0)
    return ScoreReport(
        pairs=sum(pairs * count for pairs, count in by_pairs.items()),
        notes_without=notes - having,
        scores=scores,
        histogram=histogram,
        per_note=_spread(by_pairs) if having else None,
        notes_by_pairs=dict(sorted({0: notes - having, **by_pairs}.items())),
        popularity=popularity,
        conclusion=_conclusion(score, popularity, k),
    )


def _conclusion(score: Score, popularity: Popularity, k: int) -> str:
    """One plain sentence; its thresholds are those of `Popularity.verdict`."""
    if popularity.recall is None:
        return f"There are no pairs by {score}: loosen the thresholds, or get more views."
    if popularity.way is None or popularity.best is None:
        return (
            f"What pairs by {score} measure cannot be told, as {k} random notes reach a recall of "
            f"{popularity.chance:.2f}: choose a smaller K."
        )
    reach = (
        f"the {k:,} most viewed notes reach a recall of {popularity.recall:.2f} (chance {popularity.chance:.2f}, "
        f"at best {popularity.best:.2f}), "
    )
    reach += f"{popularity.way:.0%} of the way from chance to the best" if popularity.way >= 0 else "less than chance"
    return {
        "popularity": f"Pairs by {score} measure popularity: {reach}.",
        "mixed": f"Pairs by {score} measure popularity in part: {reach}.",
        "relatedness": f"Pairs by {score} do not measure popularity, which leaves relatedness (or noise): {reach}.",
        "rarity": f"Pairs by {score} favour what few viewed, which may be noise; a higher min_count helps: {reach}.",
    }[popularity.verdict]


# How values spread: exactly, from counts of equal integers, or on the engine where the values may all differ.


def _value_counts(engine: Engine, table: ir.Table, column: str) -> dict[int, int]:
    """How often each integer occurs, ascending. Few differ: n of them add up to n² / 2 or more."""
    counted = engine.fetch(table.group_by(value=table[column]).aggregate(n=_.count())).to_pylist()
    return dict(sorted((int(row["value"]), int(row["n"])) for row in counted))


def _spread(values: dict[int, int]) -> Distribution:
    """Of values with the number of times that each occurs, ascending by value or not."""
    ordered = np.array(sorted(values.items()), np.int64)
    upto = np.cumsum(ordered[:, 1])
    number = int(upto[-1])
    quantiles = [float(ordered[np.searchsorted(upto, rank), 0]) for rank in _ranks(number)]
    total = sum(value * count for value, count in values.items())
    return Distribution._make([number, float(ordered[0, 0]), *quantiles, float(ordered[-1, 0]), total / number])


def _ranks(number: int) -> list[int]:
    """The places of the quantiles, from 1, among so many values in ascending order."""
    return [-(-percent * number // 100) for percent in _PERCENTS]


def _curve(values: dict[int, int]) -> list[tuple[int, int]]:
    """(rank, value), descending by value, at log-spaced ranks."""
    ordered = np.array(sorted(values.items(), reverse=True), np.int64)
    upto = np.cumsum(ordered[:, 1])
    ranks = np.unique(np.geomspace(1, upto[-1], _CURVE_POINTS).round().astype(np.int64))
    return [(int(rank), int(ordered[np.searchsorted(upto, rank), 0])) for rank in ranks]


def _sum_of_top(values: dict[int, int], number: int) -> int:
    """The sum of the `number` highest values."""
    total = 0
    for value, count in sorted(values.items(), reverse=True):
        total += value * min(count, number)
        number -= min(count, number)
    return total


class _Bin(NamedTuple):
    """Values that lie beside one another: the lowest, the highest, and how many there are."""

    low: float
    high: float
    number: int


def _spread_on_engine(
    engine: Engine, table: ir.Table, column: str, *, integers: bool
) -> tuple[Distribution, Histogram]:
    """Of a column of numbers from 0, at least one, that may all differ and be too many to fetch."""
    value = table[column].cast("float64")
    table = table.select(value=value)
    known = table.aggregate(
        low=_.value.min(), lowest=_.value.min(where=_.value > 0), highest=_.value.max(), mean=_.value.mean()
    )
    low, lowest, highest, mean = (column[0].as_py() for column in engine.fetch(known).columns)
    if lowest is None:  # nothing but zeros
        number = sum(one.number for one in _binned(engine, table, []))
        return Distribution._make([number] + [0.0] * 8), Histogram(number, (), ())
    edges = _log_edges(lowest, highest, integers)
    places = dict(_numbered_bins(engine, table, edges))
    bins = sorted(places.values())
    number = sum(one.number for one in bins)
    # An engine adds in whatever order it likes, which shows in the last digits.
    spread = Distribution._make([number, low, *_quantiles(engine, table, bins), highest, float(f"{mean:.12g}")])
    counts = tuple(places[i].number if i in places else 0 for i in range(1, len(edges)))
    return spread, Histogram(places[0].number if 0 in places else 0, tuple(edges), counts)


def _log_edges(lowest: float, highest: float, integers: bool) -> list[float]:
    """Bounds of bins, of which the last is above the highest value."""
    if integers:
        # Each integer has its bin, or each bin is twice as wide as the one before: rounded bounds would make a comb.
        if highest - lowest < _HISTOGRAM_BINS:
            return [float(edge) for edge in range(int(lowest), int(highest) + 2)]
        return [lowest * 2.0**i for i in range(int(highest / lowest).bit_length() + 1)]
    inner = np.geomspace(lowest, highest, _HISTOGRAM_BINS + 1)[1:-1]
    inner = inner[(inner > lowest) & (inner < highest)]
    return [lowest, *(float(edge) for edge in np.unique(inner)), float(np.nextafter(highest, np.inf))]


def _numbered_bins(engine: Engine, table: ir.Table, edges: Sequence[float]) -> list[tuple[int, _Bin]]:
    """The bins that are not empty, in no order. Bin i holds the values that i of the edges are at most."""

    # Comparisons with numbers that are given, as engines do not agree on the last digit of a logarithm; as a tree, as
    # a list of all edges would cost a comparison an edge.
    def place(first: int, last: int) -> ir.IntegerValue:
        if first == last:
            return ibis.literal(first, "int32")
        middle = (first + last) // 2
        return (table.value < exactly(edges[middle])).ifelse(place(first, middle), place(middle + 1, last))

    binned = table.select(value="value", place=place(0, len(edges))).group_by("place")
    rows = engine.fetch(binned.aggregate(low=_.value.min(), high=_.value.max(), number=_.count())).to_pylist()
    return [(int(row["place"]), _Bin(row["low"], row["high"], int(row["number"]))) for row in rows]


def _binned(engine: Engine, table: ir.Table, edges: Sequence[float]) -> list[_Bin]:
    return sorted(one for _place, one in _numbered_bins(engine, table, edges))


def _quantiles(engine: Engine, table: ir.Table, bins: list[_Bin]) -> list[float]:
    """Bins that hold a quantile are made narrower until they are of one value, or few enough values to be fetched."""
    while True:
        upto = np.cumsum([one.number for one in bins])
        holding = [bins[np.searchsorted(upto, rank)] for rank in _ranks(int(upto[-1]))]
        wide = [one for one in dict.fromkeys(holding) if one.low < one.high]
        if not wide:
            return [one.low for one in holding]
        if sum(one.number for one in wide) <= _FETCHED_VALUES:
            inside = ibis.or_(*(table.value.between(exactly(one.low), exactly(one.high)) for one in wide))
            counted = engine.fetch(table.filter(inside).group_by("value").aggregate(n=_.count())).to_pylist()
            single = [_Bin(row["value"], row["value"], int(row["n"])) for row in counted]
            bins = sorted([one for one in bins if one not in wide] + single)
        else:
            parts = 64 // len(wide)
            edges = {edge for one in wide for edge in np.linspace(one.low, one.high, parts + 1).tolist()}
            # What was found stays apart from its neighbours: each pass narrows, and there is an end.
            edges |= {edge for one in holding for edge in (one.low, float(np.nextafter(one.high, np.inf)))}
            bins = _binned(engine, table, sorted(edges))


# The text.


def _views_text(report: DataReport) -> list[str]:
    found = [f"- {line.strip()}" for line in report.rules_text.splitlines()]
    if not any(report.broken.values()):
        found.append("- no row broke a rule")
    unseen = report.notes - report.notes_viewed
    days = (report.last - report.first) / SECONDS_PER_DAY
    viewed = f"- {report.users:,} users viewed {report.notes_viewed:,} notes"
    return [
        "# Report of the views",
        "",
        *found,
        viewed + (f"; nobody viewed {unseen:,} more" if unseen else ""),
        f"- first view {_time(report.first)}, last view {_time(report.last)}: {days:,.1f} days",
        "",
        "## Views per note and per user",
        "",
        *_table(["", "number", *_QUANTILE_NAMES], [[name, *_cells(one)] for name, one in report.activity.items()]),
        "",
        f"The 1% most viewed notes ({report.top_notes:,} of {report.notes_viewed:,}) have {report.top_share:.1%} of "
        "the views.",
        "",
    ]


def _pairs_text(report: DataReport) -> list[str]:
    header = ["score", "pairs", "notes without", "notes with", *_QUANTILE_NAMES]
    rows = [
        [name, f"{one.pairs:,}", f"{one.notes_without:,}", *_cells(one.per_note)] for name, one in report.scores.items()
    ]
    scores = [[name, *_cells(one.scores)] for name, one in report.scores.items()]
    options = {name: value for name, value in asdict(report.options).items() if value is not None}
    options.pop("score")
    said = [f"{name} {value}" for name, value in options.items()]
    return [
        "## Pairs",
        "",
        f"Pairs per note that has any, with {', '.join(said)}:",
        "",
        *_table(header, rows),
        "",
        "Scores of these pairs:",
        "",
        *_table(["score", "pairs", *_QUANTILE_NAMES], scores),
        "",
    ]


def _popularity_text(report: DataReport) -> list[str]:
    header = ["score", f"recall@{report.k}", "at best", "chance", "of the way", "pairs measure"]
    rows = []
    for name, score in report.scores.items():
        one = score.popularity
        way = "-" if one.way is None else f"{one.way:.0%}"
        rows.append([name, _decimal(one.recall), _decimal(one.best), _decimal(one.chance), way, one.verdict])
    return [
        "## Relatedness or popularity?",
        "",
        f"Recall of always answering the {report.k:,} most viewed other notes, against the pairs of each score. Pairs "
        f"measure popularity if that goes {POPULARITY_FROM:.0%} or more of the way from chance to the best recall of "
        f"any {report.k:,} notes, popularity in part from {RELATEDNESS_BELOW:.0%}, relatedness (or noise) below, and "
        f"rarity below {RARITY_BELOW:.0%} of chance.",
        "",
        *_table(header, rows),
        "",
        *(f"- {score.conclusion}" for score in report.scores.values()),
    ]


_QUANTILE_NAMES = ["min", "25%", "median", "75%", "90%", "99%", "max", "mean"]


def _cells(spread: Distribution | None) -> list[str]:
    if spread is None:
        return ["0"] + ["-"] * len(_QUANTILE_NAMES)
    return [f"{spread.number:,}", *(_short(value) for value in spread[1:])]


def _short(value: float) -> str:
    """Whole numbers in full, others with three digits or more that count."""
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table, its columns aligned, the first one to the left."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for line in [header, rule, *rows]:
        right = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        lines.append(f"| {' | '.join([line[0].ljust(widths[0]), *right[1:]])} |")
    return lines


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _score_record(report: ScoreReport) -> dict[str, Any]:
    record: dict[str, Any] = {"pairs": report.pairs, "notes_without": report.notes_without}
    named = {"scores": report.scores, "histogram": report.histogram, "per_note": report.per_note}
    record |= {name: None if value is None else value._asdict() for name, value in named.items()}
    popularity = {**asdict(report.popularity), "way": report.popularity.way, "verdict": report.popularity.verdict}
    return {
        **record,
        "notes_by_pairs": report.notes_by_pairs,
        "popularity": popularity,
        "conclusion": report.conclusion,
    }


# The plots: 1,200 pixels wide.

_WIDTH = 8.0  # inches
_DOTS_PER_INCH = 150
_BLUE, _ORANGE, _GREY = "#2a6fb0", "#d9772b", "#777777"


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "The plots of the report need matplotlib: pip install 'notellm2[report]', or -e '.[report]' in a checkout."
        ) from error


def _figure(height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: "Axes", title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_log_ticks(axis: "Axis") -> None:
    """1, 2, 5, 10, …: on an axis of less than a decade matplotlib would write 2 × 10⁰ over and over."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high < 1000 * low else (1.0,), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_views(report: DataReport) -> "Figure":
    figure = _figure(4.2)
    panels = [
        ("notes", "Views per note", "users per note", "views per note"),
        ("users", "Views per user", "notes per user", "views per user"),
    ]
    for axes, (what, title, distinct, views) in zip(figure.subplots(1, 2), panels, strict=True):
        # The dashed line is drawn last, and leaves the other to be seen where both are the same.
        for name, color, line, width in ((views, _ORANGE, "-", 3.5), (distinct, _BLUE, "--", 1.8)):
            ranks, values = zip(*report.curves[name], strict=True)
            marker = "o" if len(ranks) == 1 else None  # a line of one point is not to be seen
            axes.plot(ranks, values, label=name, color=color, linestyle=line, linewidth=width, marker=marker)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_log_ticks(axes.xaxis)
        _plain_log_ticks(axes.yaxis)
        axes.legend(fontsize=10, loc="lower left")
        _finish(axes, title, f"rank among {what} (1: the highest)", f"number per {what.removesuffix('s')} (see legend)")
    return figure


def _draw_scores(report: DataReport) -> "Figure":
    units = {"count": "users", "inverse_activity": "users / notes viewed", "lift": "times chance"}
    rows = -(-len(report.scores) // 2)
    figure = _figure(0.4 + 2.6 * rows)
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (name, score) in zip(panels, report.scores.items(), strict=False):
        shown, title = score.histogram, str(name)
        if score.scores is None or shown is None or not shown.counts:
            axes.text(0.5, 0.5, "no pairs" if shown is None else "all are 0", ha="center", transform=axes.transAxes)
        else:
            title += f": median {_short(score.scores.median)}"
            title += f", {shown.zeros / score.pairs:.0%} are 0" if shown.zeros else ""
            axes.stairs(shown.counts, shown.edges, fill=True, color=_BLUE)
            axes.set_xscale("log")
            _plain_log_ticks(axes.xaxis)
            if score.scores.median > 0:
                axes.axvline(score.scores.median, color=_ORANGE, linestyle="--")
        _finish(axes, title, f"score ({units.get(name, 'no unit')})", "pairs")
    for axes in panels[len(report.scores) :]:
        axes.set_visible(False)
    return figure


def _draw_pairs_per_note(report: DataReport) -> "Figure":
    rows = -(-len(report.scores) // 2)
    figure = _figure(0.4 + 2.6 * rows)
    panels = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (name, score) in zip(panels, report.scores.items(), strict=False):
        numbers = list(score.notes_by_pairs)
        colors = [_BLUE if number else _ORANGE for number in numbers]
        axes.bar(numbers, list(score.notes_by_pairs.values()), color=colors, width=0.8)
        _finish(axes, f"{name}: {score.notes_without:,} notes have none", "pairs per note", "notes")
        axes.set_yscale("log", nonpositive="clip")  # a few notes with few pairs shall be seen beside thousands
        axes.set_ylim(bottom=0.7)
        _plain_log_ticks(axes.yaxis)
        axes.tick_params(labelbottom=True, labelleft=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[len(report.scores) :]:
        axes.set_visible(False)
    return figure


def _draw_popularity(report: DataReport) -> "Figure":
    figure = _figure(4.5)
    axes = figure.subplots()
    names = list(report.scores)
    recalls = [score.popularity.recall or 0.0 for score in report.scores.values()]
    bars = axes.bar(names, recalls, color=_BLUE, width=0.6)
    labels = [_decimal(score.popularity.recall) for score in report.scores.values()]
    axes.bar_label(bars, labels, fontsize=11, padding=2)
    chance = report.scores[names[0]].popularity.chance
    axes.axhline(chance, color=_ORANGE, linestyle="--", label=f"chance {chance:.3f}")
    axes.set_ylim(0, 1.08)
    axes.tick_params(axis="x", labelsize=11)
    axes.legend(fontsize=11, loc="upper right")
    title = f"What always answering the {report.k:,} most viewed notes reaches"
    _finish(axes, title, "score that the pairs are built with", f"Recall@{report.k} (mean over notes with pairs)")
    return figure


_DRAWN = {
    "views.png": _draw_views,
    "scores.png": _draw_scores,
    "pairs_per_note.png": _draw_pairs_per_note,
    "popularity.png": _draw_popularity,
}


@interruption_said("the report was not written; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m pairs.report",
        description="Report how good a log of views is, and whether the pairs that each score makes of it measure "
        "relatedness or popularity.",
        epilog="Written to DIR: report.md (what is printed), report.json (all figures) and plots: "
        + "; ".join(f"{name}: {title.lower()}" for name, title in PLOTS.items())
        + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # --score is none of --scores
    )
    parser.add_argument(
        "--views", required=True, help="log of views: a file, a pattern, a folder (also day=…/) or a URL such as s3://…"
    )
    parser.add_argument("--notes", help="table of notes: views of others are unknown_note; without it, no note is")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the report, made if it is not there")
    parser.add_argument("--k", type=int, default=100, help="answer so many of the most viewed notes")
    parser.add_argument(
        "--scores",
        nargs="+",
        choices=SCORES,
        metavar="SCORE",
        default=list(SCORES),
        help=f"scores to try, of {', '.join(SCORES)}; swing takes the longest",
    )
    add_options(parser, PairOptions, "what makes two notes related (thresholds: of every score)", leave_out=["score"])
    add_view_options(parser)
    add_engine_options(parser)
    args = parser.parse_args(argv)
    try:
        options, view_options = parsed_options(args, PairOptions), parsed_view_options(args)
        if args.k < 1:
            raise ValueError(f"k={args.k}: give 1 or more.")
        _need_matplotlib()  # now, not after all the counting
        note_ids = load_notes(args.notes, ANYWHERE)["note_id"] if args.notes else None
        with opened_engine(args) as engine:
            views = read_views(engine, args.views, view_options, note_ids)
            report = report_views(engine, views, options, args.scores, args.k)
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    report.write(args.output)
    sys.stdout.write(report.text() + f"\nreport.md, report.json, {', '.join(PLOTS)}: {args.output}\n")


if __name__ == "__main__":
    main()
