#include "bpe_train.h"

#include <algorithm>
#include <queue>

#include "bpe.h"

int64_t WordCounts::add(const std::vector<std::string_view>& texts) {
    int64_t replaced = 0;
    std::vector<Counts> parts(texts.size());
#pragma omp parallel for schedule(dynamic) reduction(+ : replaced)
    for (size_t i = 0; i < texts.size(); i++)
        each_word(valid_utf8(texts[i], &replaced), true, [&](std::string_view word) {
            const auto found = parts[i].find(word);
            if (found != parts[i].end()) found->second++;
            else parts[i].emplace(word, 1);
        });
    for (const auto& part : parts)
        for (const auto& [word, count] : part) counts[word] += count;
    return replaced;
}

namespace {
using Pair = std::pair<int, int>;  // of tokens
struct PairHash {
    size_t operator()(const Pair& p) const { return std::hash<uint64_t>()((uint64_t(p.first) << 32 | uint32_t(p.second)) * 0x9E3779B97F4A7C15u); }
};
struct Word {
    std::vector<int> tokens;
    int64_t count;
};
struct Occurrences {
    int64_t count = 0;       // in the text
    std::vector<int> words;  // in which it is, or was; some more than once
    bool merged = false;
    // What another merge makes of a pair that has become a token is that token at once, as it will be when the text is encoded.
    int64_t priority() const { return merged && count > 0 ? INT64_MAX : count; }
};
struct Candidate {
    int64_t priority;  // when it was put into the queue
    Pair pair;
    bool operator<(const Candidate& other) const {  // the largest comes first
        return priority != other.priority ? priority < other.priority : pair > other.pair;
    }
};

// Pairs of all words, and a queue of them. A pair's place in the queue is not mended when it becomes rarer, only when it comes up.
struct Trainer {
    std::vector<Word> words;
    std::unordered_map<Pair, Occurrences, PairHash> pairs;
    std::priority_queue<Candidate> queue;
    std::vector<Pair> grown;  // in this merge

    void change(Pair pair, int64_t by, int word) {
        Occurrences& o = pairs[pair];
        o.count += by;
        if (by < 0) return;
        if (o.words.empty() || o.words.back() != word) o.words.push_back(word);
        grown.push_back(pair);
    }
    void enqueue_grown() {
        std::sort(grown.begin(), grown.end());
        grown.erase(std::unique(grown.begin(), grown.end()), grown.end());
        for (const Pair& pair : grown) queue.push({pairs[pair].priority(), pair});
        grown.clear();
    }
    void count_pairs() {
        for (size_t w = 0; w < words.size(); w++)
            for (size_t i = 0; i + 1 < words[w].tokens.size(); i++)
                change({words[w].tokens[i], words[w].tokens[i + 1]}, words[w].count, int(w));
        enqueue_grown();
    }
    // The most frequent pair; false: there is none.
    bool next(Pair& pair) {
        while (!queue.empty()) {
            const Candidate top = queue.top();
            queue.pop();
            const int64_t priority = pairs[top.pair].priority();
            pair = top.pair;
            if (priority == top.priority && priority > 0) return true;
            if (priority > 0) queue.push({priority, pair});
        }
        return false;
    }
    // Makes one token of the pair, from left to right, wherever it is.
    void merge(Pair pair, int token) {
        Occurrences& merged = pairs[pair];
        const std::vector<int> where = std::move(merged.words);
        merged.words.clear();
        merged.merged = true;
        for (const int w : where) {
            std::vector<int>& t = words[w].tokens;
            const int64_t count = words[w].count;
            size_t kept = 0;  // tokens of the word as it becomes
            for (size_t i = 0; i < t.size(); kept++) {
                if (i + 1 == t.size() || t[i] != pair.first || t[i + 1] != pair.second) {
                    t[kept] = t[i++];
                    continue;
                }
                change(pair, -count, w);
                if (kept > 0) change({t[kept - 1], pair.first}, -count, w), change({t[kept - 1], token}, count, w);
                if (i + 2 < t.size()) change({pair.second, t[i + 2]}, -count, w), change({token, t[i + 2]}, count, w);
                t[kept] = token;
                i += 2;
            }
            t.resize(kept);
        }
        enqueue_grown();
    }
};
}  // namespace

std::string train_bpe(const WordCounts& words, int vocab, const std::function<void(int)>& progress) {
    std::vector<std::string> pieces = Bpe::alphabet();
    std::unordered_map<std::string, int> token_of;
    for (int t = 0; t < int(pieces.size()); t++) token_of[pieces[t]] = t;
    Trainer trainer;
    for (const auto& [word, count] : words.counts) {
        Word& w = trainer.words.emplace_back(Word{{}, count});
        for (const char byte : word) w.tokens.push_back(token_of[std::string(1, byte)]);
    }
    // So that the order of a hash table is in nothing.
    std::sort(trainer.words.begin(), trainer.words.end(), [](const Word& a, const Word& b) { return a.tokens < b.tokens; });
    trainer.count_pairs();
    std::vector<Pair> merges;
    for (Pair pair; int(pieces.size()) < vocab && trainer.next(pair);) {
        std::string piece = pieces[pair.first] + pieces[pair.second];
        const auto [found, is_new] = token_of.emplace(piece, int(pieces.size()));  // "ab" + "c" may have been "a" + "bc" before
        if (is_new) pieces.push_back(std::move(piece));
        if (!trainer.pairs[pair].merged) merges.push_back(pair);
        trainer.merge(pair, found->second);
        progress(int(pieces.size()));
    }
    return Bpe::write(pieces, merges, true);
}
