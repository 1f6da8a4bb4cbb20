"""Chat templates inside qtune, by name, for bases that have none, as most that were only pretrained.

Their text follows from the name alone: what differs between tokenizers is `bos_token` and `eos_token`, which are the
template's variables wherever it is rendered. A tokenizer must have the `tokens` of one as its own. Those that need none
end an answer with the end of sequence.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from qtune.errors import ModelError

FILE = "chat_template.jinja"  # as transformers, vLLM and SGLang look for one

# OpenAI's ChatML as Qwen and SmolLM2 write it, without a system prompt of their own. SmolLM2's BOS begins every turn.
# Tools, calls and results are to the letter what the published template of Qwen2.5 writes, which is Hermes' way.
CHATML = """\
{%- if bos_token != '<|im_start|>' %}
    {{- bos_token }}
{%- endif %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message['tool_calls'] %}
        {{- '<|im_start|>assistant' }}
        {%- if message['content'] %}
            {{- '\\n' + message['content'] }}
        {%- endif %}
        {%- for call in message['tool_calls'] %}
            {{- '\\n<tool_call>\\n{"name": "' + call['function']['name'] + '", "arguments": ' }}
            {{- call['function']['arguments'] | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not tools or not loop.first or message['role'] != 'system' %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# To the letter what the published template of Llama 3 writes.
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# The prompt of Stanford's Alpaca (prompt_no_input of its train.py) with a line end behind "### Response:", so that an
# answer begins a line. A system prompt stands in place of the preamble.
ALPACA = """\
{{- bos_token }}
{%- if messages[0]['role'] != 'system' %}
    {{- 'Below is an instruction that describes a task. ' }}
    {{- 'Write a response that appropriately completes the request.' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '\\n\\n### Instruction:\\n' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\\n\\n### Response:\\n' + message['content'] }}
        {{- eos_token }}
    {%- else %}
        {{- ('' if loop.first else '\\n\\n') + message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\n### Response:\\n' }}
{%- endif %}"""

PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '' if loop.first else '\\n\\n' }}
    {%- if message['role'] == 'user' %}
        {{- 'User:\\n' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- 'Assistant:\\n' + message['content'] }}
        {{- eos_token }}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\nAssistant:\\n' }}
{%- endif %}"""


@dataclass(frozen=True)
class BuiltIn:
    """A template's Jinja text, and the special tokens that it writes besides `bos_token` and `eos_token`."""

    text: str
    tokens: tuple[str, ...] = ()


BUILT_IN = {
    "chatml": BuiltIn(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": BuiltIn(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "alpaca": BuiltIn(ALPACA),
    "plain": BuiltIn(PLAIN),
}
"""By name, what is proposed first in front."""


def fitting(special_tokens: Collection[str], eos_token: str | None) -> list[str]:
    """Names of those that need no new token of this tokenizer, the best first."""
    return [
        name
        for name, each in BUILT_IN.items()
        if (all(token in special_tokens for token in each.tokens) if each.tokens else eos_token)
    ]


def text_of(template: str) -> str:
    """The Jinja text of `model.chat_template`, a name of these or a file. Raises ModelError for one that is empty, or
    cannot be read."""
    if template in BUILT_IN:
        return BUILT_IN[template].text
    try:
        text = Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise ModelError(f"model.chat_template: {template} cannot be read ({fault}).") from None
    if not text.strip():
        raise ModelError(f"model.chat_template: {template} is empty.")
    return text
