"""Chat templates in the style of published ones, on a tokenizer of bytes, and texts to encode with them."""

from __future__ import annotations

from datetime import date

from hypothesis import strategies as st
from tiny import CHATML, SPECIAL, tiny_tokenizer

from saro.data.chat_format import ChatFormat

DAY = date(1999, 7, 4)
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|head|>system\n\nToday: {{ date_string }}<|eot_id|>"
    "{% for m in messages %}<|head|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Drops the reasoning of earlier assistant turns.
DROPS_THINK = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1: the generation prompt opens the reasoning.
OPENS_THINK = DROPS_THINK.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
# As Qwen3: enable_thinking false closes the reasoning at once.
QWEN3 = DROPS_THINK.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
# As gpt-oss (Harmony): the prompt ends with the role, and the model opens the channel of its answer.
HARMONY = (
    "{% for m in messages %}<|head|>{{ m['role'] }}{% if m['role'] == 'assistant' %}[INST]final{% endif %}"
    "<|eot_id|>{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant{% endif %}"
)

# Writes tools and calls in the style of Hermes and Qwen.
TOOLS = (
    "{% if tools %}<|im_start|>system\n# Tools{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' if m['content'] or not loop.first else '' }}"
    "<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TOKENS = ("<|head|>", "<|eot_id|>", "[INST]", "[/INST]", "</s>")
STOP = {LLAMA3: "<|eot_id|>", MISTRAL: "</s>"}
# What the template writes between the prompt and the assistant's answer.
START = {MISTRAL: " ", HARMONY: "[INST]final<|eot_id|>"}
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "drops think": DROPS_THINK,
    "opens think": OPENS_THINK,
    "qwen3": QWEN3,
    "harmony": HARMONY,
}


def chat_of(template=CHATML, *, extra=TOKENS, stop=None, day=DAY, tokenizer=None, **options) -> ChatFormat:
    tokenizer = tokenizer or tiny_tokenizer(template, extra)
    stops = stop or [STOP.get(template, "<|im_end|>")]
    return ChatFormat(tokenizer, frozenset(map(tokenizer.convert_tokens_to_ids, stops)), day, **options)


CHATS = {name: chat_of(template) for name, template in TEMPLATES.items()}
# Any text that people may write. Tags and control tokens have tests of their own, and hypothesis draws both from the
# constants of the source; a lone surrogate never passes the reader.
written = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda t: t.strip() and not any(other in t for other in ("think>", *SPECIAL, *TOKENS))
)
