#include "bpe.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "files.h"
#include "json.h"

namespace fs = std::filesystem;

// ------------------------------------------------------------------------------------------------------------------
// Characters

namespace {
enum Class { kOther, kLetter, kNumber, kSpace };
struct Character {
    int code;
    int bytes;
};
}  // namespace

static Character character(std::string_view text, size_t at) {  // of valid UTF-8
    const auto byte = [&](size_t i) { return int(static_cast<unsigned char>(text[at + i])); };
    const int first = byte(0);
    if (first < 0x80) return {first, 1};
    if (first < 0xE0) return {(first & 0x1F) << 6 | (byte(1) & 0x3F), 2};
    if (first < 0xF0) return {(first & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F), 3};
    return {(first & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F), 4};
}

static Class classify(int code) {
    switch (code) {  // White_Space, which no later version of Unicode has changed since U+180E left it
        case 0x20: case 0x85: case 0xA0: case 0x1680: case 0x2028: case 0x2029: case 0x202F: case 0x205F: case 0x3000: return kSpace;
    }
    if ((code >= 0x09 && code <= 0x0D) || (code >= 0x2000 && code <= 0x200A)) return kSpace;
    switch (utf8proc_category(code)) {
        case UTF8PROC_CATEGORY_LU: case UTF8PROC_CATEGORY_LL: case UTF8PROC_CATEGORY_LT: case UTF8PROC_CATEGORY_LM: case UTF8PROC_CATEGORY_LO:
            return kLetter;
        case UTF8PROC_CATEGORY_ND: case UTF8PROC_CATEGORY_NL: case UTF8PROC_CATEGORY_NO: return kNumber;
        default: return kOther;
    }
}
static Class class_of(int code) {
    static const auto ascii = [] {
        std::array<Class, 128> classes;
        for (int c = 0; c < 128; c++) classes[c] = classify(c);
        return classes;
    }();
    return code < 128 ? ascii[code] : classify(code);
}
const char* unicode_version() { return utf8proc_unicode_version(); }

// The length of what begins at `at`: a character, or, where none does, of the longest beginning of one, which counts as one mistake
// (Unicode 15, section 3.9, "substitution of maximal subparts", as Python).
static int utf8_length(std::string_view text, size_t at, bool* valid) {
    const auto byte = [&](size_t i) { return at + i < text.size() ? int(static_cast<unsigned char>(text[at + i])) : -1; };
    const int first = byte(0);
    *valid = true;
    if (first < 0x80) return 1;
    const int length = first >= 0xC2 && first < 0xE0 ? 2 : first >= 0xE0 && first < 0xF0 ? 3 : first >= 0xF0 && first < 0xF5 ? 4 : 1;
    // No longer form than need be, no surrogate, nothing above U+10FFFF
    const int least = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80, most = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    int n = 1;
    while (n < length && byte(n) >= (n == 1 ? least : 0x80) && byte(n) <= (n == 1 ? most : 0xBF)) n++;
    *valid = length > 1 && n == length;
    return n;
}
std::string valid_utf8(std::string_view text, int64_t* replaced) {
    std::string out;
    out.reserve(text.size());
    for (size_t at = 0; at < text.size();) {
        bool valid;
        const int n = utf8_length(text, at, &valid);
        if (valid) out.append(text, at, n);
        else out += "\uFFFD", ++*replaced;
        at += n;
    }
    return out;
}
size_t whole_characters(std::string_view text) {
    for (size_t at = text.size() - std::min<size_t>(text.size(), 3); at < text.size(); at++) {
        bool valid;
        const size_t n = utf8_length(text, at, &valid);
        // What begins a character, and ends with the text before the character does
        if (!valid && at + n == text.size() && static_cast<unsigned char>(text[at]) >= 0xC2 && static_cast<unsigned char>(text[at]) < 0xF5) return at;
    }
    return text.size();
}

// ------------------------------------------------------------------------------------------------------------------
// Words

// The end of the run of characters of this class that begins at `at`.
static size_t run(std::string_view text, size_t at, Class of) {
    while (at < text.size()) {
        const Character c = character(text, at);
        if (class_of(c.code) != of) break;
        at += c.bytes;
    }
    return at;
}
static size_t contraction(std::string_view text, size_t at) {  // its length, or 0
    for (const char* ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
        if (text.substr(at).starts_with(ending)) return strlen(ending);
    return 0;
}
static size_t word_end(std::string_view text, size_t at, bool digits_apart) {
    if (text[at] == '\'')
        if (const size_t length = contraction(text, at)) return at + length;
    const Character first = character(text, at);
    const Class of = class_of(first.code);
    if (of == kNumber && digits_apart) return at + first.bytes;
    if (of != kSpace) return run(text, at, of);
    size_t last = at, end = at;  // of the spaces
    for (; end < text.size(); ) {
        const Character c = character(text, end);
        if (class_of(c.code) != kSpace) break;
        last = end;
        end += c.bytes;
    }
    if (end == text.size()) return end;
    const Class next = class_of(character(text, end).code);
    if (next == kNumber && digits_apart) return end;  // as if the text ended there
    if (last > at) return last;                       // the last space is left to what follows
    return text[at] == ' ' ? run(text, end, next) : end;
}
size_t word_boundary(std::string_view text, size_t from) {
    for (size_t at = std::max<size_t>(from, 1); at < text.size(); at++) {
        const int byte = static_cast<unsigned char>(text[at]);
        if (byte >= 0x80 || class_of(byte) != kSpace) continue;
        size_t start = at - 1;  // of the character before
        while (start > 0 && at - start < 4 && (text[start] & 0xC0) == 0x80) start--;
        bool valid;
        const bool whole = start + utf8_length(text, start, &valid) == at && valid;
        if (!whole || class_of(character(text, start).code) != kSpace) return at;
    }
    return std::string_view::npos;
}
void each_word(std::string_view text, bool digits_apart, const std::function<void(std::string_view)>& f) {
    for (size_t at = 0, end; at < text.size(); at = end) {
        end = word_end(text, at, digits_apart);
        f(text.substr(at, end - at));
    }
}

// ------------------------------------------------------------------------------------------------------------------
// Merging

// A list of tokens, linked so that a merge is one step, and a queue of the pairs that can be merged. Which of them the queue gives out may be
// gone by then: its tokens are not there any more. n log n in the length of the word, whatever it is.
void Bpe::merge(std::vector<int>& tokens, std::string_view word) const {
    struct Part {
        int token, previous, next;  // -1: none
    };
    struct Pair {
        int rank, at, left, right, token;
        bool operator<(const Pair& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }  // the least comes first
    };
    static thread_local std::vector<Part> parts;
    static thread_local std::vector<Pair> heap;
    const int n = int(word.size());
    parts.resize(n);
    heap.clear();
    const auto consider = [&](int at) {
        if (at < 0 || parts[at].next < 0) return;
        const int left = parts[at].token, right = parts[parts[at].next].token;
        const auto found = merges.find(uint64_t(left) << 32 | uint32_t(right));
        if (found == merges.end()) return;
        heap.push_back({found->second.rank, at, left, right, found->second.token});
        std::push_heap(heap.begin(), heap.end());
    };
    for (int i = 0; i < n; i++) parts[i] = {bytes[static_cast<unsigned char>(word[i])], i - 1, i + 1 < n ? i + 1 : -1};
    for (int i = 0; i < n; i++) consider(i);
    while (!heap.empty()) {
        std::pop_heap(heap.begin(), heap.end());
        const Pair pair = heap.back();
        heap.pop_back();
        Part& left = parts[pair.at];
        if (left.token != pair.left || left.next < 0 || parts[left.next].token != pair.right) continue;
        Part& right = parts[left.next];
        left.token = pair.token;
        left.next = right.next;
        right.token = -1;
        if (left.next >= 0) parts[left.next].previous = pair.at;
        consider(left.previous);
        consider(pair.at);
    }
    for (int i = 0; i >= 0; i = parts[i].next) tokens.push_back(parts[i].token);
}

static std::string composed(std::string_view text) {
    utf8proc_uint8_t* made = nullptr;
    const auto bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    const utf8proc_ssize_t size = utf8proc_map(bytes, utf8proc_ssize_t(text.size()), &made, utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    if (size < 0) fail("Unicode's NFC: %s", utf8proc_errmsg(size));
    const std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> owner(made, free);
    return {reinterpret_cast<const char*>(made), size_t(size)};
}

void Bpe::encode(std::vector<int>& tokens, std::string_view text) const {
    std::string other;
    if (composes && std::any_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) >= 0x80; }))
        text = other = composed(text);
    size_t begin = 0;  // of what has no tokens yet
    for (size_t at = spaces.empty() ? text.size() : 0; (at = text.find(' ', at)) < text.size();) {
        const size_t end = std::min(text.find_first_not_of(' ', at), text.size());
        for (const auto& [length, token] : spaces)
            for (; end - at >= length; begin = at += length) {
                if (begin < at) encode_words(tokens, text.substr(begin, at - begin));
                tokens.push_back(token);
            }
        at = end;
    }
    encode_words(tokens, text.substr(begin));
}

void Bpe::encode_words(std::vector<int>& tokens, std::string_view text) const {
    // Most words have been met before. A table of them, not more than kSlots: a new word takes the place of another.
    constexpr size_t kSlots = 1 << 16, kLongest = 32;
    struct Word {
        std::string text;
        std::vector<int> tokens;
    };
    static thread_local std::vector<Word> known;
    static thread_local uint64_t known_of = 0;
    if (known_of != number) known.assign(kSlots, {}), known_of = number;
    each_word(text, digits_apart, [&](std::string_view word) {
        if (word.size() > kLongest) return merge(tokens, word);
        Word& slot = known[std::hash<std::string_view>()(word) % kSlots];
        if (slot.text != word) {
            slot.text = word;
            slot.tokens.clear();
            merge(slot.tokens, word);
        }
        tokens.insert(tokens.end(), slot.tokens.begin(), slot.tokens.end());
    });
}

// ------------------------------------------------------------------------------------------------------------------
// Files. Tokens are written with a character for each byte: itself where it is printed, or else one from U+0100 on.
using Json = nlohmann::json;
static constexpr int kCharacters = 256 + 68;  // of which 256 stand for a byte

static std::array<int, 256> byte_characters() {  // code points
    std::array<int, 256> code;
    for (int b = 0, next = 256; b < 256; b++) code[b] = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD) ? b : next++;
    return code;
}
static std::string byte_text(int byte) {
    static const auto code = byte_characters();
    if (code[byte] < 0x80) return std::string(1, char(code[byte]));
    return {char(0xC0 | code[byte] >> 6), char(0x80 | (code[byte] & 0x3F))};
}
// The bytes that a token's text stands for; false: something else is in it.
static bool token_bytes(const std::string& token, std::string& bytes) {
    static const auto byte_of = [] {
        std::array<int, kCharacters> byte;
        byte.fill(-1);
        for (int b = 0; b < 256; b++) byte[byte_characters()[b]] = b;
        return byte;
    }();
    bytes.clear();
    for (size_t at = 0; at < token.size();) {
        const Character c = character(token, at);
        if (c.code >= kCharacters || byte_of[c.code] < 0) return false;
        bytes += char(byte_of[c.code]);
        at += c.bytes;
    }
    return true;
}

struct Bpe::File {
    std::string name;  // in errors
    std::vector<std::pair<std::string, int64_t>> vocabulary, added;  // text, token
    std::vector<std::pair<std::string, std::string>> merges;         // the first comes first
    bool digits_apart = false, composes = false;
    std::string text;
};

static bool only_spaces(const std::string& text) { return !text.empty() && text.find_first_not_of(' ') == std::string::npos; }

Bpe::Bpe(const File& from) : digits_apart(from.digits_apart), composes(from.composes), file(from.text) {
    static std::atomic<uint64_t> bpes = 0;
    number = ++bpes;
    const char* const name = from.name.c_str();
    // Gaps between numbers take memory: they must not be out of proportion.
    const int64_t most = 4 * int64_t(from.vocabulary.size() + from.added.size()) + (1 << 16);
    const auto place = [&](const std::string& text, int64_t token, const std::string& piece) {
        if (token < 0 || token >= most)
            fail("%s: \"%.80s\" is token %lld: with so few tokens numbers must be below %lld", name, printable(text).c_str(), (long long)token,
                 (long long)most);
        if (token >= int64_t(pieces.size())) pieces.resize(token + 1);
        if (!pieces[token].empty()) fail("%s: two tokens are number %lld", name, (long long)token);
        pieces[token] = piece;
    };
    std::unordered_map<std::string, int> tokens;
    std::fill(std::begin(bytes), std::end(bytes), -1);
    for (const auto& [text, token] : from.added) {
        place(text, token, text);
        if (only_spaces(text)) spaces.emplace_back(text.size(), int(token));
        for (const char* end : {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"})
            if (end_of_text < 0 && text == end) end_of_text = int(token), end_text = text;
    }
    for (const auto& [text, token] : from.vocabulary) {
        if (std::any_of(from.added.begin(), from.added.end(), [&](const auto& a) { return a.first == text; })) continue;
        std::string piece;
        if (!token_bytes(text, piece) || piece.empty())
            fail("%s: token %lld, \"%.80s\", is not in the characters of byte-level BPE", name, (long long)token, printable(text).c_str());
        place(text, token, piece);
        tokens[text] = int(token);
        if (piece.size() == 1) bytes[static_cast<unsigned char>(piece[0])] = int(token);
    }
    std::sort(spaces.rbegin(), spaces.rend());
    for (int b = 0; b < 0xF5; b++)  // all that are in UTF-8
        if (bytes[b] < 0 && b != 0xC0 && b != 0xC1) fail("%s: no token for byte %d: it is not byte-level BPE", name, b);
    if (end_of_text < 0) fail("%s: no end-of-text token; <|endoftext|>, <|end_of_text|>, </s> and <eos> are known", name);
    pieces[end_of_text].clear();
    for (size_t i = 0; i < from.merges.size(); i++) {
        const auto& [left, right] = from.merges[i];
        const auto a = tokens.find(left), b = tokens.find(right), both = tokens.find(left + right);
        if (a == tokens.end() || b == tokens.end() || both == tokens.end())
            fail("%s: merge %zu, \"%.80s\" with \"%.80s\": there is no token for %s", name, i + 1, printable(left).c_str(),
                 printable(right).c_str(), a == tokens.end() ? "the first" : b == tokens.end() ? "the second" : "both together");
        merges.emplace(uint64_t(a->second) << 32 | uint32_t(b->second), Merge{int(i), both->second});
    }
}

static std::string text_of(const Json& json, const std::string& where) {
    if (!json.is_string()) fail("%s is %.100s, not a text", where.c_str(), json.dump().c_str());
    return json.get<std::string>();
}
static void read_vocabulary(std::vector<std::pair<std::string, int64_t>>& to, const Json& json, const std::string& where) {
    if (!json.is_object()) fail("%s is not an object", where.c_str());
    for (const auto& [text, token] : json.items()) {
        if (!token.is_number_unsigned()) fail("%s: \"%.80s\" has number %.100s", where.c_str(), printable(text).c_str(), token.dump().c_str());
        to.emplace_back(text, int64_t(std::min<uint64_t>(token.get<uint64_t>(), INT64_MAX)));
    }
}
static void read_merge(std::vector<std::pair<std::string, std::string>>& to, const std::string& line, const std::string& where) {
    const size_t space = line.find(' ');
    if (space == std::string::npos || space == 0 || line.find(' ', space + 1) != std::string::npos || space + 1 == line.size())
        fail("%s: \"%.80s\" is not two tokens with a space between them", where.c_str(), printable(line).c_str());
    to.emplace_back(line.substr(0, space), line.substr(space + 1));
}

// null, for what is not there.
static const Json& member(const Json& json, const char* name) {
    static const Json none;
    return json.is_object() && json.contains(name) ? json.at(name) : none;
}

// tokenizer.json. What would change the tokens of a text, and is not known here, is refused.
static void read_tokenizer_json(Bpe::File& file, const Json& json) {
    const std::string& name = file.name;
    const auto refuse = [&](const char* what, const Json& is) {
        fail("%s: %s is %.200s: not known here", name.c_str(), what, printable(is.dump(-1, ' ', false, Json::error_handler_t::replace)).c_str());
    };
    const Json& model = member(json, "model");
    if (!member(model, "type").is_null() && model["type"] != "BPE") refuse("its model", model["type"]);
    for (const char* option : {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"}) {
        const Json& value = member(model, option);
        if (!value.is_null() && value != "" && value != false && value != 0.0) refuse((std::string("its model's ") + option).c_str(), value);
    }
    const Json& normalizer = member(json, "normalizer");
    file.composes = member(normalizer, "type") == "NFC";
    if (!normalizer.is_null() && !file.composes) refuse("its normalizer", normalizer);
    const Json& before = member(json, "pre_tokenizer");
    const Json parts = member(before, "type") == "Sequence" ? member(before, "pretokenizers") : Json::array({before});
    if (!parts.is_array() || parts.empty() || parts.size() > 2) refuse("its pre_tokenizer", before);
    file.digits_apart = parts.size() == 2;
    if (file.digits_apart && !(member(parts[0], "type") == "Digits" && member(parts[0], "individual_digits") == true))
        refuse("its pre_tokenizer", before);
    const Json& level = parts.back();
    if (member(level, "type") != "ByteLevel" || member(level, "add_prefix_space") != false || member(level, "use_regex") == false)
        refuse("its pre_tokenizer", before);

    read_vocabulary(file.vocabulary, member(model, "vocab"), name + ": its vocabulary");
    const Json &merges = member(model, "merges"), &added = member(json, "added_tokens");
    if (!merges.is_array()) fail("%s: it has no list of merges", name.c_str());
    for (const Json& merge : merges) {
        const std::string where = name + ": merge " + std::to_string(file.merges.size() + 1);
        if (merge.is_array() && merge.size() == 2) file.merges.emplace_back(text_of(merge[0], where), text_of(merge[1], where));
        else read_merge(file.merges, text_of(merge, where), where);
    }
    if (!added.is_null() && !added.is_array()) refuse("its list of added tokens", added);
    for (size_t i = 0; i < added.size(); i++) {
        const std::string where = name + ": added token " + std::to_string(i + 1);
        for (const char* option : {"single_word", "lstrip", "rstrip"})
            if (member(added[i], option) == true) refuse((std::string("an added token's ") + option).c_str(), true);
        if (member(added[i], "special") == false && !only_spaces(text_of(member(added[i], "content"), where)))
            fail("%s is not special: to find it in a text is not known here, unless it is spaces", where.c_str());
        if (!member(added[i], "id").is_number_unsigned()) fail("%s has no id", where.c_str());
        file.added.emplace_back(text_of(member(added[i], "content"), where), int64_t(std::min<uint64_t>(added[i]["id"].get<uint64_t>(), INT64_MAX)));
    }
}

static std::string tokenizer_json(const Bpe::File& file) {
    const Json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
    Json vocabulary = Json::object(), merges = Json::array(), added = Json::array();
    for (const auto& [text, token] : file.vocabulary) vocabulary[text] = token;
    for (const auto& [left, right] : file.merges) merges.push_back(left + " " + right);
    for (const auto& [text, token] : file.added) {
        vocabulary[text] = token;
        added.push_back({{"id", token}, {"content", text}, {"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false},
                         {"special", true}});
    }
    const Json digits = {{"type", "Digits"}, {"individual_digits", true}};
    return Json{{"version", "1.0"}, {"truncation", nullptr}, {"padding", nullptr}, {"added_tokens", added}, {"normalizer", nullptr},
                {"pre_tokenizer", file.digits_apart ? Json{{"type", "Sequence"}, {"pretokenizers", Json::array({digits, level})}} : level},
                {"post_processor", nullptr}, {"decoder", level},
                {"model", {{"type", "BPE"}, {"dropout", nullptr}, {"unk_token", nullptr}, {"continuing_subword_prefix", nullptr},
                           {"end_of_word_suffix", nullptr}, {"fuse_unk", false}, {"byte_fallback", false}, {"ignore_merges", false},
                           {"vocab", vocabulary}, {"merges", merges}}}}
        .dump();
}

std::vector<std::string> Bpe::alphabet() {
    std::vector<std::pair<int, int>> ordered;  // by the characters that they are written with
    for (int b = 0; b < 256; b++) ordered.emplace_back(byte_characters()[b], b);
    std::sort(ordered.begin(), ordered.end());
    std::vector<std::string> pieces = {""};
    for (const auto& [code, byte] : ordered) pieces.emplace_back(1, char(byte));
    return pieces;
}
std::string Bpe::write(const std::vector<std::string>& pieces, const std::vector<std::pair<int, int>>& merges, bool digits_apart) {
    File file;
    std::vector<std::string> texts;
    for (const std::string& piece : pieces) {
        std::string& text = texts.emplace_back();
        for (const char byte : piece) text += byte_text(static_cast<unsigned char>(byte));
    }
    file.added = {{"<|endoftext|>", 0}};
    for (size_t t = 1; t < texts.size(); t++) file.vocabulary.emplace_back(texts[t], int64_t(t));
    for (const auto& [left, right] : merges) file.merges.emplace_back(texts[left], texts[right]);
    file.digits_apart = digits_apart;
    return tokenizer_json(file);
}
std::string Bpe::of_bytes() {
    File file;
    for (int b = 0; b < 256; b++) file.vocabulary.emplace_back(byte_text(b), b);
    file.added = {{"<|endoftext|>", 256}};
    return tokenizer_json(file);
}

// GPT-2's two files: {"token": number}; and a line for each merge, after one that begins with #version.
static void read_pair(Bpe::File& file, const std::string& vocabulary, const std::string& merges) {
    file.name = vocabulary;
    read_vocabulary(file.vocabulary, parse_json<Json>(read_file(vocabulary, "vocabulary"), vocabulary), vocabulary);
    const auto end = std::find_if(file.vocabulary.begin(), file.vocabulary.end(), [](const auto& v) { return v.first == "<|endoftext|>"; });
    if (end != file.vocabulary.end()) file.added.push_back(*end), file.vocabulary.erase(end);
    std::istringstream lines(read_file(merges, "merges"));
    int number = 0;
    for (std::string line; std::getline(lines, line);) {
        number++;
        if (line.ends_with('\r')) line.pop_back();
        if (line.empty() || (number == 1 && line.starts_with("#version"))) continue;
        read_merge(file.merges, line, merges + ", line " + std::to_string(number));
    }
}

Bpe Bpe::load(const std::string& path) {
    File file;
    std::error_code ignored;
    const fs::path place(path);
    const bool directory = fs::is_directory(place, ignored);
    const auto has = [&](const std::string& name) { return fs::exists(place / name, ignored); };
    if (directory && !has(kTokenizerFile)) {
        if (has("encoder.json")) read_pair(file, (place / "encoder.json").string(), (place / "vocab.bpe").string());
        else if (has("vocab.json")) read_pair(file, (place / "vocab.json").string(), (place / "merges.txt").string());
        else fail("%s: no tokenizer.json in it, nor encoder.json and vocab.bpe, nor vocab.json and merges.txt", path.c_str());
        Bpe bpe(file);
        bpe.file = tokenizer_json(file);  // of what has been found to be whole
        return bpe;
    }
    const std::string name = directory ? (place / kTokenizerFile).string() : path;
    return of_file(read_file(name, "tokenizer"), name);
}

Bpe Bpe::of_file(const std::string& text, const std::string& where) {
    File file;
    file.name = where;
    file.text = text;
    read_tokenizer_json(file, parse_json<Json>(text, where));
    return Bpe(file);
}
