"""Define the two chat formats as Jinja templates, for other programs that load the model.

`chat.py` renders the same strings in Python; a test renders both and compares. Source: the
Thinking and the plain chat format of the released ERNIE-4.5 text models. Where the released
template leaves it open: an earlier assistant turn keeps its reasoning, and a turn without
reasoning gets an empty thinking part, so that every turn continues the same generation prompt.
"""

from ernie_train.data.completion_format import (
    IM_END,
    IM_START,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    SENTENCE_END,
    SENTENCE_START,
    THINK_CLOSE,
    THINK_OPEN,
    TOOL_CALL_CLOSE,
    TOOL_CALL_OPEN,
    TOOL_RESPONSE_CLOSE,
    TOOL_RESPONSE_OPEN,
)

SYSTEM_OPEN, SYSTEM_CLOSE = "<system_setting>", "</system_setting>"
GLOBAL_OPEN, GLOBAL_CLOSE = "<global_setting>", "</global_setting>"
TOOLS_OPEN, TOOLS_CLOSE = "<tool_list>", "</tool_list>"
THINK_MODE = "think_mode=True"

# Tokens that structure a conversation. The content of a row must not contain one: it would end
# its turn or forge another turn.
CONTROL_TOKENS = (SENTENCE_START, SENTENCE_END, IM_START, IM_END)

# The markup inside turns, which a model writes or reads; each is one token in tokenizers that
# `train_tokenizer` makes.
MARKUP_TOKENS = (
    THINK_OPEN,
    THINK_CLOSE,
    RESPONSE_OPEN,
    RESPONSE_CLOSE,
    TOOL_CALL_OPEN,
    TOOL_CALL_CLOSE,
    TOOL_RESPONSE_OPEN,
    TOOL_RESPONSE_CLOSE,
    SYSTEM_OPEN,
    SYSTEM_CLOSE,
    GLOBAL_OPEN,
    GLOBAL_CLOSE,
    TOOLS_OPEN,
    TOOLS_CLOSE,
    THINK_MODE,
)

CHAT_TEMPLATE = r"""{%- set first = messages[0] if messages else {} -%}
{{- '<|im_start|>system\n' -}}
{%- if first.role == 'system' and first.content -%}
    {{- '<system_setting>\n' + first.content + '\n</system_setting>\n\n' -}}
{%- endif -%}
{{- '<global_setting>\nthink_mode=True\n</global_setting>' -}}
{%- if tools -%}
    {{- '\n\n<tool_list>\n[' -}}
    {%- for tool in tools -%}
        {{- tool | tojson -}}{{- ', ' if not loop.last else '' -}}
    {%- endfor -%}
    {{- ']\n</tool_list>' -}}
{%- endif -%}
{{- '<|im_end|>\n\n' -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content else '' -%}
    {%- if message.role == 'user' -%}
        {{- '<|im_start|>user\n' + content + '<|im_end|>\n\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response>' -}}
        {{- '<|im_end|>\n\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set reasoning = message.reasoning_content if message.reasoning_content else '' -%}
        {%- if '</think>' in content -%}
            {%- set parts = content.split('</think>', 1) -%}
            {%- set reasoning = parts[0].lstrip() -%}
            {%- if reasoning.startswith('<think>') -%}
                {%- set reasoning = reasoning[7:] -%}
            {%- else -%}
                {%- set reasoning = parts[0] -%}
            {%- endif -%}
            {%- set content = parts[1] -%}
        {%- endif -%}
        {%- set content = content.strip('\n') -%}
        {{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' -}}
        {%- if content.startswith('<response>') or content.startswith('<tool_call>') -%}
            {{- content + '\n' -}}
        {%- elif content -%}
            {{- '<response>\n' + content + '\n</response>\n' -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- set call = call.function if call.function else call -%}
            {{- '<tool_call>\n{"name": ' + call.name | tojson + ', "arguments": ' -}}
            {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
            {{- '}\n</tool_call>\n' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n<think>\n' -}}
{%- endif -%}
"""

PLAIN_CHAT_TEMPLATE = r"""{{- '<|begin_of_sentence|>' -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- message.content + '\n' -}}
    {%- elif message.role == 'user' -%}
        {{- 'User: ' + message.content + '\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'Assistant: ' + message.content -}}
        {{- '</s>' if loop.last else '<|end_of_sentence|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant: ' -}}
{%- endif -%}
"""
