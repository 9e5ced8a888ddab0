"""A run that is killed and goes on is the run that was not killed, bit for bit."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException
from transformers import TrainerCallback, TrainerState

from tests.train import tiny
from train.trainer import NoteLLM2Trainer

SETTINGS = {
    "max_steps": 8,
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "llm_tuning": "lora",
    "lora_dropout": 0.2,
    "mini_batch_size": 3,
    "batches": "graph",
    "image_dropout": 0.2,
    "hard_negatives": 1,
    "warmup_steps": 2,
}


class Kill(TrainerCallback):
    """kill −9 at the end of a step, or in the middle of writing the checkpoint that follows it."""

    def __init__(self, step: int, while_saving: bool) -> None:
        self.step = step
        self.while_saving = while_saving

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if not self.while_saving:
                os.kill(os.getpid(), signal.SIGKILL)
            original = torch.save

            def cut_short(value: Any, file: Any, *arguments: Any, **keywords: Any) -> None:
                original(value, file, *arguments, **keywords)
                if str(file).endswith("optimizer.pt"):
                    content = Path(file).read_bytes()
                    Path(file).write_bytes(content[: len(content) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)

            torch.save = cut_short


def run(
    splits_folder: Path, backbones: tiny.Backbones, output_dir: Path, kill: tuple[int, bool] | None, resume: bool | str
) -> NoteLLM2Trainer:
    trainer = tiny.build_trainer(tiny.load_splits(splits_folder), tiny.build_model(backbones), output_dir, **SETTINGS)
    if kill is not None and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        trainer.add_callback(Kill(*kill))
    torch.manual_seed(random.randrange(10**6))  # a new process is in another random state
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on how many threads share them, and other tests set that number
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        torch.set_num_threads(threads)
    trainer.save_model()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
    return trainer


def run_in_process(*arguments: Any) -> None:
    run(*arguments)


def assert_same_run(one: Path, other: Path) -> None:
    histories = []
    for folder in (one, other):
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        histories.append([{k: v for k, v in e.items() if "time" not in k} for e in state.log_history if "loss" in e])
    assert histories[0] == histories[1] and len(histories[0]) == SETTINGS["max_steps"]
    assert len({entry["loss"] for entry in histories[0]}) > 4
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.fixture(scope="module")
def undisturbed(splits_folder: Path, backbones: tiny.Backbones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(splits_folder, backbones, folder, None, False)
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_step(
    seed: int, undisturbed: Path, splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path
):
    """Seed 0 dies in the middle of writing a checkpoint, which is then passed over."""
    step = 4 if seed == 0 else random.Random(seed).randint(3, 7)
    arguments = (splits_folder, backbones, tmp_path, (step, seed == 0), False)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        tiny.run_processes(1, run_in_process, *arguments)
    saved = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert "checkpoint-2" in saved and ("checkpoint-4" in saved) == (step > 4 or seed == 0)
    run(splits_folder, backbones, tmp_path, None, True)
    assert_same_run(undisturbed, tmp_path)


def test_two_processes_of_which_one_is_killed(splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny.run_processes(2, run_in_process, splits_folder, backbones, whole, None, False)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        tiny.run_processes(2, run_in_process, splits_folder, backbones, cut, (5, False), False)
    tiny.run_processes(2, run_in_process, splits_folder, backbones, cut, None, True)
    assert_same_run(whole, cut)


def mined(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "hard_negatives").glob("*.npy")}


def test_hard_negatives_of_what_was_given_up_are_not_used(
    undisturbed: Path, splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path
):
    """A run goes on in another folder with what was mined for the checkpoint's epoch, and mines for later ones anew."""
    there = mined(undisturbed)
    assert len(there) > 1  # the run has several epochs
    checkpoint = undisturbed / "checkpoint-2"
    (tmp_path / "hard_negatives").mkdir()
    for name in there:
        (tmp_path / "hard_negatives" / name).write_bytes(b"of another run")
    run(splits_folder, backbones, tmp_path, None, str(checkpoint))
    assert_same_run(undisturbed, tmp_path)
    epoch = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).epoch
    assert epoch is not None and 0 < epoch % 1  # in the middle of it, where the model is not what it was mined with
    assert mined(tmp_path) == {name: content for name, content in there.items() if name >= f"epoch-{int(epoch)}"}
    assert mined(undisturbed) == there
    # Another pool is another file: what was mined with other settings is not used.
    trainer = tiny.build_trainer(
        tiny.load_splits(splits_folder),
        tiny.build_model(backbones),
        tmp_path / "other",
        **SETTINGS | {"hard_negative_pool": 3},
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all("pool-3" in name for name in mined(tmp_path / "other")) and mined(tmp_path / "other")
