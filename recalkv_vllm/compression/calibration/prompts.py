"""What the texts that a model writes begin with, as its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recalkv_vllm.compression.calibration.prompt_texts import (
    CODE_OPENINGS,
    PROSE_OPENINGS,
    REQUESTS,
)
from recalkv_vllm.compression.calibration.samples import start_tokens
from recalkv_vllm.compression.calibration.text import BUILTIN, SELF
from recalkv_vllm.compression.errors import InputError


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids that texts begin with, and the one that ends them.

    Args:
        kinds: by kind (code, prose and, where there is a chat template, chat), each prompt's ids.
        end: the tokenizer's token at the end of a text, if it has one.
        separator: what is between a text and the next prompt.
    """

    kinds: tuple[tuple[tuple[int, ...], ...], ...]
    end: int | None
    separator: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer) -> Prompts:
        """Prompts for the model of a Hugging Face tokenizer.

        Raises:
            InputError: the tokenizer has no token that begins or ends a text.
        """
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        start = eos if bos is None else bos
        if start is None:
            raise InputError(
                f"--dataset {SELF}: the tokenizer has no token that begins or ends a text; "
                f"expected one (give another --dataset, such as {BUILTIN})"
            )
        before = start_tokens(tokenizer)

        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        def opening(text: str) -> tuple[int, ...]:
            return (*before, *ids(text)) if text else (start,)

        def request(text: str) -> tuple[int, ...]:
            # As text: a template begins with the start token itself, where there is one.
            message = [{"role": "user", "content": text}]
            template = tokenizer.apply_chat_template
            return ids(template(message, add_generation_prompt=True, tokenize=False))

        kinds = [tuple(map(opening, CODE_OPENINGS)), tuple(map(opening, PROSE_OPENINGS))]
        if tokenizer.chat_template:
            kinds.append(tuple(map(request, REQUESTS)))
        return cls(tuple(kinds), eos, () if before else ids("\n\n"))

    def of_row(self, index: int, step: int) -> Iterator[tuple[int, ...]]:
        """Prompts of a row's texts, without end: kinds take turns, and prompts of a kind.

        Args:
            index: of the row: with the first text of the next row goes the next prompt.
            step: from one text of the row to the next, in prompts.
        """
        separator: tuple[int, ...] = ()
        while True:
            number, kind = divmod(index, len(self.kinds))
            prompts = self.kinds[kind]
            yield separator + prompts[number % len(prompts)]
            index += step
            separator = self.separator
