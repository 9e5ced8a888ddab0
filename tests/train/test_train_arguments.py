"""YAML and command line."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from pairs.simulate import SimulationOptions
from train.arguments import DEFAULT_CONFIG, changed_settings, parse_arguments


def write(path: Path, **settings: object) -> str:
    path.write_text(yaml.safe_dump({"output_dir": str(path.parent / "run"), "use_cpu": True, **settings}))
    return str(path)


def test_command_line_wins_over_yaml_which_wins_over_defaults(tmp_path: Path):
    config = write(tmp_path / "c.yaml", learning_rate=1e-3, max_steps=7, late_fusion="vector", pair_top_k=4)
    composition, data, training = parse_arguments([config, "--max_steps", "9", "--late_fusion", "none"])
    assert (training.learning_rate, training.max_steps) == (1e-3, 9)
    assert composition.late_fusion == "none"
    assert data.pair_options.top_k == 4 and data.pair_options.window_days == 7.0
    assert training.llm_tuning == "frozen" and training.report_to == ["tensorboard"]


def test_scientific_notation_in_yaml_is_a_number(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nlearning_rate: 1e-4\n")
    assert parse_arguments([str(tmp_path / "c.yaml")])[2].learning_rate == 1e-4


def test_changed_settings_are_those_that_differ_from_defaults():
    aloud = {"prompt": "micl", "num_text_layers": None, "eval_ks": [10, 100], "learnable_temperature": True}
    changed = {"learning_rate": "1e-4", "vision": "", "eval_ks": [5], "eval_untrained": False}
    expected = {"learning_rate": 1e-4, "vision": "", "eval_ks": [5], "eval_untrained": False}
    assert changed_settings(aloud) == {} and changed_settings(aloud | changed) == expected
    for settings, message in (({"batch_size": 3}, "'batch_size' is no option"), ({"max_steps": "many"}, "max_steps")):
        with pytest.raises(ValueError, match=message):
            changed_settings(settings)


def test_without_arguments_the_embedded_default_is_read(monkeypatch: pytest.MonkeyPatch):
    _, data, training = parse_arguments(["--use_cpu"])
    settings = yaml.safe_load(DEFAULT_CONFIG.read_text())
    assert data.notes is None and data.num_simulated_notes == settings["num_simulated_notes"]
    assert training.max_steps == settings["max_steps"]
    assert data.simulation_options == SimulationOptions()


def test_the_simulated_world_may_tell_other_things():
    _, data, _ = parse_arguments(["--use_cpu", "--num_simulated_subjects", "16", "--num_simulated_looks", "2"])
    assert data.simulation_options == SimulationOptions(subjects=16, looks=2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rat": 1e-3}, "learning_rat"),
        ({"visual_loss_weight": -1.0}, "visual_loss_weight=-1.0"),
        ({"notes": "notes.csv"}, "views is not given"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True"),
        ({"llm_tuning": "lorra"}, "lorra"),
        ({"head_warmup_steps": -1}, "head_warmup_steps=-1"),
        ({"head_warmup_steps": 3}, "without head_learning_rate"),
        ({"prompt": "mcil"}, "mcil"),
        ({"max_steps": 2.5}, "2.5"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 10, "save_steps": 15},
            "round multiple",
        ),
    ],
)
def test_bad_settings_are_named(settings: dict, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([write(tmp_path / "c.yaml", **settings)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert named in said and "usage" not in said and said.endswith(" (--help explains all options)\n")
    assert len(said.splitlines()) <= 3  # transformers may break its sentence


def test_an_unknown_option_is_named_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_arguments([write(tmp_path / "c.yaml"), "--batches", "graph", "--quality", "high"])
    assert capsys.readouterr().err == "train/run.py: error: --quality is no option (--help explains all options)\n"


@pytest.mark.parametrize("content", [b"llm: [a, b", b"llm: \xff"])
def test_a_config_that_is_no_yaml_is_named(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(SystemExit):
        parse_arguments([str(tmp_path / "c.yaml")])
    assert f"config='{tmp_path / 'c.yaml'}' is no YAML: " in capsys.readouterr().err


def test_every_kind_of_yaml_value_is_read(tmp_path: Path):
    settings = {
        "eval_ks": [5, 20],
        "late_fusion_normalize": False,
        "num_text_layers": None,
        "vision": "",
        "lr_scheduler_kwargs": {"num_cycles": 0.25},
        "metric_for_best_model": "recall@10",
    }
    composition, _, training = parse_arguments([write(tmp_path / "c.yaml", **settings)])
    assert training.eval_ks == [5, 20] and training.lr_scheduler_kwargs == {"num_cycles": 0.25}
    assert (
        composition.late_fusion_normalize is False and composition.num_text_layers is None and composition.vision == ""
    )
    overridden = [write(tmp_path / "d.yaml", late_fusion_normalize=True), "--late_fusion_normalize", "false"]
    assert parse_arguments(overridden)[0].late_fusion_normalize is False


def test_missing_config_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_arguments(["nowhere.yaml"])
    assert "nowhere.yaml" in capsys.readouterr().err


def test_help_is_complete(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for option in (
        "--llm_tuning",
        "--visual_loss_weight",
        "--num_text_layers",
        "--pair_score",
        "--head_learning_rate",
    ):
        assert option in text


@pytest.mark.parametrize("name", ["single_gpu", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_reads_its_configurations(name: str):
    """Unknown keys are errors there."""
    config = load_config_from_file(str(DEFAULT_CONFIG.parent / "accelerate" / f"{name}.yaml"))
    kind = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert config.distributed_type.value == kind and config.mixed_precision == "bf16"
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
