"""What cheaper inference costs in Recall: fewer tokens, layers and visual tokens, int8, and smaller embeddings.

    python -m benchmarks.savings configs/movies.yaml [--seeds 6] [--variants layers-15 …] [--output savings.json]

A variant is the recipe with other settings (`VARIANTS`). Its price is that of the features: its untrained backbones run
once over the training and test notes, then what comes after the LLM is trained on their states as the recipe's warm-up
does (`train.warmup`), with the variant's own settings. A whole training run a variant would be dearer and tell less, as
its seed moves Recall@10 by as much as these savings do. What a variant's LLM or connector would win back by training is
not in it, and no figure is that of a trained model.

A seed draws the head's first weights and the pairs of each step. Both are the same for all variants, which are compared
with the recipe seed by seed. A difference has two 95 % intervals: over seeds (t, of the mean over queries: would other
seeds say the same of these notes?), and over queries (bootstrap, of the mean over seeds: would other notes?).

Speed is that of `NoteLLM2Model.encode` beside the official recipe's inference of the recipe itself, on the same test
notes, each run in a process of its own, in turns (`benchmarks.encode`).

Small embeddings are made of the recipe's: its first dimensions, or one bit a dimension (its sign), by Hamming distance.
For the best K of the bits, the best 10·K may be scored again by the query's floats, either against the notes' bits as
±1, or against their floats, which must be kept for that. They are shown with the head as the recipe trains it, and with
one that is trained for the first dimensions, too (`matryoshka_dims`).
"""

import argparse
import copy
import json
import logging
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from datasets import Dataset as Table
from scipy import stats
from sentence_transformers.util.quantization import quantize_embeddings
from tqdm.auto import tqdm

from benchmarks.encode import HelpFormatter, Run, Settings, positive, quantized, take_turns
from benchmarks.measure import Limits, facts_text
from evaluation.metrics import ScoreFunction, metrics_per_query, rank_related, tie_order
from evaluation.report import collect_facts
from evaluation.significance import bootstrap_interval
from hub.compose import CompositionArguments, compose, save_checkpoint
from modeling_notellm2 import NoteLLM2Model
from pairs.split import load_split
from pairs.tables import related_indices, write_table
from train.arguments import NoteLLM2TrainingArguments, parse_arguments
from train.data import NoteReader, PairDataset
from train.features import VisionFeatureStore
from train.run import prepare_data
from train.states import NoteStateTable
from train.trainer import NoteLLM2Trainer
from train.warmup import warm_up_head

RECIPE = "recipe"
OFFICIAL = "official recipe"
KS = (10, 100)
RESCORED = 10
"""For the best K, so many times K notes are scored again."""


class Variant(NamedTuple):
    """A way to spend less.

    Attributes:
        settings: options of train/run.py that differ from the recipe's.
        dtype: of the LLM's linear layers, as in `benchmarks.encode.Settings`.
    """

    settings: dict[str, Any]
    dtype: str = "float32"


COMPACT = {"template": "compact"}
VARIANTS: dict[str, Variant] = {
    RECIPE: Variant({}),
    # fewer tokens
    "compact": Variant(COMPACT),
    "content-32": Variant({"max_content_tokens": 32}),
    "visual-2": Variant({"num_visual_tokens": 2}),
    "visual-1": Variant({"num_visual_tokens": 1}),
    "no-visual": Variant({"prompt": "text"}),  # late fusion alone sees the image
    # fewer layers
    "layers-20": Variant({"num_text_layers": 20}),
    "layers-15": Variant({"num_text_layers": 15}),
    "layers-10": Variant({"num_text_layers": 10}),
    # cheaper products
    "int8": Variant({}, "int8"),
    # several at once
    "compact-visual-1": Variant(COMPACT | {"num_visual_tokens": 1}),
    "compact-no-visual": Variant(COMPACT | {"prompt": "text"}),
    "compact-layers-20": Variant(COMPACT | {"num_text_layers": 20}),
    "compact-layers-15": Variant(COMPACT | {"num_text_layers": 15}),
    "compact-visual-1-layers-20": Variant(COMPACT | {"num_visual_tokens": 1, "num_text_layers": 20}),
    "compact-int8": Variant(COMPACT, "int8"),
    "compact-no-visual-int8": Variant(COMPACT | {"prompt": "text"}, "int8"),
    "compact-layers-20-int8": Variant(COMPACT | {"num_text_layers": 20}, "int8"),
}


class Difference(NamedTuple):
    """Of two systems' means over seeds and queries.

    Attributes:
        mean: the first minus the second.
        of_seeds: 95 % t interval over seeds; NaN of one seed.
        of_queries: 95 % bootstrap interval over queries.
    """

    mean: float
    of_seeds: tuple[float, float]
    of_queries: tuple[float, float]


def compare(found: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare two systems by one value a seed and query, (S, Q) float64 each, paired by both."""
    differences = found - reference
    by_seed = differences.mean(1)
    seeds, mean = len(by_seed), float(by_seed.mean())
    half = math.nan
    if seeds > 1:
        half = float(stats.t.ppf(0.975, seeds - 1) * by_seed.std(ddof=1) / math.sqrt(seeds))
    return Difference(mean, (mean - half, mean + half), bootstrap_interval(differences.mean(0)))


Score = np.ndarray | ScoreFunction
Recalls = dict[int, np.ndarray]
"""Recall@K by K, (S, Q) float64: of each seed and query."""


def recalls_of(by_seed: Sequence[Mapping[int, Score]], related: Sequence[np.ndarray]) -> Recalls:
    """The recalls of a system that scores notes, by seed and K."""

    def recall(score: Score, k: int) -> np.ndarray:
        return metrics_per_query(rank_related(score, related), (k,))[f"recall@{k}"]

    return {k: np.stack([recall(scores[k], k) for scores in by_seed]) for k in KS}


class Study:
    """A recipe's notes, and a store of what its tower sees, which all variants share.

    Args:
        config: the recipe.
        options: options of train/run.py that change it.
        folder: for splits, features and checkpoints.
        steps: of each head; None: the recipe's `head_warmup_steps`.
        splits: folder of `pairs.split`; None: the recipe's own splits.

    Raises:
        ValueError: the recipe does not say how long its head trains.
    """

    def __init__(self, config: str, options: list[str], folder: Path, steps: int | None, splits: str | None) -> None:
        self.config, self.options, self.folder = config, options, folder
        _composition, data, training = parse_arguments([config, *options])
        if steps is None and not training.head_warmup_steps:
            raise ValueError(f"head_warmup_steps=0 in {config}: say with --steps how long heads are to train.")
        self.steps = steps or training.head_warmup_steps
        splits = splits or data.splits
        if splits is None:
            prepare_data(data, folder)
        self.train, self.test = (load_split(splits or folder / "data", name) for name in ("train", "test"))
        self.related = related_indices(list(self.test.notes["note_id"]), self.test.pairs)

    def write_speed_notes(self, number: int) -> Path:
        """Write the first so many test notes as a table, with their images. Returns its path.

        Raises:
            ValueError: there are fewer.
        """
        notes = self.test.notes
        if number > len(notes):
            raise ValueError(f"speed_notes={number}, but there are {len(notes)} test notes: give no more than that.")
        folder = self.folder / "speed"
        folder.mkdir()
        rows = [dict(notes[row]) for row in range(number)]
        for position, row in enumerate(rows):
            if row["image"] is not None:  # images must lie in the table's folder
                row["image"] = shutil.copy(row["image"], folder / f"{position}{Path(row['image']).suffix}")
        write_table(Table.from_list(rows, features=notes.features), folder / "notes.parquet")
        return folder / "notes.parquet"

    def arguments_of(self, variant: Variant) -> tuple[CompositionArguments, NoteLLM2TrainingArguments]:
        """The recipe's settings with the variant's, which win."""
        words = [word for name, value in variant.settings.items() for word in (f"--{name}", str(value))]
        words += ["--head_warmup_steps", str(self.steps)]  # as an option, it is checked as one: it wants a rate
        composition, _data, training = parse_arguments([self.config, *self.options, *words])
        training.llm_tuning = "frozen"  # adapters start at nothing, and would slow the pass down
        training.output_dir, training.report_to = str(self.folder / "run"), "none"
        training.save_strategy = training.eval_strategy = "no"  # nothing is trained but heads
        training.load_best_model_at_end = False
        training.vision_features_dir = training.vision_features_dir or str(self.folder / "vision_features")
        return composition, training


class FrozenVariant:
    """A variant's model, and the states of its untrained backbones.

    Raises:
        ValueError: the recipe is no NoteLLM-2, or has neither head nor late fusion.
    """

    def __init__(self, study: Study, variant: Variant) -> None:
        self.study = study
        composition, training = study.arguments_of(variant)
        model = compose(composition)
        if not isinstance(model, NoteLLM2Model):
            raise ValueError(f"{study.config} is of a {type(model).__name__}: give the recipe of a NoteLLM-2.")
        if model.config.embedding_dim is None and model.late_fusion is None:
            raise ValueError(f"{study.config} has embedding_dim=0 and late_fusion=none: nothing after the LLM trains.")
        self.model, self.training = model, training
        self.dim = model.config.embedding_dim or model.config.hidden_size
        self.pairs = PairDataset(*study.train)
        train_rows = torch.from_numpy(np.unique(self.pairs.pairs))
        # The checkpoint holds no int8: a run of `benchmarks.encode` quantizes it anew.
        llm = model.language_model
        if variant.dtype == "int8":
            model.language_model = quantized(llm)
        self.reader, self.states = self._states(study.train.notes, train_rows)
        _reader, self.test_states = self._states(study.test.notes, torch.arange(len(study.test.notes)))
        model.language_model = llm
        self.trainer = NoteLLM2Trainer(model, training, self.pairs)
        of_head = (*model.parts["head"], "note_standardizer.", "visual_standardizer.", "pooled_standardizer.")
        self.start = {
            name: copy.deepcopy(value) for name, value in model.state_dict().items() if name.startswith(of_head)
        }

    def _states(self, notes: Any, rows: torch.Tensor) -> tuple[NoteReader, NoteStateTable]:
        model, training, features = self.model, self.training, None
        batch_size = training.per_device_eval_batch_size
        if model.config.has_vision:
            assert training.vision_features_dir is not None
            features = VisionFeatureStore(training.vision_features_dir, model).table(notes, batch_size)
        reader = NoteReader(notes, model.processor, features)
        return reader, NoteStateTable(model, reader, rows, batch_size)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Give what comes after the LLM its first weights, which depend on the seed and its own sizes alone."""
        self.model.load_state_dict(self.start, strict=False)  # temperature and standardizers, too
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for part in (self.model.head, self.model.late_fusion):
                for module in [] if part is None else part.modules():
                    self.model._init_weights(module)

    def embeds(self, seed: int, dims: tuple[int, ...] | None) -> np.ndarray:
        """Train what comes after the LLM anew. Returns the embeddings of the test notes, (N, D) float32.

        Args:
            seed: of its first weights, and of the pairs.
            dims: as in `train.losses.joint_loss`.
        """
        model = self.model
        self.restart(seed)
        warm_up_head(
            model,
            self.reader,
            self.pairs.pairs,
            self.trainer.warmup_groups(),  # anew: the schedule of a warm-up writes its rates into them
            steps=self.study.steps,
            visual_loss_weight=self.training.visual_loss_weight,
            seed=seed,
            dims=dims,
            show_progress_bar=False,
            table=self.states,
        )
        with torch.no_grad():
            output = model.embed_states(self.test_states.select(torch.arange(len(self.study.test.notes))))
        assert output.note_embeds is not None
        return output.note_embeds.numpy()


def sign_bits(embeds: np.ndarray) -> np.ndarray:
    """(N, D) float32 ─► (N, D / 8, rounded up) uint8: whether each number is positive, packed."""
    bits = quantize_embeddings(embeds, "ubinary")
    assert isinstance(bits, np.ndarray)
    return bits


def hamming_distances(bits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(R, N) int64, of the notes at `rows` to all, whose packed bits are `bits` (N, B) uint8."""
    return np.bitwise_count(bits[rows, None] ^ bits).sum(-1, dtype=np.int64)


def binary_scores(embeds: np.ndarray) -> ScoreFunction:
    """Of notes that are one bit a dimension: minus their Hamming distance.

    Args:
        embeds: (N, D) float32.
    """
    bits = sign_bits(embeds)
    return lambda rows: -hamming_distances(bits, rows)


def rescored_scores(queries: np.ndarray, notes: np.ndarray, number: int) -> ScoreFunction:
    """Of notes found by their bits and scored again; those not found come last.

    Args:
        queries: (N, D) float32 embeddings.
        notes: (N, D) float32, what the products of a query are taken with.
        number: notes that are scored again, those with the nearest bits.
    """
    bits, order = sign_bits(queries), tie_order(len(queries))

    def score(rows: np.ndarray) -> np.ndarray:
        distances = hamming_distances(bits, rows)
        distances[np.arange(len(rows)), rows] = 8 * bits.shape[1] + 1  # a query is not among its own answers
        # Distances are few numbers, and many are equal: which of these are scored again is left to chance.
        nearest = np.argsort(distances * len(order) + order)[:, :number]
        scores = np.full(distances.shape, -np.inf, np.float32)
        np.put_along_axis(scores, nearest, np.einsum("rd,rnd->rn", queries[rows], notes[nearest]), 1)
        return scores

    return score


def small_embeddings(dim: int) -> Iterator[tuple[str, int, Any]]:
    """What may be kept of an embedding: its name, its bytes, and (N, D) float32 embeddings ─► scores by K."""
    for width in widths_of(dim):
        name = "float32" if width == dim else f"first {width} dimensions"
        yield name, 4 * width, lambda embeds, width=width: dict.fromkeys(KS, _unit_length(embeds[:, :width]))
    size = -(-dim // 8)
    yield "bits", size, lambda embeds: dict.fromkeys(KS, binary_scores(embeds))
    name = f"bits, best {RESCORED}·K again"
    yield (
        f"{name} by the bits",
        size,
        lambda embeds: {
            k: rescored_scores(embeds, np.where(embeds > 0, 1, -1).astype(np.float32), RESCORED * k) for k in KS
        },
    )
    yield (
        f"{name} by the floats",
        size + 4 * dim,
        lambda embeds: {k: rescored_scores(embeds, embeds, RESCORED * k) for k in KS},
    )


def widths_of(dim: int) -> tuple[int, ...]:
    """The first dimensions that are tried of an embedding: all, and a half, a quarter and an eighth of them."""
    return tuple(dict.fromkeys(max(1, dim // part) for part in (1, 2, 4, 8)))


def _unit_length(embeds: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(embeds, axis=1, keepdims=True)
    result: np.ndarray = embeds / np.where(lengths == 0, 1, lengths)
    return result


@dataclass
class Row:
    """A line of a table.

    Attributes:
        name: of what was measured.
        details: its other cells, by their heading.
        recalls: with each seed's head.
    """

    name: str
    details: dict[str, str]
    recalls: Recalls


def markdown_table(title: str, rows: Sequence[Row]) -> str:
    """A line a row; differences are to the first one."""
    reference = rows[0].recalls
    heads = [title, *rows[0].details]
    for k in KS:
        heads += [f"Recall@{k}", "Difference", "95 % over seeds", "95 % over queries"]
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)]]
    for row in rows:
        line = [row.name, *row.details.values()]
        for k in KS:
            by_seed = row.recalls[k].mean(1)
            deviation = f" ± {by_seed.std(ddof=1):.4f}" if len(by_seed) > 1 else ""
            line.append(f"{by_seed.mean():.4f}{deviation}")
            if row.recalls is reference:
                line += [""] * 3
                continue
            found = compare(row.recalls[k], reference[k])
            line += [f"{found.mean:+.4f}", _interval(found.of_seeds), _interval(found.of_queries)]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(bounds: tuple[float, float]) -> str:
    return "" if math.isnan(bounds[0]) else f"{bounds[0]:+.4f} to {bounds[1]:+.4f}"


def measure_variants(study: Study, names: Sequence[str], seeds: int) -> tuple[dict[str, Recalls], list[Row]]:
    """Run every variant's backbones, train its heads, and save it in the study's folder with the last of them.

    Returns:
        The recalls by variant, and the lines of the table of small embeddings.
    """
    recalls: dict[str, Recalls] = {}
    small: list[Row] = []
    for name in (variants := tqdm(names, desc="variants", unit="variant")):
        variants.set_postfix_str(name)
        variant = FrozenVariant(study, VARIANTS[name])
        if name == RECIPE:
            small = small_rows(variant, seeds)
        embeds = heads_embeds(variant, seeds, variant.training.dims)
        recalls[name] = recalls_of([dict.fromkeys(KS, of_seed) for of_seed in embeds], study.related)
        save_checkpoint(variant.model, checkpoint_of(study, name))
    return recalls, small


def heads_embeds(variant: FrozenVariant, seeds: int, dims: tuple[int, ...] | None) -> list[np.ndarray]:
    """The embeddings of the test notes by each seed's head, trained for the widths `dims`."""
    return [variant.embeds(seed, dims) for seed in tqdm(range(seeds), desc="heads", unit="head", leave=False)]


def small_rows(variant: FrozenVariant, seeds: int) -> list[Row]:
    """Small embeddings of heads that are trained as the recipe says, and of others trained for small widths, too."""
    rows = []
    for training, dims in {"the recipe's": variant.training.dims, "Matryoshka": widths_of(variant.dim)}.items():
        embeds = heads_embeds(variant, seeds, dims)
        for name, size, scores in small_embeddings(variant.dim):
            recalls = recalls_of([scores(of_seed) for of_seed in embeds], variant.study.related)
            rows.append(Row(name, {"Head": training, "Bytes a note": f"{size:,}"}, recalls))
    return rows


def checkpoint_of(study: Study, name: str) -> Path:
    """The folder of a variant's checkpoint."""
    return study.folder / "checkpoints" / name


def measure_speed(
    study: Study, names: Sequence[str], notes: Path, number: int, repeat: int, threads: int | None, limits: Limits
) -> list[Run]:
    """Encode a table of so many notes by the official recipe's inference, and by `encode` of every variant."""
    # "scaling" times each note once, without watching the parts.
    official = Settings("scaling", "official", number, str(checkpoint_of(study, RECIPE)), str(notes), threads=threads)
    lines = {OFFICIAL: official}
    for name in names:
        lines[name] = replace(
            official, system="encode", model=str(checkpoint_of(study, name)), dtype=VARIANTS[name].dtype
        )
    return list(take_turns(lines, repeat, limits, study.folder))


def speed_details(runs: Sequence[Run], name: str, number: int) -> dict[str, str]:
    """The cells of a variant's median speed, or why a run failed."""
    heads = ("Notes/s", "Times the official recipe")
    seconds = {}
    for line in (OFFICIAL, name):
        same = [run for run in runs if run.name == line]
        if failures := [f"{line}: {run.usage.failure}" for run in same if run.result is None]:
            return dict.fromkeys(heads, failures[0])
        seconds[line] = median(run.result["seconds"] for run in same)
    return dict(zip(heads, (f"{number / seconds[name]:.2f}", f"{seconds[OFFICIAL] / seconds[name]:.2f}"), strict=True))


def settings_text(variant: Variant) -> str:
    """What is changed, in a cell."""
    texts = [f"{name} {value}" for name, value in variant.settings.items()]
    return ", ".join(texts + [variant.dtype] * (variant.dtype != "float32")) or "as they are"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.savings", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("config", help="recipe, such as configs/movies.yaml; then also options of train/run.py")
    names = [name for name in VARIANTS if name != RECIPE]
    text = f"beside the recipe itself; default: all of {', '.join(names)}"
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME", help=text)
    parser.add_argument("--seeds", type=positive, default=6, help="heads a variant")
    parser.add_argument("--steps", type=positive, help="of each head (None: the recipe's head_warmup_steps)")
    parser.add_argument("--splits", help="folder of python -m pairs.split (None: the recipe's own splits)")
    parser.add_argument("--speed-notes", type=positive, default=96, help="the first so many test notes are timed")
    parser.add_argument("--repeat", type=positive, default=3, help="runs of each line's speed, which is the median")
    parser.add_argument("--threads", type=positive, help="of PyTorch where speed is measured (None: its own choice)")
    parser.add_argument("--memory-limit-gb", type=float, default=20.0, help="stop a timed run that takes more")
    parser.add_argument("--time-limit-s", type=float, default=3600.0, help="stop a timed run that takes longer")
    parser.add_argument("--temp-dir", help="for splits, features and checkpoints, a model a variant (None: TMPDIR)")
    parser.add_argument("--output", help="JSON file to write: every figure, and what one must know to repeat it")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = build_parser()
    args, options = parser.parse_known_args(argv)
    names = [RECIPE, *dict.fromkeys(args.variants)]
    facts = collect_facts(config=args.config, options=options, seeds=args.seeds, repeat=args.repeat)
    facts["hardware"]["memory"] = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    try:
        with tempfile.TemporaryDirectory(prefix="notellm2-savings-", dir=args.temp_dir) as folder:
            study = Study(args.config, options, Path(folder).resolve(), args.steps, args.splits)
            notes = study.write_speed_notes(args.speed_notes)
            recalls, small = measure_variants(study, names, args.seeds)
            limits = Limits(args.memory_limit_gb, args.time_limit_s)
            runs = measure_speed(study, names, notes, args.speed_notes, args.repeat, args.threads, limits)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows = []
    for name in names:
        details = {"Settings": settings_text(VARIANTS[name]), **speed_details(runs, name, args.speed_notes)}
        rows.append(Row(name, details, recalls[name]))
    facts |= {
        "steps": study.steps,
        "test_notes": len(study.test.notes),
        "queries": sum(len(related) > 0 for related in study.related),
        "speed_notes": args.speed_notes,
        "official_seconds": [run.result and run.result["seconds"] for run in runs if run.name == OFFICIAL],
        "largest_load": max(run.load for run in runs),
    }
    if args.output:
        content = {"facts": facts, "runs": [asdict(run) for run in runs]}
        for table, of_table in (("variants", rows), ("small_embeddings", small)):
            content[table] = [
                {"name": row.name, **row.details, **{f"recall@{k}": row.recalls[k].mean(1).tolist() for k in KS}}
                for row in of_table
            ]
        Path(args.output).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tables = (markdown_table("Variant", rows), markdown_table("Kept of the recipe's embedding", small))
    sys.stdout.write("\n\n".join([*tables, facts_text(facts)]) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
