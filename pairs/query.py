"""What makes two notes related, written once as Ibis expressions that every engine runs.

1. The views of each person are joined with themselves: a person *saw* (a, b) who viewed both within the window. Each
   person counts once for (a, b), however often they saw it.
2. A score is made of who saw the pair; low counts and scores outside the thresholds are dropped.
3. A note stays related to at most `max_as_related` other notes, where it scores best.
4. Of every a the `top_k` best b are kept, best first; equal scores go by count, then by id.

Two things make engines agree to the last bit. Ids are numbers in the order of the ids, so that ties break alike. Sums
of fractions are taken over integers, a whole being `WHOLE`: an engine adds in whatever order it likes, and
floating-point sums would then differ in their last digits and rank ties at random.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import ibis
from ibis import _
from ibis.expr import types as ir
from tqdm.auto import tqdm

from pairs.engines import Engine

Direction = Literal["forward", "both"]
Score = Literal["count", "inverse_activity", "cosine", "lift", "swing"]

SECONDS_PER_DAY = 86_400
WHOLE = 2**32

# Takes of a table the rows that belong to the part of the work at hand.
InPart = Callable[[ir.Table], ir.Table]


@dataclass(frozen=True)
class PairOptions:
    """What makes two notes related. Each field's metadata says what it is; the commands' --help repeats it.

    The scores; users_x is the number of distinct users who viewed x at any time, U that of all users:

    - `count`: how many users saw (a, b) (NoteLLM-2, data set).
    - `inverse_activity`: Σ 1 / N_u over the users who saw it, N_u the number of notes that u viewed (NoteLLM, Zhang et
      al., arXiv 2403.01744): who views everything says little. Each 1 / N_u is rounded down to 2^-32.
    - `cosine`: count / sqrt(users_a · users_b), Ochiai's coefficient: popular notes do not win everywhere.
    - `lift`: count · U / (users_a · users_b). Its logarithm is the pointwise mutual information (Church and Hanks,
      1990), which ranks alike. It favours what hardly anyone viewed: give it a floor (`min_count` of 3 or more).
    - `swing`: Σ w_u · w_v / (1 + |I_u ∩ I_v|) over the unordered pairs {u, v} of users who saw (a, b), where w_u is
      1 / sqrt(N_u) and I_u the notes that u viewed (Yang et al., arXiv 2010.05525, with α = 1): users who have little
      else in common say more. A pair that one user saw scores 0. Each term is rounded down to 2^-32.
    """

    window_days: float = field(
        default=7.0, metadata={"help": "a user views both notes within this many days, bounds included"}
    )
    direction: Direction = field(
        default="both",
        metadata={"help": "forward: the related note is viewed after the note or in the same second; both: any order"},
    )
    score: Score = field(
        default="count",
        metadata={
            "help": "count: users who saw both; inverse_activity: sum of 1 / (notes that the user viewed); cosine: "
            "count / sqrt(users_a * users_b); lift: count * users / (users_a * users_b), give it --min-count 3 or "
            "more; swing: over pairs of users, more where they have little else in common"
        },
    )
    min_score: float = field(default=0.0, metadata={"help": "drop pairs that score lower"})
    max_score: float | None = field(default=None, metadata={"help": "drop pairs that score higher"})
    min_count: int = field(default=1, metadata={"help": "drop pairs that fewer users saw"})
    min_note_users: int = field(default=1, metadata={"help": "leave out notes that fewer users viewed"})
    top_k: int = field(default=10, metadata={"help": "related notes to keep of each note"})
    max_as_related: int | None = field(
        default=None,
        metadata={"help": "a note is the related note of at most so many others: those with which it scores best"},
    )
    max_swing_users: int = field(
        default=200,
        metadata={
            "help": "swing: look at the so many least active users of a pair, as its cost grows with their square"
        },
    )

    def __post_init__(self) -> None:
        if not 1 / SECONDS_PER_DAY <= self.window_days < 100_000:  # also refuses nan
            raise ValueError(f"window_days={self.window_days}: give a second at least and less than 100000 days.")
        for name, value, allowed in (("direction", self.direction, Direction), ("score", self.score, Score)):
            if value not in get_args(allowed):
                raise ValueError(f"{name}={value!r}: use one of {get_args(allowed)}.")
        if not self.min_score >= 0:
            raise ValueError(f"min_score={self.min_score}: give 0 or more.")
        if self.max_score is not None and not self.max_score >= self.min_score:
            raise ValueError(f"max_score={self.max_score}: give at least min_score={self.min_score}.")
        for name in ("min_count", "min_note_users", "top_k", "max_as_related", "max_swing_users"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: give 1 or more.")

    @property
    def window_seconds(self) -> int:
        """The window in whole seconds, in which time is counted."""
        return round(self.window_days * SECONDS_PER_DAY)


class ViewLog(NamedTuple):
    """Views as numbers, each table computed once. What the numbers stand for is in `notes`.

    Attributes:
        visits: person, note, timestamp (int64, seconds since 1970, UTC): distinct rows.
        spans: person, note, first, last (int64, seconds), times (int64): one row for all visits of a person to a note.
        notes: note (in the order of the ids), note_id (string), users (int64): all notes that have a number; users is 0
            for those that `visits` lacks.
        people: person, activity (int64): each person in `visits`, with the number of notes they viewed.
        num_users: the number of `people`.
        encounters: how often a person viewed two notes, at any times: Σ activity · (activity - 1) / 2.
    """

    visits: ir.Table
    spans: ir.Table
    notes: ir.Table
    people: ir.Table
    num_users: int
    encounters: int


def view_log(visits: ir.Table, notes: ir.Table, engine: Engine) -> ViewLog:
    """Puts together what the query needs to know of some visits.

    Args:
        visits: see `ViewLog`.
        notes: note, note_id of all notes.
        engine: the engine of these tables.
    """
    spans = engine.keep(
        visits.group_by("person", "note").aggregate(
            first=_.timestamp.min(), last=_.timestamp.max(), times=_.count().cast("int64")
        ),
        cluster_by="person",
    )
    users = spans.group_by("note").aggregate(users=_.count().cast("int64"))
    counted = notes.select("note", "note_id").left_join(users, "note")
    people = engine.keep(spans.group_by("person").aggregate(activity=_.count().cast("int64")))
    totals = people.aggregate(users=_.count(), encounters=(_.activity * (_.activity - 1)).sum())
    num_users, twice = (column[0].as_py() for column in engine.fetch(totals).columns)
    return ViewLog(
        visits=visits,
        spans=spans,
        notes=engine.keep(counted.select("note", "note_id", users=_.users.fill_null(0))),
        people=people,
        num_users=int(num_users),
        encounters=int(twice or 0) // 2,
    )


def count_pairs(
    log: ViewLog,
    options: PairOptions,
    engine: Engine,
    eligible: ir.Table | None = None,
    *,
    weigh_activity: bool = False,
) -> ir.Table:
    """Who saw each pair of notes: the heavy half of the query.

    Args:
        log: the views.
        options: what makes two notes related.
        engine: the engine of these tables.
        eligible: note: only pairs of these are counted, but `ViewLog.notes.users` and `ViewLog.people.activity` still
            count all notes. None: all notes.
        weigh_activity: whether to sum 1 / activity, too; always done where the score needs it.

    Returns:
        note, related, count (int64: users who saw the pair, at least `min_count`) and weight (int64, `WHOLE` is 1:
        inverse_activity's or swing's sum, else 0), in both directions where `direction` is "both". Computed already.
    """
    spans, visits = log.spans, log.visits
    wanted = log.notes.filter(_.users >= options.min_note_users).select("note")
    if eligible is not None:
        wanted = wanted.semi_join(eligible, "note")
    if eligible is not None or options.min_note_users > 1:
        spans, visits = spans.semi_join(wanted, "note"), visits.semi_join(wanted, "note")
    weights = None
    if options.score == "inverse_activity" or weigh_activity:
        weights = log.people.select("person", weight=(float(WHOLE) / _.activity).floor().cast("int64"))
        spans = spans.join(weights, "person")
    if options.score != "swing" and (eligible is not None or weights is not None or options.min_note_users > 1):
        spans = engine.keep(spans, cluster_by="person")

    # A person's visits to a note are one row of spans, so that each person is once in what follows: nothing has to be
    # made distinct, which would cost as much as the counting.
    columns = ["person", "note", "related"] + ([] if weights is None else ["weight"])
    by_visits = _seen_visit_by_visit(spans, visits, options, columns, engine)

    def count(in_part: InPart) -> ir.Table:
        seen = _pair_up(in_part(spans), spans, options, columns, sure=True).union(in_part(by_visits))
        if options.score == "swing":
            return _count_swing(engine.keep(seen), log, options, engine)
        weight = ibis.literal(0, "int64") if weights is None else _.weight.sum().cast("int64")
        counted = seen.group_by("note", "related").aggregate(count=_.count().cast("int64"), weight=weight)
        return counted.filter(_["count"] >= options.min_count)

    counted = _in_parts(count, "note", "counting pairs", log, engine)
    if options.direction == "both":  # until here (lower, higher) stood for both ways
        counted = counted.union(counted.select(note="related", related="note", count="count", weight="weight"))
    return counted


def rank_pairs(counted: ir.Table, log: ViewLog, options: PairOptions, engine: Engine) -> ir.Table:
    """Scores, thresholds, caps and ranks: the light half of the query.

    Args:
        counted: from `count_pairs`.
        log: the views that it counted.
        options: what makes two notes related; `score` may be another than `count_pairs` had, as long as the weight is
            the one that it needs.
        engine: the engine of these tables.

    Returns:
        note, related, count (int64), score (float64), rank (int32, from 1), in no order. Computed already.
    """
    if options.score in ("cosine", "lift"):
        users = log.notes.select(note="note", users_a="users")
        users_of_related = log.notes.select(related="note", users_b="users")
        counted = counted.join(users, "note").join(users_of_related, "related")
    scored = counted.select("note", "related", "count", score=_score(counted, options.score, log.num_users))
    if options.min_score > 0:
        scored = scored.filter(_.score >= exactly(options.min_score))
    if options.max_score is not None:
        scored = scored.filter(_.score <= exactly(options.max_score))
    if options.max_as_related is not None:
        scored = _best(scored, "related", "note", options.max_as_related, options, engine).drop("rank")
    return _best(scored, "note", "related", options.top_k, options, engine)


def _best(scored: ir.Table, of: str, other: str, k: int, options: PairOptions, engine: Engine) -> ir.Table:
    """The k rows of each `of` with the best score, then count, then the lowest `other`; with their rank, from 1."""
    order = [ibis.desc("count"), ibis.asc(other)]
    if options.score != "count":  # which is the count: a key less to sort by
        order = [ibis.desc("score"), *order]
    # The frame is the one that Spark demands of a row number.
    rank = _row_number().over(ibis.window(group_by=of, order_by=order, rows=(None, 0)))
    if engine.drops_rows_before_it_sorts:
        return engine.keep(scored.mutate(rank=rank).filter(_.rank <= k).mutate(rank=_.rank.cast("int32")))
    # Reading twice costs less than sorting all: the first time finds a bound that the k best of each `of` reach.
    scored = scored.mutate(step=scored["count"] if options.score == "count" else _step(scored.score))
    steps = scored.group_by(of, "step").aggregate(rows=_.count())
    better = _.rows.sum().over(ibis.window(group_by=of, order_by=ibis.desc("step"), rows=(None, -1)))
    reached = steps.mutate(better=better.fill_null(0)).filter(_.better < k)
    bounds = engine.keep(reached.group_by(of).aggregate(bound=_.step.min()))
    promising = scored.join(bounds, of).filter(_.step >= _.bound).drop("step", "bound")
    return engine.keep(promising.mutate(rank=rank).filter(_.rank <= k).mutate(rank=_.rank.cast("int32")))


def _step(score: ir.FloatingValue) -> ir.IntegerValue:
    """Quarters of a doubling, rounded down: rises with the score, and takes few values. 0 comes before all of them."""
    return ibis.cases((score > 0, (score.log2() * 4).floor().cast("int64")), else_=-(10**6))


def exactly(number: float) -> ir.FloatingValue:
    """A literal of this very number: DuckDB takes the digits of one for a decimal, which may be a step beside it."""
    return ibis.literal(repr(float(number))).cast("float64")


@ibis.udf.agg.builtin(name="row_number")
def _row_number() -> int:
    """The engines' own row number, from 1. Ibis's counts from 0, and Spark, which drops rows before it sends them where
    a row number is to be at most k, does not see that in `ROW_NUMBER() - 1 < k`."""
    raise NotImplementedError  # Ibis reads the signature alone


def _in_parts(compute: Callable[[InPart], ir.Table], column: str, what: str, log: ViewLog, engine: Engine) -> ir.Table:
    """`compute(in_part)` for each part of the values of `column`, such that what a part needs fits in memory.

    To spill a hash table or a sort to disk costs more than all the rest; to read a table a few times more does not.
    """
    parts = engine.parts_of(log.encounters)
    computed = []
    for part in tqdm(range(parts), desc=what, unit="part", disable=not engine.show_progress):

        def in_part(table: ir.Table, part: int = part) -> ir.Table:
            return table.filter(_[column] % parts == part) if parts > 1 else table

        computed.append(engine.keep(compute(in_part)))
    return ibis.union(*computed) if parts > 1 else computed[0]


def name_pairs(ranked: ir.Table, log: ViewLog) -> ir.Table:
    """The table of pairs: note_id, related_note_id (string), score, rank, sorted by note_id and rank."""
    names = log.notes.select("note", "note_id")
    related_names = log.notes.select(related="note", related_note_id="note_id")
    named = ranked.join(names, "note").join(related_names, "related")
    return named.order_by("note", "rank").select("note_id", "related_note_id", "score", "rank")


def related_pairs(log: ViewLog, options: PairOptions, engine: Engine, eligible: ir.Table | None = None) -> ir.Table:
    """The whole query; arguments as in `count_pairs`, result as in `name_pairs`."""
    return name_pairs(rank_pairs(count_pairs(log, options, engine, eligible), log, options, engine), log)


def _score(scored: ir.Table, score: Score, num_users: int) -> ir.FloatingValue:
    count = scored["count"].cast("float64")
    if score == "cosine":
        return count / (scored.users_a * scored.users_b).cast("float64").sqrt()
    if score == "lift":
        return count * float(num_users) / (scored.users_a.cast("float64") * scored.users_b.cast("float64"))
    if score == "count":
        return count
    return scored.weight.cast("float64") / float(WHOLE)


def _pair_up(left: ir.Table, right: ir.Table, options: PairOptions, columns: list[str], *, sure: bool) -> ir.Table:
    """person, note, related (…) of a note of `left` and a note of `right` that the same person saw.

    First and last visits tell all of spans of up to two visits. `sure`: the pairs seen by them; else those that they
    leave open.
    """
    window = options.window_seconds
    other = right.select(person="person", related="note", related_first="first", related_last="last").view()
    gaps = (
        other.related_first - left["first"],
        other.related_last - left["first"],
        other.related_first - left["last"],
        other.related_last - left["last"],
    )
    if options.direction == "both":
        hits, order = [gap.abs() <= window for gap in gaps], left.note < other.related
    else:
        hits, order = [gap.between(0, window) for gap in gaps], left.note != other.related
    hit = hits[0] | hits[1] | hits[2] | hits[3]
    predicates = [left.person == other.person, order]
    if sure:
        predicates.append(hit)
    else:
        lowest = -window if options.direction == "both" else 0
        within_reach = (gaps[1] >= lowest) & (gaps[2] <= window)  # the widest and the narrowest gap there can be
        predicates += [~hit, within_reach]
    return left.join(other, predicates).select(columns)


def _seen_visit_by_visit(
    spans: ir.Table, visits: ir.Table, options: PairOptions, columns: list[str], engine: Engine
) -> ir.Table:
    """The pairs that first and last visits leave open, looked at visit by visit: few, as most visits are the only."""
    often, seldom = spans.filter(_.times > 2), spans.filter(_.times <= 2)
    opened = _pair_up(often, spans, options, columns, sure=False)
    opened = engine.keep(opened.union(_pair_up(seldom, often, options, columns, sure=False)))
    first = visits.select("person", "note", first="timestamp").view()
    second = visits.select("person", related="note", second="timestamp").view()
    # In two steps, each kept: an optimizer that began with the visits would join all of them.
    opened = engine.keep(opened.join(first, ["person", "note"])).join(second, ["person", "related"])
    gap = opened.second - opened["first"]
    window = options.window_seconds
    hit = gap.abs() <= window if options.direction == "both" else gap.between(0, window)
    return engine.keep(opened.filter(hit).select(columns).distinct())


def _count_swing(seen: ir.Table, log: ViewLog, options: PairOptions, engine: Engine) -> ir.Table:
    """note, related, count, weight of the pairs in `seen`, the weight being swing's sum."""
    counted = seen.group_by("note", "related").aggregate(count=_.count().cast("int64"))
    counted = engine.keep(counted.filter(_["count"] >= options.min_count))
    activity = log.people.select("person", "activity")
    several = seen.semi_join(counted.filter(_["count"] >= 2), ["note", "related"]).join(activity, "person")
    place = ibis.row_number().over(group_by=["note", "related"], order_by=["activity", "person"])
    several = engine.keep(several.mutate(place=place).filter(_.place < options.max_swing_users).drop("place"))
    other = several.select(note="note", related="related", other="person", other_activity="activity").view()
    together = [several.note == other.note, several.related == other.related, several.person < other.other]
    met = engine.keep(
        several.join(other, together).select("note", "related", "person", "other", "activity", "other_activity")
    )
    # What two users have in common is looked up for those who met, not for all: their number is bounded.
    viewed = log.spans.select("person", "note").view()
    also_viewed = log.spans.select(other="person", note="note").view()
    common = met.select("person", "other").distinct().join(viewed, "person").join(also_viewed, ["other", "note"])
    common = common.group_by("person", "other").aggregate(common=_.count().cast("int64"))
    terms = met.join(common, ["person", "other"])
    roots = (terms.activity * terms.other_activity).cast("float64").sqrt()
    term = (float(WHOLE) / (roots * (terms.common + 1).cast("float64"))).floor().cast("int64")
    sums = terms.select("note", "related", term=term).group_by("note", "related").aggregate(weight=_.term.sum())
    counted = counted.left_join(sums, ["note", "related"])
    return counted.select("note", "related", "count", weight=_.weight.cast("int64").fill_null(0))
