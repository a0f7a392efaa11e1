"""A conversation as the text that a chat model was trained on, by the template that came with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moekit.config.errors import ConfigError

if TYPE_CHECKING:
    from moekit.data.tokenizer import Tokenizer


def chat_template(files: Mapping[str, Path]) -> str | None:
    """The template among a tokenizer's files (chat_template.jinja, or in tokenizer_config.json); None without one."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].read_text("utf-8")
    if "tokenizer_config.json" in files:
        found = json.loads(files["tokenizer_config.json"].read_text("utf-8")).get("chat_template")
        if isinstance(found, str):
            return found
    return None


def chat_ids(files: Mapping[str, Path], tokenizer: Tokenizer, message: str, source: str) -> list[int]:
    """Token ids of one message in the chat template among a tokenizer's files.

    Errors: `ConfigError` naming the model `source` where there is no template, and those of `render_chat`.
    """
    template = chat_template(files)
    if template is None:
        raise ConfigError(f"{source} has no chat template. Leave out --chat to continue the prompt as text")
    text = render_chat(template, [{"role": "user", "content": message}], {"eos_token": tokenizer.end_token})
    return tokenizer.encode_template(text)


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]
) -> str:
    """The text of a conversation, up to where the model's answer begins.

    Templates come with foreign models, so they run in a sandbox that reaches nothing but their inputs.

    Args:
        template: Jinja, as transformers has it.
        messages: `{"role": "user", "content": "..."}` each.
        special_tokens: such as `{"eos_token": "<|im_end|>"}`.

    Errors: `ConfigError` where the template refuses the conversation or is broken.

    >>> template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    >>> render_chat(template, [{"role": "user", "content": "Hi"}], {})
    '[user] Hi'
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ConfigError(f"the chat template refuses this conversation: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=list(messages), add_generation_prompt=True, **special_tokens)
    except TemplateError as error:
        raise ConfigError(f"the chat template of this model is broken: {error}") from None
