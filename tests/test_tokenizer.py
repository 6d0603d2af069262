"""Tokenising equals the sentencepiece package, and transformers where special pieces are typed."""

from __future__ import annotations

import io
import random
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from gguf_bytes import Kind, array, build, key, scalar
from hypothesis import given, settings
from hypothesis import strategies as st
from protobuf import blob, fields, number, varint
from yivl_edge import _core

GOLDEN = Path(__file__).parent / "data" / "golden"
USER_DEFINED = ["<|im_start|>", "<|im_end|>", "<|im", "  \n", "##", "汉字", " x", "= ", "▁▁▁"]


class Type(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    pieces: list[str]
    scores: list[float]
    types: list[int]
    dummy_prefix: bool = False
    squeeze: bool = False

    @staticmethod
    def read(model: bytes, **flags: bool) -> Vocabulary:
        entries = [dict(fields(data)) for field, data in fields(model) if field == 1]
        return Vocabulary(
            [entry[1].decode() for entry in entries],
            [struct.unpack("<f", entry[2])[0] for entry in entries],
            [entry.get(3, Type.NORMAL) for entry in entries],
            **flags,
        )

    @property
    def oracle(self) -> Any:
        pieces = b"".join(
            blob(1, blob(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind))
            for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True)
        )
        bpe = 2
        trainer = number(3, bpe) + number(35, int(Type.BYTE in self.types))
        normaliser = blob(1, b"identity") + number(3, int(self.dummy_prefix)) + number(4, int(self.squeeze))
        model = pieces + blob(2, trainer) + blob(3, normaliser)
        return sentencepiece.SentencePieceProcessor(model_proto=model)

    def tokenizer(self, **options: Any) -> _core.Tokenizer:
        return _core.Tokenizer(
            self.pieces,
            self.scores,
            self.types,
            unk_id=self.types.index(Type.UNKNOWN),
            add_dummy_prefix=self.dummy_prefix,
            remove_extra_whitespaces=self.squeeze,
            **options,
        )


def trained(byte_fallback: bool) -> Vocabulary:
    """Pieces as of LLaMA's tokeniser, from a little text in two languages."""
    rng = random.Random(1)
    syllables = ["ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "str", "ing", "tion"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]
    phrases = ["这是一个好奇的人类", "图片里有几只猫", "它是什么颜色的", "é è ü", "x = 10;"]
    sentences = [
        [*rng.choices(words, k=8), "", rng.choice(phrases), str(rng.randint(0, 999))] for _ in range(400)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(" ".join, sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=byte_fallback,
        split_digits=True,
        normalization_rule_name="identity",
        user_defined_symbols=USER_DEFINED,
        num_threads=1,
        minloglevel=2,
    )
    return Vocabulary.read(model.getvalue())


@pytest.fixture(scope="module")
def golden_vocabulary() -> Vocabulary:
    return Vocabulary.read((GOLDEN / "checkpoint" / "tokenizer.model").read_bytes())


@pytest.fixture(scope="module")
def llama_vocabulary() -> Vocabulary:
    return trained(byte_fallback=True)


CHARACTERS = [
    [chr(c) for c in range(32, 127)],
    [chr(c) for c in range(ord("a"), ord("z") + 1)],
    [chr(c) for c in range(0x4E00, 0xA000)],
    list("0123456789"),
    list("😀🎉👩🏽‍🚀🇩🇪❤️‍🔥🀄"),
    [chr(c) for c in (*range(32), *range(127, 160), 0xAD, 0x200B, 0x200D, 0x2060, 0xFEFF, 0xFFFD, 0xFFFF)],
    list("  \t\n\r\u00a0\u1680\u2003\u2028\u202f\u3000▁"),
    [chr(c) for c in range(0x300, 0x370)] + list("eaou"),
    [chr(c) for c in (*range(0xA0, 0xD800, 7), *range(0xE000, 0x110000, 997))],
    ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|Human|>", "<0x41>", "<0x0A>", *USER_DEFINED],
]


def random_texts(count: int, pieces: list[str]) -> list[str]:
    """Each made of runs of one kind of characters, or of pieces; the last ones are very long words."""
    rng = random.Random(7)
    kinds = [*CHARACTERS, [piece.replace("▁", " ") for piece in pieces]]

    def run(longest: int) -> str:
        return "".join(rng.choices(rng.choice(kinds), k=rng.randint(0, longest)))

    texts = ["".join(run(9) for _ in range(rng.randint(1, 6))) for _ in range(count - 20)]
    return texts + ["".join(rng.choices(rng.choice(kinds), k=3000)) for _ in range(20)]


def assert_equal_to_sentencepiece(vocabulary: Vocabulary) -> None:
    oracle, tokenizer = vocabulary.oracle, vocabulary.tokenizer()
    texts = random_texts(20_000, vocabulary.pieces)
    for text, expected in zip(texts, oracle.encode(texts, num_threads=1), strict=True):
        ids = tokenizer.encode(text)
        assert ids == expected, repr(text)
        assert tokenizer.decode(ids) == oracle.decode(ids), repr(text)


def test_yi_settings_equal_sentencepiece(golden_vocabulary: Vocabulary) -> None:
    assert_equal_to_sentencepiece(golden_vocabulary)


@pytest.mark.parametrize("squeeze", [False, True], ids=["spaces-kept", "spaces-removed"])
def test_llama_settings_equal_sentencepiece(llama_vocabulary: Vocabulary, squeeze: bool) -> None:
    assert_equal_to_sentencepiece(replace(llama_vocabulary, dummy_prefix=True, squeeze=squeeze))


def test_without_byte_pieces_equals_sentencepiece() -> None:
    assert_equal_to_sentencepiece(replace(trained(byte_fallback=False), dummy_prefix=True))


def test_rebuilt_oracle_is_the_published_model(golden_vocabulary: Vocabulary) -> None:
    file = GOLDEN / "checkpoint" / "tokenizer.model"
    published = sentencepiece.SentencePieceProcessor(model_file=str(file))
    texts = random_texts(1000, golden_vocabulary.pieces)
    assert golden_vocabulary.oracle.encode(texts) == published.encode(texts, num_threads=1)


# Vocabularies that nobody trained reach more: equal scores, unused pieces (taken apart again after merging),
# user-defined pieces that overlap or hold U+2581, one-character control pieces.
ALPHABET = "ab▁中 "
SMALL_PIECES = st.dictionaries(
    st.text(ALPHABET, min_size=1, max_size=5),
    st.tuples(
        st.sampled_from([0.0, -1.0, -2.0, -3.0, -4.0, 1.5]),
        st.sampled_from([*[Type.NORMAL] * 7, Type.USER_DEFINED, Type.UNUSED, Type.UNUSED, Type.CONTROL]),
    ),
    min_size=1,
    max_size=25,
)


@settings(derandomize=True, deadline=None)
@given(
    SMALL_PIECES,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(st.text(ALPHABET + "é", max_size=14), min_size=10, max_size=10),
    st.lists(st.integers(0, 2**16), max_size=10),
)
def test_any_vocabulary_equals_sentencepiece(
    pieces: dict[str, tuple[float, int]],
    byte_fallback: bool,
    dummy_prefix: bool,
    squeeze: bool,
    texts: list[str],
    any_ids: list[int],
) -> None:
    reserved = [("<unk>", 0.0, Type.UNKNOWN), ("<s>", 0.0, Type.CONTROL)]
    reserved += [(f"<0x{byte:02X}>", 0.0, Type.BYTE) for byte in range(256)] if byte_fallback else []
    rows = reserved + [(piece, score, kind) for piece, (score, kind) in pieces.items()]
    vocabulary = Vocabulary(*(list(column) for column in zip(*rows, strict=True)), dummy_prefix, squeeze)
    oracle, tokenizer = vocabulary.oracle, vocabulary.tokenizer()
    for text in texts:
        assert tokenizer.encode(text) == oracle.encode(text)
    any_ids = [i % len(rows) for i in any_ids]
    assert tokenizer.decode(any_ids) == oracle.decode(any_ids)


def test_golden_prompts(golden_vocabulary: Vocabulary) -> None:
    tokenizer = golden_vocabulary.tokenizer(special_ids=[0, 1, 2])
    with np.load(GOLDEN / "golden.npz") as golden:
        for turn in "01":
            ids = golden[f"ids_{turn}"].tolist()
            image = ids.index(-200)
            before, after = str(golden[f"prompt_{turn}"]).split("<image_placeholder>")
            assert tokenizer.encode(before) == ids[:image]
            assert tokenizer.encode(after) == ids[image + 1 :]


@pytest.mark.parametrize("llama", [False, True], ids=["yi", "llama"])
def test_detokenising_inverts(
    golden_vocabulary: Vocabulary, llama_vocabulary: Vocabulary, llama: bool
) -> None:
    vocabulary = replace(llama_vocabulary, dummy_prefix=True) if llama else golden_vocabulary
    tokenizer = vocabulary.tokenizer(special_ids=[0, 1, 2])
    for text in random_texts(4000, vocabulary.pieces):
        ids = tokenizer.encode(text)
        text = text.replace("▁", " ")  # one sign for both, by SentencePiece's design
        assert tokenizer.decode(ids, skip_special=False) == text
        if not llama:
            raw = [vocabulary.pieces[i].encode() if i < 3 else tokenizer.bytes(i) for i in ids]
            assert b"".join(raw).decode() == text


def test_special_pieces_typed_by_users_are_found_as_in_transformers(golden_vocabulary: Vocabulary) -> None:
    """Its slow tokenisers' splitting, with sentencepiece for each part: LlamaTokenizer with legacy=True."""
    from transformers import PreTrainedTokenizer

    oracle = golden_vocabulary.oracle

    class Slow(PreTrainedTokenizer):
        @property
        def vocab_size(self) -> int:
            return int(oracle.vocab_size())

        def get_vocab(self) -> dict[str, int]:
            return {piece: i for i, piece in enumerate(golden_vocabulary.pieces)}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return list(oracle.encode(text, out_type=str))

        def _convert_token_to_id(self, token: str) -> int:
            return int(oracle.piece_to_id(token))

        def _convert_id_to_token(self, index: int) -> str:
            return str(oracle.id_to_piece(index))

    special = ["<unk>", "<|startoftext|>", "<|endoftext|>"]
    slow = Slow(unk_token=special[0], bos_token=special[1], eos_token=special[2], pad_token=special[0])
    tokenizer = golden_vocabulary.tokenizer(special_ids=[0, 1, 2, 0])
    fragments = [*special, "<", "|", "<|", "<unk", "unk>", "start", "oftext|>", "<|Human|>", "<0x0A>"]
    fragments += [" ", "\n", "\u3000", "hello", "中", "▁", "<|startof<|endoftext|>", "<un<unk>"]
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choices(fragments, k=rng.randint(0, 8)))
        assert tokenizer.encode(text) == slow.convert_tokens_to_ids(slow.tokenize(text)), repr(text)


def test_each_part_between_special_pieces_gets_its_own_dummy_prefix(llama_vocabulary: Vocabulary) -> None:
    vocabulary = replace(llama_vocabulary, dummy_prefix=True)
    tokenizer = vocabulary.tokenizer(special_ids=[1, 2])
    ids = tokenizer.encode("ba</s>ba")
    assert ids == [*vocabulary.oracle.encode("ba"), 2, *vocabulary.oracle.encode("ba")]
    assert tokenizer.decode(ids) == "ba ba"
    assert tokenizer.decode(ids, skip_special=False) == "ba</s>ba"


def test_of_special_texts_at_one_place_the_longest_counts() -> None:
    pieces = ["<unk>", "<a>", "<a><b>", "<", "a", "b", ">"]
    types = [Type.UNKNOWN, Type.CONTROL, Type.CONTROL, *[Type.NORMAL] * 4]
    tokenizer = Vocabulary(pieces, [0.0] * 7, types).tokenizer(special_ids=[1, 2])
    assert tokenizer.encode("<a><b><a>b<a") == [2, 1, 5, 3, 4]


def test_bos_and_eos_are_added_only_if_asked_for(golden_vocabulary: Vocabulary) -> None:
    plain = golden_vocabulary.oracle.encode("a cat")
    both = golden_vocabulary.tokenizer(bos_id=1, eos_id=2, add_bos=True, add_eos=True)
    assert both.encode("a cat") == [1, *plain, 2]
    assert both.encode("a cat", add_special=False) == plain
    assert golden_vocabulary.tokenizer(bos_id=1, eos_id=2).encode("a cat") == plain
    assert golden_vocabulary.tokenizer(add_bos=True).encode("a cat") == plain  # there is no BOS


def test_bytes_of_an_id(llama_vocabulary: Vocabulary) -> None:
    tokenizer = llama_vocabulary.tokenizer()
    by_piece = {piece: i for i, piece in enumerate(llama_vocabulary.pieces)}
    assert tokenizer.bytes(by_piece["▁▁▁"]) == b"   "
    assert tokenizer.bytes(by_piece["<0xE4>"]) == b"\xe4"
    assert tokenizer.bytes(by_piece["汉字"]) == "汉字".encode()
    assert tokenizer.bytes(0) == tokenizer.bytes(1) == b""
    special = llama_vocabulary.tokenizer(special_ids=[by_piece["汉字"]])
    assert special.bytes(by_piece["汉字"]) == b""
    assert special.decode([by_piece["汉字"]]) == ""


def test_bytes_that_are_not_utf8_decode_to_replacement_characters(golden_vocabulary: Vocabulary) -> None:
    tokenizer, oracle = golden_vocabulary.tokenizer(), golden_vocabulary.oracle
    rng = random.Random(5)
    first_byte = golden_vocabulary.pieces.index("<0x00>")
    seen = 0
    for _ in range(2000):
        values = rng.choices(b"a\x80\xa0\xbf\xc3\xe4\xed\xf0\xf4\xff", k=6)
        ids = [rng.choice([first_byte + value, 1000]) for value in values]
        text = tokenizer.decode(ids)
        assert text == oracle.decode(ids)
        seen += "\ufffd" in text
    assert seen > 1000


@pytest.mark.parametrize(
    ("data", "at"),
    [
        (b"ab\xff", 2),
        (b"\x80", 0),
        (b"a\xc0\x80", 1),
        (b"\xe0\x80\x80", 0),
        (b"\xed\xa0\x80", 0),
        (b"\xf4\x90\x80\x80", 0),
        ("中".encode()[:2], 0),
        (b"<unk>\xf0\x9f\x98", 5),
    ],
)
def test_invalid_utf8_is_refused(golden_vocabulary: Vocabulary, data: bytes, at: int) -> None:
    with pytest.raises(ValueError, match=f"not valid UTF-8 at byte {at}$"):
        golden_vocabulary.tokenizer().encode(data)


def test_lone_surrogates_are_refused(golden_vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        golden_vocabulary.tokenizer().encode("a\ud83d")


@pytest.mark.parametrize("bad", [-1, -200, 2048, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_refused(golden_vocabulary: Vocabulary, bad: int) -> None:
    tokenizer = golden_vocabulary.tokenizer()
    with pytest.raises(ValueError, match=f"token id {bad} is not in the vocabulary of 2048 pieces"):
        tokenizer.decode([5, bad])
    with pytest.raises(ValueError, match=f"token id {bad} "):
        tokenizer.bytes(bad)


def test_very_long_words_take_no_quadratic_time(golden_vocabulary: Vocabulary) -> None:
    """About 0.1 s each in n log n steps; n^2 = 10^11 would take minutes on any machine."""
    tokenizer = golden_vocabulary.tokenizer(special_ids=[0, 1, 2])
    started = time.perf_counter()
    for word in ["a", " ", "<|end", "odelode", "中", "\0"]:
        text = word * (300_000 // len(word))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - started < 30


def test_one_tokenizer_serves_many_threads(golden_vocabulary: Vocabulary) -> None:
    tokenizer = golden_vocabulary.tokenizer(special_ids=[0, 1, 2])
    texts = ["".join(random_texts(300, golden_vocabulary.pieces)[i::8]) for i in range(8)]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts * 10)) == expected * 10
        decoded = [tokenizer.decode(ids) for ids in expected]
        assert list(pool.map(tokenizer.decode, expected * 10)) == decoded * 10


GOOD: dict[str, Any] = {"pieces": ["<unk>", "a"], "scores": [0.0, -1.0], "types": [2, 1]}
ALL_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pieces": [], "scores": [], "types": []}, "the vocabulary is empty"),
        ({"scores": [0.0]}, "one score and one type for each of 2 pieces, found 1 scores and 2 types"),
        ({"types": [2, 1, 1]}, "found 2 scores and 3 types"),
        ({"types": [2, 0]}, "expected a type of 1 to 6 for piece 1, found 0"),
        ({"types": [2, 7]}, "expected a type of 1 to 6 for piece 1, found 7"),
        ({"types": [2, 6]}, "expected <0x00> to <0xFF> for the byte piece 1, found 'a'"),
        ({"pieces": ["<unk>", "<0x0a>"], "types": [2, 6]}, "for the byte piece 1"),
        ({"pieces": ["<unk>", "<0x0A>"], "types": [2, 6]}, "expected all 256 byte pieces or none, found 1"),
        ({"pieces": ["<unk>", b"\xff"]}, "piece 1 is not valid UTF-8"),
        ({"scores": [0.0, float("nan")]}, "the score of piece 1 is not a number"),
        ({"bos_id": 2}, r"the first token \(BOS\), 2, is not in the vocabulary of 2"),
        ({"eos_id": -2}, r"the last token \(EOS\), -2, is not"),
        ({"unk_id": 9}, "the unknown piece, 9, is not"),
        ({"unk_id": -1}, "neither byte pieces nor an unknown piece"),
        ({"special_ids": [0, -1]}, "a special piece, -1, is not"),
    ],
)
def test_a_vocabulary_that_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.Tokenizer(**GOOD | change)


def test_of_equal_pieces_the_first_counts() -> None:
    assert _core.Tokenizer(["<unk>", "a", "a"], [0.0, -1.0, 0.0], [2, 1, 1]).encode("aa") == [1, 1]


def test_byte_pieces_need_no_unknown_piece() -> None:
    tokenizer = _core.Tokenizer(ALL_BYTES, [0.0] * 256, [6] * 256, unk_id=-1)
    assert tokenizer.encode("é") == [0xC3, 0xA9]


def model_file(**changes: bytes | None) -> bytes:
    """A file with a small tokeniser; a change replaces a key's value, or takes the key away."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "▁a", "<pad>"]
    ggml = "tokenizer.ggml."
    keys: dict[str, bytes | None] = {
        ggml + "model": scalar(Kind.STRING, "llama"),
        ggml + "tokens": array(Kind.STRING, pieces),
        ggml + "scores": array(Kind.F32, [0.0, 0.0, 0.0, -2.0, -3.0, -1.0, 0.0]),
        ggml + "token_type": array(Kind.I32, [2, 3, 3, 1, 1, 1, 3]),
        ggml + "bos_token_id": scalar(Kind.U32, 1),
        ggml + "eos_token_id": scalar(Kind.U32, 2),
        ggml + "unknown_token_id": scalar(Kind.U32, 0),
        ggml + "padding_token_id": scalar(Kind.U32, 6),
    }
    for name, value in changes.items():
        keys[name if name.startswith("yivl.") else ggml + name] = value
    return build([key(name, value) for name, value in keys.items() if value is not None])


def flag(value: bool) -> bytes:
    return scalar(Kind.BOOL, value)


def test_reading_a_model_file() -> None:
    text = "a  a<pad></s><s>"
    assert _core.Tokenizer.parse(model_file()).encode(text) == [1, 5, 3, 5, 6, 2, 1]
    settings = model_file(
        add_bos_token=flag(False),
        add_eos_token=flag(True),
        add_space_prefix=flag(False),
        remove_extra_whitespaces=flag(True),
        **{"yivl.tokenizer.special_ids": array(Kind.I32, [6])},
    )
    assert _core.Tokenizer.parse(settings).encode("a  a <pad>a") == [4, 5, 6, 4, 2]
    assert _core.Tokenizer.parse(settings).encode("</s>") == [0, 2]
    assert _core.Tokenizer.parse(model_file(bos_token_id=None)).encode("a") == [5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": scalar(Kind.STRING, "gpt2")}, "model: expected 'llama' .*, found 'gpt2'"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"scores": None}, "tokenizer.ggml.scores"),
        ({"token_type": None}, "tokenizer.ggml.token_type"),
        ({"scores": array(Kind.F32, [0.0])}, "found 1 scores and 7 types"),
        ({"token_type": array(Kind.I32, [2, 3, 3, 1, 1, 2**31 - 1, 3])}, "piece 5, found 0"),
        ({"token_type": array(Kind.I64, [2, 3, 3, 1, 2**32 + 1, 1, 3])}, "piece 4, found 0"),
        ({"bos_token_id": scalar(Kind.U32, 7)}, r"\(BOS\), 7, is not in the vocabulary"),
        ({"eos_token_id": scalar(Kind.U32, 2**32 - 1)}, "eos_token_id: expected an id"),
        ({"add_bos_token": scalar(Kind.U32, 1)}, "add_bos_token"),
        ({"yivl.tokenizer.special_ids": array(Kind.I32, [-1])}, "special_ids: .* found -1"),
    ],
)
def test_a_damaged_tokeniser_in_a_file_is_named(change: dict[str, bytes | None], message: str) -> None:
    with pytest.raises(_core.ModelFileError, match=f"(?s)broken.gguf.*{message}"):
        _core.Tokenizer.parse(model_file(**change), "broken.gguf")


def test_a_byte_twice_and_one_missing_is_told() -> None:
    pieces = [f"<0x{i:02X}>" for i in range(255)] + ["<0x00>"]
    with pytest.raises(ValueError, match="expected all 256 byte pieces or none, found 255"):
        _core.Tokenizer(["<unk>", *pieces], [0.0] * 257, [2, *[6] * 256])
