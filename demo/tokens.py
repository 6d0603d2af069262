"""The text of training: a tokeniser from the demo's own texts, and conversations about a picture as its tokens."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import sentencepiece

from demo import conversations, scenes
from demo import model as yivl
from demo.pictures import FIRST_SEED

TEXT_TOKENS = 192  # of conversations about one picture
FAMILY_WEIGHTS = {  # how often each is asked
    "what": 1.0, "describe": 1.2, "colour": 1.0, "shape": 1.0, "count": 1.2, "where": 1.0, "compare": 2.0,
    "yesno": 1.6, "read": 1.0, "followup": 2.0, "absent": 1.3,
}  # fmt: skip
# At the end, what is learnt last: to count, to compare.
LAST_WEIGHTS = FAMILY_WEIGHTS | {
    "count": 8.0,
    "compare": 4.0,
    "where": 0.5,
    "colour": 0.5,
    "followup": 1.0,
    "absent": 0.7,
}


def train_tokenizer(vocab: int, seed: int) -> bytes:
    """A SentencePiece BPE with Yi's settings, from the demo's own texts and the system text."""
    rng = random.Random(seed)
    lines = []
    for i in range(4000):
        scene = scenes.make_scene(FIRST_SEED + i)
        for family in conversations.FAMILIES:
            for language in conversations.LANGUAGES:
                for question, answer in conversations.ask(scene, family, language, rng.random()) or []:
                    lines += [question, " " + answer]
    # Every printed word becomes one piece, after a space and after Chinese.
    lines += [line for word in scenes.WORDS for line in (f" The word is {word}.", f" 单词是{word}。")] * 1000
    lines += ["### Human:", "### Assistant:"] * 5000 + [yivl.SYSTEM] * 2000
    characters = "".join(chr(c) for c in range(33, 127))
    rng.shuffle(lines)
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        required_chars=characters,
        max_sentence_length=20000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_piece="<unk>",
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def _words(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


# A thing by colour, shape or both; a place, which is not what follows "的" (the left of something).
THING = re.compile(
    rf"\b(?:({_words(scenes.COLOURS)}) )?({_words(scenes.SHAPES)})(?:e?s)?\b|\b({_words(scenes.COLOURS)})\b"
    rf"|(?:({_words(conversations.COLOUR_ZH.values())})的)?({_words(conversations.SHAPE_ZH.values())})"
    rf"|({_words(conversations.COLOUR_ZH.values())})"
)
PLACE = re.compile(
    rf"({_words([*conversations.PLACE_EN, 'in the middle'])})|(?<![的左右])({_words(conversations.PLACE_ZH)})"
)
ONE = re.compile(r"\bone\b|有一个")
COLOUR_NUMBER = {
    w: i + 1 for words in (scenes.COLOURS, conversations.COLOUR_ZH.values()) for i, w in enumerate(words)
}
SHAPE_NUMBER = {
    w: i + 1 for words in (scenes.SHAPES, conversations.SHAPE_ZH.values()) for i, w in enumerate(words)
}
PLACE_NUMBER = {
    w: i + 1 for words in (conversations.PLACE_EN, conversations.PLACE_ZH) for i, w in enumerate(words)
}
PLACE_NUMBER["in the middle"] = 5
Words = tuple[
    int, int, int, int
]  # what a token speaks of: shape, colour, place; the character that comes next


class Writer:
    """Turns conversations about a picture into token ids, in the form that inference sees."""

    def __init__(self, tokenizer: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        self.prefix: list[int] = self.processor.encode(yivl.PREFIX)
        self.encode = lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, text: str, printed: str = "") -> tuple[tuple[int, ...], tuple[Words, ...]]:
        """Ids and what each speaks of; `printed` is the text in the picture."""
        ids = self.processor.encode(text)
        owner: list[int] = []  # of each character: its token
        for i, token in enumerate(ids):
            owner += [i] * (1 if self.processor.is_byte(token) else len(self.processor.id_to_piece(token)))
        assert len(owner) == len(text), text
        words = np.zeros((len(ids), 4), np.int64)
        for match in THING.finditer(text):
            colour, shape, colour_alone, zh_colour, zh_shape, zh_colour_alone = match.groups()
            words[owner[match.end() - 1], :2] = (
                SHAPE_NUMBER.get(shape or zh_shape, 0),
                COLOUR_NUMBER.get(colour or colour_alone or zh_colour or zh_colour_alone, 0),
            )
        for match in PLACE.finditer(text):
            words[owner[match.end() - 1], 2] = PLACE_NUMBER[match[0]]
        at = text.rfind(printed) if printed else -1
        if at > 0:
            for i in range(len(printed) if printed.isdigit() else 1):
                words[owner[at + i] - 1, 3] = i + 1
        return tuple(ids), tuple(tuple(row) for row in words.tolist())

    def conversation(
        self, turns: list[conversations.Turn], rng: random.Random, printed: str = ""
    ) -> tuple[list[int], list[bool], list[Words]]:
        """Ids after the picture, which of them the model should have written, and what they speak of."""
        ids: list[int] = []
        ours: list[bool] = []
        words: list[Words] = []
        lead = "\n"
        for question, answer in turns:
            if rng.random() < 0.08:  # people write sloppily
                question = (
                    question.rstrip("?？.。") if rng.random() < 0.5 else question[0].lower() + question[1:]
                )
            asked, asked_words = self.encode(f"{lead}{question}\n{yivl.STOP} Assistant:")
            written, written_words = self.encode(f" {answer}\n{yivl.STOP}", printed)
            ids += asked + written
            words += asked_words + written_words
            ours += [False] * len(asked) + [True] * len(written)
            lead = " Human: "
        return ids, ours, words

    def about(
        self, scene: scenes.Scene, rng: random.Random, last: bool
    ) -> tuple[list[int], list[bool], list[int], list[int], list[Words]]:
        """As many conversations as fit: ids, whether ours, places in the conversation, its number, words.

        `last`: those of the last phase.
        """
        ids: list[int] = []
        ours: list[bool] = []
        places: list[int] = []
        numbers: list[int] = []
        words: list[Words] = []
        weights = LAST_WEIGHTS if last else FAMILY_WEIGHTS
        for number in range(16):
            turns = None
            while turns is None:
                family = rng.choices(list(weights), list(weights.values()))[0]
                turns = conversations.ask(
                    scene, family, rng.choice(conversations.LANGUAGES), rng.getrandbits(40)
                )
                if last and family == "count" and turns and ONE.search(turns[0][1]) and rng.random() < 0.5:
                    turns = None  # or nearly all would be counted as one
            new, mine, spoken = self.conversation(turns, rng, scene.text or "")
            if len(ids) + len(new) <= TEXT_TOKENS:
                ids += new
                ours += mine
                places += range(len(new))
                numbers += [number] * len(new)
                words += spoken
        return ids, ours, places, numbers, words
