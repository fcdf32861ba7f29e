"""Write a folder with a model of random weights in bfloat16, a byte tokenizer and a chat template.

    python benchmarks/gpu/random_model.py llama-8b FOLDER

A machine without a network trains real shapes this way. Weights have a standard deviation of 0.02, so that logits are about
a nat apart and attention prefers some tokens to others. A folder that has a model already is left as it is.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>")
IDS = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 2}
SHARD_BYTES = 2 * 2**30

# The last file that is written: a folder that has it is complete.
LAST_FILE = "tokenizer_config.json"


def shape(
    kind: type[PreTrainedConfig],
    vocabulary: int,
    width: int,
    inner: int,
    layers: int,
    heads: tuple[int, int, int],
    tied: bool,
) -> PreTrainedConfig:
    """Make the config of a shape. ``heads``: number of query heads, number of key heads, size of a head."""
    return kind(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        **IDS,
    )


# Shapes of published models, and two tiny ones for runs without a GPU.
SHAPES = {
    "llama-8b": partial(shape, LlamaConfig, 128256, 4096, 14336, 32, (32, 8, 128), False),  # Llama-3-8B
    "qwen2.5-7b": partial(shape, Qwen2Config, 152064, 3584, 18944, 28, (28, 4, 128), False),
    "qwen3-8b": partial(shape, Qwen3Config, 151936, 4096, 12288, 36, (32, 8, 128), False),
    "llama-70b": partial(shape, LlamaConfig, 128256, 8192, 28672, 80, (64, 8, 128), False),  # Llama-3-70B
    "llama-1b": partial(shape, LlamaConfig, 128256, 2048, 8192, 16, (32, 8, 64), True),  # Llama-3.2-1B
    "qwen3-0.6b": partial(shape, Qwen3Config, 151936, 1024, 3072, 28, (16, 8, 128), True),
    "tiny-llama": partial(shape, LlamaConfig, 512, 64, 128, 2, (4, 2, 16), True),
    "tiny-qwen3": partial(shape, Qwen3Config, 512, 64, 128, 2, (4, 2, 16), False),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte and the special tokens."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def split_shards(shapes: dict[str, torch.Size]) -> list[dict[str, torch.Size]]:
    """Split tensors, given by name, into shards of at most SHARD_BYTES or of one tensor."""
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, tensor_shape in shapes.items():
        tensor_bytes = 2 * tensor_shape.numel()
        if shards[-1] and size + tensor_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor_shape
        size += tensor_bytes
    return shards


def random_tensor(
    name: str, tensor_shape: torch.Size, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """Draw a weight: norms are 1, biases 0, all others normal."""
    if len(tensor_shape) == 1:
        fill = torch.zeros if name.endswith("bias") else torch.ones
        return fill(tensor_shape, dtype=torch.bfloat16)
    weight = torch.empty(tensor_shape, dtype=torch.bfloat16, device=device)
    return weight.normal_(std=0.02, generator=generator).cpu()


def write_model(name: str, folder: Path) -> None:
    """Write a model of the shape ``name``, or nothing if the folder has it already."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # two steps of the suite may ask for it at the same time
        if not (folder / LAST_FILE).exists():
            _write_model(name, folder)


def _write_model(name: str, folder: Path) -> None:
    config = SHAPES[name]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {key: weight.shape for key, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    shards = split_shards(shapes)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def write_shard(number: int) -> None:
        generator = torch.Generator(device).manual_seed(number)
        tensors = {key: random_tensor(key, size, device, generator) for key, size in shards[number].items()}
        save_file(tensors, folder / files[number], metadata={"format": "pt"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_shard, range(len(shards))))
    places = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    GenerationConfig(**IDS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    begin = time.perf_counter()
    write_model(name, folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    print(f"{name}: {size:.2f} GB in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
