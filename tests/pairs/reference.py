"""What pairs are, in plain Python and straight from the definitions: slow, and with no trick of the query's."""

import math
import random
from collections import Counter, defaultdict
from itertools import combinations

from datasets import Dataset

# As text these sort unlike numbers, and unlike UTF-16, which is how Java holds a text.
USERS = ("u9", "u10", "10", "9", "Zoë", "zoe", "用户", "\uff61", "\U0001f600", "O'Neil")
NOTES = ("n2", "n10", "7", "07", "é", "e\u0301", "笔记", "\uff61", "\U0001f600", 'a "b", c')


def random_views(seed, views=50, users=6, notes=7, window=86_400):
    """(user, note, time) of a log in which users and notes are unequal, times repeat and gaps are near the window.

    A few users come back to a note long before, right at and long after the others, such that neither their first nor
    their last visit is within the window.
    """
    rng = random.Random(seed)
    chosen_users, chosen_notes = rng.sample(USERS, users), rng.sample(NOTES, notes)
    start = rng.randrange(2**31)

    def pick(values):
        return values[int(len(values) * rng.random() ** 2)]

    def time():
        return start + rng.randrange(6) * (window // 2) + rng.choice((0, 0, 0, -1, 1)) + window

    rows = [(pick(chosen_users), pick(chosen_notes), time()) for _ in range(views)]
    for _ in range(views // 10):
        user, note, middle = rng.choice(rows)
        rows += [(user, note, middle - 9 * window), (user, note, middle + 9 * window)]
    rng.shuffle(rows)
    return [(user, note, max(0, second)) for user, note, second in rows]


def as_views(rows):
    return Dataset.from_dict(
        {name: [row[i] for row in rows] for i, name in enumerate(("user_id", "note_id", "timestamp"))}
    )


def as_rows(pairs):
    return list(zip(*(pairs[name] for name in ("note_id", "related_note_id", "score", "rank")), strict=True))


def reference_pairs(rows, options, note_ids=None):
    """(note, related note, score, rank): every two views are looked at."""
    notes_of, users_of, seen = defaultdict(set), defaultdict(set), defaultdict(set)
    for user, note, _ in rows:
        notes_of[user].add(note)
        users_of[note].add(user)
    for user, a, time_a in rows:
        for other, b, time_b in rows:
            gap = time_b - time_a if options.direction == "forward" else abs(time_b - time_a)
            if user == other and a != b and 0 <= gap <= options.window_days * 86_400:
                seen[a, b].add(user)

    scored = []
    for (a, b), users in seen.items():
        if note_ids is not None and not {a, b} <= set(note_ids):
            continue
        if len(users) < options.min_count or min(len(users_of[a]), len(users_of[b])) < options.min_note_users:
            continue
        score = reference_score(users, notes_of, len(users_of[a]), len(users_of[b]), options)
        if score >= options.min_score and (options.max_score is None or score <= options.max_score):
            scored.append((a, b, score, len(users)))
    if options.max_as_related is not None:
        scored = [row for _, row in best(scored, 1, 0, options.max_as_related)]
    return [(a, b, score, rank) for rank, (a, b, score, _) in best(scored, 0, 1, options.top_k)]


def best(scored, of, other, k):
    """The k best rows of each value in place `of`, with their rank; ties by count, then by the value in `other`."""
    groups = defaultdict(list)
    for row in scored:
        groups[row[of]].append(row)
    return [
        (rank, row)
        for value in sorted(groups)
        for rank, row in enumerate(sorted(groups[value], key=lambda row: (-row[2], -row[3], row[other]))[:k], start=1)
    ]


def reference_score(users, notes_of, users_a, users_b, options):
    if options.score == "count":
        return float(len(users))
    if options.score == "cosine":
        return len(users) / math.sqrt(users_a * users_b)
    if options.score == "lift":
        return len(users) * len(notes_of) / (users_a * users_b)
    if options.score == "inverse_activity":
        return sum(2**32 // len(notes_of[user]) for user in users) / 2**32
    return sum(math.floor(term * 2**32) for term in swing_terms(users, notes_of, options)) / 2**32


def swing_terms(users, notes_of, options):
    least_active = sorted(users, key=lambda user: (len(notes_of[user]), user))[: options.max_swing_users]
    return [
        1 / (math.sqrt(len(notes_of[u]) * len(notes_of[v])) * (1 + len(notes_of[u] & notes_of[v])))
        for u, v in combinations(least_active, 2)
    ]


def reference_views(rows, seconds, options, note_ids=None):
    """What the rules leave of a log and drop.

    Args:
        rows: (user, note, time).
        seconds: the second that each time stands for, or None.
        options: `ViewOptions`.
        note_ids: the notes that there are.

    Returns:
        The views (user, note, second) that are left, and for each rule the places in `rows` of those that broke it.
    """
    broken, places_of, good, previous, copies = defaultdict(list), {}, [], {}, set()
    for place, (user, note, time) in enumerate(rows):
        second = seconds[time]
        if not user:
            broken["empty_user_id"].append(place)
        elif not note:
            broken["empty_note_id"].append(place)
        elif second is None:
            broken["bad_timestamp"].append(place)
        elif second < 0 or second > 95_617_584_000:
            broken["timestamp_range"].append(place)
        elif note_ids is not None and note not in note_ids:
            broken["unknown_note"].append(place)
        else:
            good.append((place, (user, note, second)))
    for place, view in good:
        user, _, second = view
        backwards = second < previous.get(user, second)
        previous[user] = second
        if backwards:
            broken["time_backwards"].append(place)
            if options.drop_time_backwards:
                continue
        if view in copies:
            broken["duplicate_view"].append(place)
        copies.add(view)
        places_of.setdefault(view, place)

    left = set(places_of)
    if options.max_user_views_per_day is not None:
        days = Counter((user, second // 86_400) for user, _, second in left)
        bots = {user for (user, _), views in days.items() if views > options.max_user_views_per_day}
        broken["bot"] = sorted(places_of[view] for view in left if view[0] in bots)
        left = {view for view in left if view[0] not in bots}
    if options.max_user_views is not None:
        for user in {user for user, _, _ in left}:
            latest = sorted((view for view in left if view[0] == user), key=lambda view: (view[2], view[1]))
            capped = latest[: -options.max_user_views]
            broken["user_cap"] += [places_of[view] for view in capped]
            left -= set(capped)
    return left, {rule: sorted(places) for rule, places in broken.items() if places}
