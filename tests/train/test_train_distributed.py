"""W processes on 1/W of the batch are one process on the whole batch: loss, gradients, temperature, weights."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import TrainerCallback

import train.trainer as train_module
from modeling_notellm2 import NoteLLM2Model
from pairs.disk import sha256
from pairs.split import load_split
from pairs.tables import write_table
from tests.train import tiny
from train.distributed import gather_rows, world
from train.losses import ContrastiveTargets, contrastive_loss
from train.trainer import NoteLLM2Trainer

BuildTrainer = Callable[..., NoteLLM2Trainer]
BuildModel = Callable[..., NoteLLM2Model]

ROWS = 10
SIZES = {2: [7, 3], 3: [0, 6, 4]}


def raw_rows() -> Tensor:
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))


def loss_of_a_share(folder: Path) -> None:
    """In each process: the gradients of its own rows and of the temperature."""
    distributed.init_process_group("gloo")
    rank, processes = world()
    sizes = SIZES[processes]
    own = raw_rows().split(sizes)[rank].requires_grad_()
    scale = torch.tensor(9.0, requires_grad=True)
    everyone = gather_rows(functional.normalize(own, dim=-1))
    targets = ContrastiveTargets.of_pairs(ROWS // 2)
    loss = contrastive_loss(everyone, scale, targets, share=(rank, processes)) * processes
    loss.backward()
    assert own.grad is not None and scale.grad is not None
    save_file(
        {"grad": own.grad.contiguous(), "scale": scale.grad, "loss": loss.detach()}, folder / f"{rank}.safetensors"
    )
    distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_are_those_of_one_process(processes: int, tmp_path: Path):
    """With uneven shares, an empty one among them."""
    tiny.run_processes(processes, loss_of_a_share, tmp_path)
    saved = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(processes)]
    rows, scale = raw_rows().requires_grad_(), torch.tensor(9.0, requires_grad=True)
    loss = contrastive_loss(functional.normalize(rows, dim=-1), scale, ContrastiveTargets.of_pairs(ROWS // 2))
    loss.backward()
    # What DDP makes of them: the mean over processes, of rows that only one process has.
    torch.testing.assert_close(torch.cat([part["grad"] for part in saved]) / processes, rows.grad)
    mean_scale = torch.stack([part["scale"] for part in saved]).mean()
    torch.testing.assert_close(mean_scale, scale.grad, rtol=1e-4, atol=1e-7)
    assert torch.stack([part["loss"] for part in saved]).mean().item() == pytest.approx(loss.item())
    assert rows.grad is not None and rows.grad.abs().max() > 1e-2
    # Control: a process alone has neither the loss nor the gradients.
    assert saved[-1]["loss"].item() != pytest.approx(loss.item(), rel=1e-3)
    assert not torch.allclose(torch.cat([part["grad"] for part in saved]), rows.grad, rtol=1e-2)


RUN = {
    "max_steps": 7,  # more than an epoch of 24 pairs a batch: the last batch is uneven
    "learning_rate": 0.02,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "visual_loss_weight": 0.5,
    "llm_tuning": "lora",
    "dataloader_num_workers": 0,
}


def train_and_save(
    splits_folder: Path,
    backbones: tiny.Backbones,
    output_dir: Path,
    arguments: dict[str, Any],
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    splits = tiny.load_splits(splits_folder)
    trainer = tiny.build_trainer(splits, tiny.build_model(backbones, dropout=0.0), output_dir, **arguments)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        (output_dir / "history.json").write_text(json.dumps(history))
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {}),
        (2, {"mini_batch_size": 5, "gradcache": False, "image_dropout": 0.5}),
        (2, {"mini_batch_size": 5, "gradient_accumulation_steps": 2}),
        (3, {"mini_batch_size": 5, "batches": "graph", "hard_negatives": 1, "image_dropout": 0.9}),
        (3, {"gradient_checkpointing": True, "image_dropout": 0.9}),
        (
            3,
            {
                "mini_batch_size": 5,
                "mask_same_image": True,
                "logq_correction": True,
                "matryoshka_dims": [16, 4],
                "text_dropout": 0.2,
                "bad_images": "drop-pair",
            },
        ),
    ],
)
def test_ddp_trains_like_one_process(
    processes: int, settings: dict[str, Any], splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path
):
    """With hardly an image left in a batch, some processes have none: their connector has to take part nevertheless.
    The last set has damaged images, whose notes are in no share."""
    if "bad_images" in settings:
        splits_folder = with_damaged_images(splits_folder, tmp_path / "splits")
    pairs = 24 // settings.get("gradient_accumulation_steps", 1)
    one = RUN | settings | {"per_device_train_batch_size": pairs}
    train_and_save(splits_folder, backbones, tmp_path / "one", one)
    several = RUN | settings | {"per_device_train_batch_size": pairs // processes}
    tiny.run_processes(processes, train_and_save, splits_folder, backbones, tmp_path / "several", several)
    expected, found = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "several"))
    for name in ("loss", "loss_m", "loss_v", "temperature", "fusion_weight", "notes_per_step"):
        curves = [[entry.get(name) for entry in history] for history in (expected, found)]
        assert curves[1] == pytest.approx(curves[0], abs=2e-4), name
    assert len({entry["loss"] for entry in expected}) == len(expected) > 3
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "several")]
    start = dict(tiny.build_model(backbones).named_parameters())
    moved = 0.0
    for name, value in weights[0].items():
        if name == "logit_scale":
            continue
        torch.testing.assert_close(weights[1][name], value, atol=2e-5, rtol=1e-4)
        if name in start:
            moved = max(moved, float((start[name].detach() - value).abs().max()))
    assert moved > 1e-3  # control: training went somewhere, fifty times the tolerance
    grads = [[entry["grad_norm"] for entry in history] for history in (expected, found)]
    assert grads[1] == pytest.approx(grads[0], rel=2e-3) and min(grads[0]) > 1e-3
    assert sum(entry["bad_images"] for entry in found) == sum(entry["bad_images"] for entry in expected)
    assert ("bad_images" in settings) == (sum(entry["bad_images"] for entry in expected) > 0)


def with_damaged_images(splits_folder: Path, folder: Path) -> Path:
    """The same splits; every fourth training note's image cannot be read, and every third has the first one's cover."""
    shutil.copytree(splits_folder, folder)
    for name in ("validation", "test"):  # images are relative to their table
        write_table(load_split(splits_folder, name).notes, folder / name / "notes.arrow")
    damaged = folder / "damaged.png"
    damaged.write_bytes(b"no picture")
    rows = [dict(note) for note in load_split(splits_folder, "train").notes]
    for number, row in enumerate(rows):
        row["image"] = str(damaged) if number % 4 == 3 else rows[0]["image"] if number % 3 == 2 else row["image"]
    write_table(Dataset.from_list(rows), folder / "train" / "notes.arrow")
    record = json.loads((folder / "splits.json").read_text())
    record["checksums"] = {name: sha256(folder / name) for name in record["checksums"]}
    (folder / "splits.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("settings", [{}, {"mini_batch_size": 5}])
def test_the_temperature_moves_alike_under_ddp(
    settings: dict[str, Any], splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path
):
    """Its gradient is small at the start, when all notes look alike: with a rate that makes it move."""
    settings = RUN | settings | {"head_learning_rate": 5.0, "learning_rate": 0.0, "max_steps": 2}
    train_and_save(splits_folder, backbones, tmp_path / "one", settings | {"per_device_train_batch_size": 24})
    several = settings | {"per_device_train_batch_size": 12}
    tiny.run_processes(2, train_and_save, splits_folder, backbones, tmp_path / "several", several)
    start = tiny.build_model(backbones).logit_scale.detach()
    one, two = (load_file(tmp_path / name / "model.safetensors")["logit_scale"] - start for name in ("one", "several"))
    assert abs(float(one)) > 1e-3  # without a gradient it would stay where it is
    torch.testing.assert_close(two, one, rtol=0.02, atol=0)


def test_a_process_alone_has_all_rows():
    rows = torch.randn(3, 2)
    assert world() == (0, 1) and gather_rows(rows) is rows


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


class IsSharded(TrainerCallback):
    """Without it a run that was not sharded at all would pass, as it is one process's equal, too."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        assert any("language_model" in name for name in sharded)


def train_sharded(*arguments: Any, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """FSDP2 on processors: PyTorch shards there, too, but accelerate turns it on for accelerators alone."""
    os.environ |= FSDP
    prepare = AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    gather = Accelerator.get_state_dict

    def materialized(self: Accelerator, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        # Gathered tensors are whole where they are moved off their device, and on processors they are not moved.
        state = gather(self, *args, **kwargs)
        return {
            name: value.full_tensor().clone() if isinstance(value, DTensor) else value for name, value in state.items()
        }

    Accelerator.get_state_dict = materialized  # type: ignore[method-assign]
    AcceleratorState.__init__ = with_fsdp  # type: ignore[method-assign]  # in a process of its own
    train_and_save(*arguments, callbacks=[IsSharded(), *callbacks])


def test_fsdp_that_accelerate_leaves_off_is_refused(build_trainer: BuildTrainer, monkeypatch: pytest.MonkeyPatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="accelerate leaves it off"):
        build_trainer()


@pytest.mark.parametrize(
    "more",
    [{}, {"mini_batch_size": 5}, {"llm_tuning": "lora"}, {"gradient_checkpointing": True, "mini_batch_size": 5}],
)
def test_fsdp2_trains_like_one_process(
    more: dict[str, Any], splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path
):
    settings = RUN | {"llm_tuning": "full", "max_steps": 3} | more
    train_and_save(splits_folder, backbones, tmp_path / "one", settings | {"per_device_train_batch_size": 24})
    several = settings | {"per_device_train_batch_size": 12}
    tiny.run_processes(2, train_sharded, splits_folder, backbones, tmp_path / "several", several)
    expected, found = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "several"))
    losses = [[entry["loss"] for entry in history] for history in (expected, found)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4) and len(set(losses[0])) == 3
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "several")]
    start = tiny.build_model(backbones, dropout=0.0).state_dict()
    moved = max(float((start[name] - value).abs().max()) for name, value in weights[0].items() if name in start)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-5, rtol=1e-4)
    assert moved > 1e-3  # control: half the gradient, as without the factor W, would be far off the tolerance


class NaNInOneProcess(TrainerCallback):
    """In process 1 alone: a loss, with its gradient finite; the gradients that it holds; the weights that it holds."""

    def __init__(self, what: str, folder: Path) -> None:
        self.what, self.folder = what, folder

    def on_step_begin(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        if state.global_step != 1 or world()[0] != 1 or self.what == "weights":
            return
        original = Accelerator.backward

        def backward(accelerator: Accelerator, loss: Tensor, **settings: Any) -> None:
            original(accelerator, loss, **settings)
            if self.what == "loss":
                loss.data.fill_(torch.nan)
            elif self.what == "gradients" and accelerator.sync_gradients:
                spoil(parameter.grad for parameter in model.parameters())

        Accelerator.backward = backward  # type: ignore[method-assign]  # in a process of its own

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        if state.global_step == 1 and world()[0] == 1 and self.what == "weights":
            spoil(parameter.detach() for parameter in model.parameters())


def spoil(tensors: Iterable[Tensor | None]) -> None:
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local is not None and local.numel():
            local.fill_(torch.nan)
            return


def end_of_a_run(what: str, is_told: bool, train: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """In each process: writes how its run ends."""
    if not is_told:
        train_module.refused_by_all = lambda device: nullcontext()  # type: ignore[assignment]
    try:
        train(*arguments, callbacks=[NaNInOneProcess(what, folder)])
    except (ValueError, RuntimeError) as error:  # the latter of gloo, where the other process is gone
        (folder / f"{world()[0]}.txt").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("what", "way", "words", "is_told"),
    [
        ("loss", "ddp", "step 2: the loss is nan", True),
        ("gradients", "ddp", "step 2: of ", True),
        ("gradients", "fsdp", "step 2: of ", True),
        ("weights", "fsdp", "step 2: 1 weights are not finite", True),
        ("gradients", "fsdp", "step 2: of ", False),
    ],
)
def test_what_one_process_finds_ends_all_of_them(
    what: str, way: str, words: str, is_told: bool, splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path
):
    """By the same error. The control: where they do not tell each other, the other one ends by something else."""
    settings = RUN | {"llm_tuning": "full", "max_steps": 3, "per_device_train_batch_size": 4, "save_steps": 1}
    settings |= {"gradient_accumulation_steps": 2, "ddp_timeout": 30}
    train = train_sharded if way == "fsdp" else train_and_save
    tiny.run_processes(
        2, end_of_a_run, what, is_told, train, tmp_path, splits_folder, backbones, tmp_path / "run", settings
    )
    ends = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert ends[1].startswith(f"NonFiniteError: {words}") and "(Process" not in ends[1]
    assert (ends[0] == f"{ends[1]} (Process 1 found it.)") == is_told, ends[0]


def test_fsdp1_is_refused(build_trainer: BuildTrainer, monkeypatch: pytest.MonkeyPatch):
    original = NoteLLM2Trainer.create_accelerator_and_postprocess

    def with_fsdp1(self: NoteLLM2Trainer) -> None:
        original(self)
        self.is_fsdp_enabled = True
        monkeypatch.setattr(self.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)

    monkeypatch.setattr(NoteLLM2Trainer, "create_accelerator_and_postprocess", with_fsdp1)
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        build_trainer()


def test_mini_batches_are_refused_under_deepspeed(build_trainer: BuildTrainer, monkeypatch: pytest.MonkeyPatch):
    original = NoteLLM2Trainer.create_accelerator_and_postprocess

    def with_deepspeed(self: NoteLLM2Trainer) -> None:
        original(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(NoteLLM2Trainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(ValueError, match="mini_batch_size=4 does not work with DeepSpeed"):
        build_trainer(mini_batch_size=4)


@pytest.mark.parametrize(
    ("policy", "classes"),
    [
        (size_based_auto_wrap_policy, None),
        (transformer_auto_wrap_policy, None),
        (transformer_auto_wrap_policy, ["LlamaDecoderLayer", "CLIPEncoderLayer"]),
    ],
)
def test_sharding_what_not_every_note_runs_is_refused(
    policy: Callable[..., bool],
    classes: list[str] | None,
    build_trainer: BuildTrainer,
    monkeypatch: pytest.MonkeyPatch,
):
    original = NoteLLM2Trainer.create_accelerator_and_postprocess
    plugin = SimpleNamespace(fsdp_version=2, auto_wrap_policy=policy, transformer_cls_names_to_wrap=classes)

    def with_fsdp(self: NoteLLM2Trainer) -> None:
        original(self)
        self.is_fsdp_enabled = True
        monkeypatch.setattr(self.accelerator.state, "fsdp_plugin", plugin, raising=False)

    monkeypatch.setattr(NoteLLM2Trainer, "create_accelerator_and_postprocess", with_fsdp)
    with pytest.raises(ValueError, match="TRANSFORMER_BASED_WRAP and LlamaDecoderLayer"):
        build_trainer()  # the layers of the LLM alone are not refused: the tests of FSDP2 above


def test_compiled_mini_batches_that_keep_their_graphs_are_refused_under_ddp(
    build_trainer: BuildTrainer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("train.trainer.world", lambda: (0, 2))
    with pytest.raises(ValueError, match="torch_compile=True with gradcache=False"):
        build_trainer(mini_batch_size=4, gradcache=False, torch_compile=True)


def test_gradcache_is_exact_with_all_at_once(splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path):
    """bfloat16, LoRA, gradient checkpointing, both losses, two processes: the same mini-batches, graphs kept or not."""
    settings = RUN | {"mini_batch_size": 5, "gradient_checkpointing": True, "bf16": True, "batches": "graph"}
    settings |= {"per_device_train_batch_size": 12, "max_steps": 3}
    for name, gradcache in (("kept", False), ("cached", True)):
        tiny.run_processes(
            2, train_and_save, splits_folder, backbones, tmp_path / name, settings | {"gradcache": gradcache}
        )
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("kept", "cached")]
    for name in ("loss", "loss_m", "loss_v", "temperature", "grad_norm"):
        curves = [[entry[name] for entry in history] for history in histories]
        assert curves[1] == pytest.approx(curves[0], rel=2e-3), name
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("kept", "cached")]
    start = tiny.build_model(backbones, dropout=0.0).state_dict()
    moved = max(float((start[name] - value).abs().max()) for name, value in weights[0].items() if name in start)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=moved / 50, rtol=0)
    assert moved > 1e-4


def train_with_deepspeed(stage: int, *arguments: Any) -> None:
    # Without the threshold DeepSpeed would leave a model this small undivided.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    file = Path(tempfile.mkdtemp()) / "deepspeed.json"
    file.write_text(json.dumps(settings | {"gradient_accumulation_steps": "auto"}))
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
        "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file",
    }
    train_and_save(*arguments)


@pytest.mark.slow  # it compiles on first use, and few install it
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("llm_tuning", ["full", "lora"])
def test_deepspeed_trains_like_one_process(
    stage: int, llm_tuning: str, splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path
):
    pytest.importorskip("deepspeed")
    settings = RUN | {"llm_tuning": llm_tuning, "max_steps": 4, "optim": "adamw_torch", "learning_rate": 2e-3}
    # With hardly an image left, some processes have none, whose parts are gathered all the same.
    settings |= {"max_grad_norm": 1.0, "image_dropout": 0.97, "adam_epsilon": 1e-4, "store": tmp_path / "store"}
    settings |= {"eval_strategy": "steps", "eval_steps": 2}
    train_and_save(splits_folder, backbones, tmp_path / "one", settings | {"per_device_train_batch_size": 24})
    several = settings | {"per_device_train_batch_size": 12}
    tiny.run_processes(2, train_with_deepspeed, stage, splits_folder, backbones, tmp_path / "several", several)
    expected, found = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "several"))
    for name in ("loss", "grad_norm", "temperature"):
        curves = [[entry[name] for entry in history] for history in (expected, found)]
        assert curves[1] == pytest.approx(curves[0], rel=2e-3), name
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "several")]
    start = tiny.build_model(backbones, dropout=0.0).state_dict()
    moved = max(float((start[name] - value).abs().max()) for name, value in weights[0].items() if name in start)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=moved / 50, rtol=0)
    assert moved > 1e-3
