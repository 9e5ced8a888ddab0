"""The model card: what the Hub reads of a published model (front matter), and what people read.

Every figure comes from a report of `train/run.py` or `evaluation.run`, and every other statement from the model itself,
its run's settings, or an option; what is not known is left out.
"""

import difflib
import logging
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pycountry
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers.utils import CONFIG_NAME

from evaluation.report import ReportRow, markdown_table
from hub.repo_id import check_repo_id
from modeling_notellm2 import NoteLLM2Model

logger = logging.getLogger("hub.card")

TINY_BACKBONES = "hub.tiny_backbones"
"""What published settings name in place of a backbone that the example of `train/run.py` made for itself."""

_MODALITIES = {"both": "text and image", "text": "text only", "image": "image only"}

LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown
    unlicense wtfpl zlib
    """.split()
)
"""License ids that the Hub takes in a card: https://huggingface.co/docs/hub/repositories-licenses. It adds to them; one
that is not here goes as `other`, with its name and link."""


@dataclass(frozen=True)
class CardOptions:
    """What only the person who publishes can say.

    Args:
        name: the model's name.
        repo_id: its id on the Hub, `ORG/NAME`, for the card's examples.
        license: one of `LICENSES`, for instance `apache-2.0`, or `other` with the next two.
        license_name, license_link: name and address of another license.
        base_models: Hub ids of what the model was made of; None: `base_models_of` the run's settings.
        datasets: Hub ids of the data.
        data_name: what the data is called in the evaluation's results; None: notes and views, simulated ones where the
            training's settings say so.
        languages: codes of the notes' languages as the Hub takes them, ISO 639 in two or three small letters, or
            `multilingual` or `code`.
        system: name of this model's rows in the report.
        code_url: https address of a Git repository from which pip installs `modeling_notellm2`.

    Raises:
        ValueError: an id, an address or a code that is none, or a license without what it needs.
    """

    name: str
    repo_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_models: Sequence[str] | None = None
    datasets: Sequence[str] = ()
    data_name: str | None = None
    languages: Sequence[str] = ()
    system: str = "trained"
    code_url: str | None = None
    tags: Sequence[str] = field(default=("notellm2", "sentence-transformers", "multimodal", "recommendation"))

    def __post_init__(self) -> None:
        if self.repo_id is not None:
            check_repo_id("repo_id", self.repo_id)
        for name, ids in (("base_models", self.base_models or ()), ("datasets", self.datasets)):
            for repo_id in ids:
                check_repo_id(name, repo_id)
                if os.path.isdir(repo_id):  # a relative path of two parts looks like an id
                    raise ValueError(f"{name}={repo_id!r} is a folder of this machine: give its id on the Hub.")
        for code in self.languages:
            if not is_language(code):
                raise ValueError(
                    f"languages={code!r} is no code that the Hub takes: give ISO 639 in two or three small letters, "
                    "such as en, or multilingual."
                )
        if self.license is not None and self.license not in LICENSES:
            like = ", ".join(difflib.get_close_matches(self.license.lower(), LICENSES, n=3))
            raise ValueError(
                f"license={self.license!r} is no license id of the Hub{f' (like it: {like})' if like else ''}: give "
                "one of https://huggingface.co/docs/hub/repositories-licenses, or other with a name and a link."
            )
        if self.code_url is not None and not re.fullmatch(r"https://[\w.-]+/[\w./~-]+", self.code_url):
            raise ValueError(
                f"code_url={self.code_url!r} is no https address of a Git repository: give one such as "
                "https://github.com/ORG/NAME, without an account in it."
            )
        if (self.license == "other") != (self.license_name is not None and self.license_link is not None):
            raise ValueError(
                f"license={self.license!r} with license_name={self.license_name!r} and license_link="
                f"{self.license_link!r}: the license `other` needs both of them, and no other one takes them."
            )


def is_language(code: str) -> bool:
    """Whether the Hub takes this as a language: a code of ISO 639-1, -2 or -3, `code` or `multilingual`.

    >>> [is_language(code) for code in ("en", "zho", "chi", "multilingual", "english", "EN", "xx")]
    [True, True, True, True, False, False, False]
    """
    if code in ("code", "multilingual"):
        return True
    if not code.islower():  # pycountry does not mind
        return False
    return pycountry.languages.get(alpha_2=code) is not None or any(
        found is not None
        for found in (
            pycountry.languages.get(alpha_3=code),
            pycountry.languages.get(bibliographic=code),  # the other codes of ISO 639-2
            pycountry.language_families.get(alpha_3=code),
        )
    )


def base_models_of(settings: Mapping[str, Any] | None) -> list[str]:
    """Ids of what a run's settings compose or go on from, as far as they are on the Hub for certain.

    A setting such as "models/clip" may be a folder of the machine that trained. It counts as an id if this machine has
    the model from the Hub; of any other that could be one, the log says so.
    """
    composition = (settings or {}).get("composition", {})
    names = [composition.get("model")] if composition.get("model") else map(composition.get, ("llm", "vision"))
    found = []
    for name in names:
        if not name or name.count("/") != 1 or os.path.isdir(name):
            continue
        if isinstance(try_to_load_from_cache(name, CONFIG_NAME), str):
            found.append(name)
        else:
            logger.warning(
                "The run's settings name %r, which this machine does not have from the Hub, and the card leaves out: "
                "if it is an id there, give it with --base-model.",
                name,
            )
    return found


def model_card(
    model: NoteLLM2Model,
    options: CardOptions,
    settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    export_commit: str | None = None,
) -> ModelCard:
    """The card of an exported model.

    Args:
        model: the model as it is exported, with its processor.
        options: what the publisher says.
        settings: the training's `settings.yaml`.
        training: `report.json` of `train/run.py`.
        evaluation: `report.json` of `evaluation.run`, whose figures are then shown in place of the training's.
        export_commit: commit of the code that exports.

    Raises:
        ValueError: the report has no rows of `options.system`, or this package is not installed.
    """
    config, processor = model.config, model.processor
    trained = dict(training["facts"]) if training is not None else {}
    report = evaluation if evaluation is not None else training
    facts = dict(report["facts"]) if report is not None else {}
    composition = (settings or {}).get("composition", {})
    rows = [ReportRow(**row) for row in report["rows"]] if report is not None else []
    base_models = options.base_models if options.base_models is not None else base_models_of(settings)
    data = ModelCardData(
        language=list(options.languages) or None,
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        base_model=list(base_models) or None,
        datasets=list(options.datasets) or None,
        tags=list(options.tags),
        model_name=options.name,
        # Of an evaluation nobody knows whether its notes are the training's.
        eval_results=evaluation_results(
            rows, facts, options, is_simulated=evaluation is None and uses_simulated_data(settings)
        )
        or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        name=options.name,
        source=options.repo_id or "path/to/this/folder",
        dim=config.embedding_dim or config.hidden_size,
        architecture=describe_architecture(model),
        requirements=" ".join(needed_packages(model)),
        has_vision=config.has_vision,
        has_lora=config.lora is not None,
        frozen_tower=config.freeze_vision_tower,
        has_random_tower=composition.get("vision") == TINY_BACKBONES,
        code_url=options.code_url,
        matryoshka_dims=(settings or {}).get("training", {}).get("matryoshka_dims"),
        template=processor.template if config.has_vision else processor.text_template,
        text_template=processor.text_template,
        max_title_tokens=processor.max_title_tokens,
        max_topics_tokens=processor.max_topics_tokens,
        max_content_tokens=processor.max_content_tokens,
        is_trained=trained.get("steps", 0) + trained.get("head_warmup_steps", 0) > 0,
        pairs_are_of_views=_pairs_are_of_views(settings),
        data_facts=_data_facts(settings, trained),
        has_settings=settings is not None,
        evaluation=markdown_table(rows) if rows else "",
        has_each_modality={"text", "image"} <= {row.modality for row in rows if row.system == options.system},
        has_intervals=any(row.intervals for row in rows),
        measured_on=_measured_on(settings, facts),
        seed=facts.get("seed") if evaluation is None else None,  # of an evaluation it is that of resampling
        system=options.system,
        report_file="training/report.json" if evaluation is None else "evaluation/report.json",
        report_commit=facts.get("commit"),
        report_hardware=_hardware(facts),
        export_commit=export_commit,
    )


def evaluation_results(
    rows: Sequence[ReportRow], facts: Mapping[str, Any], options: CardOptions, is_simulated: bool = False
) -> list[EvalResult]:
    """The main figures of this model in a report, one result a metric and modality, as a `model-index` holds them:
    recall and NDCG at 10, or else at the first cut that there is, and MRR. The card's table has all.

    Args:
        rows: the report's.
        facts: the report's. The split is `test` where they say that there are test notes (`train/run.py`), and else
            not known.
        options: what the publisher says.
        is_simulated: whether the report's notes and views are.

    Raises:
        ValueError: there are rows, but none of `options.system`.
    """
    own = [row for row in rows if row.system == options.system]
    if rows and not own:
        raise ValueError(
            f"system={options.system!r} is not in the report, which has {sorted({row.system for row in rows})}: name "
            "this model's rows."
        )
    data_name = "simulated notes and views" if is_simulated else "notes and views"
    return [
        EvalResult(
            task_type="information-retrieval",
            task_name="Retrieval of related notes",
            dataset_type=options.datasets[0] if options.datasets else "simulated" if is_simulated else "unknown",
            dataset_name=options.data_name or data_name,
            dataset_split="test" if "test_notes" in facts else None,
            metric_type=name,
            metric_name=f"{_metric_name(name)} ({_MODALITIES.get(row.modality, row.modality)})",
            metric_args={"protocol": facts["protocol"]} if "protocol" in facts else None,
            metric_value=round(row.metrics[name], 4),
        )
        for row in own
        for name in _main_metrics(row.metrics)
        if row.metrics[name] is not None and math.isfinite(row.metrics[name])
    ]


def _main_metrics(names: Collection[str]) -> list[str]:
    """
    >>> _main_metrics(["recall@5", "ndcg@5", "hit_rate@5", "recall@10", "ndcg@10", "hit_rate@10", "mrr"])
    ['recall@10', 'ndcg@10', 'mrr']
    >>> _main_metrics(["recall@100", "hit_rate@100", "mrr"])
    ['recall@100', 'mrr']
    """
    cuts = [int(cut) for _, at, cut in (name.partition("@") for name in names) if at]
    cut = 10 if 10 in cuts else min(cuts, default=None)
    return [name for name in (f"recall@{cut}", f"ndcg@{cut}", "mrr") if name in names]


def _metric_name(key: str) -> str:
    """
    >>> _metric_name("hit_rate@10"), _metric_name("ndcg@10"), _metric_name("mrr")
    ('Hit rate@10', 'NDCG@10', 'MRR')
    """
    name, at, cut = key.partition("@")
    return (name.upper() if name in ("mrr", "ndcg") else name.replace("_", " ").capitalize()) + at + cut


def describe_architecture(model: NoteLLM2Model) -> str:
    """What the model is made of, in one sentence.

    Widths and kinds are read from the config: a backbone's name is not in it.
    """
    config = model.config
    text = config.text_config
    llm = f"an LLM of type `{text.model_type}` ({text.num_hidden_layers} layers of width {config.hidden_size})"
    if not config.has_vision:
        return f"{llm}, text-only."
    parts = [f"{llm} and a vision tower of type `{config.vision_config.model_type}`"]
    if model.connector is not None:
        kind = {"qformer": "a Q-Former", "mlp": "an MLP"}[config.connector]
        parts.append(f"joined by {kind} that turns an image into {config.num_visual_tokens} visual tokens")
    if model.processor.prompt == "micl":
        parts.append("with mICL, a prompt that compresses first the image and then the whole note into one word")
    if config.late_fusion is not None:
        weight = {"scalar": "one weight a note", "vector": "one weight a dimension"}[config.late_fusion]
        parts.append(f"with late fusion of the image ({weight})")
    return ", ".join(parts) + "."


def supported_releases() -> dict[str, SpecifierSet]:
    """Package ─► the releases of it that this package declares to work with, also in its extras.

    Raises:
        ValueError: this package is not installed.
    """
    try:
        declared = requires("notellm2")
    except PackageNotFoundError as error:
        raise ValueError(
            "The package notellm2 is not installed here, and so does not say which releases of other packages it works "
            "with: run `pip install -e .` in its checkout."
        ) from error
    return {Requirement(line).name: Requirement(line).specifier for line in declared or []}


def needed_packages(model: NoteLLM2Model) -> list[str]:
    """What must be installed to load the folder with transformers, as arguments of pip.

    Raises ValueError as `supported_releases`.
    """
    names = ["transformers", "torch", "pillow"]
    if model.config.lora is not None:
        names.append("peft")
    declared = supported_releases()
    packages = [f'"{name}{declared[name]}"' for name in names]
    if model.config.has_vision and model.config.vision_config.model_type == "timm_wrapper":
        packages += ["timm", "torchvision"]
    return packages


def _data_facts(settings: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> list[str]:
    """Sentences about the training's data, of what the run recorded."""
    sentences = []
    if "train_notes" in facts and "train_pairs" in facts:
        sentences.append(
            f"Trained on {facts['train_pairs']} pairs of related notes among {facts['train_notes']} notes; (a, b) and "
            "(b, a) are one pair."
        )
    if "steps" in facts:
        sentences.append(f"Steps of training: {facts['steps']}.")
    if uses_simulated_data(settings):
        sentences.append("Notes, pictures and views are simulated: the model shows that the method works, no more.")
    composition = (settings or {}).get("composition", {})
    parts = {"llm": "the LLM", "vision": "the vision tower"}
    tiny = " and ".join(part for name, part in parts.items() if composition.get(name) == TINY_BACKBONES)
    if tiny:
        sentences.append(
            f"{tiny[0].upper()}{tiny[1:]} began with random weights, as tiny backbones that the package makes for its "
            "own example: before this training they had learned nothing."
        )
    data = (settings or {}).get("data", {})
    if _pairs_are_of_views(settings):
        sentences.append(
            f"Two notes are related if the same users view them within {data['pair_window_days']:g} days (score: "
            f"{data['pair_score']})."
        )
    return sentences


def uses_simulated_data(settings: Mapping[str, Any] | None) -> bool:
    """Whether a run's settings name no notes, so that `train/run.py` simulated some, with their views."""
    data = (settings or {}).get("data", {})
    return bool(data) and data.get("notes") is None and data.get("splits") is None


def _pairs_are_of_views(settings: Mapping[str, Any] | None) -> bool:
    """Whether a run's settings say that it made its pairs from views. Those in splits may be of any kind."""
    data = (settings or {}).get("data", {})
    return data.get("pair_score") is not None and data.get("splits") is None


def _measured_on(settings: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> str:
    """What a report's figures are about, as far as it says so: "12 test notes, 10 queries"."""
    parts = []
    if "test_notes" in facts:
        parts.append(f"{facts['test_notes']} test notes{_how_set_apart(settings)}")
    elif "notes" in facts:
        parts.append(f"{facts['notes']} notes")
    queries = facts.get("test_queries", facts.get("queries"))
    if queries is not None:
        parts.append(f"{queries} queries")
    if "protocol" in facts:
        parts.append(f"protocol `{facts['protocol']}`")
    return ", ".join(parts)


def _how_set_apart(settings: Mapping[str, Any] | None) -> str:
    data = (settings or {}).get("data", {})
    if data.get("splits") is not None:  # made before the run, which does not say how
        return ""
    return {
        "note": " that this training has not seen",
        "both": " that this training has not seen",
        "time": " with pairs of later days than this training's",
    }.get(data.get("split_by"), "")


def _hardware(facts: Mapping[str, Any]) -> str:
    hardware = facts.get("hardware") or {}
    names = [hardware.get("cpu"), hardware.get("gpu")]
    return ", ".join(str(name) for name in names if name)


__all__ = [
    "LICENSES",
    "TINY_BACKBONES",
    "CardOptions",
    "base_models_of",
    "describe_architecture",
    "evaluation_results",
    "is_language",
    "model_card",
    "needed_packages",
    "supported_releases",
    "uses_simulated_data",
]
