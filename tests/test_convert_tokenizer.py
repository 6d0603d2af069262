"""The tokeniser's tables: sentencepiece's, with the tokens that a folder adds and up to the embeddings' rows."""

from __future__ import annotations

from pathlib import Path

import sentencepiece
from checkpoints import GOLDEN, edit_json, write_checkpoint
from gguf import GGUFReader
from gguf_contents import keys
from yivl_edge.convert import convert
from yivl_edge.convert.tokenizer import read_sentencepiece


def test_tokeniser_tables_equal_sentencepiece(golden_q8_0: Path) -> None:
    found = keys(GGUFReader(golden_q8_0))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))
    assert found["tokenizer.ggml.tokens"] == [oracle.id_to_piece(i) for i in range(len(oracle))]
    assert found["tokenizer.ggml.scores"] == [oracle.get_score(i) for i in range(len(oracle))]
    kinds = found["tokenizer.ggml.token_type"]
    for number, of_kind in {
        2: oracle.is_unknown,
        3: oracle.is_control,
        5: oracle.is_unused,
        6: oracle.is_byte,
    }.items():
        assert [kind == number for kind in kinds] == [of_kind(i) for i in range(len(oracle))]
    assert all(
        kinds[i] == 4 for i in range(3, 9)
    )  # <|Human|> and so on: user defined, which the oracle cannot tell


def test_pieces_are_filled_up_to_the_rows(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", vocab=2052)
    edit_json(
        folder / "tokenizer_config.json",
        added_tokens_decoder={
            "2049": {"content": "<|extra|>", "special": True},
            "2050": {"content": "<plain>", "special": False},
            "7": {"content": "<|im_end|>", "special": True},
        },
        additional_special_tokens=["<|im_sep|>"],
        pad_token={"content": "<|extra|>", "lstrip": False},
    )
    convert(folder, tmp_path / "out.gguf")
    found = keys(GGUFReader(tmp_path / "out.gguf"))
    assert found["tokenizer.ggml.tokens"][2047:] == [
        "潘",
        "<unused_2048>",
        "<|extra|>",
        "<plain>",
        "<unused_2051>",
    ]
    assert found["tokenizer.ggml.token_type"][2047:] == [1, 5, 3, 4, 5]
    assert len(found["tokenizer.ggml.scores"]) == 2052
    assert found["yivl.tokenizer.special_ids"] == [0, 1, 2, 7, 8, 2049, 2050]
    assert found["tokenizer.ggml.padding_token_id"] == 2049


def test_added_tokens_file_of_older_folders(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", vocab=2050)
    (folder / "added_tokens.json").write_text('{"<image>": 2048}')
    convert(folder, tmp_path / "out.gguf")
    found = keys(GGUFReader(tmp_path / "out.gguf"))
    assert found["tokenizer.ggml.tokens"][2048:] == ["<image>", "<unused_2049>"]
    assert found["tokenizer.ggml.token_type"][2048:] == [4, 5]


def test_tokeniser_with_llama_settings(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a few words are enough to train upon\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "llama"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    model = read_sentencepiece(tmp_path / "llama.model")
    assert model.add_dummy_prefix
    assert model.remove_extra_whitespaces
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llama.model"))
    assert model.pieces == [oracle.id_to_piece(i) for i in range(len(oracle))]
