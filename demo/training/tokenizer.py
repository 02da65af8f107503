"""The demo's vocabulary: a SentencePiece model in which every word of the table, and every number of a state, is one piece."""

from __future__ import annotations

import io
import itertools
import string
from collections.abc import Iterator

from demo.instructions import FAMILIES, SUBTASKS, WORDINGS, Goal, Instruction, sentence
from demo.world import BINS, COLOURS
from hosting.templates import DEFAULT_ACTION_PROMPT_TEMPLATE
from pi0.prompt import DEFAULT_GENERATION_PROMPT_FORMAT

VOCABULARY = 640

_STATE_BINS = 256


def train_tokenizer() -> bytes:
    """The model file, the same bytes each time: PaliGemma's special ids, no dummy prefix, spaces kept, the newline and " 0" … " 255" pieces of
    their own (so that a state takes one token per number), all printable ASCII covered."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n", *(f"\u2581{number}" for number in range(_STATE_BINS))],
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()


def _sentences() -> Iterator[str]:
    """Every instruction in every wording, with and without a capital, every subtask, and the prompts around them."""
    for instruction, wording in itertools.product(_instructions(), range(WORDINGS)):
        text = sentence(instruction, wording)
        yield text
        yield text.capitalize()
        yield DEFAULT_GENERATION_PROMPT_FORMAT.format(task=text)
        for subtask in SUBTASKS:
            yield f"Task: {DEFAULT_ACTION_PROMPT_TEMPLATE.format(task=text.capitalize(), subtask=subtask)}, State: ;"
    yield from SUBTASKS
    yield "Action: "


def _instructions() -> Iterator[Instruction]:
    colours, bins = range(len(COLOURS)), range(len(BINS))
    for family in FAMILIES:
        match family:
            case "seq":
                yield from (Instruction("seq", (Goal(c, b), Goal((c + 1) % 4, (b + 1) % 3))) for c, b in itertools.product(colours, bins))
            case "every":
                yield from (Instruction("every", bin=b) for b in bins)
            case "sort":
                yield Instruction("sort")
            case "others":
                yield from (Instruction("others", (Goal(c, b),), (b + 1) % 3) for c, b in itertools.product(colours, bins))
