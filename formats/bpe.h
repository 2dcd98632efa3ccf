// Byte-level BPE (GPT-2): a text is cut into words; in each, whose first tokens are its bytes, the two neighbours that were merged first when
// the tokenizer was made are merged, again and again until no two have been.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

// Calls f(word) for each word of a valid UTF-8 text, in order; together they are the text. What GPT-2's regular expression cuts,
//   '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// \s as Unicode's White_Space; \p{L} and \p{N} of the Unicode version that libutf8proc knows (unicode_version()): characters that are
// younger count as neither. digits_apart: every character of \p{N} is a word of its own, with no space in front.
void each_word(std::string_view text, bool digits_apart, const std::function<void(std::string_view)>& f);
const char* unicode_version();
// The first place, at `from` or later, where the text can be cut so that the words of both parts are those of the whole: behind what is no
// space, before what is. npos: none. The text need not be UTF-8.
size_t word_boundary(std::string_view text, size_t from);

// text with U+FFFD for what is not UTF-8, in the places where Python's errors="replace" has it; adds their number to *replaced.
std::string valid_utf8(std::string_view text, int64_t* replaced);
// The length of a text without the beginning of a character at its end.
size_t whole_characters(std::string_view text);

inline const std::string kTokenizerFile = "tokenizer.json";

struct Bpe {
    std::vector<std::string> pieces;  // the bytes of each token; "" of one that is not text
    int end_of_text = -1;             // token
    std::string end_text;             // how its file calls that token
    bool digits_apart = false;
    bool composes = false;            // characters first become what Unicode's NFC makes of them
    std::vector<std::pair<size_t, int>> spaces;  // so many spaces are this token, wherever they are (GPT-NeoX); the longest first
    std::string file;                 // tokenizer.json: what load() has read, or the same in that form

    struct File;  // what load() reads
    // From tokenizer.json of Hugging Face's tokenizers, or from a directory with it or with encoder.json + vocab.bpe (GPT-2's own),
    // vocab.json + merges.txt (Hugging Face's). Fails on what this cannot do: another model than BPE, bytes without a token, other normalizers.
    static Bpe load(const std::string& path);
    // A tokenizer.json of tokens, of which 0 is <|endoftext|> whatever its piece, and of merges, the first of which comes first.
    static std::string write(const std::vector<std::string>& pieces, const std::vector<std::pair<int, int>>& merges, bool digits_apart);
    static std::vector<std::string> alphabet();  // pieces of what is there before any merge: end-of-text, then the bytes, as they are ordered
    static std::string of_bytes();  // a tokenizer.json without merges: token = byte, 256 is <|endoftext|>
    static Bpe of_file(const std::string& text, const std::string& where);  // text: of a tokenizer.json
    void encode(std::vector<int>& tokens, std::string_view text) const;  // appends; valid UTF-8. Text that spells a special token stays text

   private:
    struct Merge {
        int rank, token;
    };
    uint64_t number = 0;                         // unlike any other's: whose words an encode() remembers
    int bytes[256];                              // tokens
    std::unordered_map<uint64_t, Merge> merges;  // of left << 32 | right
    explicit Bpe(const File& file);
    void merge(std::vector<int>& tokens, std::string_view word) const;
    void encode_words(std::vector<int>& tokens, std::string_view text) const;
};
