"""Standard ways to write a chat as text, for models that come without one, and by name in `model.chat_template`.

Each ends an answer with a token at which generation can stop, begins an answer with what its generation prompt writes,
and never writes an earlier turn differently because the chat goes on: so the loss mask is exact.
"""

from __future__ import annotations

# Written by hand after what the models' own documentation says of their formats. White space within {%- -%} is ignored.
STANDARD = {
    # Qwen, SmolLM, Yi and many others; functions as Hermes and Qwen2.5 write them.
    "chatml": r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\n\n' }}
    {%- endif %}
    {{- 'You may call these functions, described in JSON, one to a line:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\n\nTo call a function, answer with its name and arguments in JSON:\n<tool_call>\n' }}
    {{- '{"name": <name>, "arguments": <arguments>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\n' }}
        {%- if message['content'] %}
            {{- message['content'] }}
        {%- endif %}
        {%- for call in message['tool_calls'] or [] %}
            {%- if message['content'] or not loop.first %}
                {{- '\n' }}
            {%- endif %}
            {{- '<tool_call>\n{"name": ' + (call['function']['name'] | tojson) + ', "arguments": ' }}
            {{- (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""",
    "llama3": r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    # There is no system role: its text stands before the first question.
    "gemma": r"""
{{- bos_token }}
{%- set system = messages[0]['content'] | trim + '\n\n' if messages[0]['role'] == 'system' else '' %}
{%- for message in messages if message['role'] != 'system' %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}
""",
    "mistral": r"""
{{- bos_token }}
{%- set system = messages[0]['content'] | trim + '\n\n' if messages[0]['role'] == 'system' else '' %}
{%- for message in messages if message['role'] != 'system' %}
    {%- if message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- else %}
        {{- '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
""",
    "phi3": r"""
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\n' + message['content'] | trim + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
""",
    "zephyr": r"""
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\n' + message['content'] | trim + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
""",
}


def chat_template(name_or_text: str) -> str:
    """The Jinja text of a standard template, or the text itself. Raises ValueError for what is neither."""
    if name_or_text in STANDARD:
        return STANDARD[name_or_text].strip("\n")
    if "{%" not in name_or_text and "{{" not in name_or_text:
        raise ValueError(f"there is no chat template {name_or_text[:40]!r}; there are {', '.join(STANDARD)}, or Jinja")
    return name_or_text
