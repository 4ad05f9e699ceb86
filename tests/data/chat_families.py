"""Chat templates in the manner of public model families, each with what its models write.

`turn` is what a model writes when it is asked: reasoning and answer are put into it.
"""

from typing import NamedTuple

SPECIAL = [
    "<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<start_of_turn>", "<end_of_turn>",
    "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|begin_of_sentence|>",
    "<|end_of_sentence|>", "[INST]", "[/INST]",
]  # fmt: skip


class Family(NamedTuple):
    template: str
    turn: str  # of an answer with reasoning
    plain_turn: str  # of an answer without
    keeps_history: bool = True  # shows earlier turns as they were written
    system: bool = True


CHATML = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

HEADERS = """{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim -}}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""

INST = """{%- if messages[0].role == 'system' -%}
{%- set first = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- set rest = messages[1:] -%}
{%- else -%}
{%- set first = '' -%}
{%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('turns must alternate') -}}
{%- endif -%}
{%- if m.role == 'user' -%}
{{- bos_token + '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' -}}
{%- else -%}
{{- ' ' + m.content + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}"""

MODEL_ROLE = """{{- '<bos>' -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

ROLE_TOKENS = """{%- for m in messages -%}
{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else '' -}}"""

LAST_THINKS = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.last = ns.last + 1 -%}{%- endfor -%}
{%- set ns.seen = -1 -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set ns.seen = ns.seen + 1 -%}{%- endif -%}
{%- if m.role != 'assistant' -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- else -%}
{%- set content = m.content -%}
{%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' -%}
{%- if '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if ns.seen == ns.last -%}{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}"""

OPENED = """{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content -}}
{%- elif m.role == 'user' -%}{{- '<|user|>' + m.content -}}
{%- elif m.role == 'assistant' -%}
{%- set r = m.reasoning_content or '' -%}
{{- '<|assistant|>' -}}
{%- if r and loop.last -%}{{- '<think>\\n' + r + '\\n</think>\\n\\n' -}}{%- endif -%}
{{- m.content.split('</think>')[-1] + '<|endoftext|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|><think>\\n' -}}{%- endif -%}"""

MARKED = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' -%}
{% generation %}{{- m.content + '<|im_end|>' -}}{% endgeneration %}
{{- '\\n' -}}
{%- else -%}{{- m.content + '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}"""

COLON = """{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content + '\\n\\n' -}}
{%- elif m.role == 'user' -%}{{- 'USER: ' + m.content + ' ' -}}
{%- else -%}{{- 'ASSISTANT: ' + m.content + eos_token -}}{%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}"""

TRIMMED = """{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content + '\\n' -}}
{%- elif m.role == 'user' -%}{{- '### Instruction:\\n' + m.content.strip() + '\\n\\n' -}}
{%- else -%}{{- '### Response:\\n' + m.content + eos_token + '\\n\\n' -}}{%- endif -%}
{%- endfor -%}
{{- '### Response:\\n' if add_generation_prompt else '' -}}"""

FAMILIES = {
    "chatml": Family(CHATML, "{answer}<|im_end|>", "{answer}<|im_end|>"),
    "headers": Family(HEADERS, "{answer}<|eot_id|>", "{answer}<|eot_id|>"),
    "inst": Family(INST, " {answer} <|endoftext|>", " {answer} <|endoftext|>"),
    "model_role": Family(
        MODEL_ROLE, "{answer}<end_of_turn>", "{answer}<end_of_turn>", system=False
    ),
    "role_tokens": Family(ROLE_TOKENS, "{answer}<|end|>", "{answer}<|end|>"),
    "last_thinks": Family(
        LAST_THINKS,
        "<think>\n{reasoning}\n</think>\n\n{answer}<|im_end|>",
        "{answer}<|im_end|>",
        keeps_history=False,
    ),
    "opened": Family(
        OPENED,
        "{reasoning}\n</think>\n\n{answer}<|endoftext|>",
        "{answer}<|endoftext|>",
        keeps_history=False,
    ),
    "marked": Family(MARKED, "{answer}<|im_end|>", "{answer}<|im_end|>"),
    "colon": Family(COLON, " {answer}<|endoftext|>", " {answer}<|endoftext|>"),
    "trimmed": Family(TRIMMED, "{answer}<|endoftext|>", "{answer}<|endoftext|>"),
}
