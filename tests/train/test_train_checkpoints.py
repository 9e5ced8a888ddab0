"""Only whole checkpoints are gone on from."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pairs.disk import sha256
from train.arguments import NoteLLM2TrainingArguments
from train.checkpoints import checkpoint_problem, newest_whole_checkpoint, write_checksums
from train.run import UserError, checkpoint_to_resume
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


def test_a_checkpoint_is_hashed_once_on_the_way_into_a_run(
    run: Path, build_trainer: BuildTrainer, monkeypatch: pytest.MonkeyPatch
):
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    for wanted in ("auto", "last", str(run / "checkpoint-2")):
        trainer = build_trainer(output_dir=str(run), max_steps=3, save_strategy="no", resume_from_checkpoint=wanted)
        monkeypatch.setattr("train.checkpoints.sha256", counted)
        found = checkpoint_to_resume(trainer.args)
        assert found == str(run / "checkpoint-2")
        trainer.train(resume_from_checkpoint=found)
        assert trainer.state.global_step == 3
        assert "model.safetensors" in hashed and len(set(hashed)) == len(hashed)
        hashed.clear()
    # Control: a path that nobody has looked at is looked at.
    build_trainer(output_dir=str(run), max_steps=3, save_strategy="no").train(str(run / "checkpoint-2"))
    assert "model.safetensors" in hashed


def cut_state(folder: Path, seed: int) -> None:
    """kill −9 in the middle of writing it, at a random byte: `Trainer` writes it in place."""
    state = folder / "trainer_state.json"
    whole = state.read_bytes()
    state.write_bytes(whole[: random.Random(seed).randrange(len(whole) - 1)])


@pytest.mark.parametrize("seed", range(5))
def test_auto_passes_over_a_state_that_was_cut_off(
    seed: int, run: Path, build_trainer: BuildTrainer, caplog: pytest.LogCaptureFixture
):
    """At any byte; what mines hard negatives reads the states of all checkpoints, too, and the one at the run's end is
    not what a run goes on from."""
    newest, settings = run / "checkpoint-2", {"output_dir": str(run), "hard_negatives": 1, "hard_negative_pool": 4}
    shutil.copy(newest / "trainer_state.json", run / "trainer_state.json")
    cut_state(newest, seed)
    cut_state(run, seed + 100)
    (newest / "checksums.json").unlink()
    trainer = build_trainer(max_steps=3, save_strategy="no", resume_from_checkpoint="auto", **settings)
    with caplog.at_level(logging.WARNING):
        found = checkpoint_to_resume(trainer.args)
    assert found == str(run / "checkpoint-1") and (newest / "model.safetensors").exists()
    assert f"{newest} is not whole and is passed over: trainer_state.json" in caplog.text
    trainer.train(resume_from_checkpoint=found)
    trainer.save_state()
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.parametrize("seed", range(20))
def test_auto_begins_anew_only_where_no_checkpoint_was_ever_whole(
    seed: int, run: Path, caplog: pytest.LogCaptureFixture
):
    arguments = build_arguments(run)
    shutil.rmtree(run / "checkpoint-1")
    newest, whole = run / "checkpoint-2", (run / "checkpoint-2" / "trainer_state.json").read_bytes()
    cut_state(newest, seed)
    # It has checksums, so that it was whole, and was damaged later: its weights are not thrown away.
    with pytest.raises(UserError, match=r"checkpoint-2 is complete, .*trainer_state\.json .*--output_dir"):
        checkpoint_to_resume(arguments)
    # The same without a state, as where a copy of the folder broke off.
    (newest / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2 is complete, .*trainer_state\.json"):
        checkpoint_to_resume(arguments)
    assert (newest / "model.safetensors").exists()
    (newest / "checksums.json").unlink()
    # Not cut off, but damaged.
    for damaged in (whole.replace(b":", b"?", 1 + seed), b"\xff" + whole):
        (newest / "trainer_state.json").write_bytes(damaged)
        with pytest.raises(UserError, match="checkpoint-2 is complete"):
            checkpoint_to_resume(arguments)
    assert (newest / "model.safetensors").exists()
    # Control: whole again.
    (newest / "trainer_state.json").write_bytes(whole)
    assert checkpoint_to_resume(arguments) == str(newest)
    cut_state(newest, seed)
    with caplog.at_level(logging.WARNING):
        assert checkpoint_to_resume(arguments) is None
    assert f"{newest} was cut off before it was whole, and is deleted" in caplog.text and not newest.exists()


def build_arguments(folder: Path) -> NoteLLM2TrainingArguments:
    return NoteLLM2TrainingArguments(
        output_dir=str(folder), resume_from_checkpoint="auto", use_cpu=True, report_to="none"
    )


def test_state_is_json(run: Path):
    assert json.loads((run / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
