"""The tokeniser's tables, read from ``tokenizer.model`` and ``tokenizer_config.json``.

``tokenizer.model`` is a protocol buffer, sentencepiece's ModelProto. The sentencepiece package tells neither
its normaliser settings nor which pieces are user defined, and its message classes need the protobuf package.
So the few fields that matter are read here. Fields used, by number:

    ModelProto        1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec, 5 denormalizer_spec
    SentencePiece     1 piece (string), 2 score (float), 3 type (enum, default 1)
    TrainerSpec       3 model_type (enum: 2 is BPE), 24 treat_whitespace_as_suffix (bool)
    NormalizerSpec    1 name (string), 2 precompiled_charsmap (bytes; empty: identity), 3 add_dummy_prefix,
                      4 remove_extra_whitespaces, 5 escape_whitespaces (bools, default true)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from yivl_edge.convert.config import JsonFile
from yivl_edge.convert.errors import CheckpointError


class PieceType(IntEnum):
    """sentencepiece's numbers, which are GGUF's too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class TokenizerTables:
    """What ``tokenizer.ggml.*`` and ``yivl.tokenizer.*`` hold; lists have one entry per row of embeddings."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    padding_id: int | None
    special_ids: list[int]  # matched in the text before the BPE
    add_bos: bool
    add_eos: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_tokenizer(folder: Path, vocab_size: int) -> TokenizerTables:
    """Read the tokeniser of a published folder and fill its tables up to ``vocab_size`` entries."""
    model = read_sentencepiece(folder / "tokenizer.model")
    config = JsonFile(folder / "tokenizer_config.json", "Copy it from the published folder.")
    tokenizer_class = config.values.get("tokenizer_class", "LlamaTokenizer")
    if tokenizer_class not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        raise config.fail("tokenizer_class", "LlamaTokenizer")

    pieces, scores, types = list(model.pieces), list(model.scores), list(model.types)
    added = _added_tokens(folder, config)
    for i, token in sorted(added.items()):
        if i >= vocab_size:
            raise CheckpointError(
                f"{token.origin} gives the token {token.text!r} the id {i}, but the embeddings have only "
                f"{vocab_size} rows (vocab_size in config.json). The tokeniser belongs to another model."
            )
        if i < len(model.pieces):
            if pieces[i] != token.text:
                raise CheckpointError(
                    f"{token.origin} calls token {i} {token.text!r}, tokenizer.model {pieces[i]!r}"
                )
            continue
        _pad(pieces, scores, types, i)
        pieces.append(token.text)
        scores.append(0.0)
        types.append(PieceType.CONTROL if token.special else PieceType.USER_DEFINED)
    if len(pieces) > vocab_size:
        raise CheckpointError(
            f"{folder}: the tokeniser has {len(pieces)} pieces, the embeddings only {vocab_size} rows "
            "(vocab_size in config.json). The tokeniser belongs to another model."
        )
    _pad(pieces, scores, types, vocab_size)

    ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}

    def find(key: str, token: object) -> int | None:
        text = _token_text(config, key, token)
        if text is None:
            return None
        if text not in ids:
            raise config.fail(key, f"a piece of tokenizer.model or an added token (looked for {text!r})")
        return ids[text]

    def special(key: str, default: str | None) -> int | None:
        # LlamaTokenizer's own defaults stand in for keys that the file lacks.
        return find(key, config.values.get(key, default))

    bos_id, eos_id = special("bos_token", "<s>"), special("eos_token", "</s>")
    unknown_id, padding_id = special("unk_token", "<unk>"), special("pad_token", None)
    _check_end_of_sequence(folder, eos_id)
    key = "additional_special_tokens"
    additional = [find(key, token) for token in config.values.get(key) or []]
    matched = {*added, *additional, bos_id, eos_id, unknown_id, padding_id}
    return TokenizerTables(
        pieces=pieces,
        scores=scores,
        types=types,
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=unknown_id,
        padding_id=padding_id,
        special_ids=sorted(i for i in matched if i is not None),
        add_bos=config.boolean("add_bos_token", default=True),
        add_eos=config.boolean("add_eos_token", default=False),
        add_dummy_prefix=model.add_dummy_prefix,
        remove_extra_whitespaces=model.remove_extra_whitespaces,
    )


def _pad(pieces: list[str], scores: list[float], types: list[int], size: int) -> None:
    for i in range(len(pieces), size):
        pieces.append(f"<unused_{i}>")
        scores.append(0.0)
        types.append(PieceType.UNUSED)


def _check_end_of_sequence(folder: Path, eos_id: int | None) -> None:
    """A reply ends at the generation config's token; the file has room for one, the tokeniser's."""
    path = folder / "generation_config.json"
    if not path.exists():
        return
    config = JsonFile(path, "It may be deleted.")
    found = config.values.get("eos_token_id")
    if found not in (None, eos_id, [eos_id]):
        raise config.fail("eos_token_id", f"{eos_id}, the tokeniser's eos_token")


@dataclass(frozen=True)
class _AddedToken:
    text: str
    special: bool
    origin: Path


def _token_text(file: JsonFile, key: str, value: object) -> str | None:
    """The text of a token written as a string, or as transformers' AddedToken."""
    if isinstance(value, dict):
        for flag in ("lstrip", "rstrip", "single_word"):
            if value.get(flag):
                raise CheckpointError(
                    f"{file.path}: {key} has {flag} set, which the engine's tokeniser does not do"
                )
        value = value.get("content")
        if value is None:
            raise file.fail(key, "a token with a content")
    if value is not None and not isinstance(value, str):
        raise file.fail(key, "the text of a token")
    return value


def _added_tokens(folder: Path, config: JsonFile) -> dict[int, _AddedToken]:
    """Tokens beside the sentencepiece model, by id: in newer folders in the config, in older ones a file."""
    added = {}
    key = "added_tokens_decoder"
    decoder = config.values.get(key) or {}
    if not isinstance(decoder, dict):
        raise config.fail(key, "tokens by id")
    for number, token in decoder.items():
        text = _token_text(config, key, token)
        if not number.isdecimal() or text is None:
            raise config.fail(key, "tokens by id")
        added[int(number)] = _AddedToken(
            text, isinstance(token, dict) and bool(token.get("special")), config.path
        )

    older = folder / "added_tokens.json"
    if not decoder and older.exists():
        file = JsonFile(older, "It should give each added token its id.")
        for text, i in file.values.items():
            if not isinstance(i, int) or isinstance(i, bool) or i < 0:
                raise file.fail(text, "the id of a token")
            added[i] = _AddedToken(text, False, older)
    return added


@dataclass(frozen=True)
class SentencePieceModel:
    """The part of a ModelProto that matters to a BPE tokeniser."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a ``tokenizer.model``; raise CheckpointError for one that the engine would not tokenise like."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Copy it from the published folder.") from None
    try:
        return _parse_model(path, data)
    except (_WireError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"{path} is no sentencepiece model, or damaged: {error}") from error


_BPE = 2


def _parse_model(path: Path, data: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    denormalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            pieces.append(_bytes(piece.get(1, b"")).decode())
            scores.append(struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0])
            types.append(_integer(piece.get(3, PieceType.NORMAL)))
        elif number == 2:
            trainer.update(_fields(_bytes(value)))
        elif number == 3:
            normalizer.update(_fields(_bytes(value)))
        elif number == 5:
            denormalizer.update(_fields(_bytes(value)))

    if not pieces:
        raise _WireError("it has no pieces")
    if unknown_types := set(types) - set(PieceType):
        raise _WireError(f"it has pieces of the unknown type {min(unknown_types)}")
    if trainer.get(3, 1) != _BPE:
        raise CheckpointError(f"{path} is no BPE model. The engine tokenises with sentencepiece's BPE only.")
    if trainer.get(24, 0):
        raise CheckpointError(f"{path} writes spaces as suffixes, which the engine's tokeniser does not do.")
    for rules in (normalizer, denormalizer):
        if rules.get(2):
            name = _bytes(rules.get(1, b"")).decode() or "unnamed"
            raise CheckpointError(
                f"{path} normalises text by the rules {name!r}. The engine supports Yi's identity rules only."
            )
    if not normalizer.get(5, 1):
        raise CheckpointError(f"{path} does not escape spaces, which the engine's tokeniser always does.")
    return SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


class _WireError(ValueError):
    """Bytes that are no protocol buffer of the expected form."""


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message: number, and an integer (varint) or bytes (all other wire types)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire_type == 2:
            length, at = _varint(data, at)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise _WireError(f"wire type {wire_type} at byte {at}")
        if length > len(data) - at:
            raise _WireError(f"a field of {length} bytes at byte {at} of {len(data)}")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise _WireError("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    raise _WireError(f"a number longer than 64 bits at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _WireError("a number where text is expected")
    return value


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise _WireError("text where a number is expected")
    return value
