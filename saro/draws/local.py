"""Draws from a model on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from importlib.metadata import version
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from saro.config import ModelConfig
from saro.draws.choices import read_choices
from saro.draws.decode import continue_texts
from saro.draws.request import Draw, Request
from saro.errors import SaroError
from saro.model.architectures import most_positions
from saro.model.cached_attention import cache_bytes_per_token
from saro.model.load import dtype_name, inference_policy, load_plain, load_policy, resolve_dtype
from saro.model.merge import merge as merge_adapter
from saro.model.policy import Policy
from saro.model.source import ModelSource
from saro.model.training_dtype import has_bfloat16_instructions
from saro.program import progress_bar

# Part of every key: increase it when a change of the engine changes the texts that it draws by more than rounding.
ENGINE_VERSION = 1
# Texts that are continued at the same time, by the kind of device. A step on a GPU is bound by the launches of its kernels, so
# more rows cost little; a CPU gains nothing from them.
_GPU_BATCH, _CPU_BATCH = 256, 64
# Requests of a group, in batches: all rows are busy until the last of them, and what a kill costs stays small.
_BATCHES_PER_GROUP = 2
# Share of the free memory that the cache may take. The rest is for activations and logits.
_CACHE_SHARE = 0.7


class LocalGenerator:
    """Draws texts from a policy, many at a time. ``load`` makes one from a model's files.

    Requests are drawn in groups of ``group_size``, cut from what ``draw`` gets, in that order. In bfloat16, a greedy text
    depends on its group by rounding. Texts are therefore the same after an interruption if requests come in the order of
    ``order``, without those of the groups that are done. Processes that share the work take every nth request of that
    order.

    Args:
        policy: a policy from ``load_plain``, ``inference_policy`` or ``load_policy``.
        identity: what distinguishes the model from all others, as plain JSON.
        tokenizer: encodes choices, and decodes texts that may hold a stop text.
        stop_ids: ids that end a text.
        batch: number of texts that are continued at the same time, fewer if memory has room for fewer; default 256 on a
            GPU, 64 on a CPU.
        progress: show a progress bar on a terminal.
    """

    def __init__(
        self,
        policy: Policy,
        identity: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        *,
        batch: int | None = None,
        progress: bool = True,
    ) -> None:
        if batch is None:
            batch = _GPU_BATCH if policy.causal_lm.device.type == "cuda" else _CPU_BATCH
        if batch < 1:
            raise SaroError(f"batch is {batch}; it must be at least 1")
        self.policy = policy
        self.identity = identity
        self.group_size = _BATCHES_PER_GROUP * batch
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._rows = batch
        self._halved = False
        self._progress = progress
        self._versions = {name: version(name) for name in ("torch", "transformers")}

    @classmethod
    def load(
        cls,
        source: ModelSource,
        options: ModelConfig,
        stop_ids: Collection[int],
        device: torch.device,
        *,
        merge: bool = True,
        dtype: str | None = None,
        batch: int | None = None,
        progress: bool = True,
    ) -> LocalGenerator:
        """Load a model's weights for generation.

        Args:
            options: as the model was trained. Without an adapter, lora and full are the same plain model; a qlora base
                is quantized as in training.
            stop_ids: ids that end a text.
            merge: add the adapter to the weights, and dequantize a 4-bit base, before anything is drawn: the sums are
                rounded once, to the dtype. If false, the layers compute as in training.
            dtype: "auto", "float32" or "bfloat16"; default that of ``options``. auto is bfloat16 on a GPU, and on a CPU
                that has instructions for it.

        Raises:
            SaroError: the model cannot be loaded or merged, or its files cannot be identified.
        """
        compute_dtype = generation_dtype(options.dtype if dtype is None else dtype, device)
        identity = identify(source, options, stop_ids, device, merge=merge, dtype=dtype)
        is_plain = _is_plain(source, options)
        if is_plain:
            options = replace(options, method="full")
        policy = _load(source, options, device, compute_dtype, is_plain, merge)
        return cls(policy, identity, source.tokenizer, stop_ids, batch=batch, progress=progress)

    def order(self, requests: Sequence[Request]) -> list[int]:
        """Return the order in which requests should be drawn; see ``order_requests``."""
        return order_requests(requests)

    def draw(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Draw]]]:
        """Yield groups of (index of the request, its draw), a group whole.

        A prompt that the model cannot read is a failure of kind "length". An answer ends where the model's positions do.
        The ids of a text that a stop text ended include it. For choices, see ``read_choices``.

        Raises:
            ValueError: a request has no ids.
            SaroError: the choices of a request cannot be told apart by one token, or memory has no room for one text.
        """
        if not all(request.ids for request in requests):
            raise ValueError("a local model takes requests with ids; render messages and text first")
        with progress_bar(None, "drawing", "tokens", shown=self._progress) as bar:
            for start in range(0, len(requests), self.group_size):
                bar.set_postfix_str(f"{start} of {len(requests)} texts", refresh=False)
                group = requests[start : start + self.group_size]
                yield [(start + i, draw) for i, draw in enumerate(self._draw_group(group, bar))]

    def _draw_group(self, group: Sequence[Request], bar: tqdm) -> list[Draw]:
        """Draw a group; once, if memory does not suffice, with half of the rows."""
        while True:
            try:
                return self._draw(group, bar)
            except torch.OutOfMemoryError as error:
                if self._halved or self._rows == 1:
                    raise SaroError(
                        f"out of memory with {self._rows} texts at a time ({str(error).splitlines()[0]}); "
                        "lower the batch or max_tokens"
                    ) from error
            # Outside of the handler: the error's traceback holds the tensors that were alive.
            self._halved = True
            self._rows //= 2
            torch.cuda.empty_cache()

    def _draw(self, group: Sequence[Request], bar: tqdm) -> list[Draw]:
        draws: dict[int, Draw] = {}
        to_continue: dict[int, Request] = {}
        to_choose: dict[int, Request] = {}
        for i, request in enumerate(group):
            room = self._room(request.ids)
            if room < 1:
                detail = f"the prompt has {len(request.ids):,} tokens, and the model reads {len(request.ids) + room:,}"
                draws[i] = Draw(failure="length", detail=detail, versions=self._versions)
            elif request.sampling.choices:
                to_choose[i] = request
            else:
                limit = min(room, request.sampling.max_tokens)
                to_continue[i] = replace(request, sampling=replace(request.sampling, max_tokens=limit))
        draws |= zip(to_continue, self._continue([*to_continue.values()], bar), strict=True)
        draws |= zip(to_choose, self._choose([*to_choose.values()]), strict=True)
        return [draws[i] for i in range(len(group))]

    def _continue(self, requests: Sequence[Request], bar: tqdm) -> list[Draw]:
        if not requests:
            return []
        longest = max(len(r.ids) + r.sampling.max_tokens for r in requests)
        lm = self.policy.causal_lm
        rows = fit_rows(lm.config, self.policy.compute_dtype, longest, self._rows, free_memory(lm.device))
        began = time.perf_counter()
        texts = continue_texts(
            self.policy, requests, self._stop_ids, rows, tokenizer=self._tokenizer, on_tokens=bar.update
        )
        per_token = (time.perf_counter() - began) / sum(len(text.ids) for text in texts)
        return [
            Draw(
                ids=text.ids,
                finish=text.finish,
                usage={"prompt": len(request.ids), "completion": len(text.ids)},
                seconds=per_token * len(text.ids),
                versions=self._versions,
            )
            for request, text in zip(requests, texts, strict=True)
        ]

    def _choose(self, requests: Sequence[Request]) -> list[Draw]:
        draws: list[Draw] = []
        for start in range(0, len(requests), self._rows):
            part = requests[start : start + self._rows]
            began = time.perf_counter()
            logps = read_choices(self.policy, self._tokenizer, part)
            seconds = (time.perf_counter() - began) / len(part)
            draws += [
                Draw(
                    ids=(),
                    finish="stop",
                    choices=choices,
                    usage={"prompt": len(request.ids), "completion": 0},
                    seconds=seconds,
                    versions=self._versions,
                )
                for request, choices in zip(part, logps, strict=True)
            ]
        return draws

    def _room(self, ids: Sequence[int]) -> int:
        """Return how many tokens the model can write after a prompt."""
        return (most_positions(self.policy.causal_lm.config) or sys.maxsize) - len(ids)


def order_requests(requests: Sequence[Request]) -> list[int]:
    """Return the indices of requests in the order in which they should be drawn, whatever order they come in.

    Long ones come first, so that memory that suffices at the beginning suffices to the end. Prompts that begin alike are
    neighbours, so that what they share is read once.
    """
    return sorted(range(len(requests)), key=lambda i: _sort_key(requests[i]))


def identify(
    source: ModelSource,
    options: ModelConfig,
    stop_ids: Collection[int],
    device: torch.device,
    *,
    merge: bool = True,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Return the identity that ``LocalGenerator.load`` gives a model, without reading its weights.

    Raises:
        SaroError: its files cannot be identified, or the GPU has no bfloat16.
    """
    compute_dtype = generation_dtype(options.dtype if dtype is None else dtype, device)
    return {
        **_file_identity(source),
        "method": "full" if _is_plain(source, options) else options.method,
        "dtype": dtype_name(compute_dtype),
        "merged": merge,
        "stop_ids": sorted(stop_ids),
        "device": device.type,
    }


def _is_plain(source: ModelSource, options: ModelConfig) -> bool:
    """Return True for a model without an adapter and without 4-bit layers."""
    return source.adapter is None and options.method != "qlora"


def _sort_key(request: Request) -> tuple[Any, ...]:
    ids = request.ids or ()
    return -len(ids) - request.sampling.max_tokens, -len(ids), ids, astuple(request.sampling), request.number


def _load(
    source: ModelSource,
    options: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    is_plain: bool,
    merge: bool,
) -> Policy:
    if not merge:
        return load_policy(source, replace(options, dtype=dtype_name(dtype)), device, seed=0)
    if is_plain:
        return load_plain(source, options, device, dtype)
    # The base has the dtype that it was trained in: only the sum is rounded to the new one. Fused layers would look for the
    # adapter in each forward after the merge. liger-kernel's layers would compute this model and not its base, and its
    # rotary embedding, which it replaces for all models of a type, the models that are loaded later.
    policy = load_policy(source, replace(options, fused_lora=False, liger=False), device, seed=0)
    merged = merge_adapter(policy, source.config, dtype)
    return inference_policy(merged.to(device), options)


def _file_identity(source: ModelSource) -> dict[str, Any]:
    """Return the identity of a model's files, without where they were found.

    Raises:
        SaroError: nothing tells the files from those of another model.
    """
    found = source.identity()
    identity = {"kind": "local", **{name: found[name] for name in ("files", "definition", "adapter")}}
    if not identity["files"]:
        if found["commit"] is None:
            raise SaroError(f"{source.path}: the weights cannot be identified; give a folder of safetensors")
        identity["commit"] = found["commit"]
    return {**identity, "engine": ENGINE_VERSION}


def fit_rows(config: PretrainedConfig, dtype: torch.dtype, longest: int, rows: int, free: int) -> int:
    """Return how many texts of ``longest`` tokens can be continued together: ``rows``, halved until their cache fits.

    It is halved, not cut to what fits, so that small changes of the free memory change nothing.

    Args:
        free: bytes of free memory.

    Raises:
        SaroError: the cache of one text does not fit.
    """
    per_row = longest * cache_bytes_per_token(config, dtype)
    while rows * per_row > _CACHE_SHARE * free:
        if rows == 1:
            raise SaroError(
                f"a text of {longest:,} tokens needs {per_row / 2**30:.1f} GiB of cache, and {free / 2**30:.1f} GiB "
                "are free; lower max_tokens"
            )
        rows //= 2
    return rows


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a device."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def generation_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve the dtype in which texts are drawn: "auto" is bfloat16 where that is fast, else float32.

    Nothing is measured: the dtype is part of the key under which a text is found again.

    Raises:
        SaroError: the GPU has no bfloat16.
    """
    if name == "auto" and device.type == "cpu" and has_bfloat16_instructions():
        return torch.bfloat16
    return resolve_dtype(name, device)
