"""Rows to tokens to batches, for encoder-decoder and decoder-only models; only answer tokens carry a label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict

from aimmerging.data.tasks import Row
from aimmerging.errors import ModelError
from aimmerging.store import records

IGNORED = -100
"""Label of tokens that carry no loss, as transformers has it."""

Feature = dict[str, list[int]]


class Truncation(records.Truncation):
    """Rows that were cut, still being counted; reported, because a cut answer teaches the model to stop early."""

    model_config = ConfigDict(frozen=False)


@dataclass(frozen=True, slots=True)
class Codec:
    """How a model's tokenizer turns rows into features.

    Attributes:
        tokenizer: of transformers, with an end-of-sequence token.
        encoder_decoder: whether prompt and answer go to different sides.
        max_input_tokens: longer prompts lose their end (encoder-decoder) or their middle (decoder-only).
        max_output_tokens: longer answers lose their end.
        chat_template: use the tokenizer's template where it has one.
    """

    tokenizer: Any
    encoder_decoder: bool
    max_input_tokens: int
    max_output_tokens: int
    chat_template: bool = True

    def prompt(self, row: Row, count: Truncation | None = None) -> list[int]:
        """Token ids of the prompt, up to where the answer begins.

        Raises:
            ModelError: a chat row and a tokenizer without chat template.
        """
        if self.chat_template and self.tokenizer.chat_template:
            turns = [dict(turn) for turn in row.messages] or [{"role": "user", "content": row.input}]
            # enable_thinking is read by templates of reasoning models and unknown, hence ignored, elsewhere; answers
            # of a task are learned without a chain of thought, so none may be asked for at generation
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        elif row.messages:
            raise ModelError(
                f"row {row.id!r} is a chat, but the tokenizer has no chat template (or model.chat_template is false); "
                "use a chat model, or rows with input and output"
            )
        else:
            ids = self.tokenizer(row.input, verbose=False)["input_ids"]
        if len(ids) <= self.max_input_tokens:
            return ids
        if count is not None:
            count.inputs += 1
        return self._cut(ids)

    def _cut(self, ids: list[int]) -> list[int]:
        """A prompt that fits.

        An encoder's prompt loses its end, but for the end-of-sequence token. A decoder's loses its middle: it begins
        with the instruction and ends with what asks for the answer (`Answer:`, a template's assistant header).
        """
        size = self.max_input_tokens
        if self.encoder_decoder:
            return ids[: size - 1] + ids[-1:] if ids[-1] == self.tokenizer.eos_token_id else ids[:size]
        tail = size // 2
        return ids[: size - tail] + ids[len(ids) - tail :]

    def answer(self, row: Row, count: Truncation | None = None) -> list[int]:
        """Token ids of the answer with the end-of-sequence token."""
        text = row.output
        templated = self.chat_template and self.tokenizer.chat_template
        if not self.encoder_decoder and not templated and not (row.input[-1:].isspace() or text[:1].isspace()):
            text = " " + text
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) + 1 > self.max_output_tokens:
            if count is not None:
                count.outputs += 1
            ids = ids[: self.max_output_tokens - 1]
        return [*ids, self.tokenizer.eos_token_id]

    def example(self, row: Row, count: Truncation | None = None) -> Feature:
        """One training feature: `input_ids`, `attention_mask` and `labels`, which ignore the prompt."""
        prompt, answer = self.prompt(row, count), self.answer(row, count)
        if count is not None:
            count.rows += 1
        if self.encoder_decoder:
            return {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": answer}
        ids = prompt + answer
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + answer}

    def examples(self, rows: Sequence[Row], count: Truncation | None = None) -> list[Feature]:
        """Features of many rows, in order."""
        return [self.example(row, count) for row in rows]


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads features on the right to the longest of the batch; labels with :data:`IGNORED`."""

    pad_token_id: int

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Return tensors [rows, length] by name, int64."""
        import torch

        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        batch: dict[str, Any] = {}
        for name, value in fill.items():
            width = max(len(feature[name]) for feature in features)
            batch[name] = torch.tensor([feature[name] + [value] * (width - len(feature[name])) for feature in features])
        return batch
