"""A training step of the official recipe beside ours: notes and pairs a second, and peak memory.

    python -m benchmarks.train_step configs/movies.yaml [--pairs 32] [--steps 6] [--repeat 3] [--systems …]

Every system learns from about the same number of pairs a step, with the same backbones and trained parameters; what
each adds is on top of the one before:

    official    pairs drawn at random, every note of every pair encoded, padded to the longest of the batch, the
                image decoded and the tower run in every step; one graph
    store       the same pairs; a note that several pairs name is encoded once, and the tower's output comes from a
                store
    lengths     notes of like length encoded together (--mini-batch-size)
    gradcache-pairs  the same, each mini-batch encoded twice, so that memory does not grow with the batch
    graph       lengths, but graph batches: every known pair among the notes is learned from
    gradcache   graph, each mini-batch encoded twice

Each run has a process of its own; systems take turns. The share of the peak is of matrix products: those of a step,
counted in the first one, over its time, against a large product measured in the same process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np
import psutil
import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from benchmarks.measure import FlopCounter, Limits, Usage, measure, moment, product_flops
from evaluation.report import collect_facts
from hub.compose import compose
from modeling_notellm2 import NoteLLM2Model
from pairs.split import NotesAndPairs, load_split
from train.arguments import NoteLLM2TrainingArguments, parse_arguments
from train.batches import BatchOptions, BatchPlanner
from train.data import PairDataset
from train.features import VisionFeatureStore
from train.trainer import NoteLLM2Trainer, apply_llm_tuning

System = Literal["official", "store", "lengths", "gradcache-pairs", "graph", "gradcache"]


@dataclass(frozen=True)
class StepTimes:
    """What a run of some steps took, the first step left out, in which memory is taken and libraries warm up.

    Attributes:
        seconds: of each step, loading included.
        notes: notes encoded a step, on average.
        pairs: pairs learned from a step, on average.
        flops: floating-point operations a second in matrix products and convolutions: those of a note of the first step
            for all notes.
        device_memory_gb: peak memory of the GPU, 10^9 bytes; None without one.
    """

    seconds: list[float]
    notes: float
    pairs: float
    flops: float
    device_memory_gb: float | None


@dataclass(frozen=True)
class Run:
    """One run of one system."""

    system: System
    batch_pairs: int
    usage: Usage
    times: StepTimes | None
    peak_flops: float | None = None


def step_times(
    seconds: list[float], notes: float, pairs: float, first_flops: int, first_notes: float, device: torch.device
) -> StepTimes:
    """`first_flops` and `first_notes` are of the first step, which `seconds` leaves out."""
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    flops = first_flops / first_notes * notes / median(seconds)
    return StepTimes(seconds, notes, pairs, flops, memory)


def official_steps(
    model: NoteLLM2Model, dataset: PairDataset, training: NoteLLM2TrainingArguments, pairs: int, steps: int
) -> StepTimes:
    """The step of the paper's code: no note is shared by pairs, no length looked at, no output of the tower kept."""
    device = training.device
    model.to(device)  # type: ignore[arg-type]  # transformers' own annotation
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate)
    draw = np.random.default_rng(0)
    model.train()
    seconds = []
    counter = FlopCounter()
    for step in range(steps + 1):
        if step == 0:
            counter.__enter__()
        started = moment(device)
        chosen = dataset.pairs[draw.choice(len(dataset.pairs), pairs, replace=len(dataset.pairs) < pairs)]
        batch = model.processor([dataset.notes[row] for row in chosen.T.flatten().tolist()])
        output = model(**batch.to(device))
        losses = []
        for embeds in (output.note_embeds, output.visual_embeds):
            if embeds is None:  # a text-only model
                continue
            logits = embeds @ embeds.T * output.logit_scale
            logits = logits.masked_fill(torch.eye(2 * pairs, dtype=torch.bool, device=device), float("-inf"))
            losses.append(functional.cross_entropy(logits, torch.arange(2 * pairs, device=device).roll(pairs)))
        weights = [1.0, training.visual_loss_weight][: len(losses)]
        loss = torch.stack([weight * part for weight, part in zip(weights, losses, strict=True)]).sum() / sum(weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(moment(device) - started)
        if step == 0:
            counter.__exit__(None, None, None)
    return step_times(seconds[1:], 2.0 * pairs, float(pairs), counter.total, 2.0 * pairs, device)


class StepClock(TrainerCallback):
    """The moments at which steps end, and what the first one computes."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.counter = FlopCounter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count in the first step."""
        if not self.moments:
            self.counter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time."""
        if not self.moments:
            self.counter.__exit__(None, None, None)
        self.moments.append(moment(args.device))


def trainer_steps(
    model: NoteLLM2Model, split: NotesAndPairs, training: NoteLLM2TrainingArguments, store_folder: str, steps: int
) -> StepTimes:
    """Steps of `NoteLLM2Trainer`. The store is built before, if it is not there yet."""
    table = VisionFeatureStore(store_folder, model).table(split.notes) if model.config.has_vision else None
    trainer = NoteLLM2Trainer(model, training, PairDataset(*split, table))
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    first, *logs = [entry for entry in trainer.state.log_history if "notes_per_step" in entry]
    notes = float(np.mean([entry["notes_per_step"] for entry in logs]))
    pairs = float(np.mean([entry["notes_per_step"] * entry["pairs_per_note"] for entry in logs]))
    seconds = np.diff(clock.moments).tolist()
    flops = clock.counter.total
    return step_times(seconds, notes, pairs, flops, first["notes_per_step"], training.device)


def batch_pairs_for(dataset: PairDataset, options: BatchOptions, pairs: int) -> int:
    """The `per_device_train_batch_size` with which graph batches hold about so many pairs."""
    size = max(1, pairs // 2)
    for _turn in range(6):
        planner = BatchPlanner(dataset.pairs, dataset.related, BatchOptions("graph", size, options.neighborhood))
        found = np.mean([len(plan.positives) / 2 for plan, _ in zip(planner.plans(), range(8), strict=False)])
        size = max(1, round(size * (pairs / found) ** 0.7))  # pairs grow faster than notes
    return size


def run_system(args: argparse.Namespace) -> None:
    """One run in this process; writes what it took to `args.result`."""
    composition, data, training = parse_arguments([args.config, *args.options])
    composition.standardize_states = False  # the warm-up would measure them, and it is no part of a step
    set_seed(0)
    split = load_split(args.splits, "train")
    model = compose(composition)
    assert isinstance(model, NoteLLM2Model)
    dataset = PairDataset(*split)
    size = args.pairs
    if args.system == "official":
        model.language_model.set_attn_implementation("sdpa")  # padded, as there
        apply_llm_tuning(model, training)
        times = official_steps(model, dataset, training, size, args.steps)
    else:
        if args.system in ("graph", "gradcache"):
            training.batches = "graph"
            size = batch_pairs_for(dataset, training.batch_options(1), args.pairs)
        training.per_device_train_batch_size = size
        training.mini_batch_size = None if args.system == "store" else args.mini_batch_size
        training.gradcache = args.system in ("gradcache", "gradcache-pairs")
        training.max_steps, training.logging_steps = args.steps + 1, 1
        training.head_warmup_steps, training.load_best_model_at_end = 0, False
        training.save_strategy = training.eval_strategy = "no"
        training.report_to, training.disable_tqdm = "none", True
        times = trainer_steps(model, split, training, args.store, args.steps)
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    peak = product_flops(training.device, dtype)
    content = {"batch_pairs": size, "times": asdict(times), "peak_flops": peak}
    Path(args.result).write_text(json.dumps(content), encoding="utf-8")


def run_all(args: argparse.Namespace) -> list[Run]:
    """Every system, in turns, each run in a process of its own."""
    limits = Limits(args.memory_limit_gb, args.time_limit_s)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="notellm2-train-step-", dir=args.temp_dir) as folder:
        splits, store = args.splits or _split(args, Path(folder)), str(Path(folder) / "store")
        turns = [(repeat, system) for repeat in range(args.repeat) for system in args.systems]
        bar = tqdm(turns, desc="training steps", unit="run")
        for repeat, system in bar:
            bar.set_postfix(system=system)
            result = Path(folder) / f"{system}-{repeat}.json"
            temp_dir = Path(folder) / f"temporary-{system}-{repeat}"
            temp_dir.mkdir()
            command = [sys.executable, "-m", "benchmarks.train_step", args.config, "--run", system]
            command += ["--pairs", str(args.pairs), "--steps", str(args.steps), "--result", str(result)]
            command += ["--splits", str(splits), "--store", store, "--mini-batch-size", str(args.mini_batch_size)]
            command += ["--output-dir", str(temp_dir / "run"), *args.options]
            usage = measure(command, temp_dir, limits, cwd=Path(__file__).parents[1])
            saved = {} if usage.failure else json.loads(result.read_text(encoding="utf-8"))
            times = StepTimes(**saved["times"]) if saved else None
            runs.append(Run(system, saved.get("batch_pairs", args.pairs), usage, times, saved.get("peak_flops")))
    return runs


def _split(args: argparse.Namespace, folder: Path) -> Path:
    """The recipe's own splits, made by the training command's code in a process that is gone afterwards."""
    code = (
        "import sys; from pathlib import Path; from train.arguments import parse_arguments; from train.run import "
        "prepare_data; prepare_data(parse_arguments(sys.argv[2:])[1], Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(folder), args.config, *args.options]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    return folder / "data"


def markdown_table(runs: Sequence[Run]) -> str:
    """A line for each system: medians over its runs; pairs a second also as a multiple of the first system's."""
    heads = [
        "System",
        "Runs",
        "Notes a step",
        "Pairs a step",
        "Step (s)",
        "Notes/s",
        "Pairs/s",
        "Ratio",
        "Share of peak",
        "Peak memory (GB)",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    first = None
    for system, some in _by_system(runs):
        done = [(run, run.times) for run in some if run.times is not None]
        if len(done) < len(some):
            failure = next(run.usage.failure for run in some if run.times is None)
            lines.append(f"| {system} | {len(some)} | {failure} |" + " |" * (len(heads) - 3))
            continue
        step = median(median(times.seconds) for _run, times in done)
        notes, pairs = done[0][1].notes, done[0][1].pairs
        first = first or pairs / step
        on_device = [times.device_memory_gb for _run, times in done if times.device_memory_gb is not None]
        memory = median(on_device or [run.usage.peak_memory_gb for run, _times in done])
        share = median(times.flops / run.peak_flops for run, times in done if run.peak_flops)
        cells = [system, str(len(some)), f"{notes:.0f}", f"{pairs:.1f}", f"{step:.2f}", f"{notes / step:.2f}"]
        cells += [f"{pairs / step:.2f}", f"{pairs / step / first:.2f}", f"{share:.0%}", f"{memory:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _by_system(runs: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    for system in dict.fromkeys(run.system for run in runs):
        yield system, [run for run in runs if run.system == system]


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="Notes and pairs a second and peak memory of a training step: the official recipe's and ours, with "
        "the backbones and settings of a recipe of configs/. Further options are those of train/run.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", help="recipe, such as configs/movies.yaml")
    parser.add_argument(
        "--systems", nargs="+", choices=get_args(System), default=list(get_args(System)), help="what runs"
    )
    parser.add_argument(
        "--pairs", type=int, default=32, help="pairs learned from a step (graph batches: about so many)"
    )
    parser.add_argument("--mini-batch-size", type=int, default=16, help="of lengths and what comes after it")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed, after one that is not")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each system, in turns; the table has medians")
    parser.add_argument("--splits", help="folder of python -m pairs.split (default: the recipe's own splits)")
    parser.add_argument("--memory-limit-gb", type=float, default=20.0, help="stop a run that takes more")
    parser.add_argument("--time-limit-s", type=float, default=3600.0, help="stop a run that takes longer")
    parser.add_argument("--temp-dir", help="for splits, store and checkpoints (default: this machine's)")
    parser.add_argument("--output", help="JSON file to write: every run, and what one must know to repeat it")
    for name in ("--run", "--result", "--store", "--output-dir"):  # of the processes that it starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    args, options = parser.parse_known_args(argv)
    args.options = options
    if args.run:
        args.system = args.run
        args.options += ["--output_dir", args.output_dir]
        run_system(args)
        return
    runs = run_all(args)
    facts = collect_facts(config=args.config, options=args.options, mini_batch_size=args.mini_batch_size)
    facts["hardware"]["memory"] = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    if args.output:
        content = {"facts": facts, "runs": [asdict(run) for run in runs]}
        Path(args.output).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(
        markdown_table(runs) + "\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n"
    )


if __name__ == "__main__":
    main()
