// Text to ids and back: SentencePiece BPE with byte fallback, from the pieces that the model file carries.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gguf.h"

namespace yivl {

// SentencePiece's piece types, with its numbers (tokenizer.ggml.token_type).
enum class PieceType : int32_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

struct TokenizerConfig {
    std::vector<std::string> pieces;  // (V), UTF-8, U+2581 for a space
    std::vector<float> scores;        // (V)
    std::vector<PieceType> types;     // (V)
    int32_t bos_id = -1;              // -1: none
    int32_t eos_id = -1;
    int32_t unk_id = 0;
    bool add_bos = false;
    bool add_eos = false;
    bool add_dummy_prefix = false;          // tokenizer.ggml.add_space_prefix
    bool remove_extra_whitespaces = false;  // tokenizer.ggml.remove_extra_whitespaces
    std::vector<int32_t> special_ids;  // matched in the text before the BPE, as the reference does (bos, eos, unk, pad)
};

class Tokenizer {
public:
    // Reads tokenizer.ggml.*; throws ModelFileError naming file and key.
    static TokenizerConfig read_config(const GgufFile& file);
    // Throws std::invalid_argument for a vocabulary that cannot work.
    explicit Tokenizer(TokenizerConfig config);
    Tokenizer(Tokenizer&&) noexcept;
    Tokenizer& operator=(Tokenizer&&) noexcept;
    ~Tokenizer();

    const TokenizerConfig& config() const;
    int64_t vocab_size() const;
    // Whether encode() begins with a BOS: asked for, and there is one.
    bool adds_bos() const;

    // Ids of UTF-8 text, with BOS and EOS only if the config adds them and `add_special`. Special pieces written in the
    // text become their ids, as in the reference. Throws std::invalid_argument for invalid UTF-8.
    std::vector<int32_t> encode(std::string_view text, bool add_special = true) const;
    // The text of ids as SentencePiece decodes them: a dummy prefix is dropped, each byte of byte pieces that do not
    // make valid UTF-8 becomes U+FFFD. Special ids are skipped; otherwise they become their texts and each part between
    // them is decoded on its own, which inverts encode(). Throws std::invalid_argument for an id out of range.
    std::string decode(std::span<const int32_t> ids, bool skip_special = true) const;
    // The raw bytes that an id adds to a reply: a space for U+2581, one byte for a byte piece, nothing for a special or
    // control piece or the unknown piece.
    std::string_view bytes(int32_t id) const;

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace yivl
