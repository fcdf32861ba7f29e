"""Tests that a run refuses the parallelism, compilation and precision that accelerate is configured for but saro has not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands import launch as launcher
from accelerate.commands.config.config_args import ClusterConfig

from saro.distributed.check_launcher import check_launcher
from saro.errors import SaroError

ROOT = Path(__file__).parents[2]
FSDP = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_offload_params": False,
    "fsdp_sync_module_states": True,
}
OFFLOAD = {"fsdp_offload_params": True}
MEGATRON = {"megatron_lm_tp_degree": 1, "megatron_lm_pp_degree": 1, "megatron_lm_gradient_clipping": 1.0}


def config_file(folder: Path, distributed_type: str, **options: object) -> Path:
    """Write a configuration with accelerate's own writer, as `accelerate config` does."""
    given = {"mixed_precision": "no", "use_cpu": False, "debug": False, "num_processes": 1, "main_process_port": 0}
    config = ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type=distributed_type, **(given | options))
    config.to_yaml_file(folder / "accelerate.yaml")
    return folder / "accelerate.yaml"


def variables_of_launch(monkeypatch: pytest.MonkeyPatch, file: Path) -> dict[str, str]:
    """Return the environment in which `accelerate launch` would start a recipe. It starts none."""
    started: list[dict[str, str]] = []
    prepare_one, prepare_several = launcher.prepare_simple_launcher_cmd_env, launcher.prepare_multi_gpu_env
    monkeypatch.setattr(launcher, "simple_launcher", lambda args: started.append(prepare_one(args)[1]))
    monkeypatch.setattr(launcher, "multi_gpu_launcher", lambda args: started.append(prepare_several(args)))
    parser = launcher.launch_command_parser()
    launcher.launch_command(parser.parse_args(["--config_file", str(file), "recipes/rw.py"]))
    (variables,) = started
    return variables


def launch(file: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "recipes/rw.py"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("distributed_type", "options", "named"),
    [
        ("FSDP", {"fsdp_config": {"fsdp_version": 1} | FSDP}, "accelerate is configured for FSDP, "),
        ("FSDP", {"fsdp_config": {"fsdp_version": 2} | FSDP | OFFLOAD}, "FSDP2 with fsdp_offload_params true, "),
        ("MEGATRON_LM", {"megatron_lm_config": MEGATRON}, "accelerate is configured for Megatron-LM, "),
        ("NO", {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "(dynamo backend inductor)"),
        ("NO", {"mixed_precision": "fp16"}, "mixed precision fp16"),
    ],
    ids=["FSDP", "FSDP2 with offloading", "Megatron-LM", "dynamo", "fp16"],
)
def test_a_configuration_that_a_run_would_ignore_is_refused_by_name(
    distributed_type, options, named, recipes, rw_arguments, tmp_path, monkeypatch
):
    """The launcher passes them on without a word, and each rank would train its own copy."""
    variables = variables_of_launch(monkeypatch, config_file(tmp_path, distributed_type, **options))
    done = recipes.run(*rw_arguments(), environment=variables)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert "which is not supported; " in line or "only data parallelism (DDP) and FSDP2 are supported; " in line
    assert not (tmp_path / "run").exists()


def test_the_launcher_itself_ends_with_that_error(rw_arguments, tmp_path, environment):
    file = config_file(tmp_path, "FSDP", fsdp_config={"fsdp_version": 1} | FSDP)
    done = launch(file, rw_arguments(), environment)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "accelerate is configured for FSDP, " in line
    assert not (tmp_path / "run").exists()


def test_a_deepspeed_configuration_never_trains(rw_arguments, tmp_path, environment):
    """Where DeepSpeed is not installed, accelerate itself refuses first."""
    file = config_file(tmp_path, "DEEPSPEED", deepspeed_config={"zero_stage": 2, "gradient_accumulation_steps": 1})
    done = launch(file, rw_arguments(), environment)
    assert done.returncode != 0
    assert "DeepSpeed" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "configured for DeepSpeed, "),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "True"}, "configured for DeepSpeed, "),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "configured for a parallelism_config (tensor, context or sequence parallelism), ",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_FP8_BACKEND": "TE"}, "mixed precision fp8, "),
    ],
    ids=["DeepSpeed", "DeepSpeed on a CPU", "tensor parallelism", "fp8"],
)
def test_the_variables_of_the_launcher_are_refused_before_a_missing_package_is_imported(
    variables, named, recipes, rw_arguments, tmp_path
):
    done = recipes.run(*rw_arguments(), environment=variables)
    assert done.code == 2, done.err
    assert done.err.startswith("error: accelerate is configured for ")
    assert named in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_two_ranks_under_deepspeed_each_end_in_one_line(recipes, rw_arguments, tmp_path):
    variables = {"ACCELERATE_USE_DEEPSPEED": "true"}
    ranks = recipes.run_ranks(2, *rw_arguments(), variables=variables)
    assert [p.code for p in ranks] == [2, 2]
    assert ranks[0].err.startswith("error: accelerate is configured for DeepSpeed, ")
    assert ranks[1].err == f"[rank 1] {ranks[0].err}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "False"},
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "False"},
    ],
    ids=["no launcher", "accelerate launch", "bf16", "switched off"],
)
def test_data_parallelism_and_its_precisions_pass(variables):
    check_launcher(variables)


def test_a_switch_is_read_as_accelerate_reads_it():
    with pytest.raises(SaroError, match="DeepSpeed"):
        check_launcher({"ACCELERATE_USE_DEEPSPEED": "TRUE"})


def test_a_configuration_for_fsdp2_shares_the_weights(rw_arguments, tmp_path, environment):
    """Without any option of ours."""
    options = {"fsdp_config": {"fsdp_version": 2} | FSDP, "num_machines": 1, "use_cpu": True}
    file = config_file(tmp_path, "FSDP", **(options | {"num_processes": 2}))
    done = launch(file, rw_arguments(train_max_steps=1), environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_000001" / "parts").is_dir()
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
