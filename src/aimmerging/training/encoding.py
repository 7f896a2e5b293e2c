"""Rows to tokens to batches, for encoder-decoder and decoder-only models; only answer tokens carry a label."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ConfigDict

from aimmerging.data.tasks import Row
from aimmerging.errors import ModelError
from aimmerging.store import records

IGNORED = -100
"""Label of tokens that carry no loss, as transformers has it."""

Feature = dict[str, list[int]]

# enable_thinking is read by templates of reasoning models and unknown, hence ignored, elsewhere; answers of a task are
# learned without a chain of thought, so none may be asked for at generation
TEMPLATE_INPUT: dict[str, Any] = {"enable_thinking": False}
"""What a chat template is given beside the row."""
TEMPLATE_DATE = datetime(2025, 1, 1)
"""What a chat template is told when it asks for the date: a prompt depends on nothing outside of its row."""
_BATCH = 1000


_DIRECTIVES = [f"%{letter}" for letter in "YmdBbAaHMSpyjIZzeFTDRcxXhuwUVGCklrnt"]
_UNPADDED = {f"%-{letter}": str(int(TEMPLATE_DATE.strftime(f"%{letter}"))) for letter in "dmyHIMSj"}
_FIXED_DATE = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('{name}', '{value}')" for name, value in _UNPADDED.items())
    + "".join(f" | replace('{name}', '{TEMPLATE_DATE.strftime(name)}')" for name in _DIRECTIVES)
    + " }}{%- endmacro -%}"
)
"""Stands before a template and takes the place of transformers' clock: callables cannot be handed to a template."""


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
        ends: token ids that end an answer when it is generated, beside the end-of-sequence token.
        stops: texts that do.
        one_by_one: answer each row alone, because the model does not leave padding out of account.
    """

    tokenizer: Any
    encoder_decoder: bool
    max_input_tokens: int
    max_output_tokens: int
    chat_template: bool = True
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    one_by_one: bool = False

    @property
    def templated(self) -> bool:
        """Whether prompts are written by the tokenizer's chat template."""
        return bool(self.chat_template and self.tokenizer.chat_template)

    def prompt(self, row: Row, count: Truncation | None = None) -> list[int]:
        """Token ids of the prompt, up to where the answer begins.

        Raises:
            ModelError: see :meth:`prompt_text`.
        """
        return self.prompts([row], count)[0]

    def prompts(self, rows: Sequence[Row], count: Truncation | None = None) -> list[list[int]]:
        """As :meth:`prompt`, of many rows."""
        fitted: list[list[int]] = []
        for ids in self.prompt_ids([self.prompt_text(row) for row in rows]):
            long = len(ids) > self.max_input_tokens
            if long and count is not None:
                count.inputs += 1
            fitted.append(self._cut(ids) if long else ids)
        return fitted

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts that :meth:`prompt_text` wrote, in their whole length."""
        return self._tokenized(texts, specials=False) if self.templated else self._opened(texts)

    def prompt_text(self, row: Row) -> str:
        """The prompt as text.

        Raises:
            ModelError: the chat template refuses the row, or there is none for a chat; names the row's place.
        """
        if not self.templated:
            if row.messages or row.tools:
                what = "a chat" if row.messages else "a prompt with tools"
                raise ModelError(
                    f"{row.place}: row {row.id!r} is {what}, but the tokenizer has no chat template (or "
                    "model.chat_template is false); use a chat model, or rows with input and output"
                )
            return row.input
        return self._written(row, [], add_generation_prompt=True)

    def conversation_text(self, row: Row) -> str:
        """The prompt and its answer as the chat template writes them where the answer is one of the messages.

        Raises:
            ModelError: the chat template refuses the row.
        """
        return self._written(row, [{"role": "assistant", "content": row.output}], add_generation_prompt=False)

    def _written(self, row: Row, answer: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """What the chat template writes of a row, with an answer behind it or with what asks for one."""
        turns = [dict(turn) for turn in row.messages] or [{"role": "user", "content": row.input}]
        tools = [dict(tool) for tool in row.tools] or None
        try:
            return self.tokenizer.apply_chat_template(
                [*turns, *answer],
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self._template(tools),
                **TEMPLATE_INPUT,
            )
        except Exception as error:  # a template is a program: it raises errors of its own, and of any type
            said = " ".join(str(error).split())
            raise ModelError(
                f"{row.place}: the tokenizer's chat template refuses this row: {said}; change the row's messages to "
                "what the template takes, or give the base a template that takes them"
            ) from None

    def _template(self, tools: list[dict[str, Any]] | None) -> str | None:
        """A template that asks for the date, with a date that never changes; None: the tokenizer's own.

        A tokenizer may have several: transformers chooses by name and by whether there are tools.
        """
        own = self.tokenizer.get_chat_template(tools=tools)
        return _FIXED_DATE + own if "strftime_now" in own else None

    def _tokenized(self, texts: Sequence[str], *, specials: bool, target: bool = False) -> list[list[int]]:
        """Token ids of texts, in batches that keep the tokenizer's memory small.

        Args:
            texts: any number.
            specials: whether the tokenizer adds what its family puts around a text.
            target: the texts are what an encoder-decoder's decoder writes; some families put other tokens around them.
        """
        encoded: list[list[int]] = []
        for start in range(0, len(texts), _BATCH):
            batch = {"text_target" if target else "text": list(texts[start : start + _BATCH])}
            found = self.tokenizer(**batch, add_special_tokens=specials, return_attention_mask=False, verbose=False)
            encoded += found["input_ids"]
        return encoded

    def _opened(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain prompts with what the tokenizer adds; for a decoder without an end before the answer."""
        encoded, end = self._tokenized(texts, specials=True), self.tokenizer.eos_token_id
        closed = [] if self.encoder_decoder else [place for place, ids in enumerate(encoded) if ids[-1:] == [end]]
        bare = self._tokenized([texts[place] for place in closed], specials=False)
        for place, ids in zip(closed, bare, strict=True):
            if ids[-1:] != [end]:  # else the end stands in the text itself
                encoded[place] = encoded[place][:-1]
        return encoded

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
        """Token ids that the model has to produce: the answer as its family writes it, with its end."""
        return self.answers([row], count)[0]

    def answers(self, rows: Sequence[Row], count: Truncation | None = None) -> list[list[int]]:
        """As :meth:`answer`, of many rows."""
        fitted: list[list[int]] = []
        for ids in self.answer_ids(rows):
            if len(ids) > self.max_output_tokens and count is not None:
                count.outputs += 1
            fitted.append(self.cut_answer(ids))
        return fitted

    def answer_ids(self, rows: Sequence[Row]) -> list[list[int]]:
        """Token ids of the answers in their whole length, with their end.

        An encoder-decoder's decoder is fed these ids shifted by one, so they hold what the tokenizer puts around a
        target: `<s>` first for BART, the language first for mBART-50 and after the end for mBART.
        """
        if not self.encoder_decoder:
            bare = self._tokenized([self.answer_text(row) for row in rows], specials=False)
            return [[*ids, self.tokenizer.eos_token_id] for ids in bare]
        written = self._tokenized([self.answer_text(row) for row in rows], specials=True, target=True)
        return [ids if self._end(ids) < len(ids) else [*ids, self.tokenizer.eos_token_id] for ids in written]

    def cut_answer(self, ids: list[int]) -> list[int]:
        """An answer of :meth:`answer_ids` that fits: it loses what stands before its end."""
        place = self._end(ids)
        tail = ids[place:]
        return ids[: max(min(place, self.max_output_tokens - len(tail)), 0)] + tail

    def _end(self, ids: Sequence[int]) -> int:
        """Where an answer's end begins; what follows the end-of-sequence token, mBART's language, belongs to it."""
        end = self.tokenizer.eos_token_id
        last = ids[-2:] if self.encoder_decoder else ids[-1:]
        return len(ids) - 1 - list(reversed(last)).index(end) if end in last else len(ids)

    def answer_text(self, row: Row) -> str:
        """The answer as it is encoded: after a space where it stands behind a decoder's prompt that does not end so."""
        apart = self.encoder_decoder or row.input[-1:].isspace() or row.output[:1].isspace()
        return row.output if self.templated or apart else " " + row.output

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """What generated token ids say up to where the answer ends: without special tokens and outer blanks."""
        ended = [self._until_end(ids) for ids in answers] if self.ends else answers
        decoded = self.tokenizer.batch_decode(ended, skip_special_tokens=True)
        return [self._until_stop(text).strip() for text in decoded]

    def _until_end(self, ids: Sequence[int]) -> Sequence[int]:
        """Token ids before the first one that ends an answer."""
        return ids[: next((place for place, token in enumerate(ids) if int(token) in self.ends), len(ids))]

    def _until_stop(self, text: str) -> str:
        """Text before the first stop string in it."""
        return text[: min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=len(text))]

    def example(self, row: Row, count: Truncation | None = None) -> Feature:
        """One training feature: `input_ids`, `attention_mask` and `labels`, which ignore the prompt."""
        return self.examples([row], count)[0]

    def examples(self, rows: Sequence[Row], count: Truncation | None = None) -> list[Feature]:
        """As :meth:`example`, of many rows in order."""
        pairs = zip(*self.prompts_and_answers(rows, count), strict=True)
        return [feature(prompt, answer, encoder_decoder=self.encoder_decoder) for prompt, answer in pairs]

    def prompts_and_answers(
        self, rows: Sequence[Row], count: Truncation | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of both, of rows in order; :func:`feature` makes a row of a pair."""
        if count is not None:
            count.rows += len(rows)
        return self.prompts(rows, count), self.answers(rows, count)


def feature(prompt: list[int], answer: list[int], *, encoder_decoder: bool) -> Feature:
    """One training feature of a prompt's and an answer's token ids, see :meth:`Codec.example`."""
    if encoder_decoder:
        return {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": answer}
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + answer}


def padded(rows: Sequence[list[int]], filler: int, *, left: bool = False) -> Any:
    """Rows as one int64 tensor [rows, longest], filled up on the right or, for what is continued, on the left."""
    import torch

    width = max(len(row) for row in rows)
    fills = [[filler] * (width - len(row)) for row in rows]
    return torch.tensor([fill + row if left else row + fill for row, fill in zip(rows, fills, strict=True)])


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads features on the right to the longest of the batch; labels with :data:`IGNORED`."""

    pad_token_id: int

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Return tensors [rows, length] by name, int64."""
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        return {name: padded([feature[name] for feature in features], value) for name, value in fill.items()}
