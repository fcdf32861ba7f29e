"""Refuse what a launcher asks for and a run would not do: `accelerate launch` passes its configuration as variables."""

from __future__ import annotations

from collections.abc import Mapping

from saro.errors import SaroError

# Kinds of parallelism besides DDP, by the variable that asks for them. A parallelism config holds tensor, context and
# sequence parallelism; accelerate accepts it only beside FSDP or DeepSpeed, whose names say more: they come first.
_OTHER_PARALLELISM = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor, context or sequence parallelism)",
}


# Settings of FSDP2 that a run would not follow: the value that asks for something else, and what to do instead.
_FSDP_SETTINGS = {
    "FSDP_OFFLOAD_PARAMS": ("true", "fsdp_offload_params true", "set it to false"),
    "FSDP_RESHARD_AFTER_FORWARD": ("false", "fsdp_reshard_after_forward false", "set it to true"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "true",
        "fsdp_activation_checkpointing true",
        "set it to false, and give --model.gradient_checkpointing true",
    ),
}


def check_launcher(environment: Mapping[str, str]) -> None:
    """Check what `accelerate launch` and its configuration ask for, before a library acts on it.

    Mixed precision "bf16" passes although it changes nothing: --model.dtype computes in bfloat16 too.

    Args:
        environment: the variables of this process.

    Raises:
        SaroError: they ask for another parallelism than DDP or FSDP2, a dynamo backend, or a precision that no option gives.
    """
    for variable, name in _OTHER_PARALLELISM.items():
        if environment.get(variable, "").lower() == "true":
            if name == "FSDP" and environment.get("FSDP_VERSION") == "2":
                _check_fsdp(environment)
                continue
            raise SaroError(
                f"accelerate is configured for {name}, and only data parallelism (DDP) and FSDP2 are supported; set "
                "distributed_type to MULTI_GPU in its configuration (accelerate config), or to 'NO' for one process"
                + (", or fsdp_version to 2" if name == "FSDP" else "")
            )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise SaroError(
            f"accelerate is configured to compile the model (dynamo backend {backend.lower()}), which is not supported; "
            "leave dynamo_config out of its configuration, or give accelerate launch --dynamo_backend no"
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise SaroError(
            f"accelerate is configured for mixed precision {precision}, which is not supported; set mixed_precision to "
            "'no' in its configuration, or give accelerate launch --mixed_precision no, and choose with --model.dtype"
        )


def asks_for_fsdp(environment: Mapping[str, str]) -> bool:
    """Return True if `accelerate launch` is configured for FSDP2."""
    return environment.get("ACCELERATE_USE_FSDP", "").lower() == "true" and environment.get("FSDP_VERSION") == "2"


def _check_fsdp(environment: Mapping[str, str]) -> None:
    """Raise SaroError for a setting of FSDP2 that a run would not follow. Others change nothing that it computes."""
    for variable, (asked, setting, fix) in _FSDP_SETTINGS.items():
        if environment.get(variable, "").lower() == asked:
            raise SaroError(f"accelerate is configured for FSDP2 with {setting}, which is not supported; {fix}")
