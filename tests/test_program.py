"""The frame of a program: options from YAML and the command line, one-line errors, exit codes, progress bars."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from saro.config import RWConfig, SRPOConfig, as_dict
from saro.errors import SaroError
from saro.evaluate.options import Options as EvaluateOptions
from saro.program import RunFlags, as_list, parse_recipe, parse_tool, progress_bar, run_program
from saro.synth.synth_options import Options as SynthOptions

ROOT = Path(__file__).resolve().parents[1]


def parse(*args: str):
    return parse_recipe(RWConfig, "rw.py", "Train.\nMore.", args)


def refusal(*args: str) -> str:
    """Return the one-line error that the arguments give."""
    with pytest.raises(SaroError) as caught:
        parse(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path):
    """Writes options to a YAML file and returns its name."""

    def write(text: str | bytes, name: str = "options.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


# Values


def test_without_arguments_all_options_have_their_defaults():
    assert parse() == (RWConfig(), RunFlags(resume=False, overwrite=False))


@pytest.mark.parametrize(
    ("args", "group", "name", "value"),
    [
        (["--train.lr", "1e-3"], "train", "lr", 1e-3),
        (["--train.lr=0.5"], "train", "lr", 0.5),
        (["--train.max_steps", "3"], "train", "max_steps", 3),
        (["--train.betas", "[0.8, 0.9]"], "train", "betas", (0.8, 0.9)),
        (["--model.method", "full"], "model", "method", "full"),
        (["--model.dropout", "true"], "model", "dropout", True),
        (["--data.heldout", "[a.jsonl, b.jsonl]"], "data", "heldout", ["a.jsonl", "b.jsonl"]),
        (["--data.heldout", "a.jsonl"], "data", "heldout", ["a.jsonl"]),
        (["--model.lora_targets", "q_proj"], "model", "lora_targets", ["q_proj"]),
        (["--train.trackers", "wandb"], "train", "trackers", ["wandb"]),
        (["--data.heldout", "[]"], "data", "heldout", []),
        (["--data.allow_overlap", "true"], "data", "allow_overlap", True),
        (["--data.weights", "{general: 1, safety: 2}"], "data", "weights", {"general": 1, "safety": 2}),
        (["--data.weights.safety", "0.5"], "data", "weights", {"safety": 0.5}),
        (["--data.think_tags", "[<a>, </a>]"], "data", "think_tags", ("<a>", "</a>")),
        (["--data.template_date", "2024-02-29"], "data", "template_date", "2024-02-29"),
        (
            ["--data.template_variables.enable_thinking", "true"],
            "data",
            "template_variables",
            {"enable_thinking": True},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value else None,
)
def test_an_option_on_the_command_line_arrives(args, group, name, value):
    config, _ = parse(*args)
    assert getattr(getattr(config, group), name) == value
    # Nothing else changes.
    expected = as_dict(RWConfig())
    expected[group][name] = list(value) if isinstance(value, tuple) else value
    assert as_dict(config) == expected


@pytest.mark.parametrize("config", [RWConfig, SRPOConfig])
@pytest.mark.parametrize(
    ("args", "train", "heldout"),
    [
        ((), ["demo"], ["demo"]),
        (("--data.train", "demo"), ["demo"], ["demo"]),
        (("--data.train", "a.jsonl"), ["a.jsonl"], []),
        (("--data.train", "[a.jsonl, b.jsonl]"), ["a.jsonl", "b.jsonl"], []),
        (("--data.train", "[demo, a.jsonl]"), ["demo", "a.jsonl"], []),
        (("--data.train", "a.jsonl", "--data.heldout", "demo"), ["a.jsonl"], ["demo"]),
        (("--data.train", "demo", "--data.heldout", "a.jsonl"), ["demo"], ["a.jsonl"]),
        (("--data.train", "demo", "--data.heldout", "[]"), ["demo"], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_the_demo_is_held_out_only_from_the_demo_unless_it_is_asked_for(config, args, train, heldout):
    data = parse_recipe(config, "rw.py", "Train.", args)[0].data
    assert (data.train, data.heldout) == (train, heldout)


def test_files_of_ones_own_in_a_yaml_file_hold_nothing_out(yaml_file):
    config, _ = parse("--config", yaml_file("data: {train: [a.jsonl]}"))
    assert config.data.heldout == []


def test_an_option_in_a_file_arrives(yaml_file):
    config, _ = parse("--config", yaml_file("train: {lr: 0.5}\ndata:\n  weights: {safety: 2}\n"))
    assert (config.train.lr, config.data.weights) == (0.5, {"safety": 2})
    assert config.train.seed == RWConfig().train.seed


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_flags_take_no_value(flag):
    assert getattr(parse(f"--{flag}")[1], flag) is True


@pytest.mark.parametrize("order", [1, -1], ids=["file first", "file last"])
def test_the_command_line_overrides_the_file_in_any_order(yaml_file, order):
    path = yaml_file("train: {lr: 0.5, seed: 3}")
    for config_args in (["--config", path], [f"--config={path}"]):
        args = [config_args, ["--train.lr", "0.25"]][::order]
        config, _ = parse(*args[0], *args[1])
        assert (config.train.lr, config.train.seed) == (0.25, 3)


def test_the_later_of_two_files_wins(yaml_file):
    one, two = yaml_file("train: {lr: 0.5, seed: 3}", "one.yaml"), yaml_file("train: {lr: 0.25}", "two.yaml")
    config, _ = parse("--config", one, "--config", two)
    assert (config.train.lr, config.train.seed) == (0.25, 3)


def test_the_printed_config_can_be_given_back(yaml_file, capsys):
    args = ["--train.lr", "0.5", "--data.weights", "{safety: 2}", "--model.lora_targets", "[q_proj]", "--resume"]
    with pytest.raises(SystemExit) as ended:
        parse(*args, "--print_config")
    assert ended.value.code == 0
    assert parse("--config", yaml_file(capsys.readouterr().out)) == parse(*args)


def test_the_config_of_a_run_can_be_given_back(yaml_file):
    config, _ = parse("--train.lr", "0.5", "--data.think_tags", "[<a>, </a>]")
    assert parse("--config", yaml_file(yaml.safe_dump(as_dict(config))))[0] == config


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_of_the_repository_are_valid(path):
    given = yaml.safe_load(path.read_text())
    if path.stem.endswith("_evaluate"):
        options = parse_tool(EvaluateOptions, "evaluate.py", "Evaluate.", ["--config", str(path), "--models", "[demo]"])
    elif path.stem.endswith("_synth"):
        options = parse_tool(SynthOptions, "synth.py", "Make data.", ["op", "--config", str(path)])
    else:
        options = parse("--config", str(path))[0]
        assert options.train.lr == given["train"]["lr"]
    assert as_dict(options).keys() >= given.keys()


def test_help_names_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for group, options in as_dict(RWConfig()).items():
        for name in options:
            assert f"--{group}.{name} " in text
    assert "Maximum number of tokens in one forward pass" in text
    assert "Peak learning rate" in text


# Mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hlep"], "unknown option --hlep; did you mean --help?"),
        (["--train.lrr", "1"], "unknown option --train.lrr; did you mean --train.lr?"),
        (["--train.lrr=1"], "unknown option --train.lrr; did you mean --train.lr?"),
        (["--trian.lr", "1"], "unknown option --trian.lr; did you mean --train.lr?"),
        (["--train.max-steps", "1"], "unknown option --train.max-steps; it is spelled --train.max_steps"),
        (["--max-steps", "1"], "unknown option --max-steps; it is spelled --train.max_steps"),
        (["--lr=1"], "unknown option --lr; it is spelled --train.lr"),
        (["--model", "org/m"], "unknown option --model; it is spelled --model.name"),
        (["--data", "x.jsonl"], "unknown option --data; it is spelled --data.train"),
        (["--train", "x.jsonl"], "unknown option --train; it is spelled --data.train"),
        (["--train.learning_rate", "1"], "unknown option --train.learning_rate; it is spelled --train.lr"),
        (["--learning-rate=1"], "unknown option --learning-rate; it is spelled --train.lr"),
        (["--load_in_4bit"], "unknown option --load_in_4bit; it is spelled --model.method qlora"),
        (["--beta", "1"], "unknown option --beta; see rw.py --help"),
        (["--train.batch", "1"], "unknown option --train.batch; see rw.py --help"),
        (["--data.train", "a", "b"], "--data.train takes one value; write several as --data.train '[a, b]'"),
        (["--data.train=a", "b"], "--data.train takes one value; write several as --data.train '[a, b]'"),
        (["--model.lora_rnk", "1"], "unknown option --model.lora_rnk; did you mean --model.lora_rank?"),
        (["--resmue"], "unknown option --resmue; did you mean --resume?"),
        (["stray"], "unknown option stray"),
        (["--resume", "yes"], "unknown option yes"),
    ],
)
def test_an_unknown_option_names_the_nearest(args, message):
    assert refusal(*args) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lrr: 1}", "unknown option train.lrr; did you mean train.lr?"),
        ("train:\n  max-steps: 1", "unknown option train.max-steps; it is spelled train.max_steps"),
        ("trian: {lr: 1}", "unknown option trian.lr; did you mean train.lr?"),
        ("lr: 1", "unknown option lr; it is spelled train.lr"),
        ("train: {learning_rate: 1}", "unknown option train.learning_rate; it is spelled train.lr"),
        ("trian.lr: 1", "unknown option trian.lr; did you mean train.lr?"),
        ("model: {nme: x}", "unknown option model.nme; did you mean model.name?"),
        ("resmue: true", "unknown option resmue; did you mean resume?"),
    ],
)
def test_an_unknown_option_in_a_file_names_the_nearest(yaml_file, text, message):
    assert refusal("--config", yaml_file(text)) == message


def test_an_unknown_option_without_a_near_one_names_none():
    assert refusal("--qqq") == "unknown option --qqq; see rw.py --help"


@pytest.mark.parametrize(
    "name",
    ["per_device_train_batch_size", "gradient_accumulation_steps", "max_seq_length", "lora_r", "output_dir", "beta"],
)
def test_a_name_from_another_library_leads_to_an_option_of_the_recipe(name):
    with pytest.raises(SaroError) as caught:
        parse_recipe(SRPOConfig, "srpo.py", "", [f"--{name}", "1"])
    group, option = str(caught.value).partition("; it is spelled --")[2].split(".")
    assert option in as_dict(SRPOConfig())[group]


@pytest.mark.parametrize("args", [["--train.l", "1"], ["--train.max", "3"], ["--res"], ["--conf", "x.yaml"]])
def test_options_may_not_be_abbreviated(args):
    assert refusal(*args).startswith(f"unknown option {args[0]}")


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("train.lr", "fast", "float"),
        ("train.seed", "1.5", "int"),
        ("train.max_steps", "some", "int"),
        ("train.betas", "[0.9]", "tuple with 2 elements"),
        ("model.dropout", "maybe", "bool"),
        ("model.gradient_checkpointing", "some", "'auto'"),
        ("data.weights", "5", "dict"),
        ("data.weights", "{general: much}", "float"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_option_and_its_type(yaml_file, option, value, wanted):
    group, name = option.split(".")
    text = yaml.safe_dump({group: {name: yaml.safe_load(value)}})
    for message in (refusal(f"--{option}", value), refusal("--config", yaml_file(text))):
        assert re.match(f"--{option}: Expected (an?|one of) ", message)
        assert wanted in message


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("auto", "auto"), ("1", 1), ("0", 0), ("20", 20)]
)
def test_recomputation_is_on_or_off_or_automatic_or_a_number_of_layers(yaml_file, text, value):
    file = yaml_file(f"model: {{gradient_checkpointing: {text}}}")
    for args in (["--model.gradient_checkpointing", text], ["--config", file]):
        parsed = parse_recipe(RWConfig, "rw.py", "", args)[0].model.gradient_checkpointing
        assert parsed == value
        assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model.method", "QLoRA", "--model.method is QLoRA; it must be full, lora or qlora"),
        ("data.too_long", "cut", "--data.too_long is cut; it must be error or drop"),
        ("train.lr", "-1", "train.lr is -1.0; it must be above 0"),
        ("train.lr", "0", "train.lr is 0.0; it must be above 0"),
        ("train.max_steps", "0", "train.max_steps is 0; it must be at least 1"),
        ("train.warmup", "2", "train.warmup is 2.0; it must be a share of the steps, 0 to 1"),
        ("train.warmup_steps", "-1", "train.warmup_steps is -1; it must be at least 0"),
        ("train.min_lr", "1", "train.min_lr is 1.0; it must be 0 to train.lr (0.0002)"),
        ("model.lora_dropout", "1", "model.lora_dropout is 1.0; it must be at least 0 and below 1"),
        ("model.lora_rank", "0", "model.lora_rank is 0; it must be at least 1"),
        ("data.pack_tokens", "1", "data.pack_tokens is 1; it must be at least 2"),
        ("data.train", "[]", "data.train names no file; give one or more"),
        ("data.weights", "{safty: 2}", "data.weights: unknown kind 'safty'; did you mean safety?"),
        ("data.weights", "{safety: -1}", "data.weights: safety is -1.0; it must be at least 0, and finite"),
        ("data.weights", "{safety: .nan}", "data.weights: safety is nan; it must be at least 0, and finite"),
        ("data.weights", "{safety: .inf}", "data.weights: safety is inf; it must be at least 0, and finite"),
        (
            "train.run_name",
            "mine",
            "train.run_name is for trackers, and there are none; name one with --train.trackers",
        ),
        (
            "train.track_samples",
            "true",
            "train.track_samples is for trackers, and there are none; name one with --train.trackers",
        ),
        ("data.think_tags", "[<a>, <a>]", "data.think_tags must be two different tags"),
    ],
)
def test_a_value_that_a_check_refuses_is_one_line(yaml_file, option, value, message):
    assert refusal(f"--{option}", value) == message
    group, name = option.split(".")
    assert refusal("--config", yaml_file(f"{group}: {{{name}: {value}}}")) == message


def test_an_option_of_adapters_is_refused_if_all_weights_are_trained():
    assert refusal("--model.method", "full", "--model.lora_rank", "4") == (
        "model.lora_rank is for adapters, and --model.method is full; leave it out"
    )


def test_an_option_without_its_value_is_refused():
    assert refusal("--train.seed") == "argument --train.seed: expected one argument"


def test_a_missing_file_is_named(tmp_path):
    expected = (
        f"--config: there is no file {tmp_path}/none.yaml; correct the path, or leave --config out for the defaults"
    )
    assert refusal("--config", str(tmp_path / "none.yaml")) == expected


def test_a_folder_is_no_file(tmp_path):
    assert refusal("--config", str(tmp_path)) == f"--config: Path is not a file: '{tmp_path}'"


def test_config_without_a_file_is_refused():
    assert refusal("--train.lr", "1", "--config") == "argument --config: expected one argument"


def test_a_file_that_is_no_yaml_says_at_which_line(yaml_file):
    assert "line 2, column 1" in refusal("--config", yaml_file("train: [1\n"))


@pytest.mark.parametrize("text", ["", "# lr: 1\n", "- train\n", "train\n", "5"])
def test_a_file_without_options_is_refused(yaml_file, text):
    expected = "--config: the file holds no options; write them as group: {option: value}"
    assert refusal("--config", yaml_file(text)) == expected


def test_a_file_that_is_not_utf8_is_refused(yaml_file):
    assert refusal("--config", yaml_file(b"train: {output: \xff}")) == "--config: the file is not UTF-8; convert it"


@pytest.mark.parametrize("value", ["5", "null", "[1]"])
def test_a_group_that_holds_no_options_is_refused(yaml_file, value):
    message = refusal("--config", yaml_file(f"model: {{name: x}}\ntrain: {value}\n"))
    assert re.fullmatch(r"train is (5|None|\[1\]); it must hold options, such as \{option: value\}", message)


@pytest.mark.parametrize("option", ["train.lr", "train.seed", "data.pack_tokens", "data.train", "data.weights"])
def test_an_option_whose_value_was_left_out_is_refused(yaml_file, option):
    group, name = option.split(".")
    expected = f"--{option} has no value; give one or leave the option out"
    assert refusal("--config", yaml_file(f"{group}:\n  {name}:\n")) == expected


@pytest.mark.parametrize("option", ["train.max_steps", "data.chat_template", "model.lora_targets", "model.revision"])
def test_an_option_that_may_have_no_value_may_be_null(yaml_file, option):
    group, name = option.split(".")
    for args in ([f"--{option}", "null"], ["--config", yaml_file(f"{group}:\n  {name}:\n")]):
        assert getattr(getattr(parse(*args)[0], group), name) is None


def test_a_flag_in_a_file_is_true_or_false(yaml_file):
    assert parse("--config", yaml_file("resume: true"))[1] == RunFlags(resume=True, overwrite=False)
    assert refusal("--config", yaml_file("resume: maybe")) == "resume is 'maybe'; it must be true or false"


# The frame of a program


def ended(main, capsys) -> tuple[int, str]:
    """Return exit code and standard error."""
    with pytest.raises(SystemExit) as caught:
        run_program(main)
    captured = capsys.readouterr()
    assert captured.out == ""
    return caught.value.code, captured.err


def raises(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_program_ends_with_its_code(code, capsys):
    assert ended(lambda: code, capsys) == (code, "")


def test_an_error_that_a_user_can_fix_is_one_line_and_exit_code_2(capsys):
    assert ended(raises(SaroError("a.jsonl:3: wrong; fix it")), capsys) == (2, "error: a.jsonl:3: wrong; fix it\n")


def test_a_refused_option_ends_a_program_with_code_2(capsys):
    assert ended(lambda: parse("--hlep"), capsys) == (2, "error: unknown option --hlep; did you mean --help?\n")


def test_an_error_on_another_rank_says_on_which(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert ended(raises(SaroError("wrong")), capsys) == (2, "[rank 3] error: wrong\n")


def test_rank_0_is_not_named(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert ended(raises(SaroError("wrong")), capsys) == (2, "error: wrong\n")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."), "CUDA out of memory. Tried"),
        (MemoryError(), "(host)"),
    ],
    ids=["gpu", "host"],
)
def test_out_of_memory_is_one_line_that_names_the_pack_size(error, shown, capsys):
    code, text = ended(raises(error), capsys)
    assert code == 2
    assert text.startswith("error: out of memory (")
    assert shown in text
    assert "lower --data.pack_tokens, or set --model.gradient_checkpointing true" in text
    assert "--model.method" not in text, "a resumed run may not change it"
    assert text.count("\n") == 1


def test_an_interrupted_program_ends_as_shells_expect(capsys):
    assert ended(raises(KeyboardInterrupt()), capsys) == (130, "")


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_program(raises(ZeroDivisionError()))


def test_a_misspelt_option_of_the_recipe_is_one_line_and_exit_code_2(environment, tmp_path):
    command = [sys.executable, str(ROOT / "recipes/rw.py"), "--hlep"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert (done.stdout, done.stderr) == ("", "error: unknown option --hlep; did you mean --help?\n")
    assert list(tmp_path.iterdir()) == []


# Small helpers


class Screen(io.StringIO):
    """A stderr that may be a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("terminal", "shown", "visible"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_progress_bar_shows_only_on_a_terminal(monkeypatch, terminal, shown, visible):
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    bar = progress_bar([1, 2], "scoring", "packs", shown=shown)
    assert bar.disable is not visible
    assert list(bar) == [1, 2]
    # Shorter than two seconds: nothing is drawn.
    assert screen.getvalue().strip() == ""


def test_a_progress_bar_without_items_has_a_total(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Screen(True))
    with progress_bar(None, "reference", "pairs", total=5) as bar:
        bar.update(2)
        assert (bar.n, bar.total, bar.unit) == (2, 5, " pairs")


def test_one_name_is_a_list_of_one():
    assert (as_list("a.jsonl"), as_list(["a", "b"])) == (["a.jsonl"], ["a", "b"])
