// Making a byte-level BPE tokenizer of a text's own: of all pairs of neighbours in its words, the most frequent becomes a token, again and
// again. Every digit is a word of its own, and no token goes across words. What has to be known of the text is how often each word comes.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

struct WordCounts {
    struct Hash : std::hash<std::string_view> {
        using is_transparent = void;
    };
    using Counts = std::unordered_map<std::string, int64_t, Hash, std::equal_to<>>;
    Counts counts;
    // Counts the words of texts that are cut between words, on all cores. Returns how much was not UTF-8 and became U+FFFD.
    int64_t add(const std::vector<std::string_view>& texts);
};

// A tokenizer.json: token 0 is <|endoftext|>, 1 to 256 are the bytes, then come merges, until there are `vocab` tokens or no pair is left.
// Of pairs that are as frequent, the one of lower tokens is the first. The same words give the same bytes. progress(tokens so far)
constexpr int kLeastVocab = 257, kMostVocab = 1 << 18;
std::string train_bpe(const WordCounts& words, int vocab, const std::function<void(int)>& progress);
