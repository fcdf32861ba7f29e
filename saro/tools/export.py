"""`saro export`: a run's model as others load it, verified by scoring records with the files that were written."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import cached_file

import saro
from saro.checks.deviation import Deviation, choose_records, packed_logps, plain_logps
from saro.config import DEMO
from saro.data.tree import SequenceTree
from saro.demo import data_files
from saro.errors import SaroError
from saro.files import atomic_folder, file_hash
from saro.model.load import find_model, load_policy
from saro.model.merge import merge
from saro.model.policy import Policy
from saro.runs.finished import FinishedRun, this_device
from saro.tool_config import ExportConfig
from saro.train.checkpoint import save_final
from saro.train.reference import layout_noise

# In every export: what it was made from and how far it is off. By it --overwrite knows what it may replace.
NOTE = "export.json"


def export(folder: str, options: ExportConfig, say: Callable[[str], None]) -> str:
    """Write a run's model and verify what was written. When that fails, the target is as it was.

    Args:
        folder: of the run.
        say: takes a line for the user when a part begins that may be long.

    Returns:
        One line: what was written, how far it is off, and how to load it.

    Raises:
        SaroError: there is no finished run, its base or its records are gone or changed, the target is taken, or the
            export is off by more than a tenth of what training changed and than what rounding explains.
    """
    run = FinishedRun.open(folder)
    if not options.merge and not run.full:
        for name, given in (("--into", options.into is not None), ("--dtype", options.dtype != "auto")):
            if given:
                raise SaroError(f"{name} is for a merged model; add --merge")
    target = Path(options.output).expanduser() if options.output else run.folder / "export"
    _check_target(target, options.overwrite)
    pack_tokens = run.manifest["config"]["data"]["pack_tokens"]
    files = [options.data] if isinstance(options.data, str) else options.data
    files = data_files(files, "rw_heldout") if files else run_files(run)
    trees = choose_records(files, run.chat_format(), pack_tokens, options.records)
    job = _Export(run, options, trees, pack_tokens, this_device(), say)
    with atomic_folder(target, replace=target.is_dir()) as temp:
        try:
            what, deviation = job.merged(temp) if run.full or options.merge else job.adapter(temp)
        except torch.OutOfMemoryError as error:
            raise SaroError(
                f"{target}: not written, the GPU has too little memory; set CUDA_VISIBLE_DEVICES= (to nothing) for the CPU"
            ) from error
        if not deviation.allowed and not (options.allow_shift and math.isfinite(deviation.shift)):
            raise SaroError(f"{target}: not written, it is off by {deviation}; {job.mend(what)}")
        weights = {file.name: file_hash(file) for file in sorted((run.folder / "final").glob("*.safetensors"))}
        note = {"saro": saro.__version__, "holds": what, "made_from": weights}
        (temp / NOTE).write_text(json.dumps(note | asdict(deviation), indent=2) + "\n")
    return f"{target}: {what}, off by {deviation}; load it with {_loader(run, options, target)}"


def run_files(run: FinishedRun) -> list[str]:
    """The run's held-out files, or those that it was trained on where it had no others.

    Raises:
        SaroError: one is not what the run read.
    """
    data, hashes = run.manifest["config"]["data"], run.manifest["data"]
    split = "heldout" if data["heldout"] else "train"
    # The demo's files lie in the package, wherever that is now; the manifest tells of which stage they are.
    demo = next((f for f in hashes if Path(f).stem in (f"rw_{split}", f"srpo_{split}")), "")
    files = data_files(data[split], Path(demo).stem)
    for name, file in zip(data[split], files, strict=True):
        if not Path(file).is_file() or file_hash(Path(file)) != hashes.get(demo if name == DEMO else name):
            state = "has changed since the run read it" if Path(file).is_file() else "is not here any more"
            raise SaroError(f"{file}: {state}; restore it, or verify the export with other records: --data FILE")
    return files


@dataclass(frozen=True)
class _Export:
    """The parts of one export, in which no two models are held at a time."""

    run: FinishedRun
    options: ExportConfig
    trees: Sequence[SequenceTree]
    pack_tokens: int
    device: torch.device
    say: Callable[[str], None]

    def adapter(self, folder: Path) -> tuple[str, Deviation]:
        """Copy the adapter and its tokenizer, and score with the copy. Returns what was written and how far it is off."""
        policy, scores = self._trained()
        del policy
        _free_memory()
        shutil.copytree(self.run.folder / "final", folder, dirs_exist_ok=True)
        self.say("loading the copy")
        options = replace(self.run.options, name=str(folder))
        exported = self._score(load_policy(find_model(options), options, self.device, seed=0).eval())
        # The same numbers in the same packs: nothing is rounded otherwise.
        trained, base, _ = scores
        return "adapter", Deviation.of(exported, trained, base, 0.0, len(self.trees))

    def merged(self, folder: Path) -> tuple[str, Deviation]:
        """Write a plain model, and score with what was written. Returns as ``adapter`` does."""
        run, of_base = self.run, self.run.base()[0]
        dtype = getattr(torch, self.options.dtype, None) or of_base.config.dtype or torch.float32
        policy, scores = self._trained()
        if run.options.method == "qlora" and self.options.into == "original":
            del policy
            _free_memory()
            # In a precision that holds the files' own.
            stored = "bfloat16" if of_base.config.dtype == torch.bfloat16 else "float32"
            self.say("loading the base model without quantization")
            policy = load_policy(run.source, replace(run.options, method="lora", dtype=stored), torch.device("cpu"), 0)
        model = merge(policy, run.source.config, dtype)
        del policy
        _free_memory()
        generation = _generation_config(of_base.path, run.options.revision)
        if generation is not None:
            # As the base has it: transformers reads some that it would not write.
            model.generation_config = GenerationConfig()
        self.say("writing the model")
        save_final(folder, model, run.source.tokenizer)
        if generation is not None:
            shutil.copyfile(generation, folder / "generation_config.json")
        del model
        _free_memory()
        self.say("loading what was written")
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map={"": self.device}, trust_remote_code=run.options.trust_remote_code
        )
        exported = plain_logps(model, self.trees)
        return f"model in {_name(dtype)}", Deviation.of(exported, *scores, len(self.trees))

    def mend(self, what: str) -> str:
        """What to do where the export is too far off."""
        if self.run.options.method == "qlora" and self.options.into == "original":
            return "leave --into original out, or take the shift with --allow-shift"
        if what.endswith("float16"):
            return f"the {what} rounds away too much: set --dtype float32"
        return "report it"

    def _trained(self) -> tuple[Policy, tuple[torch.Tensor, torch.Tensor, float]]:
        """The trained model; log-probs by it and by the base model, and the noise of the former."""
        run = self.run
        self.say(f"scoring {len(self.trees)} records as trained and before training")
        if run.full:
            # Another model: gone before the trained one is loaded.
            base = self._score(run.load_base(self.device))
            _free_memory()
            policy = run.load(self.device)
        else:
            policy = run.load(self.device)
            with policy.model.disable_adapter():
                base = self._score(policy)
        _, noise = layout_noise(policy, self.trees, self.pack_tokens)
        return policy, (self._score(policy), base, noise.mean)

    def _score(self, policy: Policy) -> torch.Tensor:
        return packed_logps(policy, self.trees, self.pack_tokens)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise SaroError(f"{target}: exists already; add --overwrite, or give another folder with --output")
    if not (target / NOTE).is_file():
        raise SaroError(f"{target}: holds files that are no export's; give another folder with --output")


def _loader(run: FinishedRun, options: ExportConfig, target: Path) -> str:
    if run.full or options.merge:
        return f"AutoModelForCausalLM.from_pretrained({str(target)!r})"
    quantized = (
        ", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
        "bnb_4bit_use_double_quant=True)"
        if run.options.method == "qlora"
        else ""
    )
    return f"AutoPeftModelForCausalLM.from_pretrained({str(target)!r}{quantized})"


def _generation_config(model: str, revision: str | None) -> str | None:
    """The file in a folder or of a hub model; None where there is none."""
    try:
        return cached_file(model, "generation_config.json", revision=revision)
    except OSError:
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _free_memory() -> None:
    # PEFT's models hold cycles, which only the collector frees.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
