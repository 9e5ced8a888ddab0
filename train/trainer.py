"""`NoteLLM2Trainer`: `transformers.Trainer` with the contrastive loss, retrieval metrics and a learning rate a part.

Only public hooks are overridden. Losses see embeddings and ids, models see tensors; the trainer, with its warm-up, sees
all.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import TrainOutput

from evaluation.metrics import retrieval_metrics
from modeling_notellm2 import NoteLLM2Model, NoteLLM2Output
from train.arguments import NoteLLM2TrainingArguments
from train.data import NoteCollator, NoteDataset, PairDataset
from train.losses import RelatedNotes, false_negative_mask, joint_loss
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


def apply_llm_tuning(model: NoteLLM2Model, arguments: NoteLLM2TrainingArguments) -> None:
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


class NoteLLM2Trainer(Trainer):
    """Trains a [`NoteLLM2Model`] on pairs of related notes.

    Args:
        model: the model; its LLM is frozen or adapted as `args.llm_tuning` says.
        args: settings.
        train_dataset: pairs of related notes.
        eval_dataset: notes to encode during training.
        eval_related: for each of them the positions of its related notes.
        kwargs: further arguments of `Trainer` (`callbacks`, `optimizers`, …).

    Raises:
        ValueError: `args.head_warmup_steps` is set and the model has nothing to warm up.
    """

    model: NoteLLM2Model
    args: NoteLLM2TrainingArguments

    def __init__(
        self,
        model: NoteLLM2Model,
        args: NoteLLM2TrainingArguments,
        train_dataset: PairDataset | None = None,
        eval_dataset: NoteDataset | None = None,
        eval_related: Sequence[np.ndarray] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.head_warmup_steps and model.config.embedding_dim is None and model.late_fusion is None:
            raise ValueError(
                f"head_warmup_steps={args.head_warmup_steps}: the model has neither a head (embedding_dim) nor late "
                "fusion, so there is nothing to warm up; set it to 0."
            )
        apply_llm_tuning(model, args)
        if eval_related is not None:
            kwargs["compute_metrics"] = RetrievalEvaluation(eval_related, args.eval_ks)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=NoteCollator(model.processor),
            processing_class=model.processor,
            **kwargs,
        )
        self.related: RelatedNotes | None = None if train_dataset is None else train_dataset.related
        self._parts: dict[str, list[float]] = {}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Warm up the head (`args.head_warmup_steps`) unless a checkpoint is resumed, then train as `Trainer` does."""
        if self.args.head_warmup_steps and not resume_from_checkpoint:
            self._warm_up_head()
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.args.head_warmup_steps and self.args.load_best_model_at_end:
            self._restore_warmed_up_if_best()
        return result

    def _warm_up_head(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"head_warmup_steps={self.args.head_warmup_steps} needs whole weights in every process: warm up in "
                "a run of its own without FSDP and DeepSpeed, then go on from its checkpoint with head_warmup_steps=0."
            )
        assert isinstance(self.train_dataset, PairDataset)
        # Every process does the same: the result is the same, and none could go on without it.
        loss = warm_up_head(
            self.model,
            self.train_dataset,
            [group for group in self.parameter_groups(self.model) if group["part"] == "head"],
            steps=self.args.head_warmup_steps,
            visual_loss_weight=self.args.visual_loss_weight,
            seed=self.args.seed,
            batch_size=self.args.per_device_eval_batch_size,
            autocast=self.accelerator.autocast,
            show_progress_bar=self.is_world_process_zero() and not self.args.disable_tqdm,
        )
        self.log({"warmup_loss": loss})
        if self.args.load_best_model_at_end:
            # A candidate for the best model, too, although `Trainer` saves none before the first step.
            metric = self.evaluate()[self._best_metric_name]
            if self.is_world_process_zero():
                Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
                trained = {name: p.detach().contiguous() for name, p in self._trained_parameters().items()}
                save_file(trained, self._warmed_up_file, metadata={self._best_metric_name: repr(metric)})
            self.accelerator.wait_for_everyone()

    def _restore_warmed_up_if_best(self) -> None:
        """Take the model back as it was after the warm-up if no checkpoint was better by `metric_for_best_model`."""
        if not self._warmed_up_file.exists():  # a finished run that is resumed for more steps
            return
        with safe_open(self._warmed_up_file, "pt") as saved:
            metric, best = float(saved.metadata()[self._best_metric_name]), self.state.best_metric
            if best is None or (metric > best if self.args.greater_is_better else metric < best):
                with torch.no_grad():
                    for name, parameter in self._trained_parameters().items():
                        parameter.copy_(saved.get_tensor(name))
                self.state.best_metric, self.state.best_global_step = metric, 0
                self.state.best_model_checkpoint = None
                logger.warning(
                    "No checkpoint is better than the warmed-up model (%s %.4f): it is taken back.",
                    self._best_metric_name,
                    metric,
                )
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self._warmed_up_file.unlink()

    @property
    def _warmed_up_file(self) -> Path:
        return Path(self.args.output_dir) / "warmed_up.safetensors"

    @property
    def _best_metric_name(self) -> str:
        return f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, NoteLLM2Output]:
        """`joint_loss` of a batch of pairs.

        `inputs` holds 2N notes, the first ones of N pairs and then their partners, and `note_index` (2N,).
        """
        tensors = dict(inputs)
        note_index = tensors.pop("note_index")
        output: NoteLLM2Output = model(**tensors)
        has_image = tensors["has_image"]
        masked = false_negative_mask(note_index, self.related)
        assert output.note_embeds is not None and output.logit_scale is not None
        loss, parts = joint_loss(
            output.note_embeds,
            output.visual_embeds,
            output.logit_scale,
            has_image,
            masked,
            self.args.visual_loss_weight,
        )
        parts["temperature"] = 1.0 / output.logit_scale
        if output.fusion_weight is not None and bool(has_image.any()):
            parts["fusion_weight"] = output.fusion_weight[has_image].mean()
        if model.training:
            for name, value in parts.items():
                self._parts.setdefault(name, []).append(value.detach().item())
        return (loss, output) if return_outputs else loss

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
        """Add the parts of the loss, the temperature and the mean fusion weight to the training logs."""
        if "loss" in logs:
            logs |= {name: float(np.mean(values)) for name, values in self._parts.items()}
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
                groups.setdefault((_part_of(name), decay), []).append(parameter)
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


def _part_of(name: str) -> Literal["llm", "connector", "head"]:
    """Which learning rate a parameter has, by its name: the LLM's, of what comes before it, or of what comes after."""
    name = name.removeprefix("module.")
    if name.startswith(("language_model.", "vision_tower.")):
        return "llm"
    if name.startswith("connector.") or name == "image_embedding":
        return "connector"
    if name.startswith(("late_fusion.", "head.")) or name == "logit_scale":
        return "head"
    raise ValueError(f"the parameter {name!r} belongs to no part of NoteLLM2Model that has a learning rate.")


__all__ = ["NoteLLM2Trainer", "RetrievalEvaluation", "apply_llm_tuning"]
