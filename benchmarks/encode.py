"""Encoding notes with `NoteLLM2Model.encode`, beside the official recipe's way and that of sentence-transformers.

    python -m benchmarks.encode MODEL --notes notes.csv [--num-notes 200] [--systems …] [--batch-size 32] [--repeat 3]
    python -m benchmarks.encode --random qwen-0.5b --notes simulated --num-notes 200
    python -m benchmarks.encode MODEL --notes notes.csv --latency 200
    python -m benchmarks.encode --random tiny --notes simulated --picture-size 48 64 --scaling 1000 10000 100000

Every system has the same weights, prompts and notes, and its embeddings must be the first system's:

    official    as in the paper's code, batches are padded to their longest note, their pictures go through the tower at
                once, and n_m is read from the states of all tokens. Chosen here: notes are sorted by length, a batch
                has `--batch-size` notes (32, as many as its training has on a GPU), attention is PyTorch's ("sdpa").
                Its random flip of pictures is left out.
    sentence-transformers-padded  `SentenceTransformer.encode`, with the LLM and the tower as in `official`
    sentence-transformers         the same with the module as published: this package's packed forward pass
    encode      `NoteLLM2Model.encode` with its defaults

sentence-transformers sorts by characters; of a mapping with `content`, as notes are here, by those of `content` alone.
Only `encode` skips repeated notes. Simulated ones do not repeat unless `--repeats` says so; those of a table may.

Each run has a process of its own; systems take turns, in every second turn in reverse order, and tables have medians.
Loading and a warm-up are not timed. Peak memory is that of the whole process, libraries and loading included; on a GPU,
what PyTorch held of it while encoding, weights included. Loads are those at the start of a run, to which the one before
it adds. The share of the peak is of the LLM alone: 2 · (its weights in matrix products) · (the tokens that it reads,
padding included) over its time, against these products alone at the same shapes, measured afterwards in the process.

`--latency` and `--scaling` take the place of the comparison: the time of one note, and that of more and more notes.
These are the given ones in turns, each with another number in its title: all differ, but their pictures recur.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, get_args
from unittest.mock import patch

import numpy as np
import psutil
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, PreTrainedModel

from benchmarks.inputs import RANDOM_MODELS, Note, read_notes, save_random_checkpoint, simulate_notes, vary
from benchmarks.measure import Limits, Usage, Watch, facts_text, measure, moment, product_flops, weight_products
from evaluation.encoders import default_device
from evaluation.report import collect_facts
from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor, processing_notellm2, vision_notellm2
from modeling_notellm2.processing_notellm2 import TEXT_FIELDS, EncodedNote, has_image

System = Literal["official", "sentence-transformers-padded", "sentence-transformers", "encode"]
Encoder = Callable[[Iterable[Note]], np.ndarray]

LLM = "LLM"
PARTS = (
    "tokenise",
    "find repeats",
    "image decode",
    "resize and normalise",
    "tower",
    "connector",
    LLM,
    "late fusion and head",
    "rest",
)
"""What the time of a run consists of; the rest is batches and looking up, placing and packing their tokens."""

WARM_UP_NOTES = 8
SIMULATED_NOTES = 1000
"""Simulated notes, if `--num-notes` does not say how many."""


class DifferentEmbeddingsError(Exception):
    """Two systems disagree."""


@dataclass(frozen=True)
class Settings:
    """Of one run.

    Attributes:
        mode: what is measured, a name of `MODES`.
        system: what encodes.
        number: notes that are encoded, or calls with one note.
        model: folder or Hub id.
        notes: path of the table, whose first `num_notes` are used; None: all.
        batch_size: notes a batch; `encode` keeps its own.
        threads: of PyTorch; None: its own choice.
        dtype: of the weights, as "float32"; "int8": float32, but for the LLM's linear layers (`quantized`). Not what
            `encoding` measures, whose share of the peak is that of floating-point products.
        result: file for the JSON that the run leaves.
    """

    mode: str
    system: System
    number: int
    model: str
    notes: str
    num_notes: int | None = None
    batch_size: int = 32
    threads: int | None = None
    dtype: str = "float32"
    result: str = ""


@dataclass(frozen=True)
class Run:
    """One run, in a process of its own.

    Attributes:
        name: of its line in the table.
        load: the machine's load average over the minute before it.
        result: what its `Mode` measures; None if it failed.
    """

    name: str
    load: float
    usage: Usage
    result: Any


class Encoding(TypedDict):
    """What encoding some notes took.

    Attributes:
        notes: how many.
        tokens: those of all notes, padding not counted.
        seconds: wall time.
        parts: of it, by `PARTS`. On a GPU they are those of a second time, in which the device is waited for.
        llm_flops: floating-point operations a second of the LLM's products with its weights, padding included.
        peak_flops: the same of these products alone.
        device_memory_gb: peak memory of the GPU, 10^9 bytes; None without one.
        embeds: file of the embeddings, (N, D) float32; `compared` takes it out and puts in
        difference: the largest one between them and the first system's; None where that failed.
    """

    notes: int
    tokens: int
    seconds: float
    parts: dict[str, float]
    llm_flops: float
    peak_flops: float
    device_memory_gb: float | None
    embeds: NotRequired[str]
    difference: NotRequired[float | None]


class LoadedSystem(NamedTuple):
    """A system's model, the processor that it reads notes with, and what encodes notes."""

    model: NoteLLM2Model
    processor: NoteLLM2Processor
    encode: Encoder


def count_tokens(processor: NoteLLM2Processor, notes: Iterable[Note]) -> int:
    """Tokens that a model reads of the notes, without padding."""
    return sum(len(processor.token_ids(processor.encode_note(note, row))) for row, note in enumerate(notes))


@torch.no_grad()
def encode_padded(model: NoteLLM2Model, notes: Iterable[Note], batch_size: int) -> np.ndarray:
    """The official recipe's inference: (N, D) float32, in the order of the notes."""
    encoded = [model.processor.encode_note(note, row) for row, note in enumerate(notes)]
    order = sorted(range(len(encoded)), key=lambda row: len(model.processor.token_ids(encoded[row])), reverse=True)
    embeds = np.empty((len(encoded), model.config.embedding_dim or model.config.hidden_size), np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = model.processor.collate([encoded[row] for row in rows]).to(model.device)
        note_embeds = model(**batch).note_embeds
        assert note_embeds is not None
        embeds[rows] = note_embeds.cpu().numpy()
    return embeds


FLOAT32_LINEARS = ("down_proj",)
"""Linear layers that int8 leaves in float32, by the end of their names. Of SmolLM2-135M with all layers in int8 the
standardized states of eight films had a cosine of 0.5 to those in float32, without this one 0.8."""


def quantized(llm: PreTrainedModel) -> PreTrainedModel:
    """A copy of an LLM whose linear layers, but for `FLOAT32_LINEARS`, compute in int8 on the processor.

    PyTorch's dynamic quantization. A weight has a scale for each output, the activations one for all tokens of a call:
    a note's embedding depends a little on the notes that it is encoded with.
    """
    names = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    kinds = {
        name: torch.ao.quantization.per_channel_dynamic_qconfig for name in names if not name.endswith(FLOAT32_LINEARS)
    }
    quantized_llm: PreTrainedModel = torch.ao.quantization.quantize_dynamic(llm, kinds)
    return quantized_llm


def load_system(settings: Settings) -> LoadedSystem:
    """Load a system. For the padded ones, `PROCESSOR_IMAGES` of this process is changed.

    Raises:
        ValueError: the folder has a model of another kind.
    """
    is_int8 = settings.dtype == "int8"
    device = torch.device("cpu" if is_int8 else default_device())
    dtype = torch.float32 if is_int8 else getattr(torch, settings.dtype)
    encode: Encoder
    if settings.system.startswith("sentence-transformers"):
        from sentence_transformers import SentenceTransformer  # its memory is not the others'

        from modeling_notellm2.sentence_transformer_notellm2 import NoteLLM2Module

        module = NoteLLM2Module.load(settings.model, model_kwargs={"dtype": dtype})
        model, processor = module.model, module.processor
        encoder = SentenceTransformer(modules=[module], device=str(device))

        def encode(notes: Iterable[Note]) -> np.ndarray:
            return encoder.encode(list(notes), batch_size=settings.batch_size, show_progress_bar=False)
    else:
        model = AutoModel.from_pretrained(settings.model, dtype=dtype).to(device)
        if not isinstance(model, NoteLLM2Model):
            raise ValueError(f"{settings.model} has a {type(model).__name__}: give a checkpoint of NoteLLM-2.")
        processor = model.processor

        def encode(notes: Iterable[Note]) -> np.ndarray:
            is_padded = settings.system == "official"
            embeds = encode_padded(model, notes, settings.batch_size) if is_padded else model.encode(notes)
            assert isinstance(embeds, np.ndarray)
            return embeds

    if settings.system in ("official", "sentence-transformers-padded"):
        model.language_model.set_attn_implementation("sdpa")
        vision_notellm2.PROCESSOR_IMAGES = settings.batch_size
    if is_int8:
        model.language_model = quantized(model.language_model)
    return LoadedSystem(model, processor, encode)


@contextmanager
def watched(model: NoteLLM2Model, processor: NoteLLM2Processor) -> Iterator[tuple[Watch, list[int]]]:
    """Watch the parts of encoding, all of them in this thread, and the tokens of each call of the LLM, with padding."""
    watch, llm_tokens = Watch(model.device), []

    def count(_llm: nn.Module, _arguments: Any, inputs: dict[str, Any]) -> None:
        llm_tokens.append(inputs["inputs_embeds"].shape[:2].numel())

    calls: tuple[tuple[str, Any, str], ...] = (
        ("tokenise", processor, "encode_note"),
        ("find repeats", EncodedNote, "content_digest"),
        ("image decode", processing_notellm2, "read_image"),
        ("resize and normalise", processor.image_processor, "preprocess"),
        ("tower", model.vision_tower, "forward"),
        ("connector", model.connector, "forward"),
        (LLM, model.language_model, "forward"),
        ("late fusion and head", model, "embed_states"),
    )
    with ExitStack() as stack:
        stack.callback(model.language_model.register_forward_pre_hook(count, with_kwargs=True).remove)
        for part, owner, name in calls:
            if owner is not None:  # a model may lack this part
                stack.enter_context(patch.object(owner, name, watch.timed(part, getattr(owner, name))))
        yield watch, llm_tokens


def measure_encoding(system: LoadedSystem, notes: Sequence[Note], settings: Settings) -> Encoding:
    """Encode the notes. Their embeddings go to a file beside the result's."""
    model, processor, encode = system
    encode(notes[:: max(1, len(notes) // WARM_UP_NOTES)][:WARM_UP_NOTES])
    device, seconds, memory = model.device, None, None
    if device.type == "cuda":  # to be watched would slow it down
        torch.cuda.reset_peak_memory_stats(device)
        started = moment(device)
        encode(notes)
        seconds = moment(device) - started
        memory = torch.cuda.max_memory_allocated(device) / 1e9
    with watched(model, processor) as (watch, llm_tokens):
        started = moment(device)
        embeds = encode(notes)
        total = moment(device) - started
    file = Path(settings.result).with_suffix(".npy")
    np.save(file, embeds)
    parts = {part: watch.seconds[part] for part in PARTS} | {"rest": total - sum(watch.seconds.values())}
    products = weight_products(model.language_model, round(sum(llm_tokens) / len(llm_tokens)))
    weights = sum(inner * columns for _rows, inner, columns in products)
    return {
        "notes": len(notes),
        "tokens": count_tokens(processor, notes),
        "seconds": seconds or total,
        "parts": parts,
        "llm_flops": 2 * weights * sum(llm_tokens) / watch.seconds[LLM],
        "peak_flops": product_flops(device, model.dtype, products),
        "device_memory_gb": memory,
        "embeds": str(file),
    }


def measure_latency(system: LoadedSystem, notes: Sequence[Note], settings: Settings) -> dict[str, Any]:
    """The `seconds` of each call with one note, which has text and picture, after some that are not timed.

    Raises:
        ValueError: no such note.
    """
    notes = [note for note in notes if has_image(note) and any(note[name] for name in TEXT_FIELDS)]
    if not notes:
        raise ValueError("no note has text and image, which --latency needs: give other --notes.")
    seconds = []
    for note in vary(notes, WARM_UP_NOTES + settings.number):
        started = moment(system.model.device)
        system.encode([note])
        seconds.append(moment(system.model.device) - started)
    return {"seconds": seconds[WARM_UP_NOTES:]}


def measure_scaling(system: LoadedSystem, notes: Sequence[Note], settings: Settings) -> dict[str, Any]:
    """The `tokens` of so many notes, made of the given ones one by one, and the `seconds` to encode them."""
    tokens = count_tokens(system.processor, vary(notes, settings.number))
    system.encode(vary(notes, WARM_UP_NOTES))
    started = moment(system.model.device)
    system.encode(vary(notes, settings.number))
    return {"tokens": tokens, "seconds": moment(system.model.device) - started}


def run_in_this_process(settings: Settings) -> None:
    """One run; its result goes to a file."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    notes = read_notes(settings.notes, settings.num_notes)
    result = MODES[settings.mode].measure(load_system(settings), notes, settings)
    Path(settings.result).write_text(json.dumps(result), encoding="utf-8")


def take_turns(lines: dict[str, Settings], repeat: int, limits: Limits, folder: Path) -> Iterator[Run]:
    """Run all lines of a table `repeat` times, in every second turn in reverse order, each in a process of its own."""
    order = [name for turn in range(repeat) for name in (reversed(lines) if turn % 2 else lines)]
    # Lines differ in their notes, and so the time left is by notes.
    total = repeat * sum(settings.number for settings in lines.values())
    with tqdm(total=total, desc="encoding", unit="note", smoothing=0) as bar:
        for position, name in enumerate(order):
            bar.set_postfix_str(name)
            load, result = os.getloadavg()[0], folder / f"{position}.json"
            settings = asdict(replace(lines[name], result=str(result)))
            command = [sys.executable, "-m", "benchmarks.encode", "--run", json.dumps(settings)]
            with tempfile.TemporaryDirectory(dir=folder) as temp_dir:
                usage = measure(command, temp_dir, limits, cwd=Path(__file__).parents[1])
            yield Run(name, load, usage, None if usage.failure else json.loads(result.read_text(encoding="utf-8")))
            bar.update(lines[name].number)


def compared(runs: Iterable[Run], tolerance: float) -> Iterator[Run]:
    """The runs as they come; those of encoding with their `difference` to the first system, which begins.

    Raises:
        DifferentEmbeddingsError: the embeddings of a run are not those of the first.
    """
    first: str | None = None
    reference: np.ndarray | None = None
    for run in runs:
        first = first or run.name
        if run.result is not None and "embeds" in run.result:
            embeds = np.load(run.result.pop("embeds"))
            if run.name == first and reference is None:
                reference = embeds
            run.result["difference"] = None
            if reference is not None:
                systems = f"{run.name} and {first}"
                run.result["difference"] = largest_difference(embeds, reference, tolerance, systems)
        yield run


def largest_difference(embeds: np.ndarray, reference: np.ndarray, tolerance: float, systems: str) -> float:
    """Of two arrays (N, D) of embeddings, named `systems`.

    Raises:
        DifferentEmbeddingsError: it is larger than `tolerance`, or a value is no number.
    """
    difference = float(np.abs(embeds - reference).max())
    if not difference <= tolerance:
        message = f"{systems} differ by {difference:.1e} (tolerance {tolerance:g}): their embeddings must be equal."
        raise DifferentEmbeddingsError(message)
    return difference


def systems_table(runs: Sequence[Run]) -> str:
    """Medians; the ratio is that of notes a second to the first system's, and empty where this failed."""
    of_first = [run.result for run in runs if run.name == runs[0].name]
    first = None if None in of_first else median(encoding["seconds"] for encoding in of_first)

    def cells(done: Sequence[Run]) -> list[str]:
        encodings: list[Encoding] = [run.result for run in done]
        seconds = median(encoding["seconds"] for encoding in encodings)
        on_device = [found for encoding in encodings if (found := encoding["device_memory_gb"]) is not None]
        memory = median(on_device or [run.usage.peak_memory_gb for run in done])
        share = median(encoding["llm_flops"] / encoding["peak_flops"] for encoding in encodings)
        notes, tokens = encodings[0]["notes"], encodings[0]["tokens"]
        texts = [f"{notes / seconds:.2f}", f"{tokens / seconds:.0f}", f"{seconds:.2f}", f"{share:.0%}", f"{memory:.2f}"]
        if first is None:
            return texts
        difference = max(found for encoding in encodings if (found := encoding["difference"]) is not None)
        return [*texts, f"{first / seconds:.2f}", f"{difference:.1e}"]

    heads = ["Notes/s", "Tokens/s", "Time (s)", "LLM's share of peak", "Peak memory (GB)"]
    return _table("System", [*heads, "Ratio", "Largest difference"], runs, cells)


def parts_table(runs: Sequence[Run]) -> str:
    """Milliseconds a note of every part, medians, and the part's share of their sum."""

    def cells(done: Sequence[Run]) -> list[str]:
        encodings: list[Encoding] = [run.result for run in done]
        parts = [median(1e3 * found["parts"][part] / found["notes"] for found in encodings) for part in PARTS]
        return [f"{part:.2f} ({part / sum(parts):.0%})" for part in parts]

    return _table("System (ms a note)", PARTS, runs, cells)


def latency_table(runs: Sequence[Run]) -> str:
    """Percentiles over the calls of all runs."""

    def cells(done: Sequence[Run]) -> list[str]:
        seconds = [taken for run in done for taken in run.result["seconds"]]
        percentiles = (f"{1e3 * np.percentile(seconds, percent):.1f}" for percent in (50, 99))
        return [f"{len(seconds):,}", *percentiles, f"{median(run.usage.peak_memory_gb for run in done):.2f}"]

    return _table("System", ["Calls", "p50 (ms)", "p99 (ms)", "Peak memory (GB)"], runs, cells)


def scaling_table(runs: Sequence[Run]) -> str:
    """Medians; time is linear where that of a token stays."""

    def cells(done: Sequence[Run]) -> list[str]:
        tokens, seconds = done[0].result["tokens"], median(run.result["seconds"] for run in done)
        memory = median(run.usage.peak_memory_gb for run in done)
        return [f"{tokens:,}", f"{seconds:.1f}", f"{1e6 * seconds / tokens:.1f}", f"{memory:.2f}"]

    return _table("Notes", ["Tokens", "Time (s)", "µs a token", "Peak memory (GB)"], runs, cells)


def _table(
    title: str, heads: Sequence[str], runs: Sequence[Run], cells: Callable[[Sequence[Run]], Sequence[str]]
) -> str:
    """A line for each name: `cells` of its runs, or why one of them failed."""
    heads = [title, "Runs", *heads]
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)]]
    for name in dict.fromkeys(run.name for run in runs):
        same = [run for run in runs if run.name == name]
        failures = [str(run.usage.failure) for run in same if run.result is None]
        line = [name, str(len(same)), *(failures[:1] or cells(same))]
        lines.append(line + [""] * (len(heads) - len(line)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Mode(NamedTuple):
    """What measures in a run's process, and what shows all runs."""

    measure: Callable[[LoadedSystem, Sequence[Note], Settings], Mapping[str, Any]]
    show: Callable[[Sequence[Run]], str]


MODES = {
    "encoding": Mode(measure_encoding, lambda runs: f"{systems_table(runs)}\n\n{parts_table(runs)}"),
    "latency": Mode(measure_latency, latency_table),
    "scaling": Mode(measure_scaling, scaling_table),
}


def plan(args: argparse.Namespace, folder: Path) -> dict[str, Settings]:
    """Make the notes and the model that are asked for. Returns the settings of each line of the table."""
    path = _absolute(args.notes)
    if args.notes == "simulated":
        number = args.num_notes or SIMULATED_NOTES
        path = str(simulate_notes(number, folder / "notes", tuple(args.picture_size), args.seed, args.repeats))
    notes = read_notes(path, args.num_notes)
    if args.random:
        model = str(save_random_checkpoint(RANDOM_MODELS[args.random], notes, folder / "model"))
    else:
        model = _absolute(args.model)

    def line(mode: str, system: System, number: int) -> Settings:
        return Settings(mode, system, number, model, path, args.num_notes, args.batch_size, args.threads, args.dtype)

    if args.latency:
        return {"encode": line("latency", "encode", args.latency)}
    if args.scaling:
        return {f"{number:,}": line("scaling", "encode", number) for number in args.scaling}
    return {system: line("encoding", system, len(notes)) for system in args.systems}


def _absolute(name_or_path: str) -> str:
    """Processes are started in this repository's folder. A Hub id stays as it is."""
    return str(Path(name_or_path).resolve()) if Path(name_or_path).exists() else name_or_path


def positive(text: str) -> int:
    """The type of an option that takes 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more.")
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the description's lines as they are."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    systems = list(get_args(System))
    parser = argparse.ArgumentParser("python -m benchmarks.encode", description=__doc__, formatter_class=HelpFormatter)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("model", nargs="?", help="folder of a checkpoint, or --random")
    models.add_argument("--random", choices=list(RANDOM_MODELS), help="a model of random weights, of such sizes")
    given = parser.add_argument_group("notes")
    given.add_argument("--notes", required=True, help="a table, or: simulated")
    text = f"the first so many of the table (None: all), or so many simulated ones (None: {SIMULATED_NOTES})"
    given.add_argument("--num-notes", type=positive, metavar="N", help=text)
    text = "width and height of simulated pictures, in pixels"
    given.add_argument("--picture-size", type=positive, nargs=2, default=[480, 640], metavar=("W", "H"), help=text)
    given.add_argument(
        "--repeats", type=float, default=0.0, metavar="SHARE", help="of simulated notes, are repetitions"
    )
    given.add_argument("--seed", type=int, default=0, help="of simulated notes")
    measured = parser.add_argument_group("what is measured").add_mutually_exclusive_group()
    text = "all notes encoded by these; the first is what the others are compared with"
    measured.add_argument("--systems", nargs="+", choices=systems, default=systems, help=text)
    text = "instead, the time of encode for one note with text and picture, over so many calls a run"
    measured.add_argument("--latency", type=positive, metavar="CALLS", help=text)
    text = "instead, time a token and memory of encode for such numbers of notes, the given ones again and again"
    measured.add_argument("--scaling", type=positive, nargs="+", metavar="NOTES", help=text)
    runs = parser.add_argument_group("runs")
    runs.add_argument("--batch-size", type=positive, default=32, help="notes a batch, of all systems but encode")
    runs.add_argument("--repeat", type=positive, default=3, help="runs of each line of the table, which has medians")
    runs.add_argument("--threads", type=positive, help="of PyTorch (None: its own choice)")
    dtypes = ["float32", "bfloat16", "float16"]
    runs.add_argument("--dtype", choices=dtypes, default="float32", help="of the model's weights")
    runs.add_argument("--tolerance", type=float, default=1e-5, help="largest difference of embeddings")
    runs.add_argument("--memory-limit-gb", type=float, default=20.0, help="stop a run that takes more")
    runs.add_argument("--time-limit-s", type=float, default=3600.0, help="stop a run that takes longer")
    runs.add_argument("--temp-dir", help="for models, notes and results that do not stay (None: this machine's)")
    runs.add_argument("--output", help="JSON file to write: every run, and what one must know to repeat it")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`. After "--run", the JSON of `Settings`: one run in this process."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "--run":
        run_in_this_process(Settings(**json.loads(argv[1])))
        return
    parser = build_parser()
    args = parser.parse_args(argv)
    given = {name: vars(args)[name] for name in ("model", "random", "notes", "num_notes", "batch_size", "dtype")}
    facts = collect_facts(**given, threads=args.threads or torch.get_num_threads())
    facts["hardware"]["memory"] = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    try:
        with tempfile.TemporaryDirectory(prefix="notellm2-encode-", dir=args.temp_dir) as name:
            lines, limits = plan(args, Path(name).resolve()), Limits(args.memory_limit_gb, args.time_limit_s)
            runs = list(compared(take_turns(lines, args.repeat, limits, Path(name).resolve()), args.tolerance))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except DifferentEmbeddingsError as error:
        parser.exit(1, f"{error} Nothing was measured.\n")
    facts["largest_load"] = max(run.load for run in runs)
    if args.output:
        content = {"facts": facts, "runs": [asdict(run) for run in runs]}
        Path(args.output).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    mode = next(iter(lines.values())).mode
    sys.stdout.write(f"{MODES[mode].show(runs)}\n\n{facts_text(facts)}\n")


if __name__ == "__main__":
    main()
