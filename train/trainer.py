"""`NoteLLM2Trainer`: `transformers.Trainer` with the contrastive loss, retrieval metrics and a learning rate a part.

Only public hooks are overridden. Losses see embeddings and ids, models see tensors; the trainer, with its warm-up, sees
all.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, send_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from evaluation.metrics import retrieval_metrics
from modeling_notellm2 import NoteLLM2Output, NoteLLM2PreTrainedModel
from modeling_notellm2.modeling_notellm2 import MAX_LOGIT_SCALE, Part
from modeling_notellm2.processing_notellm2 import IMAGE_EMBEDDING_TOKEN
from train.arguments import NoteLLM2TrainingArguments
from train.batches import BatchPlanner, drawn_log_probability
from train.checkpoints import (
    CheckpointChecksums,
    WholeCheckpoint,
    checkpoint_problem,
    has_readable_state,
    newest_whole_checkpoint,
)
from train.data import NoteCollator, NoteDataset, NoteReader, PairDataset, PlanCollator, PlanDataset
from train.distributed import gather_rows, world
from train.features import image_groups
from train.finite import (
    refuse_non_finite_gradients,
    refuse_non_finite_loss,
    refuse_non_finite_weights,
    refused_by_all,
)
from train.gradcache import EncodedRows, cached_loss
from train.losses import ContrastiveTargets, joint_loss
from train.negatives import mine_hard_negatives, write_hard_negatives
from train.warmup import warm_up_head

logger = logging.getLogger(__name__)


class RetrievalEvaluation:
    """Recall@K, NDCG@K and MRR over all evaluation notes, as `compute_metrics` of a `Trainer`.

    Args:
        related: for each evaluation note the positions of its related notes.
        ks: cut-offs.
    """

    def __init__(self, related: Sequence[np.ndarray], ks: Sequence[int]) -> None:
        self.related = related
        self.ks = ks

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """`predictions` (N, D) float32 embeddings, `label_ids` (N,) positions ─► metrics such as `recall@10`."""
        embeds = np.empty_like(prediction.predictions)
        embeds[prediction.label_ids] = prediction.predictions
        return retrieval_metrics(embeds, self.related, self.ks)


def apply_llm_tuning(model: NoteLLM2PreTrainedModel, arguments: NoteLLM2TrainingArguments) -> None:
    """Freeze or adapt the LLM as `arguments.llm_tuning` says. A checkpoint that has adapters keeps training these."""
    if arguments.llm_tuning == "lora":
        if model.config.lora is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(arguments.seed)
                model.add_lora(**arguments.lora_settings())
    elif model.config.lora is not None:
        model.merge_lora()
    for name, parameter in model.language_model.named_parameters():
        parameter.requires_grad_(arguments.llm_tuning == "full" or "lora_" in name)


class TemperatureBound(TrainerCallback):
    """Bounds the temperature's parameter after each step of the optimizer, as CLIP does: it would otherwise go on
    beyond a bound, where it changes nothing, and have as far to come back.

    Not under DeepSpeed, which keeps the weights that it updates to itself: there the bounds alone are kept.
    """

    @torch.no_grad()
    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """`model` is the one that trains."""
        assert model is not None
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.clamp_(-MAX_LOGIT_SCALE, MAX_LOGIT_SCALE)


class NoteLLM2Trainer(Trainer):
    """Trains a [`NoteLLM2Model`], or a multimodal LLM to compare it with, on pairs of related notes.

    Args:
        model: the model; its LLM is frozen or adapted as `args.llm_tuning` says.
        args: settings.
        train_dataset: pairs of related notes.
        eval_dataset: notes to encode during training.
        eval_related: for each of them the positions of its related notes.
        kwargs: further arguments of `Trainer` (`callbacks`, `optimizers`, …).

    Raises:
        ValueError: settings that do not go together, or not with the model or the kind of distribution; in `train` too.
    """

    model: NoteLLM2PreTrainedModel
    args: NoteLLM2TrainingArguments

    def __init__(
        self,
        model: NoteLLM2PreTrainedModel,
        args: NoteLLM2TrainingArguments,
        train_dataset: PairDataset | None = None,
        eval_dataset: NoteDataset | None = None,
        eval_related: Sequence[np.ndarray] | None = None,
        **kwargs: Any,
    ) -> None:
        standardizer = model.note_standardizer
        if standardizer is not None and not standardizer.is_fitted and not args.head_warmup_steps:
            raise ValueError(
                "standardize_states=True with head_warmup_steps=0: the warm-up measures the LLM's states; give it a "
                "step or more."
            )
        if args.head_warmup_steps and model.config.embedding_dim is None and model.late_fusion is None:
            raise ValueError(
                f"head_warmup_steps={args.head_warmup_steps}: the model has neither a head (embedding_dim) nor late "
                "fusion, so there is nothing to warm up; set it to 0."
            )
        apply_llm_tuning(model, args)
        if eval_related is not None:
            kwargs["compute_metrics"] = RetrievalEvaluation(eval_related, args.eval_ks)
        self.reader: NoteReader | None = None
        if train_dataset is not None:
            self.reader = NoteReader(train_dataset.notes, model.processor, train_dataset.features, args.bad_images)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=NoteCollator(model.processor, "raise" if args.bad_images == "raise" else "text-only"),
            processing_class=model.processor,
            **kwargs,
        )
        self.add_callback(TemperatureBound())
        self.add_callback(CheckpointChecksums())
        if args.mini_batch_size and self.is_deepspeed_enabled:
            raise ValueError(
                f"mini_batch_size={args.mini_batch_size} does not work with DeepSpeed, whose engine allows one forward "
                "and one backward pass a step: use FSDP2 (configs/accelerate/fsdp2.yaml) or DDP, or leave it unset."
            )
        if args.mini_batch_size and not args.gradcache and self.is_fsdp_enabled:
            raise ValueError(
                f"mini_batch_size={args.mini_batch_size} with gradcache=False does not work with FSDP, where processes "
                "must make the same number of forward passes: leave gradcache True, or mini_batch_size unset."
            )
        if args.torch_compile and args.mini_batch_size and not args.gradcache and world()[1] > 1:
            raise ValueError(
                "torch_compile=True with gradcache=False: several compiled forward passes before one backward pass do "
                "not go with DDP; leave gradcache True, or mini_batch_size unset."
            )
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not self.is_fsdp_enabled:
            raise ValueError(
                f"FSDP was asked for, and accelerate leaves it off: {self.accelerator.num_processes} processes on "
                f"{args.device.type}. It shards over several accelerators only; use DDP, or one process, here."
            )
        if self.is_fsdp_enabled:
            _check_fsdp_plugin(self.accelerator.state.fsdp_plugin, model)
        unstored = [data for data in (train_dataset, eval_dataset) if data is not None and data.features is None]
        zero_stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0
        if zero_stage == 3 and model.config.has_vision and unstored:
            raise ValueError(
                "vision_features=recompute does not work with ZeRO-3, where processes must run the same parts and some "
                "may have no image: set vision_features: store (not for a multimodal LLM), or use ZeRO-2."
            )
        if args.hard_negatives and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"hard_negatives={args.hard_negatives} needs whole weights in every process to mine with, which FSDP "
                "and DeepSpeed do not keep: use DDP, or set it to 0."
            )
        width = model.config.embedding_dim or model.config.hidden_size
        if wrong := [dim for dim in args.matryoshka_dims if not 1 <= dim <= width]:
            raise ValueError(
                f"matryoshka_dims={args.matryoshka_dims}: {wrong[0]} is not between 1 and {width}, the whole width."
            )
        if args.matryoshka_dims and width not in args.matryoshka_dims:
            raise ValueError(
                f"matryoshka_dims={args.matryoshka_dims} lacks the whole width, {width}: without it what comes after "
                "the largest of them would not be trained; add it."
            )
        self._embedding_dim = width
        self._has_visual = IMAGE_EMBEDDING_TOKEN in model.processor.template and model.config.has_vision
        self._groups: np.ndarray | None = None
        self._parts: dict[str, tuple[Tensor | float, int]] = {}  # sums since the last log, and of how many batches
        self._latest_parts: dict[str, Tensor] = {}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Warm up the head (`args.head_warmup_steps`) unless a checkpoint is resumed, then train as `Trainer` does.

        `resume_from_checkpoint=True` means the newest checkpoint that is whole.

        Raises:
            ValueError: there is none, or the one to resume from was cut short.
            NonFiniteError: a loss, a gradient or a weight is NaN or infinite; no checkpoint has taken it up.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        if self.is_world_process_zero():
            self._keep_hard_negatives_of(resume_from_checkpoint or None)
        if self.args.head_warmup_steps and not resume_from_checkpoint:
            self._warm_up_head()
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.args.head_warmup_steps and self.args.load_best_model_at_end:
            self._restore_warmed_up_if_best()
        return result

    def _whole_checkpoint(self, wanted: str | Literal[True]) -> str:
        processes = self.accelerator.num_processes
        if wanted is True:
            found = newest_whole_checkpoint(self.args.output_dir, processes)
            if found is None:
                raise ValueError(f"output_dir={self.args.output_dir} holds no whole checkpoint to go on from.")
            return str(found)
        if isinstance(wanted, WholeCheckpoint):
            return wanted
        if problem := checkpoint_problem(wanted, processes):
            raise ValueError(f"resume_from_checkpoint={wanted!r}: {problem}. Give one that is whole.")
        return wanted

    def _warm_up_head(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"head_warmup_steps={self.args.head_warmup_steps} needs whole weights in every process: warm up in "
                "a run of its own without FSDP and DeepSpeed, then go on from its checkpoint with head_warmup_steps=0."
            )
        assert self.reader is not None and isinstance(self.train_dataset, PairDataset)
        # Every process does the same: the result is the same, and none could go on without it.
        loss = warm_up_head(
            self.model,
            self.reader,
            self.train_dataset.pairs,
            self.warmup_groups(),
            steps=self.args.head_warmup_steps,
            visual_loss_weight=self.args.visual_loss_weight,
            seed=self.args.seed,
            dims=self.args.dims,
            batch_size=self.args.per_device_eval_batch_size,
            autocast=self.accelerator.autocast,
            show_progress_bar=self.is_world_process_zero() and not self.args.disable_tqdm,
        )
        self.log({"warmup_loss": loss})
        if self.args.load_best_model_at_end:
            # A candidate for the best model, too, although `Trainer` saves none before the first step.
            metric = self.evaluate()[self._best_metric_name]
            logger.info("After the warm-up: %s %.4f", self._best_metric_name, metric)
            if self.is_world_process_zero():
                Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
                trained = {name: p.detach().contiguous() for name, p in self._trained_parameters().items()}
                save_file(trained, self._warmed_up_file, metadata={self._best_metric_name: repr(metric)})
            self.accelerator.wait_for_everyone()

    def _restore_warmed_up_if_best(self) -> None:
        """Take the model back as it was after the warm-up if no checkpoint was better by `metric_for_best_model`."""
        better: list[tuple[float, dict[str, Tensor]] | None] = [None]
        # The main process alone has the file. None: a finished run that is resumed for more steps.
        if self.is_world_process_zero() and self._warmed_up_file.exists():
            with safe_open(self._warmed_up_file, "pt") as saved:
                metric, best = float(saved.metadata()[self._best_metric_name]), self.state.best_metric
                if best is None or (metric > best if self.args.greater_is_better else metric < best):
                    better = [(metric, {name: saved.get_tensor(name) for name in self._trained_parameters()})]
            self._warmed_up_file.unlink()
        broadcast_object_list(better)
        if better[0] is None:
            return
        metric, tensors = better[0]
        with torch.no_grad():
            for name, parameter in self._trained_parameters().items():
                parameter.copy_(tensors[name])
        self.state.best_metric, self.state.best_global_step = metric, 0
        self.state.best_model_checkpoint = None
        logger.warning(
            "No checkpoint is better than the warmed-up model (%s %.4f): it is taken back.",
            self._best_metric_name,
            metric,
        )

    def _keep_hard_negatives_of(self, checkpoint: str | None) -> None:
        """Leave in the output folder what was mined for the checkpoint's epoch, and no more: another run, or the part
        of this one that is given up, has other models."""
        wanted: Path | None = None
        if checkpoint is not None and self.args.hard_negatives and (epoch := _epoch_of(checkpoint)) % 1:
            wanted = self._hard_negatives_file(math.floor(epoch))
            source = Path(checkpoint).parent / wanted.relative_to(self.args.output_dir)
            if not source.exists():
                logger.warning(
                    "%s is missing, with the hard negatives that the checkpoint's epoch began with: they are mined "
                    "anew, by the model of the checkpoint, and the run is not the one that was interrupted.",
                    source,
                )
                wanted = None
            elif source.resolve() != wanted.resolve():
                write_hard_negatives(wanted, np.load(source))
        for file in self._hard_negatives_folder.glob("*.npy"):
            if file != wanted:
                file.unlink()

    @property
    def _hard_negatives_folder(self) -> Path:
        return Path(self.args.output_dir) / "hard_negatives"

    def _hard_negatives_file(self, epoch: int) -> Path:
        settings = f"pool-{self.args.hard_negative_pool}-max-{self.args.max_negative_similarity}"
        return self._hard_negatives_folder / f"epoch-{epoch}-{settings}.npy"

    @property
    def _warmed_up_file(self) -> Path:
        return Path(self.args.output_dir) / "warmed_up.safetensors"

    @property
    def _best_metric_name(self) -> str:
        return f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def get_train_dataloader(self) -> DataLoader:
        """Planned batches, of which each process loads its share.

        The plans are the same whatever the number of processes, and `accelerate` must not divide them once more.
        """
        args, dataset, share = self.args, self.train_dataset, world()
        if dataset is None or self.reader is None:
            raise ValueError("train_dataset=None: pass the pairs to train on.")
        assert isinstance(dataset, PairDataset)
        groups, log_q = self._image_groups(), None
        if args.logq_correction:
            batch = min(args.per_device_train_batch_size * share[1], len(dataset))
            log_q = drawn_log_probability(dataset.related.degrees, batch, len(dataset))
        planner = BatchPlanner(
            dataset.pairs,
            dataset.related,
            args.batch_options(share[1]),
            self._mine_hard_negatives if args.hard_negatives else None,
        )
        collator = PlanCollator(self.reader, dataset.related, share, args.mini_batch_size, groups, log_q)
        loader: DataLoader = DataLoader(
            PlanDataset(planner),
            batch_sampler=planner,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator(),  # the workers' seeds, which nothing depends on, are not drawn from the run's
        )
        return prepare_data_loader(
            loader, device=args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def _image_groups(self) -> np.ndarray | None:
        """For each training note the number of its cover image, where notes with one cover are to be no negatives."""
        if not self.args.mask_same_image:
            return None
        if self._groups is None:
            assert isinstance(self.train_dataset, PairDataset)
            notes, show_progress_bar = self.train_dataset.notes, not self.args.disable_tqdm
            self._groups = image_groups(notes, self.model.processor, show_progress_bar=show_progress_bar)
        return self._groups

    def _mine_hard_negatives(self, epoch: int) -> np.ndarray:
        """The hard negatives of an epoch. A file keeps them, as a resumed epoch has to go on with the same."""
        assert self.reader is not None and isinstance(self.train_dataset, PairDataset)
        file = self._hard_negatives_file(epoch)
        is_main = self.is_world_process_zero()
        kept: list[np.ndarray | None] = [np.load(file) if is_main and file.exists() else None]
        broadcast_object_list(kept)
        if kept[0] is not None:
            return kept[0]
        found = mine_hard_negatives(
            self.model,
            self.reader,
            self.train_dataset.related,
            self.args.hard_negative_pool,
            self.args.max_negative_similarity,
            self._image_groups(),
            batch_size=self.args.per_device_eval_batch_size,
            autocast=self.accelerator.autocast,
            show_progress_bar=is_main and not self.args.disable_tqdm,
        )
        if is_main:
            write_hard_negatives(file, found)
            kept_epochs = {epoch}
            for checkpoint in Path(self.args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
                if has_readable_state(checkpoint.parent):  # one without is passed over, and stays
                    kept_epochs.add(math.floor(_epoch_of(checkpoint.parent)))
            for other in self._hard_negatives_folder.glob("*.npy"):
                if other not in {self._hard_negatives_file(number) for number in kept_epochs}:
                    other.unlink()  # no checkpoint goes on with it
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """`joint_loss` of a planned batch, over the notes of all processes.

        `inputs` is what `PlanCollator` returns. The value is W times this process's share of the loss: its mean over
        the W processes, which is what gradients are averaged to, is the loss. With `return_outputs` the parts of the
        loss are returned, too.
        """
        parts: dict[str, Tensor] = {}
        mini_batches = inputs["mini_batches"]

        def encode(mini_batch: dict[str, Tensor]) -> EncodedRows:
            return self._encode(model, mini_batch)

        def loss_of(rows: Tensor, logit_scale: Tensor) -> Tensor:
            has_image = torch.cat([mini_batch["has_image"] for mini_batch in mini_batches])
            loss, found = self._loss_of_rows(rows, logit_scale, inputs["places"], has_image, inputs["targets"])
            parts.update(found)
            return loss

        if self.args.mini_batch_size is not None and self.args.gradcache:
            loss = cached_loss(encode, mini_batches, loss_of, inputs["passes"], self._no_sync(model))
        else:
            loss = loss_of(*self._encode_all(model, mini_batches))
        if model.training:
            self._latest_parts = {name: value.detach() for name, value in parts.items()}
            for name, value in {**parts, "bad_images": torch.tensor(inputs["bad_images"])}.items():
                total, count = self._parts.get(name, (0.0, 0))
                self._parts[name] = (total + value.detach().float(), count + 1)  # read when logged: a GPU need not wait
        return (loss, parts) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """`Trainer`'s, which ends a run whose loss or gradients are not finite before the optimizer sees them.

        What overflows in fp16 when the loss is scaled up for it is no failure: the scaler skips that step. DeepSpeed
        keeps the gradients to itself, and only the loss is looked at.

        Raises:
            NonFiniteError: says which; in all processes where one of them finds it.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        place = f"step {self.state.global_step + 1}"
        is_whole = self.accelerator.sync_gradients  # of the last batch that gradients are accumulated over
        with refused_by_all(loss.device):
            refuse_non_finite_loss(loss, self._latest_parts, place)
            if is_whole and self.accelerator.scaler is None and not self.is_deepspeed_enabled:
                # A pass of its own: `Trainer` computes the norm after this and shows it to no callback before the
                # optimizer's step, and clipping by a norm that is NaN has spoiled the gradients by then.
                refuse_non_finite_gradients(self.model.named_parameters(), place)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer`'s, which saves no weight that is not finite.

        Raises:
            NonFiniteError: there is one.
        """
        # Of a model that FSDP has sharded each process has a part, and all of them save; else all have the same.
        with refused_by_all(self.args.device) if self.is_fsdp_enabled else nullcontext():
            refuse_non_finite_weights(self.model.named_parameters(), f"step {self.state.global_step}")
        super().save_model(output_dir, _internal_call)

    def _encode_all(self, model: nn.Module, mini_batches: Sequence[dict[str, Tensor]]) -> EncodedRows:
        # DDP allows one forward pass a backward pass, and hears of the other passes' gradients all the same: they add
        # up before they reach a weight.
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        encoded = [self._encode(inner, mini_batch) for mini_batch in mini_batches[:-1]]
        encoded.append(self._encode(model, mini_batches[-1]))
        return EncodedRows(torch.cat([rows for rows, _scale in encoded]), encoded[-1].logit_scale)

    def _encode(self, model: nn.Module, mini_batch: dict[str, Tensor]) -> EncodedRows:
        """(B, D or 2D, + 1): n_m, n_v where the prompt gives one, and the fusion weight, which takes no gradient."""
        tensors = dict(mini_batch)
        if "feature_rows" in tensors:
            assert self.reader is not None and self.reader.features is not None
            features = self.reader.features.stack(tensors.pop("feature_rows").tolist())
            tensors |= send_to_device(features, self.args.device)
        output: NoteLLM2Output = model(**tensors)
        assert output.note_embeds is not None and output.logit_scale is not None
        columns = [output.note_embeds]
        if self._has_visual:
            visual = output.visual_embeds
            columns.append(torch.zeros_like(output.note_embeds) if visual is None else visual)
        weight = output.note_embeds.new_zeros(len(output.note_embeds), 1)
        if output.fusion_weight is not None:
            weight = output.fusion_weight.detach().mean(1, keepdim=True).to(weight.dtype)
        return EncodedRows(torch.cat([*columns, weight], dim=1), output.logit_scale)

    def _loss_of_rows(
        self, rows: Tensor, logit_scale: Tensor, places: Tensor, has_image: Tensor, targets: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rank, processes = world()
        everyone = gather_rows(rows)
        places, images = gather_rows(torch.stack([places, has_image.long()], dim=1)).T
        # In the order of the plan, without the notes that could not be read.
        row_of = torch.full_like(targets["groups"], -1)
        row_of[places[places >= 0]] = (places >= 0).nonzero().flatten()
        kept = row_of >= 0
        order = row_of[kept]
        embeds, has_image = everyone[order], images[order].bool()
        log_q = None if targets["log_q"] is None else torch.as_tensor(targets["log_q"], device=rows.device)
        width, chosen = self._embedding_dim, ContrastiveTargets(**{**targets, "log_q": log_q}).select(kept)
        loss, parts = joint_loss(
            embeds[:, :width],
            embeds[:, width : 2 * width] if self._has_visual else None,
            logit_scale,
            has_image,
            chosen,
            self.args.visual_loss_weight,
            self.args.dims,
            share=(rank, processes),
            tile_size=self.args.loss_tile_size,
        )
        parts = {name: value * processes for name, value in parts.items()}
        parts["temperature"] = 1.0 / logit_scale
        if self.model.late_fusion is not None and bool(has_image.any()):
            parts["fusion_weight"] = embeds[has_image, -1].mean()
        parts["notes_per_step"] = kept.sum().float()
        parts["pairs_per_note"] = torch.tensor(len(chosen.positives) / 2 / max(len(order), 1))
        return loss * processes, parts

    def _no_sync(self, model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        # DDP's, also below a compiled model. FSDP2 has none: it shares gradients in every mini-batch, as unshared ones
        # would be as large as the whole model.
        no_sync: Callable[[], AbstractContextManager[None]] = getattr(model, "no_sync", nullcontext)
        return no_sync

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The sum over the mini-batches of a planned batch, as `Trainer` estimates each."""
        return sum(super(NoteLLM2Trainer, self).floating_point_ops(part) for part in inputs["mini_batches"])

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Embed single notes: (no loss, embeddings (B, D), positions (B,))."""
        tensors = dict(inputs)
        note_index = tensors.pop("note_index")
        with torch.no_grad(), self.compute_loss_context_manager():
            return None, model(**tensors).note_embeds, note_index

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, the temperature, the mean fusion weight, the size of the batches and the number of
        notes whose image could not be read to the training logs."""
        if "loss" in logs:
            names = sorted(self._parts)
            means = torch.tensor([float(self._parts[name][0]) / self._parts[name][1] for name in names])
            means = means.to(self.args.device)
            means = self.accelerator.reduce(means, "mean")
            logs |= dict(zip(names, means.tolist(), strict=True))
            if "bad_images" in logs:  # how many, not how many a step and process
                times = self._parts["bad_images"][1] * self.accelerator.num_processes
                logs["bad_images"] = float(round(logs["bad_images"] * times))
            self._parts = {}
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Groups of parameters by learning rate (LLM, what comes before it, what comes after it) and weight decay."""
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args)
            groups = self.parameter_groups(self.model if model is None else model)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Groups for the optimizer: what trains, split by `part` (llm, connector, head) and by weight decay."""
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # Decay would pull a temperature and a token's embedding to zero, which means nothing for them.
                scale_or_token = name.endswith(("logit_scale", "image_embedding", "query_tokens"))
                decay = name in decayed and not scale_or_token
                groups.setdefault((_part_of(name, self.model.parts), decay), []).append(parameter)
        rates = {
            "llm": self.args.learning_rate,
            "connector": self.args.connector_learning_rate,
            "head": self.args.head_learning_rate,
        }
        return [
            {
                "part": part,
                "params": parameters,
                "lr": self.args.learning_rate if rates[part] is None else rates[part],
                "weight_decay": self.args.weight_decay if decay else 0.0,
            }
            for (part, decay), parameters in groups.items()
        ]

    def warmup_groups(self) -> list[dict[str, Any]]:
        """`parameter_groups` of what the head's warm-up trains, at its rate."""
        groups = [group for group in self.parameter_groups(self.model) if group["part"] == "head"]
        if self.args.head_warmup_learning_rate is not None:
            groups = [group | {"lr": self.args.head_warmup_learning_rate} for group in groups]
        return groups


def _check_fsdp_plugin(plugin: Any, model: NoteLLM2PreTrainedModel) -> None:
    """Raises ValueError for what `accelerate` can shard by, and this model cannot be sharded by."""
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError("FSDP 1 renames parameters and is not supported: set fsdp_version: 2.")
    policy = plugin.auto_wrap_policy
    policy = getattr(policy, "func", policy)
    of_llm = set(model.language_model.modules())
    layers = {type(module).__name__ for module in of_llm}
    others = {type(module).__name__ for module in model.modules() if module not in of_llm}
    wrapped = set(plugin.transformer_cls_names_to_wrap or ())
    by_layer = policy is transformer_auto_wrap_policy and wrapped and wrapped <= layers - others
    if policy is not None and not by_layer:
        # What runs only where there are images would leave processes waiting for each other.
        raise ValueError(
            f"fsdp_auto_wrap_policy={getattr(policy, '__name__', policy)} with fsdp_transformer_layer_cls_to_wrap="
            f"{sorted(wrapped)} may shard what runs only where there are images, and processes would wait for each "
            "other forever: wrap the LLM's layers alone, with TRANSFORMER_BASED_WRAP and "
            f"{', '.join(sorted(name for name in layers - others if name.endswith('Layer'))) or 'their class'}."
        )


def _epoch_of(checkpoint: str | Path) -> float:
    """How many epochs a checkpoint has behind it."""
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).epoch or 0.0


def _part_of(name: str, parts: Mapping[Part, tuple[str, ...]]) -> Part:
    """Which learning rate a parameter has, by its name: the LLM's, of what comes before it, or of what comes after."""
    name = name.removeprefix("module.")
    for part, beginnings in parts.items():
        if name.startswith(beginnings):
            return part
    raise ValueError(f"the parameter {name!r} belongs to no part of the model that has a learning rate: {parts}.")


__all__ = ["NoteLLM2Trainer", "RetrievalEvaluation", "apply_llm_tuning"]
