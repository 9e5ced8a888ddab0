"""Write a checkpoint as the folder that goes to the Hub.

    python -m hub.export CHECKPOINT DIR [--keep-lora] [--license apache-2.0] [--base-model ID ID] [--run RUN] …

    DIR/model*.safetensors, config.json, processor_config.json, tokenizer*   what AutoModel loads
    DIR/*.py                                                                  its code, flat
    DIR/modules.json, config_sentence_transformers.json                       what SentenceTransformer loads
    DIR/README.md                                                             the model card
    DIR/training/settings.yaml, report.json                                   the training's settings and figures
    DIR/evaluation/report.json                                                the figures of an evaluation.run
    DIR/provenance.json                                                       commit and versions of the export
    DIR/verification.json                                                     notes and their embeddings
    DIR/checksums.sha256                                                      all other files

The folder is written beside its place and renamed when it is whole. Of what the run recorded, only what is known to
say nothing of its machine (folders, accounts, credentials) goes with it.
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import snapshot_download
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils.logging import disable_progress_bar

import modeling_notellm2
from evaluation.checkpoints import load_model
from evaluation.report import collect_facts
from hub.card import TINY_BACKBONES, CardOptions, model_card, uses_simulated_data
from hub.compose import save_checkpoint
from hub.private import PrivateError, refuse_private
from hub.verify import CHECKSUMS, folder_files, is_export, sha256, write_checksums, write_record
from modeling_notellm2 import NoteLLM2Model, __version__
from pairs.command import CommandParser, interruption_said
from pairs.disk import DiskError, new_folder

logger = logging.getLogger("hub.export")

SENTENCE_TRANSFORMER_CODE = "sentence_transformer_notellm2"
SENTENCE_TRANSFORMER_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{SENTENCE_TRANSFORMER_CODE}.NoteLLM2Module"}
]
# Without the versions that sentence-transformers writes there: it warns of any that is newer than the reader's own.
SENTENCE_TRANSFORMER_CONFIG = {
    "model_type": "SentenceTransformer",
    "prompts": {"query": "", "document": ""},
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}

# What is published of a run: no other setting, fact or column. A name that is missing here costs the card a line; one
# too many could publish a password.
PUBLIC_SETTINGS: Mapping[str, frozenset[str]] = {
    "composition": frozenset(
        """
        model llm vision multimodal_llm max_image_pixels num_text_layers prompt language template connector
        num_visual_tokens qformer_layers qformer_hidden_size standardize_states late_fusion late_fusion_initial_weight
        late_fusion_normalize embedding_dim initial_temperature learnable_temperature max_title_tokens
        max_topics_tokens max_content_tokens composition_seed
        """.split()
    ),
    "data": frozenset(
        """
        notes image_root views splits num_simulated_notes num_simulated_subjects num_simulated_looks pair_window_days
        pair_direction pair_score pair_min_score pair_max_score pair_min_count pair_min_note_users pair_top_k
        pair_max_as_related split_by validation_share test_share validation_days test_days split_seed
        """.split()
    ),
    "training": frozenset(
        """
        llm_tuning lora_rank lora_alpha lora_dropout lora_target_modules visual_loss_weight connector_learning_rate
        head_learning_rate head_warmup_learning_rate head_warmup_steps batches neighborhood_size mini_batch_size
        gradcache loss_tile_size mask_same_image logq_correction hard_negatives hard_negative_pool
        max_negative_similarity text_dropout image_dropout matryoshka_dims bad_images vision_features eval_untrained
        eval_ks per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs
        max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1
        adam_beta2 adam_epsilon max_grad_norm bf16 fp16 tf32 gradient_checkpointing neftune_noise_alpha eval_strategy
        eval_steps save_strategy save_steps load_best_model_at_end metric_for_best_model greater_is_better seed
        data_seed full_determinism
        """.split()
    ),
}
_PLACES = frozenset({"model", "llm", "vision", "multimodal_llm", "notes", "image_root", "views", "splits"})
_PUBLIC_FACTS = frozenset(
    """
    commit time versions notes queries protocol dtype seed test_notes test_queries train_notes train_pairs
    head_warmup_steps steps train_seconds best_step temperature threads
    """.split()
)
# Of a run's facts those that hold from its first step on.
_FACTS_OF_ANY_STEP = frozenset(
    "commit versions hardware seed threads train_notes train_pairs head_warmup_steps".split()
)
_WORD = re.compile(r"[\w@.:+-]{1,64}")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ExportError(RuntimeError):
    """The checkpoint, the run or the place to write to cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """What a training or evaluation left behind, as far as it may be published.

    Args:
        settings: `settings.yaml` of `train/run.py`.
        training: facts and rows of its `report.json`.
        evaluation: facts and rows of the `report.json` of an `evaluation.run`.
    """

    settings: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None


def read_run(folder: str | os.PathLike) -> Run:
    """Read the settings and the reports in an output folder of `train/run.py` or `evaluation.run`, or in an export, any
    of which may be missing: those settings, facts and figures that may be published.

    Raises:
        ExportError: a file of theirs cannot be read.
    """
    root = Path(folder)
    if is_export(root):
        settings_file, report_files = root / "training" / "settings.yaml", [root / "training", root / "evaluation"]
    else:
        settings_file, report_files = root / "settings.yaml", [root / "report", root]
    settings: dict[str, Any] | None = None
    reports: dict[str, dict[str, Any]] = {}
    try:
        if settings_file.is_file():
            settings = _public_settings(yaml.safe_load(settings_file.read_text(encoding="utf-8")))
        for file in (place / "report.json" for place in report_files):
            if file.is_file():
                content = json.loads(file.read_text(encoding="utf-8"))
                report = {"facts": public_facts(content["facts"]), "rows": list(map(_public_row, content["rows"]))}
                # Only a training makes steps.
                reports.setdefault("training" if "steps" in report["facts"] else "evaluation", report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ExportError(f"run={str(folder)!r}: its settings or report cannot be read ({error!r}).") from error
    return Run(settings, **reports)


def _public_settings(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    output_dir = settings.get("training", {}).get("output_dir")
    if uses_simulated_data(settings) and output_dir is not None:
        made = Path(output_dir) / "backbones"  # where train/run.py makes those of its example
        given = settings.get("composition", {})
        own = {name: TINY_BACKBONES for name in ("llm", "vision") if given.get(name) == str(made / name)}
        settings = {**settings, "composition": {**given, **own}}
    found = {name: _allowed(settings[name], allowed) for name, allowed in PUBLIC_SETTINGS.items() if name in settings}
    return found or None


def public_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of the facts of a report those that may be published: no command, which names files, and may name passwords.

    >>> public_facts({"steps": 7, "command": "train/run.py --notes /home/me/notes.csv", "validation_mrr": 0.5})
    {'steps': 7, 'validation_mrr': 0.5}
    """
    metrics = {name for name, value in facts.items() if name.startswith("validation_") and isinstance(value, float)}
    public = _allowed(facts, _PUBLIC_FACTS | metrics)
    if "hardware" in facts:  # texts of the manufacturers, and numbers
        known = ("cpu", "cores", "load", "gpu")
        public["hardware"] = {name: value for name, value in facts["hardware"].items() if name in known}
    return public


def _public_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "system": public_place(row["system"]),  # named after a folder, if nobody named it
        "modality": row["modality"],
        "is_bound": row.get("is_bound", False),
        **{name: _numbers(row.get(name, {})) for name in ("metrics", "intervals", "details", "cost")},
    }


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if _is_plain(value, words=False)}


def _allowed(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Of `values` those with one of `names`, if they are numbers, words, ids or patterns of module names."""
    found = {}
    for name, value in values.items():
        if name not in names:
            continue
        if name in _PLACES and isinstance(value, str):
            found[name] = public_place(value)
        elif name == "lora_target_modules" or _is_plain(value):
            found[name] = value
    return found


def _is_plain(value: Any, words: bool = True) -> bool:
    """Whether a value is a number, null or, with `words`, a word; or a list or mapping of such."""
    if isinstance(value, Mapping):
        return all(_is_plain(name) and _is_plain(part, words) for name, part in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(part, words) for part in value)
    if isinstance(value, str):
        return words and _WORD.fullmatch(value) is not None
    return value is None or isinstance(value, int | float)


def public_place(text: str) -> str:
    """A folder, file, address or id as it may be published: an id of the Hub, or what looks like one, as it is; of
    anything else the last part alone.

    >>> [public_place(text) for text in ("Qwen/Qwen2.5-0.5B", "/models/SmolLM2/", r"C:\\models\\clip", "~/views.csv")]
    ['Qwen/Qwen2.5-0.5B', 'SmolLM2', 'clip', 'views.csv']
    >>> public_place("/home/some one/my notes.csv"), public_place("s3://key:word@bucket/log/views.csv?signature=x")
    ('my notes.csv', 'views.csv')
    """
    if _ID.fullmatch(text):
        return text
    path = urlsplit(text).path if "://" in text else text
    return PureWindowsPath(path).name.rpartition("@")[2] or "…"  # takes both kinds of slash


def export(
    checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    card: CardOptions | None = None,
    keep_lora: bool = False,
    run: str | os.PathLike | None = None,
) -> None:
    """Write `checkpoint` as a folder to publish.

    Args:
        checkpoint: folder or Hub id of a NoteLLM-2 checkpoint.
        folder: where to; must not exist, or be empty.
        card: what the model card says that the checkpoint does not.
        keep_lora: leave LoRA adapters as they are. By default they are merged into the LLM, so that peft is not needed;
            in 16 bits, merging rounds the weights once more.
        run: folder with the `settings.yaml` and `report.json` of the checkpoint's training, or with the `report.json`
            of an evaluation, whose figures the card then shows. By default what is the checkpoint's own, be that a
            run's output, a `checkpoint-N` in one, or an export. An evaluation joins the checkpoint's own training. A
            training stands in place of all that is the checkpoint's own, but that an evaluation recorded with the same
            training is kept; one that is left out is said.

    Raises:
        ExportError: the checkpoint is no NoteLLM-2 or cannot be loaded, the run cannot be read.
        PrivateError: a file would name a folder of a machine or hold a credential.
        FileExistsError: the place is taken.
        ValueError: the card's options do not fit the run; another run is writing the folder.
        DiskError: the disk is full.
    """
    if run is not None and not Path(run).is_dir():
        raise ExportError(f"run={str(run)!r} is no folder: give the output_dir of a training or an evaluation.")
    target = Path(folder)
    with new_folder(target) as staging:  # before the model is loaded, which takes long
        try:
            model = load_model(checkpoint, "auto", "cpu")
        except (OSError, ValueError) as error:
            raise ExportError(str(error)) from error
        if not isinstance(model, NoteLLM2Model):
            raise ExportError(
                f"checkpoint={str(checkpoint)!r} holds a {type(model).__name__}, which loads with this package alone: "
                "give a NoteLLM-2 checkpoint."
            )
        processor = model.processor  # loaded now, from where the model came from
        lora = None if model.config.lora is None else "kept" if keep_lora else "merged"
        if lora == "merged":
            model.merge_lora()
        found = _find_run(checkpoint, run)
        facts = {"notellm2": __version__, "lora": lora, **public_facts(collect_facts())}
        options = card if card is not None else CardOptions(name=target.name)
        text = str(model_card(model, options, found.settings, found.training, found.evaluation, facts.get("commit")))
        logger.info("Writing %s (LoRA: %s, prompt: %s)", target, lora, processor.prompt)
        save_checkpoint(model, staging)
        del model  # the record loads what was written
        _write_parts(staging, text, facts, found)
        write_record(staging)
        refuse_private(staging, [checkpoint, target.parent, Path.cwd(), Path.home(), *([run] if run else [])])
        write_checksums(staging)
        _open_to_readers(staging)


def _find_run(checkpoint: str | os.PathLike, run: str | os.PathLike | None) -> Run:
    """What `export` publishes of `run` and of what is the checkpoint's own: never parts of two trainings, nor of a
    training and an evaluation of which nothing says that they are of one model."""
    given = read_run(run) if run is not None else Run()
    if run is not None and given == Run():
        raise ExportError(
            f"run={str(run)!r} holds neither settings.yaml nor report.json: leave it out, or name another."
        )
    own = _own_run(checkpoint)
    if given.settings is None and given.training is None:
        return own if given.evaluation is None else replace(own, evaluation=given.evaluation)
    if given.evaluation is None and own.evaluation is not None:
        if (given.settings, given.training) == (own.settings, own.training):
            return own
        logger.warning(
            "The checkpoint's own evaluation is left out: nothing says that it is of the training of run=%r. To "
            "publish it, leave --run out, or give it the evaluation's folder.",
            str(run),
        )
    return given


def _own_run(checkpoint: str | os.PathLike) -> Run:
    own = Path(checkpoint)
    if not own.is_dir():  # an id: transformers fetched what it loads, and not the rest
        try:
            own = Path(snapshot_download(str(checkpoint), allow_patterns=["training/*", "evaluation/*", CHECKSUMS]))
        except (OSError, ValueError) as error:
            raise ExportError(f"checkpoint={str(checkpoint)!r}: its run cannot be fetched: {error}") from error
    found = read_run(own)
    step = own.resolve().name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    if found == Run() and step.isdecimal():
        found = _at_step(read_run(own.resolve().parent), int(step))
    return found


def _at_step(run: Run, step: int) -> Run:
    """What a run says of its checkpoint at `step`: all, if that is the model that the run delivered and measured."""
    facts = {"facts": {}, **(run.training or {})}["facts"]
    keeps_best = (run.settings or {}).get("training", {}).get("load_best_model_at_end", False)
    delivered = facts.get("best_step") if keeps_best and facts.get("best_step") else facts.get("steps")
    if delivered == step or run == Run():
        return run
    if delivered is not None:
        logger.warning(
            "The run's figures are of step %d and say nothing of step %d: measure it with python -m evaluation.run, "
            "and give --run its output.",
            delivered,
            step,
        )
    known = {name: value for name, value in facts.items() if name in _FACTS_OF_ANY_STEP}
    return Run(run.settings, training={"facts": {**known, "steps": step}, "rows": []})


def _write_parts(folder: Path, card: str, facts: Mapping[str, Any], run: Run) -> None:
    code = Path(modeling_notellm2.__file__).with_name(f"{SENTENCE_TRANSFORMER_CODE}.py")
    shutil.copyfile(code, folder / code.name)
    _write_json(folder / "modules.json", SENTENCE_TRANSFORMER_MODULES)
    _write_json(folder / "config_sentence_transformers.json", SENTENCE_TRANSFORMER_CONFIG)
    _write_json(folder / "provenance.json", facts)
    (folder / "README.md").write_text(f"{card}\n", encoding="utf-8")
    for report, name in ((run.training, "training"), (run.evaluation, "evaluation")):
        if report is not None:
            (folder / name).mkdir()
            _write_json(folder / name / "report.json", report)
    if run.settings is not None:
        (folder / "training").mkdir(exist_ok=True)
        text = yaml.safe_dump(run.settings, allow_unicode=True)
        (folder / "training" / "settings.yaml").write_text(text, encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _open_to_readers(folder: Path) -> None:
    """The usual rights: temporary folders, and weights as safetensors writes them, can be read by nobody else."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m hub.export",
        description="Write a checkpoint as the folder that goes to the Hub: weights, code, sentence-transformers' "
        "module, model card, checksums.",
    )
    parser.add_argument("checkpoint", help="folder or Hub id of a NoteLLM-2 checkpoint")
    parser.add_argument("folder", help="where to write it; must not exist, or be empty")
    lora = parser.add_mutually_exclusive_group()
    lora.add_argument(
        "--merge-lora",
        dest="keep_lora",
        action="store_false",
        default=False,  # otherwise True, for both options: this one comes first
        help="merge LoRA adapters into the LLM, so that peft is not needed (the default)",
    )
    lora.add_argument("--keep-lora", action="store_true", help="leave LoRA adapters as they are")
    parser.add_argument(
        "--run",
        help="folder with settings.yaml and report.json (also in report/) of the training that made the checkpoint, or "
        "the report's folder of an evaluation.run, which joins the checkpoint's own training (default: all that is the "
        "checkpoint's own, or of RUN/checkpoint-N that of RUN)",
    )
    parser.add_argument("--name", help="the model's name in its card (default: that of --repo-id, or the folder's)")
    parser.add_argument("--repo-id", metavar="ORG/NAME", help="its id on the Hub, for the examples in the card")
    parser.add_argument(
        "--license", help="license id of the Hub, for instance apache-2.0; mind the backbones' licenses"
    )
    parser.add_argument("--license-name", help="with --license other: its name")
    parser.add_argument("--license-link", help="with --license other: its address")
    parser.add_argument(
        "--base-model",
        nargs="*",
        metavar="ID",
        help="Hub ids of the backbones (default: those that the run's settings name and this machine has from the Hub)",
    )
    parser.add_argument("--datasets", nargs="+", default=[], metavar="ID", help="Hub ids of the data")
    parser.add_argument(
        "--data-name",
        help="what the data is called in the card's figures (default: notes and views, or simulated notes and views)",
    )
    parser.add_argument(
        "--language", nargs="+", default=[], metavar="CODE", help="languages of the notes (ISO 639: en)"
    )
    parser.add_argument(
        "--system", default="trained", help="name of this model's rows in the report (default: trained)"
    )
    parser.add_argument(
        "--code-url",
        metavar="URL",
        help="https address of the Git repository that has modeling_notellm2, for those who would install it",
    )
    return parser


@interruption_said(
    "the folder was not written, or is not whole: hub.verify says; give the same command to begin again."
)
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    disable_progress_bar()
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        card = CardOptions(
            name=arguments.name or (arguments.repo_id or Path(arguments.folder).resolve().name).rpartition("/")[2],
            repo_id=arguments.repo_id,
            license=arguments.license,
            license_name=arguments.license_name,
            license_link=arguments.license_link,
            base_models=arguments.base_model,
            datasets=arguments.datasets,
            data_name=arguments.data_name,
            languages=arguments.language,
            system=arguments.system,
            code_url=arguments.code_url,
        )
        if card.license is None:
            logger.warning("The card names no license, so that others may not use the model: say which with --license.")
        export(arguments.checkpoint, arguments.folder, card, arguments.keep_lora, arguments.run)
    except (ExportError, PrivateError, FileExistsError, DiskError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write("".join(f"{name}\n" for name in folder_files(arguments.folder)))
    sys.stdout.write(f"SHA-256 of {CHECKSUMS}: {sha256(Path(arguments.folder) / CHECKSUMS)}\n")
    sys.stdout.write(f"Check it with:   python -m hub.verify {arguments.folder}\n")
    target = arguments.repo_id or "ORG/NAME"
    sys.stdout.write(f"Publish it with: python -m hub.push {arguments.folder} {target} --dry-run\n")


if __name__ == "__main__":
    main()
