"""Questions as token ids: the model's tokenizer, and the chat around a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.accuracy.tasks import Sample


class Tokenizer(Protocol):
    """What prompts need of a tokenizer; `HubTokenizer` is the real one."""

    bos: int | None

    def count(self, text: str) -> int:
        """Tokens of a text alone."""

    def encode(self, sample: Sample) -> list[int]:
        """Ids of the whole prompt, as it is sent."""


class HubTokenizer:
    """A Hugging Face tokenizer, and how a question is put to the model.

    Args:
        path: A folder or the name of a model.
        template: ``none``: the question and the beginning of its answer, with the
            tokenizer's special tokens, as RULER's ``base``. ``chat``: the question is
            a user's message in the tokenizer's chat template, and the model's turn
            begins with that of the answer. A text with ``{task}`` in the question's
            place: the same with this text, special tokens included.
    """

    def __init__(self, path: str, template: str) -> None:
        from transformers import AutoTokenizer

        if template not in ("none", "chat") and "{task}" not in template:
            raise ValueError(
                f"template: got {template!r}; allowed: none, chat, a text with {{task}}"
            )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self._template = template
        self.bos: int | None = self._tokenizer.bos_token_id
        self.eos: int | None = self._tokenizer.eos_token_id

    def count(self, text: str) -> int:
        """How many tokens a text alone has."""
        return len(self.ids(text))

    def ids(self, text: str) -> list[int]:
        """Tokens of a text alone."""
        return self._ids(text, special=False)

    def encode(self, sample: Sample) -> list[int]:
        """Ids of the whole prompt, as it is sent."""
        if self._template == "none":
            return self._ids(sample.text + sample.prefix, special=True)
        if self._template == "chat":
            around = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": sample.text}],
                add_generation_prompt=True,
                tokenize=False,
            )
        else:
            around = self._template.replace("{task}", sample.text)
        return self._ids(around + sample.prefix, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _ids(self, text: str, *, special: bool) -> list[int]:
        # verbose: no warning that prompts are longer than the tokenizer's limit.
        return list(
            self._tokenizer(text, add_special_tokens=special, verbose=False)[
                "input_ids"
            ]
        )
