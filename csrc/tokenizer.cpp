#include "tokenizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <queue>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "utf8.h"

namespace yivl {

namespace {

constexpr std::string_view escaped_space = "\xE2\x96\x81";      // U+2581
constexpr std::string_view unknown_surface = " \xE2\x81\x87 ";  // " U+2047 ", SentencePiece's text of the unknown piece
constexpr size_t max_text_bytes = size_t{1} << 29;              // symbols are counted in 32 bits

// A sorted set of texts that finds the longest one with which a text begins.
class PrefixSet {
public:
    explicit PrefixSet(std::vector<std::string_view> texts) : texts_(std::move(texts)) {
        std::erase(texts_, std::string_view());
        std::sort(texts_.begin(), texts_.end());
    }

    bool empty() const { return texts_.empty(); }

    // The length of the longest member that `text` begins with; 0 if there is none.
    size_t longest(std::string_view text) const {
        size_t length = 0;
        auto first = texts_.begin(), last = texts_.end();
        // Invariant: [first, last) are the members that begin with text[0, depth).
        for (size_t depth = 0; first != last; ++depth) {
            if (first->size() == depth) {
                length = depth;
                while (first != last && first->size() == depth) ++first;
            }
            if (depth == text.size()) break;
            const auto wanted = static_cast<uint8_t>(text[depth]);
            const auto byte = [depth](std::string_view member) { return static_cast<uint8_t>(member[depth]); };
            first = std::partition_point(first, last, [&](std::string_view m) { return byte(m) < wanted; });
            last = std::partition_point(first, last, [&](std::string_view m) { return byte(m) == wanted; });
        }
        return length;
    }

private:
    std::vector<std::string_view> texts_;
};

// The value of a piece "<0x00>" to "<0xFF>"; -1 for any other text.
int byte_value(std::string_view piece) {
    const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
    if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return -1;
    const int high = digit(piece[3]), low = digit(piece[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

std::string spaces_for_escapes(std::string_view piece) {
    std::string text;
    for (size_t at = 0; at < piece.size();) {
        const bool escape = piece.substr(at).starts_with(escaped_space);
        text += escape ? ' ' : piece[at];
        at += escape ? escaped_space.size() : 1;
    }
    return text;
}

// Throws std::invalid_argument for a vocabulary that cannot work.
void check(const TokenizerConfig& config) {
    const auto fail = [](const std::string& what) { throw std::invalid_argument("tokeniser: " + what); };
    const size_t count = config.pieces.size();
    if (count == 0) fail("the vocabulary is empty");
    if (count > static_cast<size_t>(std::numeric_limits<int32_t>::max())) fail("the vocabulary is too large");
    if (config.scores.size() != count || config.types.size() != count)
        fail("expected one score and one type for each of " + std::to_string(count) + " pieces, found " +
             std::to_string(config.scores.size()) + " scores and " + std::to_string(config.types.size()) + " types");

    size_t bytes = 0, total = 0;
    std::array<bool, 256> seen{};
    for (size_t i = 0; i < count; ++i) {
        const std::string& piece = config.pieces[i];
        const std::string name = "piece " + std::to_string(i);
        total += piece.size();
        if (total > max_text_bytes) fail("the pieces are longer than 512 MiB together");
        if (find_invalid_utf8(piece) != std::string::npos) fail(name + " is not valid UTF-8");
        if (std::isnan(config.scores[i])) fail("the score of " + name + " is not a number");
        const auto type = static_cast<int32_t>(config.types[i]);
        if (type < 1 || type > 6) fail("expected a type of 1 to 6 for " + name + ", found " + std::to_string(type));
        if (config.types[i] != PieceType::byte) continue;
        const int value = byte_value(piece);
        if (value < 0) fail("expected <0x00> to <0xFF> for the byte " + name + ", found " + quoted(piece));
        if (!std::exchange(seen[value], true)) ++bytes;
    }
    if (bytes != 0 && bytes != 256) fail("expected all 256 byte pieces or none, found " + std::to_string(bytes));

    const auto check_role = [&](const char* role, int64_t id, int64_t lowest) {
        if (id < lowest || id >= static_cast<int64_t>(count))
            fail(std::string("the id of ") + role + ", " + std::to_string(id) + ", is not in the vocabulary of " +
                 std::to_string(count) + " pieces");
    };
    check_role("the first token (BOS)", config.bos_id, -1);
    check_role("the last token (EOS)", config.eos_id, -1);
    check_role("the unknown piece", config.unk_id, -1);
    for (const int32_t id : config.special_ids) check_role("a special piece", id, 0);
    if (bytes == 0 && config.unk_id < 0) fail("there are neither byte pieces nor an unknown piece");
}

}  // namespace

struct Tokenizer::Impl {
    using IdMap = std::unordered_map<std::string_view, int32_t>;

    TokenizerConfig config;
    IdMap mergeable;                    // normal, user defined and unused pieces: what merging can make
    std::array<int32_t, 256> byte_ids;  // valid if has_bytes
    bool has_bytes = false;
    size_t longest_mergeable = 0;  // bytes
    std::vector<bool> is_special;  // (V), from special_ids
    IdMap special_by_text;
    PrefixSet special_texts{{}};
    PrefixSet user_defined{{}};
    std::string surfaces;                // what bytes(id) gives, one after another
    std::vector<uint32_t> surface_ends;  // (V)

    explicit Impl(TokenizerConfig from) : config(std::move(from)) {
        check(config);
        index_pieces();
        index_surfaces();
    }

    void index_pieces();
    void index_surfaces();

    int64_t vocab_size() const { return static_cast<int64_t>(config.pieces.size()); }
    void check_id(int64_t id) const {
        if (id < 0 || id >= vocab_size())
            throw std::invalid_argument("token id " + std::to_string(id) + " is not in the vocabulary of " +
                                        std::to_string(vocab_size()) + " pieces");
    }
    bool is_unknown(int32_t id) const { return id == config.unk_id || config.types[id] == PieceType::unknown; }

    std::string_view next_unit(std::string_view text, bool* frozen) const;
    std::string normalise(std::string_view text) const;
    void encode_part(std::string_view text, std::vector<int32_t>& ids) const;
    std::string decode_part(std::span<const int32_t> ids, bool skip_special) const;
};

void Tokenizer::Impl::index_pieces() {
    const size_t count = config.pieces.size();
    std::vector<std::string_view> user_texts, special;
    mergeable.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        const std::string_view piece = config.pieces[i];
        const auto id = static_cast<int32_t>(i);
        switch (config.types[i]) {
            case PieceType::user_defined: user_texts.push_back(piece); [[fallthrough]];
            case PieceType::normal:
            case PieceType::unused:
                mergeable.try_emplace(piece, id);  // of equal pieces the first counts
                longest_mergeable = std::max(longest_mergeable, piece.size());
                break;
            case PieceType::byte:
                byte_ids[byte_value(piece)] = id;
                has_bytes = true;
                break;
            case PieceType::control:
            case PieceType::unknown: break;  // never made from text
        }
    }
    user_defined = PrefixSet(std::move(user_texts));

    is_special.resize(count);
    for (const int32_t id : config.special_ids) {
        is_special[id] = true;
        special_by_text.try_emplace(config.pieces[id], id);
        special.push_back(config.pieces[id]);
    }
    special_texts = PrefixSet(std::move(special));
}

void Tokenizer::Impl::index_surfaces() {
    surface_ends.reserve(config.pieces.size());
    for (size_t i = 0; i < config.pieces.size(); ++i) {
        const PieceType type = config.types[i];
        const bool silent = is_special[i] || type == PieceType::control || is_unknown(static_cast<int32_t>(i));
        if (type == PieceType::byte && !silent) {
            surfaces += static_cast<char>(byte_value(config.pieces[i]));
        } else if (!silent) {
            surfaces += spaces_for_escapes(config.pieces[i]);
        }
        surface_ends.push_back(static_cast<uint32_t>(surfaces.size()));
    }
    surfaces.shrink_to_fit();
}

// What comes next as a whole: the longest user-defined piece, or one character.
std::string_view Tokenizer::Impl::next_unit(std::string_view text, bool* frozen) const {
    const size_t length = user_defined.empty() ? 0 : user_defined.longest(text);
    *frozen = length > 0;
    return text.substr(0, length > 0 ? length : utf8_step(text).length);
}

// SentencePiece's normaliser with the identity rules: the dummy prefix, extra spaces, and U+2581 for each space.
std::string Tokenizer::Impl::normalise(std::string_view text) const {
    bool frozen;
    const bool squeeze = config.remove_extra_whitespaces;
    while (squeeze && !text.empty() && next_unit(text, &frozen) == " ") text.remove_prefix(1);
    if (text.empty()) return {};

    std::string out;
    out.reserve(text.size() + text.size() / 2 + escaped_space.size());
    if (config.add_dummy_prefix) out += escaped_space;
    bool after_space = squeeze;
    while (!text.empty()) {
        std::string_view unit = next_unit(text, &frozen);
        text.remove_prefix(unit.size());
        while (after_space && unit.starts_with(' ')) unit.remove_prefix(1);
        if (unit.empty()) continue;
        for (const char c : unit) {
            if (c == ' ') {
                out += escaped_space;
            } else {
                out += c;
            }
        }
        after_space = squeeze && unit.ends_with(' ');
    }
    while (squeeze && out.ends_with(escaped_space)) out.resize(out.size() - escaped_space.size());
    return out;
}

// Byte-pair merging: of all neighbouring symbols whose union is a piece, the pair of the highest score merges first, of
// equal scores the leftmost, until none is left. A heap of candidate pairs makes it O(n log n); a pair whose symbols
// have changed since it was pushed is recognised by its length and dropped.
void Tokenizer::Impl::encode_part(std::string_view text, std::vector<int32_t>& ids) const {
    struct Symbol {
        uint32_t begin, length;  // in the normalised text; length 0: merged into its left neighbour
        int32_t previous, next;  // neighbours; -1: none
        bool frozen;             // a user-defined piece, which merges with nothing
    };
    struct Pair {
        float score;
        int32_t left, right;
        uint32_t length;
        bool operator<(const Pair& other) const {
            return score < other.score || (score == other.score && left > other.left);
        }
    };

    const std::string normalised = normalise(text);
    const std::string_view whole = normalised;
    std::vector<Symbol> symbols;
    symbols.reserve(whole.size());
    for (size_t at = 0; at < whole.size();) {
        bool frozen;
        const size_t length = next_unit(whole.substr(at), &frozen).size();
        const auto index = static_cast<int32_t>(symbols.size());
        symbols.push_back({static_cast<uint32_t>(at), static_cast<uint32_t>(length), index - 1, index + 1, frozen});
        at += length;
    }
    if (symbols.empty()) return;
    symbols.back().next = -1;

    std::priority_queue<Pair> candidates;
    // How an unused piece was last made of two symbols: it is taken apart again at the end, as SentencePiece does.
    std::unordered_map<std::string_view, std::pair<std::string_view, std::string_view>> halves_of_unused;
    const auto consider = [&](int32_t left, int32_t right) {
        if (left < 0 || right < 0) return;
        const Symbol &a = symbols[left], &b = symbols[right];
        const uint32_t length = a.length + b.length;
        if (a.frozen || b.frozen || length > longest_mergeable) return;
        const std::string_view piece = whole.substr(a.begin, length);
        const auto it = mergeable.find(piece);
        if (it == mergeable.end()) return;
        candidates.push({config.scores[it->second], left, right, length});
        if (config.types[it->second] == PieceType::unused)
            halves_of_unused[piece] = {whole.substr(a.begin, a.length), whole.substr(b.begin, b.length)};
    };

    for (int32_t right = 1; right < static_cast<int32_t>(symbols.size()); ++right) consider(right - 1, right);
    while (!candidates.empty()) {
        const Pair pair = candidates.top();
        candidates.pop();
        Symbol &left = symbols[pair.left], &right = symbols[pair.right];
        if (left.length == 0 || right.length == 0 || left.length + right.length != pair.length) continue;
        left.length = pair.length;
        right.length = 0;
        left.next = right.next;
        if (left.next >= 0) symbols[left.next].previous = pair.left;
        consider(left.previous, pair.left);
        consider(pair.left, left.next);
    }

    bool after_unknown = false;
    std::vector<std::string_view> stack;
    for (int32_t index = 0; index >= 0; index = symbols[index].next) {
        stack.push_back(whole.substr(symbols[index].begin, symbols[index].length));
        while (!stack.empty()) {
            const std::string_view piece = stack.back();
            stack.pop_back();
            if (const auto it = halves_of_unused.find(piece); it != halves_of_unused.end()) {
                stack.push_back(it->second.second);
                stack.push_back(it->second.first);
                continue;
            }
            const auto it = mergeable.find(piece);
            const bool unknown = it == mergeable.end() || config.types[it->second] == PieceType::unused;
            if (unknown && has_bytes) {
                for (const char c : piece) ids.push_back(byte_ids[static_cast<uint8_t>(c)]);
            } else if (!unknown || !after_unknown) {  // a run of unknown characters is one unknown piece
                ids.push_back(unknown ? config.unk_id : it->second);
            }
            after_unknown = unknown;
        }
    }
}

// SentencePiece's decoding of pieces between two special ones.
std::string Tokenizer::Impl::decode_part(std::span<const int32_t> ids, bool skip_special) const {
    std::string text, pending;  // pending: the bytes of byte pieces in a row
    const auto flush = [&] {
        for (size_t at = 0; at < pending.size();) {
            const std::string_view rest = std::string_view(pending).substr(at);
            const Utf8Step step = utf8_step(rest);
            const bool valid = step.kind == Utf8Step::valid;
            text += valid ? rest.substr(0, step.length) : replacement_character;
            at += valid ? step.length : 1;  // SentencePiece writes one U+FFFD for each byte
        }
        pending.clear();
    };

    bool at_start = true, dropped_space = false;
    for (const int32_t id : ids) {
        if (skip_special && is_special[id]) continue;
        std::string_view piece = config.pieces[id];
        if (config.types[id] == PieceType::byte) {
            pending += static_cast<char>(byte_value(piece));
            continue;
        }
        flush();
        at_start = at_start && !dropped_space && text.empty();
        dropped_space = false;
        if (config.types[id] == PieceType::control) continue;
        if (is_unknown(id)) {
            text += unknown_surface;
            continue;
        }
        // The dummy prefix goes; where extra spaces were removed, so does a space of each piece before the first text.
        if (at_start && (config.add_dummy_prefix || config.remove_extra_whitespaces) &&
            piece.starts_with(escaped_space)) {
            piece.remove_prefix(escaped_space.size());
            dropped_space = !config.remove_extra_whitespaces;
        }
        text += spaces_for_escapes(piece);
    }
    flush();
    return text;
}

TokenizerConfig Tokenizer::read_config(const GgufFile& file) {
    const auto key = [](const char* name) { return std::string("tokenizer.ggml.") + name; };
    const auto id = [&](const char* name) -> int32_t {
        if (!file.has(key(name))) return -1;
        const int64_t value = file.integer(key(name));
        if (value < 0 || value > std::numeric_limits<int32_t>::max())
            file.fail(key(name) + ": expected an id of the vocabulary, found " + std::to_string(value));
        return static_cast<int32_t>(value);
    };
    const auto flag = [&](const char* name, bool otherwise) {
        return file.has(key(name)) ? file.boolean(key(name)) : otherwise;
    };

    if (const std::string_view model = file.string(key("model")); model != "llama")
        file.fail(key("model") + ": expected 'llama' (SentencePiece BPE), found " + quoted(model));
    TokenizerConfig config;
    const auto pieces = file.strings(key("tokens"));
    config.pieces.assign(pieces.begin(), pieces.end());
    const auto scores = file.floats(key("scores"));
    config.scores.assign(scores.begin(), scores.end());
    for (const int64_t type : file.integers(key("token_type"))) {
        const bool known = type >= 1 && type <= 6;  // check() names the piece of an unknown type
        config.types.push_back(static_cast<PieceType>(known ? type : 0));
    }
    config.bos_id = id("bos_token_id");
    config.eos_id = id("eos_token_id");
    config.unk_id = id("unknown_token_id");
    config.add_bos = flag("add_bos_token", true);
    config.add_eos = flag("add_eos_token", false);
    config.add_dummy_prefix = flag("add_space_prefix", true);
    config.remove_extra_whitespaces = flag("remove_extra_whitespaces", false);
    if (file.has("yivl.tokenizer.special_ids")) {
        for (const int64_t special : file.integers("yivl.tokenizer.special_ids")) {
            if (special < 0 || special >= static_cast<int64_t>(pieces.size()))
                file.fail("yivl.tokenizer.special_ids: expected ids of the vocabulary, found " +
                          std::to_string(special));
            config.special_ids.push_back(static_cast<int32_t>(special));
        }
    } else {
        for (const int32_t special : {config.bos_id, config.eos_id, config.unk_id, id("padding_token_id")})
            if (special >= 0) config.special_ids.push_back(special);
    }
    try {
        check(config);
    } catch (const std::invalid_argument& error) {
        file.fail(error.what());
    }
    return config;
}

Tokenizer::Tokenizer(TokenizerConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

const TokenizerConfig& Tokenizer::config() const { return impl_->config; }
int64_t Tokenizer::vocab_size() const { return impl_->vocab_size(); }
bool Tokenizer::adds_bos() const { return impl_->config.add_bos && impl_->config.bos_id >= 0; }

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special) const {
    if (const size_t at = find_invalid_utf8(text); at != std::string_view::npos)
        throw std::invalid_argument("the text is not valid UTF-8 at byte " + std::to_string(at));
    if (text.size() > max_text_bytes)
        throw std::invalid_argument("expected a text of at most 512 MiB, found " + std::to_string(text.size()) +
                                    " bytes");

    const TokenizerConfig& config = impl_->config;
    std::vector<int32_t> ids;
    if (add_special && adds_bos()) ids.push_back(config.bos_id);
    // Each part between special pieces is encoded on its own (transformers' slow tokeniser with legacy=True).
    size_t part = 0;
    for (size_t at = 0; at < text.size();) {
        const size_t length = impl_->special_texts.longest(text.substr(at));
        if (length == 0) {
            ++at;
            continue;
        }
        impl_->encode_part(text.substr(part, at - part), ids);
        ids.push_back(impl_->special_by_text.at(text.substr(at, length)));
        at += length;
        part = at;
    }
    impl_->encode_part(text.substr(part), ids);
    if (add_special && config.add_eos && config.eos_id >= 0) ids.push_back(config.eos_id);
    return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
    for (const int32_t id : ids) impl_->check_id(id);
    if (skip_special) return impl_->decode_part(ids, true);
    std::string text;
    size_t part = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
        if (!impl_->is_special[ids[i]]) continue;
        text += impl_->decode_part(ids.subspan(part, i - part), false);
        text += impl_->config.pieces[ids[i]];
        part = i + 1;
    }
    return text + impl_->decode_part(ids.subspan(part), false);
}

std::string_view Tokenizer::bytes(int32_t id) const {
    impl_->check_id(id);
    const uint32_t begin = id == 0 ? 0 : impl_->surface_ends[id - 1];
    return std::string_view(impl_->surfaces).substr(begin, impl_->surface_ends[id] - begin);
}

}  // namespace yivl
