"""The training command, end to end, and every recipe of configs/."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, LlamaConfig, TrainerState

from hub.tiny_backbones import save_tiny_vision_tower
from hub.verify import verify
from pairs.query import PairOptions
from pairs.split import SplitOptions, load_split, make_splits
from pairs.tables import load_notes
from train.arguments import NoteLLM2TrainingArguments
from train.run import UserError, checkpoint_to_resume, main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "paper").glob("*.yaml")])
# The tiny model of the kind that a recipe names.
MULTIMODAL_LLMS = {"blip2": "blip-2", "qwen_vl": "qwen2_vl"}
FAST = [
    *("--use_cpu", "--disable_tqdm", "True", "--report_to", "none", "--per_device_train_batch_size", "4"),
    *("--qformer_layers", "1", "--qformer_hidden_size", "64", "--num_visual_tokens", "2", "--eval_steps", "1"),
    *("--save_steps", "1", "--warmup_steps", "0"),
]
NO_HEAD = ["--embedding_dim", "0", "--late_fusion", "none"]


def test_default_runs_from_simulation_to_a_checkpoint_that_stands_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "run"
    main([*FAST, "--output_dir", str(output), "--num_simulated_notes", "192", "--max_steps", "2"])
    printed = capsys.readouterr().out
    for text in ("chance", "bm25", "perfect knowledge", "untrained", "trained", "AutoModel", "recall@10"):
        assert text in printed
    report = json.loads((output / "report" / "report.json").read_text())
    rows = {(row["system"], row["modality"]) for row in report["rows"]}
    assert {("trained", "both"), ("trained", "text"), ("trained", "image"), ("untrained", "both")} <= rows
    made_of = {row["cost"]["made_of"] for row in report["rows"] if row["system"] in ("untrained", "trained")}
    assert made_of == {"LLM llm (llama), tower vision (clip_vision_model)"}
    settings = yaml.safe_load((output / "settings.yaml").read_text())
    assert settings["training"]["max_steps"] == 2 and settings["data"]["num_simulated_notes"] == 192
    model = AutoModel.from_pretrained(output)
    notes = list(load_split(output / "data", "test").notes)
    assert model.encode(notes).shape == (len(notes), 64)
    assert verify(output) <= 1e-5
    before = {(row["system"], row["modality"]): row["metrics"] for row in report["rows"]}
    assert before["untrained", "both"] != before["trained", "both"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_trains_a_step(
    config: Path,
    world_folder: Path,
    backbones: tuple[Path, Path],
    llm_folder: Callable[[str], Path],
    multimodal_llm_folder: Callable[[str], Path],
    tmp_path: Path,
):
    output, settings = tmp_path / "run", yaml.safe_load(config.read_text())
    data = ["--notes", str(world_folder / "notes.jsonl"), "--views", str(world_folder / "views.csv")]
    options = ["--lora_target_modules", "all-linear", "--pair_min_count", "1"]
    if "multimodal_llm" in settings:
        parts = ["--multimodal_llm", str(multimodal_llm_folder(MULTIMODAL_LLMS[config.stem]))]
    else:
        llm, tower = backbones
        if config.stem.startswith("mqwen"):
            llm = llm_folder("qwen2")
        if config.stem.startswith("mqwen_bigg"):  # its tower is wider than the others'
            tower = save_tiny_vision_tower(tmp_path / "wide", 24, 64)
        parts = ["--num_text_layers", "1", "--llm", str(llm)]
        if settings.get("vision") != "":  # the text-only recipe has none
            parts += ["--vision", str(tower)]
    main([str(config), *FAST, *data, *parts, *options, "--output_dir", str(output), "--max_steps", "1"])
    model = AutoModel.from_pretrained(output)
    embeds = model.encode([{"title": "one"}, {"title": "two"}])
    assert np.isfinite(embeds).all() and np.abs(embeds[0] - embeds[1]).max() > 0
    if config.stem.startswith("mqwen"):
        assert model.config.text_config.model_type == "qwen2"
        assert model.config.vision_config.hidden_size == (64 if "bigg" in config.stem else 32)
    rows = json.loads((output / "report" / "report.json").read_text())["rows"]
    modalities = {"both", "text", "image"} if model.config.has_vision else {"text"}
    assert {row["modality"] for row in rows if row["system"] == "trained"} == modalities


def test_recipes_of_the_paper_are_its_systems():
    """Each differs from the others in what it is named for."""
    found = {}
    for config in (ROOT / "configs" / "paper").glob("*.yaml"):
        settings = yaml.safe_load(config.read_text())
        assert (settings["llm_tuning"], settings["learning_rate"], settings["embedding_dim"]) == ("full", 3e-6, 64)
        names = ("llm", "vision", "multimodal_llm", "prompt", "late_fusion")
        found[config.stem] = tuple(settings.get(name) for name in names)
    assert len(set(found.values())) == len(found) == 11
    assert {found[name][3:] for name in found if name.endswith("_notellm2")} == {("micl", "vector")}
    assert {found[name][3:] for name in found if name.endswith("_base")} == {("basic", "none")}


@pytest.mark.parametrize("name", ["movies", "rooms"])
def test_recipes_adapt_the_last_ten_layers(name: str):
    """Their pattern is written for the thirty layers of SmolLM2-135M, which the tests above do not have."""
    pattern = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["lora_target_modules"]
    with torch.device("meta"):
        llm = AutoModel.from_config(LlamaConfig(num_hidden_layers=30, hidden_size=64, vocab_size=8))
    found = [path for path, module in llm.named_modules() if re.fullmatch(pattern, path)]
    assert len(found) == 10 * 7 and {int(path.split(".")[1]) for path in found} == set(range(20, 30))


def test_text_only_in_the_simulated_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main([*FAST, "--output_dir", str(tmp_path), "--num_simulated_notes", "192", "--max_steps", "1", "--vision", ""])
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config.vision_config is None and model.processor.prompt == "text"
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("trained")]
    assert rows == [["trained", "text"]]


def test_trains_on_splits_made_before(world_folder: Path, backbones: tuple[Path, Path], tmp_path: Path):
    notes = load_notes(world_folder / "notes.jsonl")
    split = SplitOptions(by="time", test_days=10, validation_days=5)
    make_splits(notes, world_folder / "views.csv", PairOptions(score="swing"), split, tmp_path / "splits")
    parts = ["--llm", str(backbones[0]), "--vision", str(backbones[1]), "--splits", str(tmp_path / "splits")]
    parts += ["--notes", "nowhere.csv", "--views", "nowhere.csv"]  # of a YAML file: the splits win
    main([*FAST, *parts, "--output_dir", str(tmp_path / "run"), "--max_steps", "1"])
    facts = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["facts"]
    assert facts["test_notes"] == facts["train_notes"] == len(notes)  # by time, all notes are in all splits
    assert not (tmp_path / "run" / "data").exists()
    with pytest.raises(SystemExit, match="no splits.json here"):
        main([*FAST, *parts[:4], "--splits", str(tmp_path), "--output_dir", str(tmp_path / "other")])


def test_warms_up_the_head_and_goes_on_from_a_checkpoint(
    world_folder: Path, backbones: tuple[Path, Path], tmp_path: Path
):
    data = ["--notes", str(world_folder / "notes.jsonl"), "--views", str(world_folder / "views.csv")]
    parts = ["--llm", str(backbones[0]), "--vision", str(backbones[1])]
    common = [*FAST, *data, "--max_steps", "1", "--llm_tuning", "lora", "--learning_rate", "0"]
    for steps in ("0", "30"):
        rates = ["--head_learning_rate", "0.001", "--head_warmup_steps", steps]
        main([*common, *parts, *rates, "--output_dir", str(tmp_path / steps)])
    cold, warm = AutoModel.from_pretrained(tmp_path / "0"), AutoModel.from_pretrained(tmp_path / "30")
    assert torch.equal(cold.connector.query_tokens, warm.connector.query_tokens)
    # One step of AdamW moves a weight by its rate at most; the warm-up has moved some further.
    assert (cold.head.weight - warm.head.weight).abs().max() > 0.003
    main([*common, "--model", str(tmp_path / "30"), "--output_dir", str(tmp_path / "second")])
    second = AutoModel.from_pretrained(tmp_path / "second")
    assert torch.equal(second.head.weight, warm.head.weight)  # at a rate of 0: it is that model that goes on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--notes", "nowhere.csv", "--views", "nowhere.csv"], "nowhere.csv"),
        (["--resume_from_checkpoint", "last"], "holds no whole checkpoint"),
        (["--num_simulated_notes", "192", "--prompt", "text", "--late_fusion", "none"], "late_fusion=None"),
        (
            ["--num_simulated_notes", "192", *NO_HEAD, "--head_warmup_steps", "3", "--head_learning_rate", "1e-3"],
            "head_warmup_steps=3",
        ),
        (
            ["--num_simulated_notes", "192", "--llm_tuning", "lora", "--lora_target_modules", "nothing"],
            "nothing",
        ),
        (["--num_simulated_notes", "192", "--multimodal_llm", "one", "--llm", "another"], "has all parts of its own"),
    ],
)
def test_what_cannot_be_used_ends_with_one_line(options: list[str], message: str, tmp_path: Path):
    with pytest.raises(SystemExit) as stopped:
        main([*FAST, "--output_dir", str(tmp_path), "--max_steps", "1", *options])
    assert message in str(stopped.value.code) and "\n" not in str(stopped.value.code)


@pytest.mark.slow
def test_default_really_learns(tmp_path: Path):
    """The promise of the README: better than BM25 and than the best that text alone, or the picture alone, can reach on
    unseen notes; and what sees one of them stays under its ceiling, or notes have leaked."""
    main(["--output_dir", str(tmp_path), "--report_to", "none"])
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    recall = {(row["system"], row["modality"]): row["metrics"]["recall@10"] for row in rows}
    trained = recall["trained", "both"]
    assert trained > 2 * recall["bm25", "text"] and trained > 1.5 * recall["perfect knowledge", "text"]
    assert trained > 2 * recall["untrained", "both"]
    for modality in ("text", "image"):
        ceiling = recall["perfect knowledge", modality]
        assert recall["trained", modality] < ceiling + 0.05  # an expectation, which 300 queries may pass by luck
        assert trained > ceiling + 0.2


def test_resume_takes_the_last_checkpoint(tmp_path: Path):
    arguments = [
        *FAST,
        "--output_dir",
        str(tmp_path),
        "--num_simulated_notes",
        "192",
        "--lr_scheduler_type",
        "constant",
    ]
    main([*arguments, "--max_steps", "1"])
    main([*arguments, "--max_steps", "2", "--resume_from_checkpoint", "last"])
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and [e["step"] for e in state["log_history"] if "eval_recall@10" in e] == [1, 2]


def checkpoint(folder: Path, *missing: str) -> Path:
    """A checkpoint of one process as far as its names go."""
    folder.mkdir(parents=True)
    for name in {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} - {*missing}:
        (folder / name).write_text("{}")
    return folder


def to_resume(folder: Path) -> str | None:
    return checkpoint_to_resume(
        NoteLLM2TrainingArguments(output_dir=str(folder), resume_from_checkpoint="auto", use_cpu=True, report_to="none")
    )


def test_auto_begins_anew_where_checkpoints_were_cut_off(tmp_path: Path):
    assert to_resume(tmp_path / "none") is None
    cut_off = checkpoint(tmp_path / "checkpoint-1", "trainer_state.json")
    other = checkpoint(tmp_path / "kept-by-hand", "trainer_state.json")
    assert to_resume(tmp_path) is None
    assert not cut_off.exists() and other.exists()


@pytest.mark.parametrize(
    ("missing", "problem"),
    [("rng_state.pth", "another number of processes"), ("scheduler.pt", "scheduler.pt is missing")],
)
def test_auto_never_deletes_training(missing: str, problem: str, tmp_path: Path):
    """Two processes have saved it, and one is started; or it was damaged after it was written."""
    complete = checkpoint(tmp_path / "checkpoint-2", missing)
    (complete / "rng_state_1.pth").write_text("")
    cut_off = checkpoint(tmp_path / "checkpoint-4", "trainer_state.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"auto: .*checkpoint-2 .*{problem}.*--output_dir"):
        to_resume(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and cut_off.exists()


def test_refuses_to_mix_two_runs_in_one_folder(tmp_path: Path):
    arguments = [*FAST, "--output_dir", str(tmp_path), "--num_simulated_notes", "192", "--max_steps", "1"]
    main(arguments)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert "checkpoints of an earlier run" in str(stopped.value.code)


def launch(file: Path, tmp_path: Path) -> list[str]:
    """How a file of configs/accelerate is launched on processors, with two processes at most."""
    settings = yaml.safe_load(file.read_text())
    if settings["distributed_type"] == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    processes = min(settings["num_processes"], 2)
    if settings["distributed_type"] == "MULTI_GPU":  # accelerate starts one process where there is no accelerator
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    settings |= {"use_cpu": True, "num_processes": processes}
    if settings["distributed_type"] != "DEEPSPEED":  # it trains in bfloat16, and must agree with `Trainer` on that
        settings["mixed_precision"] = "no"
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    return [*launcher, "--config_file", str(tmp_path / "accelerate.yaml")]


SHORT = ["--num_simulated_notes", "200", "--eval_steps", "2", "--save_steps", "2", "--use_cpu", "true"]
ON_PROCESSORS = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes"), [("single_gpu", 1), ("ddp", 2), ("deepspeed_zero2", 2), ("deepspeed_zero3", 2)]
)
def test_every_way_of_distribution_trains_goes_on_and_measures(name: str, processes: int, tmp_path: Path):
    """As its file says, but for processors, and two of them."""
    command = launch(ROOT / "configs" / "accelerate" / f"{name}.yaml", tmp_path)
    command += ["train/run.py", "--output_dir", str(tmp_path / "run"), *SHORT]
    for more in (["--max_steps", "2"], ["--max_steps", "4", "--resume_from_checkpoint", "last"]):
        done = subprocess.run(
            [*command, *more], cwd=ROOT, env=ON_PROCESSORS, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"Processes: {processes} (" in done.stderr
    assert "trained" in done.stdout
    state = TrainerState.load_from_json(str(tmp_path / "run" / "trainer_state.json"))
    assert state.global_step == 4 and all(np.isfinite(e["loss"]) for e in state.log_history if "loss" in e)


def start_two(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # --standalone: on a free port, as another test may be at work.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train/run.py"]
    command += options
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--eval_untrained", "false"]
    command += ["--num_simulated_notes", "200", "--per_device_train_batch_size", "4"]
    environment = ON_PROCESSORS | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_are_two_and_not_twice_one(tmp_path: Path):
    done = start_two(tmp_path, "--use_cpu", "true")
    assert done.returncode == 0 and "Processes: 2 (MULTI_CPU); a batch of all of them: 8 pairs" in done.stderr


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path):
    done = start_two(tmp_path)
    assert done.returncode != 0 and "2 processes were started and do not know of each other" in done.stderr
    assert not (tmp_path / "run").exists()
