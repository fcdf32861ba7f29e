"""`saro export`: a run's model in the form that other programs load, verified by scoring records with the written files."""

from __future__ import annotations

import fnmatch
import gc
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from transformers import GenerationConfig
from transformers.utils import cached_file

import saro
from saro.checks.deviation import Deviation, choose_records
from saro.checks.noise import fitting_trees, layout_noise
from saro.config import DEMO, check_at_least
from saro.data.read_rows import hash_rows, is_hub
from saro.data.tree import SequenceTree
from saro.demo import data_files
from saro.errors import SaroError
from saro.files import atomic_folder, file_hash
from saro.model.architectures import OUTSIDE_TEXT_MODEL, WRAPPERS, auto_class, is_quantized
from saro.model.load import dtype_name, load_policy
from saro.model.merge import merge
from saro.model.policy import Policy
from saro.model.score import score_natively, score_trees
from saro.model.source import find_model
from saro.program import as_list
from saro.runs.finish import save_final
from saro.runs.finished import FinishedRun, this_device
from saro.runs.model_card import make_card

# Written into every export: what it was made from and its deviation. --overwrite replaces only folders that hold it.
NOTE = "export.json"
# Files by which a multimodal model's processor is loaded.
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class Options:
    """Options of `saro export`.

    Attributes:
        run: Folder of a finished run.
        merge: Merge the adapter into its base: a plain model for programs that do not load adapters.
        into: For QLoRA runs: weights that the adapter is merged into. Default dequantized, the weights it was trained on;
            original are those of the base model before it was quantized, which a base that was saved in 4 bits lacks.
        allow_shift: Write a merge --into original however far it is from the trained model.
        dtype: Dtype of the weights of a merged or full model; auto is the base model's.
        output: Folder to write; default RUN/export.
        overwrite: Replace an existing export.
        push: Upload the export to this repository of the hub, ORG/NAME, which is made private if it does not exist.
        public: Make a new repository public.
        data: JSONL file or files to verify with; default: the run's held-out records, or its training records if it has
            no others.
        records: How many records are scored to verify the export.
    """

    run: str
    merge: bool = False
    into: Literal["dequantized", "original"] | None = None
    allow_shift: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    output: str | None = None
    overwrite: bool = False
    push: str | None = None
    public: bool = False
    data: list[str] | str | None = None
    records: int = 16

    def __post_init__(self) -> None:
        if self.allow_shift and self.into != "original":
            raise SaroError("--allow_shift goes with --into original: only there is a shift expected")
        if self.public and self.push is None:
            raise SaroError("--public is for a repository of the hub; name it with --push ORG/NAME")
        check_at_least(self, "--", 1, "records")


def run(options: Options, console: Console) -> int:
    """Write a run's model in the form that other programs load, verified by scoring records with it.

    Raises:
        SaroError: as ``export`` does.
    """
    if options.push is not None:
        # Before the long work.
        has_adapter = (Path(options.run).expanduser() / "final" / "adapter_config.json").is_file()
        check_push(options.push, is_adapter=has_adapter and not options.merge)
    console.out(export(options, lambda line: print(line, file=sys.stderr, flush=True)), highlight=False)
    if options.push is not None:
        console.out(push(options), highlight=False)
    return 0


def check_push(repository: str, *, is_adapter: bool) -> None:
    """Check that a name is one of a repository that can take the export, and that somebody is logged in to the hub.

    Raises:
        SaroError: it is not, nobody is, the hub cannot be reached, or the repository holds an adapter and the export is a
            whole model, or the reverse: transformers would load the adapter on top of the model.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise SaroError(f"--push {repository}: is not the name of a repository; write it as ORG/NAME") from error
    if huggingface_hub.get_token() is None:
        raise SaroError("--push needs an account of the hub: log in with hf auth login, or set HF_TOKEN")
    try:
        files = huggingface_hub.list_repo_files(repository)
    except RepositoryNotFoundError:
        return
    except (HTTPError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SaroError(
            f"--push {repository}: cannot be looked at ({first}); leave --push out, or try again"
        ) from error
    # They are not deleted here: they may be somebody's only copy.
    other = "model*.safetensors" if is_adapter else "adapter_*"
    if found := fnmatch.filter(files, other):
        raise SaroError(
            f"--push {repository}: holds {found[0]}, and transformers would load an adapter on top of a model in one "
            "repository; delete it there, or give another repository"
        )


def push(options: Options) -> str:
    """Upload an export, and return one line about it. Files of other names in the repository stay.

    Raises:
        SaroError: the hub refuses it or cannot be reached; the export is still there.
    """
    target = _target(options)
    try:
        private = not options.public
        huggingface_hub.create_repo(options.push, private=private, exist_ok=True)
        message = f"Export by saro {saro.__version__}"
        huggingface_hub.upload_folder(repo_id=options.push, folder_path=target, commit_message=message)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SaroError(
            f"--push {options.push}: not uploaded ({first}); the export is in {target}, hf upload sends it"
        ) from error
    return f"uploaded to https://huggingface.co/{options.push}"


def export(options: Options, say: Callable[[str], None]) -> str:
    """Write a run's model and verify what was written. If that fails, the target is as it was.

    Args:
        say: receives a line for the user before each part that may take long.

    Returns:
        One line: what was written, how far it is off, and how to load it.

    Raises:
        SaroError: there is no finished run, its base or its records are gone or changed, the target exists, or the
            export is off by more than a tenth of what training changed and more than rounding explains.
    """
    run = FinishedRun.open(options.run)
    # liger-kernel's rotary embedding would stay for the written model, which other programs compute without it.
    run = replace(run, options=replace(run.options, liger=False))
    if not options.merge and not run.is_full:
        if options.into is not None:
            raise SaroError("--into is for a merged model; add --merge")
        if options.dtype != "auto":
            raise SaroError("--dtype is for a merged model; add --merge")
    if options.into == "original" and is_quantized(run.source.config):
        raise SaroError(
            f"{run.source.path}: was saved in 4 bits and holds no original weights; leave --into original out: the "
            "adapter is then merged into the dequantized weights, on which it was trained"
        )
    target = _target(options)
    _check_target(target, options.overwrite)
    pack_tokens = run.manifest["config"]["data"]["pack_tokens"]
    files = data_files(as_list(options.data), "rw_heldout") if options.data else run_files(run)
    trees = choose_records(files, run.chat_format(), pack_tokens, options.records)
    job = _Export(run, options, trees, pack_tokens, this_device(), say)
    with atomic_folder(target, replace=target.is_dir()) as temp:
        try:
            kind, deviation = job.write_model(temp) if run.is_full or options.merge else job.write_adapter(temp)
        except torch.OutOfMemoryError as error:
            raise SaroError(
                f"{target}: not written, the GPU has too little memory; set CUDA_VISIBLE_DEVICES= (to nothing) for the CPU"
            ) from error
        if not deviation.is_allowed and not (options.allow_shift and math.isfinite(deviation.shift)):
            raise SaroError(f"{target}: not written, it is off by {deviation}; {job.suggest_fix(kind)}")
        weights = {file.name: file_hash(file) for file in sorted((run.folder / "final").glob("*.safetensors"))}
        note = {"saro": saro.__version__, "holds": kind, "made_from": weights}
        (temp / NOTE).write_text(json.dumps(note | asdict(deviation), indent=2) + "\n")
        title = options.push or target.resolve().name
        card = make_card(run, title, kind, str(deviation), _loader(run, options, title))
        (temp / "README.md").write_text(card, encoding="utf-8")
    return f"{target}: {kind}, off by {deviation}; load it with {_loader(run, options, str(target))}"


def _target(options: Options) -> Path:
    return Path(options.output or Path(options.run) / "export").expanduser()


def run_files(run: FinishedRun) -> list[str]:
    """Return the run's held-out files, or its training files if it has no others.

    Raises:
        SaroError: a file has changed since the run read it, or is gone.
    """
    data, hashes = run.manifest["config"]["data"], run.manifest["data"]
    split = "heldout" if data["heldout"] else "train"
    # The demo files are in the package, wherever that is now; the manifest has their stage in their old path.
    demo = next((f for f in hashes if Path(f).stem in (f"rw_{split}", f"srpo_{split}")), "")
    files = data_files(data[split], Path(demo).stem)
    for name, file in zip(data[split], files, strict=True):
        is_here = is_hub(file) or Path(file).is_file()
        if not is_here or hash_rows(file) != hashes.get(demo if name == DEMO else name):
            state = "has changed since the run read it" if is_here else "is not here any more"
            raise SaroError(f"{file}: {state}; restore it, or verify the export with other records: --data FILE")
    return files


@dataclass(frozen=True)
class _Export:
    """The parts of one export. At most one model is in memory at a time."""

    run: FinishedRun
    options: Options
    trees: Sequence[SequenceTree]
    pack_tokens: int
    device: torch.device
    say: Callable[[str], None]

    def write_adapter(self, folder: Path) -> tuple[str, Deviation]:
        """Copy the adapter and its tokenizer, and score with the copy. Return the name of what was written, and its deviation."""
        policy, trained, base, _ = self._load_and_score()
        del policy
        _free_memory()
        shutil.copytree(self.run.folder / "final", folder, dirs_exist_ok=True)
        self.say("loading the copy")
        options = replace(self.run.options, name=str(folder))
        exported = self._score(load_policy(find_model(options), options, self.device, seed=0).eval())
        # Same weights in the same packs: rounding cannot differ.
        return "adapter", Deviation.of(exported, trained, base, 0.0, len(self.trees))

    def write_model(self, folder: Path) -> tuple[str, Deviation]:
        """Write a plain model, and score with the files. Return the name of what was written, and its deviation."""
        run, base_source = self.run, self.run.base()[0]
        dtype = getattr(torch, self.options.dtype, None) or base_source.config.dtype or torch.float32
        policy, trained, base, noise = self._load_and_score()
        if run.options.method == "qlora" and self.options.into == "original":
            del policy
            _free_memory()
            # Load in a dtype at least as wide as the files'.
            stored = "bfloat16" if base_source.config.dtype == torch.bfloat16 else "float32"
            self.say("loading the base model without quantization")
            policy = load_policy(run.source, replace(run.options, method="lora", dtype=stored), torch.device("cpu"), 0)
        model = merge(policy, run.source.config, dtype)
        del policy
        _free_memory()
        generation = _find_file(base_source.path, "generation_config.json", run.options.revision)
        if generation is not None:
            # Copy the base's file below: transformers cannot save every generation config that it can load.
            model.generation_config = GenerationConfig()
        self.say("writing the model")
        save_final(folder, model, run.source.tokenizer)
        if generation is not None:
            shutil.copyfile(generation, folder / "generation_config.json")
        for name in _PROCESSOR if run.source.config.model_type in WRAPPERS else ():
            file = _find_file(base_source.path, name, run.options.revision)
            if file is not None:
                shutil.copyfile(file, folder / name)
        del model
        _free_memory()
        self.say("loading what was written")
        model = auto_class(run.source.config).from_pretrained(
            folder, dtype="auto", device_map={"": self.device}, trust_remote_code=run.options.trust_remote_code
        )
        exported = score_natively(model, self.trees)
        return f"model in {dtype_name(dtype)}", Deviation.of(exported, trained, base, noise, len(self.trees))

    def suggest_fix(self, kind: str) -> str:
        """Return the advice for an export that is too far off."""
        if self.run.options.method == "qlora" and self.options.into == "original":
            return "leave --into original out, or accept the shift with --allow_shift"
        if kind.endswith("float16"):
            return f"the {kind} rounds away too much: set --dtype float32"
        return "report it"

    def _load_and_score(self) -> tuple[Policy, torch.Tensor, torch.Tensor, float]:
        """Load the trained model. Return it, its log-probs, those of the base model, and the noise of the former."""
        run = self.run
        self.say(f"scoring {len(self.trees)} records as trained and before training")
        if run.is_full:
            base = self._score(run.load_base(self.device))
            # Free the base before loading the trained model.
            _free_memory()
            policy = run.load(self.device)
        else:
            policy = run.load(self.device)
            with policy.model.disable_adapter():
                base = self._score(policy)
        noise = layout_noise(policy, fitting_trees(self.trees, self.pack_tokens), self.pack_tokens)
        # Other programs may round each logit to the dtype of the products.
        rounding = torch.finfo(policy.compute_dtype).eps * np.abs(noise.logps).mean()
        return policy, self._score(policy), base, max(noise.mean, rounding)

    def _score(self, policy: Policy) -> torch.Tensor:
        return score_trees(policy, self.trees, self.pack_tokens)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise SaroError(f"{target}: exists already; add --overwrite, or give another folder with --output")
    if not (target / NOTE).is_file():
        raise SaroError(f"{target}: is not an export (no {NOTE}); give another folder with --output")


def _loader(run: FinishedRun, options: Options, target: str) -> str:
    """Return the Python call that loads the export from a folder or a repository."""
    config = run.source.config
    plain = auto_class(config).__name__
    if run.is_full or options.merge:
        return f"{plain}.from_pretrained({target!r})"
    if run.options.method != "qlora" or is_quantized(config):
        quantization = ""
    else:
        nf4 = "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True"
        # As in training, the other parts of a multimodal model stay as they are.
        skipped = (
            f", llm_int8_skip_modules={['lm_head', OUTSIDE_TEXT_MODEL]!r}" if config.model_type in WRAPPERS else ""
        )
        quantization = f", quantization_config={nf4}{skipped})"
    if config.model_type in WRAPPERS:
        commit = run.manifest["model"].get("commit")
        revision = f", revision={commit!r}" if commit else ""
        base = f"{plain}.from_pretrained({run.source.path!r}{revision}{quantization})"
        return f"PeftModel.from_pretrained({base}, {target!r})"
    return f"AutoPeftModelForCausalLM.from_pretrained({target!r}{quantization})"


def _find_file(model: str, name: str, revision: str | None) -> str | None:
    """Return a file in a folder or of a hub model, or None if it has none."""
    try:
        return cached_file(model, name, revision=revision)
    except OSError:
        return None


def _free_memory() -> None:
    # PEFT's models hold reference cycles, which only the collector frees.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
