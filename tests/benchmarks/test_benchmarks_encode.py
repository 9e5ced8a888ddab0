"""The benchmark of `encode`: its systems agree, its parts add up, and a system that is wrong ends it."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPVisionConfig, Qwen2Config

from benchmarks import encode as benchmark
from benchmarks import inputs
from benchmarks.encode import LLM, PARTS, Encoding, Run, Settings, System
from benchmarks.inputs import RANDOM_MODELS
from benchmarks.measure import FlopCounter, Usage, Watch, product_flops, weight_products
from modeling_notellm2 import NoteLLM2Model, vision_notellm2
from pairs.tables import load_notes

SYSTEMS: tuple[System, ...] = get_args(System)
CPU = torch.device("cpu")
SMALL_PICTURE = (36, 48)


def run_settings(system: System, model: Path, **settings: Any) -> Settings:
    return Settings("encoding", system, 0, str(model), "", **settings)


@pytest.fixture(scope="module")
def notes_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs.simulate_notes(40, tmp_path_factory.mktemp("notes") / "simulated", SMALL_PICTURE, repeats=0.05)


@pytest.fixture(autouse=True)
def images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a system of a process of its own may change is put back."""
    monkeypatch.setattr(vision_notellm2, "PROCESSOR_IMAGES", vision_notellm2.PROCESSOR_IMAGES)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs are not started in processes of their own. Returns their commands, as they come."""
    commands: list[list[str]] = []

    def measure(command: list[str], *limits: Any, **settings: Any) -> Usage:
        commands.append(command)
        assert command[1:4] == ["-m", "benchmarks.encode", "--run"]
        images = vision_notellm2.PROCESSOR_IMAGES
        benchmark.main(command[3:])
        vision_notellm2.PROCESSOR_IMAGES = images
        return Usage(2.0, 0.5, 0.0, None)

    monkeypatch.setattr(benchmark, "measure", measure)
    return commands


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_gives_the_same_embeddings_and_its_parts_add_up(
    system: System, tiny_checkpoint: Path, tiny_model: NoteLLM2Model, notes_table: Path, tmp_path: Path
) -> None:
    notes = inputs.read_notes(str(notes_table), None)
    expected = tiny_model.encode(notes)
    settings = run_settings(system, tiny_checkpoint, result=str(tmp_path / "run.json"))
    loaded = benchmark.load_system(settings)
    encoding = benchmark.measure_encoding(loaded, notes, settings)
    embeds = np.load(encoding["embeds"])
    benchmark.largest_difference(embeds, expected, 1e-5, system)
    with pytest.raises(benchmark.DifferentEmbeddingsError, match="differ by"):  # control: neighbours changed places
        benchmark.largest_difference(np.roll(embeds, 1, axis=0), expected, 1e-5, system)
    assert encoding["notes"] == 40
    assert encoding["tokens"] == sum(len(loaded.processor.encode_note(note).input_ids) for note in notes)
    assert tuple(encoding["parts"]) == PARTS
    assert sum(encoding["parts"].values()) == pytest.approx(encoding["seconds"])
    parts = {part for part, seconds in encoding["parts"].items() if seconds > 0}
    assert parts == set(PARTS) - ({"find repeats"} if system != "encode" else set())
    assert encoding["llm_flops"] > 0 and encoding["peak_flops"] > 0


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_the_llm_reads_is_counted(system: System, tiny_checkpoint: Path, notes_table: Path) -> None:
    notes = inputs.read_notes(str(notes_table), None)
    loaded = benchmark.load_system(run_settings(system, tiny_checkpoint, batch_size=16))
    with benchmark.watched(loaded.model, loaded.processor) as (watch, llm_tokens):
        loaded.encode(notes)
    lengths = sorted((len(loaded.processor.encode_note(note).input_ids) for note in notes), reverse=True)
    if system == "official":
        assert llm_tokens == [16 * lengths[0], 16 * lengths[16], 8 * lengths[32]]
    elif system == "sentence-transformers-padded":  # by characters, so that a longer note may come in a later batch
        assert llm_tokens[0] == 16 * lengths[0] and len(llm_tokens) == 3 and sum(llm_tokens) > sum(lengths)
    else:
        assert sum(llm_tokens) < sum(lengths)
    count, seconds = len(llm_tokens), dict(watch.seconds)
    loaded.encode(notes)
    assert len(llm_tokens) == count and watch.seconds == seconds  # what was wrapped is unwrapped


def test_the_share_of_the_peak_is_of_the_products_with_the_weights(
    tiny_checkpoint: Path, notes_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings("official", tiny_checkpoint, result=str(tmp_path / "run.json"))
    loaded, notes = benchmark.load_system(settings), inputs.read_notes(str(notes_table), 12)
    measured: list[Any] = []
    monkeypatch.setattr(benchmark, "product_flops", lambda device, dtype, products: measured.append(products) or 1.0)
    encoding = benchmark.measure_encoding(loaded, notes, settings)
    tokens = 12 * max(len(loaded.processor.encode_note(note).input_ids) for note in notes)
    with FlopCounter() as counter, torch.no_grad():  # the products are all that an LLM computes but its attention
        loaded.model.language_model(inputs_embeds=torch.randn(1, 1, loaded.model.config.hidden_size), use_cache=False)
    weights = sum(inner * columns for _rows, inner, columns in measured[0])
    assert 2 * weights == pytest.approx(counter.total, rel=0.02)
    assert measured == [weight_products(loaded.model.language_model, tokens)]
    assert encoding["llm_flops"] * encoding["parts"][LLM] == pytest.approx(2 * weights * tokens)


def test_time_within_another_part_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("benchmarks.measure.moment", lambda device: now)

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    watch = Watch(CPU)
    inner = watch.timed("image decode", lambda: pass_time(5.0))

    def outer() -> None:
        pass_time(1.0)
        inner()
        inner()
        raise ValueError("what fails is timed, too")

    with pytest.raises(ValueError, match="timed"):
        watch.timed("find repeats", outer)()
    assert watch.seconds == {"image decode": 10.0, "find repeats": 1.0}


def test_the_command_measures_in_turns_and_prints(
    tiny_checkpoint: Path, notes_table: Path, in_this_process: list[list[str]], tmp_path: Path, capsys: Any
) -> None:
    options = [str(tiny_checkpoint), "--notes", str(notes_table), "--num-notes", "12", "--repeat", "2"]
    options += ["--batch-size", "5", "--systems", "official", "encode", "--temp-dir", str(tmp_path)]
    output = tmp_path / "runs.json"
    benchmark.main([*options, "--output", str(output)])
    content = json.loads(output.read_text())
    runs = content["runs"]
    assert [run["name"] for run in runs] == ["official", "encode", "encode", "official"]
    assert {json.loads(command[4])["batch_size"] for command in in_this_process} == {5}
    assert content["facts"]["largest_load"] == max(run["load"] for run in runs)
    assert runs[0]["result"]["difference"] == 0 and all(run["result"]["difference"] < 1e-5 for run in runs)
    text = capsys.readouterr().out
    for expected in ("| official | 2 | ", "| encode | 2 | ", "| 1.00 | 0.0e+00 |", f"| {LLM} | ", "- commit: "):
        assert expected in text
    assert [path.name for path in tmp_path.iterdir()] == ["runs.json"]


def test_a_wrong_embedding_ends_it(
    tiny_checkpoint: Path,
    notes_table: Path,
    in_this_process: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    right = benchmark.encode_padded
    monkeypatch.setattr(benchmark, "encode_padded", lambda *given: np.roll(right(*given), 1, axis=0))
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([str(tiny_checkpoint), "--notes", str(notes_table), "--num-notes", "6"])
    assert stopped.value.code == 1 and len(in_this_process) == 2
    assert "sentence-transformers-padded and official differ by" in capsys.readouterr().err


def test_no_number_is_no_agreement() -> None:
    embeds = np.random.default_rng(0).normal(size=(3, 4))
    with pytest.raises(benchmark.DifferentEmbeddingsError):
        benchmark.largest_difference(np.where(embeds == embeds[1, 2], np.nan, embeds), embeds, 1e-5, "a and b")


def failed_run(name: str) -> Run:
    return Run(name, 0.5, Usage(1.0, 9.0, 0.0, "out of memory (limit 8 GB)"), None)


def encoding_run(system: System, seconds: float, memory: float, difference: float | None) -> Run:
    parts = {**dict.fromkeys(PARTS, 0.0), LLM: 0.75 * seconds, "rest": 0.25 * seconds}
    encoding: Encoding = {
        "notes": 30,
        "tokens": 3000,
        "seconds": seconds,
        "parts": parts,
        "llm_flops": 6e9,
        "peak_flops": 8e9,
        "device_memory_gb": None,
        "difference": difference,
    }
    return Run(system, 0.5, Usage(9.0, memory, 0.0, None), encoding)


def test_tables_have_medians_and_say_what_failed() -> None:
    runs = [
        encoding_run("official", 4.0, 1.0, 0.0),
        encoding_run("encode", 2.0, 3.0, 1e-6),
        encoding_run("encode", 2.0, 5.0, 3e-6),
        encoding_run("official", 6.0, 2.0, 2e-7),
        failed_run("sentence-transformers"),
    ]
    _heads, _rule, official, encode, failed = benchmark.systems_table(runs).splitlines()
    assert official == "| official | 2 | 6.00 | 600 | 5.00 | 75% | 1.50 | 1.00 | 2.0e-07 |"
    assert encode == "| encode | 2 | 15.00 | 1500 | 2.00 | 75% | 4.00 | 2.50 | 3.0e-06 |"
    assert "out of memory (limit 8 GB)" in failed and failed.count("|") == encode.count("|")
    heads, _rule, official, *_others = benchmark.parts_table(runs).splitlines()
    place = heads.split(" | ").index(LLM)
    assert heads.startswith("| System (ms a note) | Runs | tokenise |")
    assert official.split(" | ")[place] == "125.00 (75%)"
    seconds = [
        {"seconds": [0.001 * call for call in range(51)]},
        {"seconds": [0.001 * call for call in range(51, 101)]},
    ]
    calls = [Run("encode", 0.5, runs[0].usage, found) for found in seconds]
    assert benchmark.latency_table(calls).endswith("| encode | 2 | 101 | 50.0 | 99.0 | 1.00 |")
    assert "out of memory" in benchmark.latency_table([*calls, failed_run("encode")])
    scaling = [failed_run("10"), Run("20", 0.5, runs[0].usage, {"tokens": 50, "seconds": 2.0})]
    table = benchmark.scaling_table(scaling)
    assert "| 10 | 1 | out of memory" in table and "| 20 | 1 | 50 | 2.0 | 40000.0 | 1.00 |" in table


def test_no_system_is_compared_with_another_than_the_first() -> None:
    runs = [failed_run("official"), encoding_run("encode", 2.0, 3.0, None), encoding_run("encode", 2.0, 3.0, 1e-6)]
    encode = benchmark.systems_table([*runs, encoding_run("official", 4.0, 1.0, 0.0)]).splitlines()[-1]
    assert encode == "| encode | 2 | 15.00 | 1500 | 2.00 | 75% | 3.00 |  |  |"


def test_embeddings_are_compared_with_those_of_the_first_system_alone(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    embeds = {name: draw.normal(size=(3, 4)) for name in ("official", "encode")}

    def run(name: str) -> Run:
        np.save(tmp_path / f"{name}.npy", embeds[name])
        return Run(name, 0.5, Usage(1.0, 1.0, 0.0, None), {"embeds": str(tmp_path / f"{name}.npy")})

    with pytest.raises(benchmark.DifferentEmbeddingsError, match="encode and official differ"):
        list(benchmark.compared([run("official"), run("encode")], 1e-5))
    runs = [failed_run("official"), run("encode"), run("official"), run("official")]
    found = [run.result for run in benchmark.compared(runs, 1e-5)]
    assert found == [None, {"difference": None}, {"difference": 0.0}, {"difference": 0.0}]


def test_latency_of_one_note(
    tiny_checkpoint: Path, notes_table: Path, in_this_process: list[list[str]], tmp_path: Path, capsys: Any
) -> None:
    options = [str(tiny_checkpoint), "--notes", str(notes_table), "--repeat", "2", "--output", str(tmp_path / "runs")]
    benchmark.main([*options, "--latency", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| System | Runs | Calls | p50 (ms) | p99 (ms)")
    assert lines[2].startswith("| encode | 2 | 10 | ")
    seconds = [run["result"]["seconds"] for run in json.loads((tmp_path / "runs").read_text())["runs"]]
    assert [len(taken) for taken in seconds] == [5, 5] and all(taken > 0 for taken in seconds[0])


def test_latency_is_of_notes_with_text_and_picture(tiny_model: NoteLLM2Model) -> None:
    seen: list[dict[str, Any]] = []

    def encode(notes: Any) -> np.ndarray:
        seen.extend(notes)
        return np.zeros((1, 2))

    blank = {"title": "", "topics": "", "content": "", "image": None}
    both = {**blank, "content": "oak", "image": "oak.jpg"}
    system = benchmark.LoadedSystem(tiny_model, tiny_model.processor, encode)
    settings = Settings("latency", "encode", 3, "", "")
    benchmark.measure_latency(system, [{**blank, "title": "x"}, both, {**blank, "image": "x.jpg"}], settings)
    assert {note["image"] for note in seen} == {"oak.jpg"} and len({note["title"] for note in seen}) == len(seen)
    with pytest.raises(ValueError, match="no note has text and image"):
        benchmark.measure_latency(system, [{**blank, "title": "x"}], settings)


def test_scaling_encodes_every_note(
    tiny_checkpoint: Path,
    notes_table: Path,
    in_this_process: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    encoded: list[int] = []
    forward = NoteLLM2Model.forward

    def count(model: NoteLLM2Model, **inputs: Any) -> Any:
        encoded.append(len(inputs["input_ids"]))
        return forward(model, **inputs)

    monkeypatch.setattr(NoteLLM2Model, "forward", count)
    options = [str(tiny_checkpoint), "--notes", str(notes_table), "--repeat", "1"]
    benchmark.main([*options, "--scaling", "6", "50"])  # more than the table has, repetitions among it
    assert sum(encoded) == 6 + 50 + 2 * benchmark.WARM_UP_NOTES
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 6 | 1 | ") and lines[3].startswith("| 50 | 1 | ")


def test_random_model_of_given_sizes(tmp_path: Path, notes_table: Path) -> None:
    notes = inputs.read_notes(str(notes_table), None)
    folders = [inputs.save_random_checkpoint(RANDOM_MODELS["tiny"], notes, tmp_path / name) for name in "ab"]
    embeds = [AutoModel.from_pretrained(folder).encode(notes[:4]) for folder in folders]
    assert embeds[0].shape == (4, 64) and np.isfinite(embeds[0]).all() and np.ptp(embeds[0], axis=0).max() > 1e-4
    np.testing.assert_array_equal(embeds[0], embeds[1])


def test_sizes_of_qwen_and_clip() -> None:
    sizes = RANDOM_MODELS["qwen-0.5b"]
    with torch.device("meta"):
        models = [
            AutoModel.from_config(Qwen2Config(**sizes.llm)),
            AutoModel.from_config(CLIPVisionConfig(**sizes.tower)),
        ]
    # Qwen2.5-0.5B as published; CLIP ViT-B/16 without its projection.
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [494_032_768, 85_799_424]


def test_simulated_notes(tmp_path: Path) -> None:
    seeds = {"a": 0, "b": 0, "c": 1}
    tables = [inputs.simulate_notes(400, tmp_path / name, SMALL_PICTURE, seed) for name, seed in seeds.items()]
    notes, same, other = ([dict(note) for note in load_notes(table)] for table in tables)
    assert [note["content"] for note in notes] == [note["content"] for note in same]
    assert [note["content"] for note in notes] != [note["content"] for note in other]
    words = np.array([len(note["content"].split()) for note in notes])
    assert np.median(words) == pytest.approx(40, rel=0.2)
    assert np.mean(words) > 1.25 * np.median(words) and words.max() > 5 * np.median(words)
    pictures = [note["image"] for note in notes if note["image"]]
    assert 0.75 < len(pictures) / 400 < 0.85
    assert Path(pictures[0]).read_bytes() == Path(next(note["image"] for note in same if note["image"])).read_bytes()
    with Image.open(pictures[0]) as picture:
        assert picture.size == SMALL_PICTURE and np.ptp(np.asarray(picture)) > 100
    assert len({(note["title"], note["content"], note["image"]) for note in notes}) == 400


def test_simulated_notes_repeat_where_it_is_asked_for(tmp_path: Path) -> None:
    notes = load_notes(inputs.simulate_notes(40, tmp_path / "notes", SMALL_PICTURE, repeats=0.25))
    assert len({(note["title"], note["content"], note["image"]) for note in notes}) == 30
    assert len({note["note_id"] for note in notes}) == 40
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"repeats={share:g} of 40 notes: give a share"):
            inputs.simulate_notes(40, tmp_path / "more", SMALL_PICTURE, repeats=share)


def test_a_picture_is_as_large_as_a_photograph() -> None:
    file = io.BytesIO()
    inputs.draw_photograph((480, 640), np.random.default_rng(0)).save(file, "JPEG", quality=85)
    assert 25_000 < len(file.getvalue()) < 150_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--notes", "simulated"], "one of the arguments model --random is required"),
        (["folder", "--random", "tiny", "--notes", "simulated"], "not allowed with argument"),
        (["folder", "--notes", "simulated", "--latency", "5", "--scaling", "6"], "not allowed with argument"),
        (["folder", "--notes", "simulated", "--repeat", "0"], "argument --repeat: 0: give 1 or more."),
        (["folder", "--notes", "simulated", "--num-notes", "0"], "argument --num-notes: 0: give 1 or more."),
        (["folder", "--notes", "simulated", "--repeats", "1"], "repeats=1 of 1000 notes"),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(options)
    assert message in capsys.readouterr().err


def test_too_few_notes_and_another_model_are_refused(notes_table: Path, llm_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="num_notes=41, but .* has 40 notes"):
        inputs.read_notes(str(notes_table), 41)
    with pytest.raises(ValueError, match="LlamaModel: give a checkpoint of NoteLLM-2"):
        benchmark.load_system(run_settings("encode", llm_folder("llama")))


def test_products_are_counted_where_no_gradient_can_be() -> None:
    layer = torch.nn.Linear(3, 4)
    with torch.inference_mode(), FlopCounter() as counter:
        layer(torch.randn(5, 3))
    assert counter.total == 2 * 5 * 3 * 4


def test_products_of_several_shapes_are_weighted_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    shapes: list[tuple[int, int, int]] = []

    def linear(left: torch.Tensor, right: torch.Tensor) -> None:
        nonlocal now
        shapes.append((left.shape[0], left.shape[1], right.shape[0]))
        now += float(right.shape[0])  # seconds

    monkeypatch.setattr("benchmarks.measure.moment", lambda device: now)
    monkeypatch.setattr("benchmarks.measure.functional.linear", linear)
    found = product_flops(CPU, torch.float32, [(2, 3, 4), (2, 3, 4), (5, 6, 7)], repeat=2)
    assert found == pytest.approx((2 * 2 * 3 * 4 * 2 + 2 * 5 * 6 * 7) / (4 + 4 + 7))
    assert shapes == [(2, 3, 4)] * 3 + [(5, 6, 7)] * 3
