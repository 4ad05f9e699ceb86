"""A model's own chat template, rendered as `transformers` renders it, within bounds."""

from ernie_train.data.chat_template.template import (
    CONTROL_TOKENS,
    ERNIE_PLAIN,
    ERNIE_THINKING,
    MARKUP_TOKENS,
    RESPONSE_TEMPLATE,
    SHIPPED_TEMPLATES,
    ChatTemplate,
    common_start,
    shipped_template,
)

__all__ = [
    "CONTROL_TOKENS",
    "ERNIE_PLAIN",
    "ERNIE_THINKING",
    "MARKUP_TOKENS",
    "RESPONSE_TEMPLATE",
    "SHIPPED_TEMPLATES",
    "ChatTemplate",
    "common_start",
    "shipped_template",
]
