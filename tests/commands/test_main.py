import re
import runpy
import sys
from pathlib import Path

import pytest

import elastic_hf
import run_seqrec
from elastic_hf.__main__ import COMMANDS, main


ROOT = Path(__file__).parents[2]


def test_every_command_has_a_file_and_every_file_a_command():
    files = {path.stem for path in Path(elastic_hf.__file__).with_name("commands").glob("*.py")}
    assert {*COMMANDS} == files - {"__init__", "arguments", "steps"}


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert COMMANDS.items() <= {tuple(line) for line in lines if len(line) == 2}


@pytest.mark.parametrize("arguments", [[], ["teach"]])
def test_what_is_no_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and "command" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_each_argument_is(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"`elastic-hf {command}`" in text and f"usage: elastic-hf {command}" in text
    options = re.split(r"\n  (?=-)", text)[1:]
    assert len(options) > 2
    for option in options:
        name, *words = option.replace("\n", "  ").split("  ")
        assert len(" ".join(words).strip()) > 10, f"{name} has no text"


def test_the_help_of_train_has_groups_its_own_arguments_first(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    groups = re.split(r"\n\n(?=[a-z].*:\n  -)", capsys.readouterr().out)[1:]
    found = {group.partition(":\n")[0]: re.findall(r"^  --(\w+)", group, flags=re.MULTILINE) for group in groups}
    assert [*found] == ["options", "model", "data", "training", "training, as Transformers has it"]
    assert {"output_dir", "learning_rate", "results_dir"} <= {*found["training"]} and len(found["training"]) < 30
    others = {*found["training, as Transformers has it"]}
    assert {"seed", "report_to", "gradient_checkpointing"} <= others and not others & {*found["training"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model_type", "sasrec5"], "model_type must be one of elastic"),
        (["evaluate", "--model_name_or_path", "here", "--split", "none"], "split must be 'leave_one_out'"),
        (["recommend", "--model_name_or_path", "here"], "set history or input_file"),
        (["export", "--model_name_or_path", "here", "--output_dir", "."], "output_dir must be empty"),
        (["export", "--model_name_or_path", "here", "--output_dir", "file"], "output_dir file must be a folder"),
        (
            ["evaluate", "--model_name_or_path", "here", "--output_file", "file/a.json"],
            "the folder of output_file file must be a folder that can be written to",
        ),
        (
            ["recommend", "--model_name_or_path", "here", "--input_file", "a.csv", "--output_file", "file/a.parquet"],
            "the folder of output_file file must be a folder that can be written to",
        ),
        (["publish", "nowhere", "org/shop", "--dry_run"], "nowhere"),
    ],
)
def test_an_error_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"elastic-hf {arguments[0]}: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "command"), [("run_seqrec", "train"), ("publish", "publish"), ("export_onnx", "export")]
)
def test_a_script_is_its_command(script, command, monkeypatch, capsys):
    file = ROOT / "examples" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert not ended.value.code and f"usage: elastic-hf {command}" in capsys.readouterr().out


def test_the_script_offers_how_recipes_are_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("variant: null\nseed: 7\n")
    assert run_seqrec.read_arguments([str(tmp_path / "recipe.yaml")]) == ["--seed", "7"]


def test_missing_onnx_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "elastic_hf.commands.export", raising=False)
    assert main(["export", "--model_name_or_path", "here", "--output_dir", "there"]) == 1
    assert "error: elastic-hf export needs ONNX: pip install onnx onnxruntime onnxscript" in capsys.readouterr().err
