"""An export is one whole folder, gives the checkpoint's embeddings anywhere, and says nothing of its machine."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from transformers import AutoModel, AutoProcessor

from evaluation.multimodal_llm import MultimodalLLM
from evaluation.report import ReportRow, collect_facts, write_report
from hub.card import TINY_BACKBONES
from hub.compose import CompositionArguments
from hub.export import (
    PUBLIC_SETTINGS,
    Run,
    _at_step,
    _public_settings,
    export,
    main,
    public_facts,
    public_place,
    read_run,
)
from hub.private import PrivateError
from hub.verify import (
    CHECKSUMS,
    RECORD,
    VerificationError,
    check_files,
    folder_files,
    sha256,
    verify,
    write_checksums,
)
from hub.verify import main as verify_main
from modeling_notellm2 import NoteLLM2Model
from tests.backbones import save
from tests.hub.conftest import CARD, METRICS, SECRET
from train.arguments import DataArguments, NoteLLM2TrainingArguments

Notes = list[dict[str, Any]]


@pytest.fixture
def exported(tiny_export: Path, tmp_path: Path) -> Path:
    """A copy of the export that the test may spoil."""
    return shutil.copytree(tiny_export, tmp_path / "exported")


def test_verify_loads_an_export_with_both_libraries(tiny_export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_main([str(tiny_export)])
    assert "loaded with transformers and sentence-transformers" in capsys.readouterr().out


def test_an_export_holds_what_it_should(tiny_export: Path, tiny_checkpoint: Path, notes: Notes) -> None:
    names = folder_files(tiny_export)
    assert {"README.md", "modules.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= set(names)
    assert {"training/settings.yaml", "training/report.json", "provenance.json", RECORD, CHECKSUMS} <= set(names)
    assert "sentence_transformer_notellm2.py" in names and not any(name.endswith((".bin", ".pyc")) for name in names)
    lines = (tiny_export / CHECKSUMS).read_text().splitlines()
    assert lines == [f"{sha256(tiny_export / name)}  {name}" for name in names if name != CHECKSUMS]
    assert not list(tiny_export.parent.glob(".shelf-notes*"))  # nothing is left of the folder it was written in
    modes = {(tiny_export / name).stat().st_mode for name in names}
    assert len(modes) == 1  # whoever can read the card can read the weights

    embeds = AutoModel.from_pretrained(tiny_export).encode(notes)
    np.testing.assert_allclose(embeds, AutoModel.from_pretrained(tiny_checkpoint).encode(notes), atol=1e-5)
    assert np.abs(embeds[0] - embeds[1]).max() > 1e-2
    assert AutoProcessor.from_pretrained(tiny_export).prompt == "micl"


def test_nothing_of_the_machine_is_published(tiny_export: Path) -> None:
    for name in set(folder_files(tiny_export)) - {"model.safetensors", "tokenizer.json"}:
        text = (tiny_export / name).read_text(encoding="utf-8")
        for private in (SECRET, "/home/", "some one", "secret place", "../towers", str(tiny_export.parent), "hunter2"):
            assert private not in text, name
    settings = yaml.safe_load((tiny_export / "training" / "settings.yaml").read_text())
    assert settings["composition"] == {"llm": "SmolLM2", "vision": "clip", "prompt": "micl"}
    assert settings["training"] == {"max_steps": 7} and settings["data"]["notes"] == "data/notes.csv"
    report = json.loads((tiny_export / "training" / "report.json").read_text())
    assert {"commit", "time", "hardware", "versions", "steps"} <= report["facts"].keys() and len(report["rows"]) == 3
    assert "command" not in report["facts"] and report["rows"][1]["metrics"] == METRICS
    assert "command" not in json.loads((tiny_export / "provenance.json").read_text())


def test_only_settings_and_facts_that_are_known_are_published(run_folder: Path) -> None:
    settings = yaml.safe_load((run_folder / "settings.yaml").read_text())
    private = dict.fromkeys(["HF_TOKEN", "auth", "passwd", "credentials", "vision_features_dir"], "hunter2")
    settings["training"] |= {**private, "optim": "a b", "learning_rate": 1e-3, "lr_scheduler_kwargs": {"min_lr": 0.1}}
    settings["data"] |= {**private, "views": f"s3a://key:{SECRET}@bucket/log/views.csv?signature={SECRET}"}
    settings |= {"environment": private}
    (run_folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    report = json.loads((run_folder / "report" / "report.json").read_text())
    report["facts"] |= {**private, "validation_mrr": 0.5, "validation_password": "hunter2", "commit": "/home/some one"}
    report["facts"]["hardware"] |= {"host": "hunter2"}
    report["rows"][1] |= {"details": {"blank": 3, "notes": "/home/some one"}, "cost": {"made_of": "/x", "seconds": 2.5}}
    report["rows"][0]["system"] = "/home/some one/my model"
    (run_folder / "report" / "report.json").write_text(json.dumps(report))
    run = read_run(run_folder)
    assert run.settings is not None and run.training is not None and run.evaluation is None
    assert not any(word in repr(run) for word in ("hunter2", SECRET, "/home", "some one", "bucket", "/x"))
    assert run.settings["training"] == {"max_steps": 7, "learning_rate": 1e-3, "lr_scheduler_kwargs": {"min_lr": 0.1}}
    assert run.settings["data"]["views"] == "views.csv" and set(run.settings) == {"composition", "data", "training"}
    assert run.training["facts"]["validation_mrr"] == 0.5 and "commit" not in run.training["facts"]
    own = run.training["rows"][1]
    assert own["details"] == {"blank": 3} and own["cost"] == {"seconds": 2.5} and own["metrics"] == METRICS
    assert own["intervals"] == {"mrr": [0.1, 0.15]} and run.training["rows"][0]["system"] == "my model"


def test_every_setting_of_this_package_is_published_or_private() -> None:
    own = set(NoteLLM2TrainingArguments.__annotations__)
    private = {"output_dir", "vision_features_dir", "report_to", "label_names"}
    fixed = {"dataloader_drop_last", "remove_unused_columns"}
    assert own - PUBLIC_SETTINGS["training"] == private | fixed
    assert {it.name for it in fields(CompositionArguments)} == PUBLIC_SETTINGS["composition"]
    assert {it.name for it in fields(DataArguments)} == PUBLIC_SETTINGS["data"]
    assert {it.name for it in fields(NoteLLM2TrainingArguments)} >= PUBLIC_SETTINGS["training"]


def test_what_a_run_leaves_is_published(splits_folder: Path) -> None:
    """The facts and settings of the commands themselves, by their names and types."""
    settings = {"composition": asdict(CompositionArguments(llm="org/llm")), "data": asdict(DataArguments(splits="x"))}
    settings["training"] = NoteLLM2TrainingArguments(
        output_dir="x", use_cpu=True, lora_target_modules=r".*\.q_proj"
    ).to_dict()
    found = _public_settings(settings)
    assert found is not None and found["composition"] == settings["composition"] and found["data"] == settings["data"]
    assert found["training"] == {name: settings["training"][name] for name in PUBLIC_SETTINGS["training"]}
    facts = collect_facts(notes=3, queries=2, protocol="graph", dtype="float32", seed=0)
    assert public_facts(facts) == {name: value for name, value in facts.items() if name != "command"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/data/models/SmolLM2", "SmolLM2"),
        ("/home/some one/my notes.csv", "my notes.csv"),
        (r"C:\models\SmolLM2", "SmolLM2"),
        ("file:///srv/x/notes.csv", "notes.csv"),
        ("../towers/clip", "clip"),
        ("~/views.csv", "views.csv"),
        ("runs/mine/backbones/llm", "llm"),
        ("s3a://key:word@bucket/views", "views"),
        ("s3a://key:word@bucket", "…"),
        ("https://example.org/a/views.csv?token=x#y", "views.csv"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("gpt2", "gpt2"),
    ],
)
def test_places_are_cut_to_a_name_and_ids_are_kept(before: str, after: str) -> None:
    assert public_place(before) == after


@pytest.mark.parametrize(("options", "keep"), [([], False), (["--merge-lora"], False), (["--keep-lora"], True)])
def test_lora_is_merged_or_kept(
    tiny_model: NoteLLM2Model, notes: Notes, tmp_path: Path, options: list[str], keep: bool
) -> None:
    plain = tiny_model.encode(notes)
    tiny_model.add_lora(r=4, target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted = tiny_model.encode(notes)
    assert np.abs(adapted - plain).max() > 1e-2
    main([str(save(tiny_model, tmp_path / "checkpoint")), str(tmp_path / "out"), *options])
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(loaded.encode(notes), adapted, atol=1e-5)
    assert (loaded.config.lora is not None) == keep
    assert ("peft" in (tmp_path / "out" / "README.md").read_text()) == keep
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["lora"] == ("kept" if keep else "merged")


def test_a_text_only_model_in_16_bits(compose: Callable[..., NoteLLM2Model], tmp_path: Path) -> None:
    model = compose(tower=None).to(torch.bfloat16)
    export(save(model, tmp_path / "checkpoint"), tmp_path / "out")
    assert AutoModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert not any("image" in note for note in record["notes"])
    in_float32 = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).encode(record["notes"])
    np.testing.assert_allclose(in_float32, np.array(record["embeddings"]), atol=1e-5)
    rounded = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).encode(record["notes"])
    assert np.abs(rounded - in_float32).max() > 1e-5


def test_a_broken_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()  # it broke in the middle
        raise KeyboardInterrupt

    monkeypatch.setattr("hub.export.write_record", fail)
    with pytest.raises(KeyboardInterrupt):
        export(tiny_checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that the test may change."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def change_config(checkpoint: Path, **entries: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **entries}))


def test_a_checkpoint_that_names_the_machine_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(checkpoint, came_from=str(checkpoint))
    with pytest.raises(PrivateError, match="config.json would name the folder"):
        export(checkpoint, tmp_path / "out")
    monkeypatch.setenv("HOME", "/usr")  # right below the root, as /root is
    for came_from in ("/usr/models/x", "file:///usr/models/x"):
        change_config(checkpoint, came_from=came_from)
        with pytest.raises(PrivateError, match="config.json would name the folder /usr of"):
            export(checkpoint, tmp_path / "out")
    (checkpoint / "chat_template.jinja").write_text("{# from /usr/me/template #}{{ messages }}")
    change_config(checkpoint, came_from="https://example.org/usr/x and ./usr/x")
    with pytest.raises(PrivateError, match="chat_template.jinja would name the folder /usr of"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    export(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("secret", [SECRET, "ghp_" + "a1" * 18, "AKIA" + "A1B2" * 4, "sk-proj-" + "a1" * 16])
def test_a_checkpoint_that_holds_a_credential_is_refused(checkpoint: Path, tmp_path: Path, secret: str) -> None:
    change_config(checkpoint, access=f"of {secret}")
    with pytest.raises(PrivateError, match="config.json would hold what looks like a credential") as refused:
        export(checkpoint, tmp_path / "out")
    assert secret not in str(refused.value)


def test_an_export_is_exported_with_its_run(tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder, and by the id of a repository that this machine has."""
    repository = tmp_path / "cache" / "models--some-org--shelf-notes"
    shutil.copytree(tiny_export, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for checkpoint in (str(tiny_export), "some-org/shelf-notes"):
        out = tmp_path / checkpoint.replace("/", "-").lstrip("-")
        export(checkpoint, out, CARD)
        for name in ("training/settings.yaml", "training/report.json", "README.md"):
            text = (out / name).read_text(encoding="utf-8")
            assert text == (tiny_export / name).read_text(encoding="utf-8") or name == "README.md"
        assert (
            "Trained on 50 pairs of related notes among 30 notes" in text and "| trained | both | **0.4321** |" in text
        )


def test_an_evaluation_joins_the_checkpoints_own_training(checkpoint: Path, run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, checkpoint, dirs_exist_ok=True)
    facts = collect_facts(notes=9, queries=8, protocol="graph", dtype="float32", seed=17)
    write_report(tmp_path / "report", [ReportRow("mine", "both", {"mrr": 0.75})], facts)
    options = ["--run", str(tmp_path / "report"), "--system", "mine"]
    main([str(checkpoint), str(tmp_path / "out"), *options])
    names = {name for name in folder_files(tmp_path / "out") if "/" in name}
    assert names == {"training/settings.yaml", "training/report.json", "evaluation/report.json"}
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| mine | both | 0.7500 |" in text and "Trained on 50 pairs" in text and "0.4321" not in text
    check_files(tmp_path / "out")
    main([str(tmp_path / "out"), str(tmp_path / "again"), "--system", "mine"])
    assert names <= set(folder_files(tmp_path / "again"))

    main([str(checkpoint), str(tmp_path / "plain")])  # the control: without it, the figures of the training
    assert "0.4321" in (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")


def test_the_checkpoints_own_evaluation_is_kept_with_its_own_training_alone(
    checkpoint: Path, run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint is an export, with its training and an evaluation; `--run` names that training, then another."""
    other = shutil.copytree(run_folder, tmp_path / "other")
    report = json.loads((other / "report" / "report.json").read_text())
    report["facts"]["train_pairs"] = 51
    (other / "report" / "report.json").write_text(json.dumps(report))
    facts = collect_facts(notes=9, queries=8, protocol="graph", dtype="float32", seed=17)
    write_report(tmp_path / "report", [ReportRow("trained", "both", {"mrr": 0.75})], facts)
    shutil.copytree(run_folder, checkpoint, dirs_exist_ok=True)
    main([str(checkpoint), str(tmp_path / "measured"), "--run", str(tmp_path / "report")])
    for run, pairs, figure in ((run_folder, 50, "0.7500"), (other, 51, "**0.4321**")):
        assert "own evaluation is left out" not in caplog.text
        out = tmp_path / f"out-{pairs}"
        main([str(tmp_path / "measured"), str(out), "--run", str(run)])
        text = (out / "README.md").read_text(encoding="utf-8")
        assert f"Trained on {pairs} pairs" in text and f"| trained | both | {figure}" in text
        assert (out / "evaluation").exists() == (run == run_folder)
    assert f"own evaluation is left out: nothing says that it is of the training of run='{other}'" in caplog.text


@pytest.fixture
def run_with_checkpoints(tiny_checkpoint: Path, run_folder: Path) -> Path:
    """The output folder of a training of 7 steps that saved after 3 and 7."""
    for step in (3, 7):
        shutil.copytree(tiny_checkpoint, run_folder / f"checkpoint-{step}")
    return run_folder


def test_a_checkpoint_of_a_run_is_exported_with_its_run(
    run_with_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main([str(run_with_checkpoints / "checkpoint-7"), str(tmp_path / "last")])
    assert {"training/settings.yaml", "training/report.json"} <= set(folder_files(tmp_path / "last"))
    text = (tmp_path / "last" / "README.md").read_text(encoding="utf-8")
    assert "Steps of training: 7." in text and "| trained | both | **0.4321** |" in text
    assert "say nothing of step" not in caplog.text and "names no license" in caplog.text

    options = ["--repo-id", "me/my-notes", "--code-url", "https://example.org/me/code"]
    main([str(run_with_checkpoints / "checkpoint-3"), str(tmp_path / "early"), *options])
    card = (tmp_path / "early" / "README.md").read_text(encoding="utf-8")
    assert "\n# my-notes\n" in card and ModelCard(card).data.model_name == "my-notes"
    assert "(https://example.org/me/code)" in card
    text = " ".join(card.split())
    assert "Steps of training: 3." in text and "among 30 notes" in text and "It was trained to bring" in text
    assert "0.4321" not in text and "No evaluation was given" in text  # they are not this model's
    assert "figures are of step 7 and say nothing of step 3" in caplog.text
    check_files(tmp_path / "early")


@pytest.mark.parametrize(
    ("training", "facts", "delivered"),
    [
        ({"load_best_model_at_end": True}, {"steps": 7, "best_step": 3}, 3),
        ({"load_best_model_at_end": True}, {"steps": 7, "best_step": None}, 7),
        ({"load_best_model_at_end": False}, {"steps": 7, "best_step": 3}, 7),
        ({}, None, None),  # the run was cut off before its report
    ],
)
def test_a_runs_figures_belong_to_the_step_that_it_delivered(
    training: dict[str, Any], facts: dict[str, Any] | None, delivered: int | None
) -> None:
    report = None if facts is None else {"facts": {**facts, "train_notes": 30, "temperature": 0.1}, "rows": [{}]}
    run = Run({"training": training}, report)
    for step in (3, 7):
        known = {} if facts is None else {"train_notes": 30}
        other = Run(run.settings, {"facts": {**known, "steps": step}, "rows": []})
        assert _at_step(run, step) == (run if step == delivered else other)
    assert _at_step(Run(), 3) == Run()


def test_the_backbones_of_the_example_are_named_as_such() -> None:
    settings = {
        "composition": {"llm": "runs/x/backbones/llm", "vision": "runs/x/backbones/vision"},
        "data": {"notes": None, "splits": None},
        "training": {"output_dir": "runs/x/"},
    }
    found = _public_settings(settings)
    assert found is not None and found["composition"] == dict.fromkeys(("llm", "vision"), TINY_BACKBONES)
    again = _public_settings(found)  # an export of an export
    assert again is not None and again["composition"] == found["composition"]
    for section, change in (
        ("composition", {"llm": "models/backbones/llm", "vision": None}),
        ("data", {"notes": "notes.csv"}),
        ("training", {"output_dir": "runs/y"}),
    ):
        found = _public_settings({**settings, section: {**settings[section], **change}})
        assert found is not None and TINY_BACKBONES not in found["composition"].values(), section


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: (folder / "README.md").write_text("changed"),
            "other content than it was exported with: README.md",
        ),
        (lambda folder: (folder / "fusion_notellm2.py").unlink(), "lacks fusion_notellm2.py"),
        (lambda folder: (folder / "more.txt").write_text(""), "does not list: more.txt"),
        (lambda folder: (folder / CHECKSUMS).write_text("nonsense\n"), "line 1 of checksums.sha256"),
    ],
)
def test_verify_notices_changed_files(exported: Path, change: Callable[[Path], None], message: str) -> None:
    (exported / ".gitattributes").write_text("the Hub's own")
    check_files(exported)
    change(exported)
    with pytest.raises(VerificationError, match=message):
        check_files(exported)


def test_verify_notices_code_and_pickles_that_were_listed(exported: Path) -> None:
    (exported / "stray.py").write_text("")
    write_checksums(exported)
    with pytest.raises(VerificationError, match="stray.py"):
        check_files(exported)
    (exported / "stray.py").rename(exported / "weights.bin")
    write_checksums(exported)
    with pytest.raises(VerificationError, match="may be a pickle: weights.bin"):
        check_files(exported)
    (exported / "weights.bin").unlink()
    (exported / "connector_notellm2.py").unlink()
    write_checksums(exported)
    with pytest.raises(VerificationError, match="lacks code that"):
        check_files(exported)


def test_verify_notices_other_weights_than_the_recorded_ones(exported: Path) -> None:
    record = json.loads((exported / RECORD).read_text())
    record["embeddings"][0][0] += 1e-3
    (exported / RECORD).write_text(json.dumps(record))
    write_checksums(exported)
    with pytest.raises(VerificationError, match="differ by 1.00e-03"):
        verify(exported)


def test_verify_notices_a_module_that_computes_something_else(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = exported / "sentence_transformer_notellm2.py"
    text = code.read_text()
    assert text.count("has_image=has_image).note_embeds") == 1
    code.write_text(text.replace("has_image=has_image).note_embeds", "has_image=has_image).note_embeds.flip(0)"))
    write_checksums(exported)
    monkeypatch.setattr("hub.verify.available_loaders", lambda python: ["sentence-transformers"])
    with pytest.raises(VerificationError, match=r"differ by .* in a fresh process \(sentence-transformers\)"):
        verify(exported, allow_other_code=True)


def test_bad_arguments_are_named(
    tiny_checkpoint: Path,
    llm_folder: Callable[[str], Path],
    multimodal_llm_folder: Callable[[str], Path],
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "out")
    released = MultimodalLLM.from_backbone(multimodal_llm_folder("qwen2_vl"))
    multimodal = str(save(released, tmp_path / "multimodal"))
    damaged = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\xff" * 64)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for arguments, message in (
        ([str(tiny_checkpoint), str(run_folder)], "exists: give another name"),
        ([str(tiny_checkpoint), out, "--run", str(tmp_path / "none")], "is no folder"),
        ([str(tiny_checkpoint), out, "--run", str(empty)], "holds neither settings.yaml nor report.json"),
        ([str(tiny_checkpoint), out, "--run", str(run_folder), "--system", "x"], "system='x' is not in the report"),
        ([str(tiny_checkpoint), out, "--base-model", str(tiny_checkpoint)], "is no id on the Hub"),
        ([str(tiny_checkpoint), out, "--license", "other"], "needs both of them"),
        ([str(llm_folder("llama")), out], "is a 'llama', no NoteLLM-2"),
        ([multimodal, out], "holds a MultimodalLLM, which loads with this package alone"),
        ([str(damaged), out], f"model='{damaged}': its weights are damaged"),
        ([str(tiny_checkpoint), out, "--repo-id", "noslash"], "repo_id='noslash' is no id on the Hub: give ORG/NAME"),
        ([str(tmp_path / "nothing"), out], "nothing': no such folder here, and no such Hub id could be read."),
        (["nothing", out], "model='nothing': no such folder here, and no such Hub id could be read."),
        (["hub/nothing", out], "model='hub/nothing': no such folder here"),  # beside what is here
        (["no-org/nothing", out], "model='no-org/nothing': no such folder here, and no such Hub id could be read ("),
        ([str(empty), out], f"model='{empty}': no model is saved there"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
