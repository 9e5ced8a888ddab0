"""Train NoteLLM-2 from notes and views, and say what it learned.

    accelerate launch train/run.py [CONFIG.yaml] [--option value …]

Without arguments: a simulated world, tiny backbones, training and evaluation in under five minutes on two CPU cores.
"""

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset as Table
from transformers import AutoConfig, AutoModel, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from evaluation.metrics import metric_names
from evaluation.report import ReportRow, collect_facts, text_table, write_report
from evaluation.run import evaluate_baselines, evaluate_model
from hub.compose import CompositionArguments, compose
from hub.tiny_backbones import save_tiny_llm, save_tiny_vision_tower
from modeling_notellm2 import NonFiniteError, NoteError, NoteLLM2Config, NoteLLM2Model
from modeling_notellm2.processing_notellm2 import prompt_template
from pairs.ceilings import ceilings
from pairs.command import interruption_said
from pairs.disk import DamagedError, DiskError, alone_in, disk_errors_named
from pairs.simulate import simulate
from pairs.split import SPLITS, NotesAndPairs, load_split, make_splits
from pairs.tables import load_notes, related_indices
from train.arguments import DataArguments, NoteLLM2TrainingArguments, parse_arguments
from train.checkpoints import WholeCheckpoint, checkpoint_problem, newest_whole_checkpoint, was_cut_off
from train.data import NoteDataset, PairDataset, without_bad_images
from train.distributed import said_by_main_process
from train.features import VisionFeatureStore, VisionFeatureTable, fingerprint
from train.trainer import NoteLLM2Trainer

logger = logging.getLogger("train")

WELCOME = """
Saved to {folder}. Use it:

    import {module}
    from transformers import AutoModel

    model = AutoModel.from_pretrained("{folder}")
    embeddings = model.encode([{{"title": "…", "topics": ["…"], "content": "…", "image": "picture.jpg"}}])

{verify}Compare it with cheaper ones:
    python -m evaluation.run --model {folder} --splits {data} --output {folder}/compared
Watch the curves:                 tensorboard --logdir {folder}
Training pairs and test notes are in {data}, the table above is in {folder}/report.
"""


VERIFY = "Check that it stands on its own:  python -m hub.verify {folder}\n"


def welcome(folder: str, data: str) -> str:
    """What to do with the checkpoint in `folder`, trained on the splits in `data`."""
    carries_code = isinstance(AutoConfig.from_pretrained(folder), NoteLLM2Config)
    return WELCOME.format(
        folder=folder,
        data=data,
        module="modeling_notellm2" if carries_code else "evaluation.multimodal_llm",
        verify=VERIFY.format(folder=folder) if carries_code else "",
    )


class UserError(Exception):
    """Something the user gave cannot be used; the message says what, and the command prints no more than that."""


def checkpoint_to_resume(training: NoteLLM2TrainingArguments) -> WholeCheckpoint | None:
    """The checkpoint `--resume_from_checkpoint` means; `last` is the newest one of the output folder, and `auto` is the
    same where there is one: otherwise the run begins anew, and what it holds of cut-off checkpoints is deleted.

    Raises:
        UserError: there is none; or `auto` finds none, but one that was not cut off, whose training would be lost.
    """
    wanted, processes = training.resume_from_checkpoint, PartialState().num_processes
    folder = Path(training.output_dir)
    if wanted is None and folder.is_dir() and get_last_checkpoint(str(folder)) is not None:
        raise UserError(
            f"output_dir={training.output_dir} holds checkpoints of an earlier run, which would mix with this one's: "
            "give --output_dir another folder, go on with --resume_from_checkpoint last, or delete it."
        )
    if wanted == "auto":
        found = newest_whole_checkpoint(folder, processes)
        if found is None:
            _remove_cut_off_checkpoints(folder, processes)
        return None if found is None else WholeCheckpoint(found)
    if wanted == "last":
        found = newest_whole_checkpoint(folder, processes)
        if found is None:
            raise UserError(f"resume_from_checkpoint=last: {folder} holds no whole checkpoint to go on from.")
        return WholeCheckpoint(found)
    if wanted is None:
        return None
    if problem := checkpoint_problem(wanted, processes):
        raise UserError(f"resume_from_checkpoint={wanted!r}: {problem}; give another, or `last`.")
    return WholeCheckpoint(wanted)


def _remove_cut_off_checkpoints(folder: Path, processes: int) -> None:
    """Raises UserError, and deletes nothing, where a checkpoint was not cut off: its training would be lost."""
    # Each process asks for the same, the main one answers.
    checkpoints = said_by_main_process(
        lambda: [path for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) if path.is_dir()]
    )
    cut_off = said_by_main_process(lambda: [path for path in checkpoints if was_cut_off(path)])
    for checkpoint in checkpoints:
        if checkpoint not in cut_off:
            problem = checkpoint_problem(checkpoint, processes)
            raise UserError(
                f"resume_from_checkpoint=auto: {checkpoint} is complete, but one cannot go on from it ({problem}): "
                "mend that, start as many processes as saved it, or delete it or give --output_dir another folder to "
                "begin anew."
            )
    if PartialState().is_main_process:
        for checkpoint in cut_off:
            logger.warning("%s was cut off before it was whole, and is deleted: the run begins anew", checkpoint)
            shutil.rmtree(checkpoint)


def prepare_data(data: DataArguments, folder: Path) -> None:
    """Write train, validation and test notes and pairs into `folder`/data, simulating a world where none is given."""
    notes_file, views_file = data.notes, data.views
    if notes_file is None or views_file is None:
        logger.info("Simulating %d notes, their pictures and their views", data.num_simulated_notes)
        simulate(data.simulation_options).write(folder / "world")
        notes_file, views_file = str(folder / "world" / "notes.jsonl"), str(folder / "world" / "views.csv")
    logger.info("Building related pairs from %s", views_file)
    notes = load_notes(notes_file, data.image_root)
    text = make_splits(notes, views_file, data.pair_options, data.split_options, folder / "data")
    logger.info("%s", text)


def tiny_composition(
    composition: CompositionArguments, notes: Table, folder: Path, state: PartialState
) -> CompositionArguments:
    """The same composition on tiny backbones, with a tokenizer trained on `notes` in their prompt."""
    template = prompt_template("micl", composition.language, composition.template)
    texts = [
        template.replace("{title}", note["title"])
        .replace("{topics}", ", ".join(note["topics"]))
        .replace("{content}", note["content"])
        for note in notes
    ]
    llm, vision = folder / "llm", folder / "vision"
    if state.is_main_process:
        save_tiny_llm(texts, llm)
        save_tiny_vision_tower(vision)
    state.wait_for_everyone()
    # A tower that was asked for stays, and so does an empty one: the text-only model.
    return replace(composition, llm=str(llm), vision=str(vision) if composition.vision is None else composition.vision)


def related_of(split: NotesAndPairs) -> list[np.ndarray]:
    """For each note of a split the positions of its related notes."""
    return related_indices(list(split.notes["note_id"]), split.pairs)


def ceiling_rows(notes: Table, related: Sequence[np.ndarray], ks: Sequence[int]) -> list[ReportRow]:
    """What perfect knowledge of the simulated text, picture or both is expected to reach on simulated notes.

    An expectation over the order of notes that nothing known tells apart: a system may pass it by a little luck.
    """
    best = ceilings(notes["subject"], notes["look"], related, ks)
    return [ReportRow("perfect knowledge", modality, metrics, is_bound=True) for modality, metrics in best.items()]


def _warn_of_bad_image(error: NoteError) -> None:
    logger.warning("%s", error)


def save_settings(folder: Path, arguments: Sequence[Any]) -> None:
    """Record every setting of the run beside its checkpoint."""
    composition, data, training = arguments
    settings = {"composition": asdict(composition), "data": asdict(data), "training": training.to_dict()}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")


def train(
    composition: CompositionArguments, data: DataArguments, training: NoteLLM2TrainingArguments
) -> list[ReportRow]:
    """Run everything: data, model, training, evaluation. Returns the rows of the final table (main process only).

    Raises:
        UserError: something that was given cannot be used; another run is at work in the output folder; a file that
            the run goes on with is damaged; the disk is full; a worker process has ended.
    """
    folder, state = Path(training.output_dir), PartialState()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != state.num_processes:
        raise UserError(
            f"{started} processes were started and do not know of each other: each would train alone, into one folder. "
            "On processors add --use_cpu true."
        )
    with ExitStack() as held:

        def take_folder() -> str | None:
            try:
                held.enter_context(alone_in(folder))
            except (ValueError, OSError) as error:
                return f"output_dir={error}"
            return None

        if problem := said_by_main_process(take_folder):
            raise UserError(problem)
        try:
            with disk_errors_named(folder):
                return _train(composition, data, training)
        except (DamagedError, DiskError) as error:
            raise UserError(str(error)) from error


def _train(
    composition: CompositionArguments, data: DataArguments, training: NoteLLM2TrainingArguments
) -> list[ReportRow]:
    """`train` in a folder that this run has for itself."""
    folder, state = Path(training.output_dir), PartialState()
    resume_from = checkpoint_to_resume(training)
    if resume_from is not None:
        logger.info("Going on from %s", resume_from)
    if state.device.type == "cpu":  # accelerate launches with one thread a process
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // state.num_processes))
    # Under ZeRO-3 transformers would divide each model while it is built, in which all processes have to take part; the
    # tower's store and the tables need whole ones. The model is divided when training begins.
    unset_hf_deepspeed_config()
    set_seed(training.seed)
    simulated = data.notes is None and data.splits is None
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if data.splits is None:
                prepare_data(data, folder)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
    state.wait_for_everyone()
    try:
        splits = {name: load_split(data.splits or folder / "data", name) for name in SPLITS}
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    test, test_related = splits["test"], related_of(splits["test"])

    if simulated and not (composition.llm or composition.model or composition.multimodal_llm):
        composition = tiny_composition(composition, splits["train"].notes, folder / "backbones", state)
    parts = f"{composition.llm} and {composition.vision or 'no vision tower'}"
    logger.info("Loading %s", composition.model or composition.multimodal_llm or parts)
    try:
        model = compose(composition)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    features: dict[str, VisionFeatureTable | None] = dict.fromkeys(SPLITS)
    store: VisionFeatureStore | None = None
    if training.vision_features == "store" and model.config.has_vision:
        if not isinstance(model, NoteLLM2Model):
            raise UserError(
                "vision_features=store: a multimodal LLM sees each image in its own size, and what its tower says is "
                "not kept; set vision_features to recompute."
            )
        on_error = None if training.bad_images == "raise" else _warn_of_bad_image
        store_folder = training.vision_features_dir or str(folder / "vision_features")
        try:
            assert model.vision_tower is not None
            model.vision_tower.to(training.device)  # alone: the LLM may be larger than one device
            store = VisionFeatureStore(store_folder, model)
            features = {
                name: store.table(splits[name].notes, training.per_device_eval_batch_size, on_error)
                for name in features
            }
        except NoteError as error:
            raise UserError(f"{error} (bad_images={training.bad_images})") from error
        except OSError as error:
            raise UserError(f"vision_features_dir={store_folder!r}: {error}") from error
        except ValueError as error:
            raise UserError(str(error)) from error
    try:
        train_dataset = PairDataset(*splits["train"], features["train"])
        trainer = NoteLLM2Trainer(
            model=model,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=NoteDataset(splits["validation"].notes, features["validation"]),
            eval_related=related_of(splits["validation"]),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if state.is_main_process:
        save_settings(folder, (composition, data, training))

    rows: list[ReportRow] = []
    if state.is_main_process:
        notes, ks = list(test.notes), training.eval_ks
        if training.bad_images != "raise" and model.config.has_vision:
            notes, bad = without_bad_images(notes)
            if bad:
                logger.warning(
                    "%d test notes have an image that cannot be read: their text alone is measured.", len(bad)
                )
        logger.info("Measuring baselines on %d test notes", len(notes))
        rows += evaluate_baselines(notes, test_related, ["chance", "bm25"], ks=ks)
        if simulated:
            rows += ceiling_rows(test.notes, test_related, ks)
        batch_size = training.per_device_eval_batch_size
        if training.eval_untrained:
            rows += evaluate_model(
                model,
                notes,
                test_related,
                name="untrained",
                ks=ks,
                batch_size=batch_size,
                vision_features=features["test"],
                composition=asdict(composition),
            )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "Processes: %d (%s); a batch of all of them: %d pairs, or twice as many notes (batches=%s)",
        state.num_processes,
        trainer.accelerator.distributed_type.value,
        training.per_device_train_batch_size * state.num_processes,
        training.batches,
    )
    logger.info(
        "Training %d of %d parameters (LLM: %s) on %d unordered pairs of %d notes",
        trainable,
        model.num_parameters(),
        training.llm_tuning,
        len(train_dataset),
        len(splits["train"].notes),
    )
    try:
        result = trainer.train(resume_from_checkpoint=resume_from)
    except NoteError as error:
        raise UserError(f"{error} (bad_images={training.bad_images})") from error
    except NonFiniteError as error:
        raise UserError(f"{error} (output_dir={training.output_dir})") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # PyTorch has no kind of its own for it
            raise
        raise UserError(
            f"dataloader_num_workers={training.dataloader_num_workers}: one of them has ended "
            f"({str(error).partition(chr(10))[0]}): often memory is short; use fewer, or 0, and go on with "
            "--resume_from_checkpoint last."
        ) from error
    except UnpicklingError as error:  # transformers lets PyTorch load tensors and numbers alone
        raise UserError(
            f"resume_from_checkpoint={resume_from!r} holds something else than tensors and numbers, and none of it was "
            f"run ({str(error).splitlines()[0]}): give a checkpoint that this package wrote."
        ) from error
    trainer.save_model()
    trainer.save_state()
    # Of the model that is delivered, which need not be the last one that was validated.
    validation = trainer.evaluate() if any(map(len, related_of(splits["validation"]))) else {}

    unset_hf_deepspeed_config()  # training has set it again, and now one process loads a model
    if state.is_main_process:
        saved = AutoModel.from_pretrained(folder).to(model.device)  # what was saved is what is measured
        if store is not None and fingerprint(saved) != store.fingerprint:  # DeepSpeed saves a tower in 16 bits
            logger.info("The saved vision tower is not to the bit the one of the store: it is run.")
            features["test"] = None
        rows += evaluate_model(
            saved,
            notes,
            test_related,
            name="trained",
            ks=ks,
            batch_size=batch_size,
            vision_features=features["test"],
            composition=asdict(composition),
        )
        facts = collect_facts(
            test_notes=len(notes),
            test_queries=sum(map(bool, map(len, test_related))),
            train_notes=len(splits["train"].notes),
            train_pairs=len(train_dataset),
            head_warmup_steps=training.head_warmup_steps,
            steps=trainer.state.global_step,
            train_seconds=round(result.metrics["train_runtime"], 1),
            best_step=trainer.state.best_global_step,
            temperature=round(saved.temperature, 4),
            seed=training.seed,
            threads=torch.get_num_threads(),
            **{
                f"validation_{metric}": round(validation[f"eval_{metric}"], 4)
                for metric in metric_names(ks)
                if f"eval_{metric}" in validation
            },
        )
        write_report(folder / "report", rows, facts)
    return rows


@interruption_said(
    "the checkpoints are kept; the same command with --resume_from_checkpoint auto goes on from the last one, or "
    "begins anew where there is none."
)
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    arguments = parse_arguments(argv)
    state = PartialState()
    logging.basicConfig(level=logging.INFO if state.is_main_process else logging.WARNING, format="%(message)s")
    disable_progress_bar()  # transformers' own, of loading and saving; the ones that matter stay
    for noisy in ("httpx", "bm25s", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        rows = train(*arguments)
    except UserError as error:
        sys.exit(f"{error}")
    if state.is_main_process:
        sys.stdout.write("\nTest notes and their pairs, which training has not seen:\n\n" + text_table(rows))
        folder = arguments[2].output_dir
        sys.stdout.write(welcome(folder, arguments[1].splits or f"{folder}/data"))


if __name__ == "__main__":
    main()
