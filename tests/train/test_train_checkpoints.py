"""Only whole checkpoints are gone on from."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from train.checkpoints import checkpoint_problem, newest_whole_checkpoint, write_checksums
from train.trainer import NoteLLM2Trainer

BuildTrainer = Callable[..., NoteLLM2Trainer]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def run(run_folder: Path, build_trainer: BuildTrainer, tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    if not any(run_folder.iterdir()):
        build_trainer(output_dir=str(run_folder), max_steps=2, save_steps=1).train()
    return Path(shutil.copytree(run_folder, tmp_path / "copy"))


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".pt", ".pth", ".json"))


def test_whole_checkpoints_have_no_problem(run: Path):
    assert checkpoint_problem(run / "checkpoint-1") is None
    assert newest_whole_checkpoint(run) == run / "checkpoint-2"
    (run / "checkpoint-x").mkdir()
    assert newest_whole_checkpoint(run) == run / "checkpoint-2"


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_cut_file_is_named_and_the_checkpoint_passed_over(keep: float, run: Path, caplog: pytest.LogCaptureFixture):
    newest = run / "checkpoint-2"
    names = files_of(newest)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[: int(keep * len(whole))])
        assert name in str(checkpoint_problem(newest)), name
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert newest_whole_checkpoint(run) == run / "checkpoint-1"
        assert name in caplog.text
        (newest / name).write_bytes(whole)
    assert newest_whole_checkpoint(run) == newest  # control: mended again


def test_a_flipped_byte_of_the_optimizer_is_found(run: Path):
    file = run / "checkpoint-2" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    assert "optimizer.pt is damaged" in str(checkpoint_problem(run / "checkpoint-2"))


def test_damage_that_leaves_files_readable_is_found_by_checksums(run: Path, build_trainer: BuildTrainer):
    newest = run / "checkpoint-2"
    state = json.loads((newest / "trainer_state.json").read_text())
    for name in ("model.safetensors", "trainer_state.json"):
        whole = (newest / name).read_bytes()
        damaged = bytearray(whole)
        if name == "model.safetensors":
            damaged[-5] ^= 0x40  # a weight
        else:
            damaged = bytearray(json.dumps({**state, "epoch": state["epoch"] + 1}).encode())
        (newest / name).write_bytes(damaged)
        assert checkpoint_problem(newest) == f"{name} is damaged, by its checksum"
        assert newest_whole_checkpoint(run) == run / "checkpoint-1"
        with pytest.raises(ValueError, match=f"checkpoint-2.*{name} is damaged"):
            build_trainer(output_dir=str(run), max_steps=3).train(resume_from_checkpoint=str(newest))
        checksums = (newest / "checksums.json").rename(newest / "checksums")
        assert checkpoint_problem(newest) is None  # control: nothing else finds it
        checksums.rename(newest / "checksums.json")
        (newest / name).write_bytes(whole)
    assert newest_whole_checkpoint(run) == newest


def test_what_a_run_goes_on_with_besides_the_checkpoint_has_a_checksum_too(run: Path):
    negatives = run / "hard_negatives" / "epoch-0.npy"
    negatives.parent.mkdir()
    negatives.write_bytes(b"rows")
    write_checksums(run / "checkpoint-2")
    assert checkpoint_problem(run / "checkpoint-2") is None
    negatives.write_bytes(b"rowz")
    assert checkpoint_problem(run / "checkpoint-2") == "../hard_negatives/epoch-0.npy is damaged, by its checksum"
    negatives.unlink()
    assert checkpoint_problem(run / "checkpoint-2") is None  # the trainer says what it does then


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trainer_state.json", "trainer_state.json"),
        ("rng_state.pth", "rng_state.pth"),
        ("optimizer.pt", "no optimizer state"),
        ("scheduler.pt", "scheduler.pt"),
        ("model.safetensors", "no weights"),
    ],
)
def test_a_missing_file_is_named(name: str, words: str, run: Path):
    (run / "checkpoint-2" / name).unlink()
    assert words in str(checkpoint_problem(run / "checkpoint-2"))


def test_a_missing_shard_is_named(run: Path):
    checkpoint = run / "checkpoint-2"
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "model-00002-of-00002.safetensors is missing" in str(checkpoint_problem(checkpoint))
    shutil.copy(checkpoint / names["a"], checkpoint / names["b"])
    assert checkpoint_problem(checkpoint) == "model.safetensors is missing, which checksums.json names"
    write_checksums(checkpoint)
    assert checkpoint_problem(checkpoint) is None


def test_another_number_of_processes_is_no_resume(run: Path):
    assert "rng_state_0.pth" in str(checkpoint_problem(run / "checkpoint-2", processes=2))
    shutil.copy(run / "checkpoint-2" / "rng_state.pth", run / "checkpoint-2" / "rng_state_0.pth")
    assert "rng_state_1.pth" in str(checkpoint_problem(run / "checkpoint-2", processes=2))


def test_a_sharded_checkpoint_needs_its_index(run: Path):
    shards = run / "checkpoint-2" / "pytorch_model_fsdp_0"
    shards.mkdir()
    (shards / "__0_0.distcp").write_bytes(b"x")
    assert "pytorch_model_fsdp_0 has no .metadata" in str(checkpoint_problem(run / "checkpoint-2"))


def test_the_trainer_goes_on_from_whole_checkpoints_only(run: Path, build_trainer: BuildTrainer):
    weights = run / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    trainer = build_trainer(output_dir=str(run), max_steps=3)
    with pytest.raises(ValueError, match="checkpoint-2.*model.safetensors"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    trainer.train(resume_from_checkpoint=True)
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == [1, 2, 3] and trainer.state.global_step == 3


def test_no_whole_checkpoint_is_no_resume(run: Path, build_trainer: BuildTrainer):
    for name in ("checkpoint-1", "checkpoint-2"):
        (run / name / "scheduler.pt").unlink()
        (run / name / "scheduler.pt").touch()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        build_trainer(output_dir=str(run)).train(resume_from_checkpoint=True)


def test_state_is_json(run: Path):
    assert json.loads((run / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
