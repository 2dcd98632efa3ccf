// Text to tokens: text files, JSON lines, directories or stdin become llm.c's .bin shards and a dataset.json that names the tokenizer.
// One pass in blocks, which all cores encode: memory does not grow with the input. To train a tokenizer takes a pass before it.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/bpe_train.h"
#include "formats/dataset.h"
#include "formats/documents.h"
#include "formats/files.h"
#include "formats/json.h"
#include "formats/options.h"
#include "formats/random.h"
#include "formats/safetensors.h"

namespace fs = std::filesystem;

constexpr size_t kBlock = 1 << 16;
constexpr std::string_view kSeparator = "<|endoftext|>";

// ------------------------------------------------------------------------------------------------------------------
static bool is_dataset_file(const std::string& name) {
    std::string form = name;
    std::replace_if(form.begin(), form.end(), [](char c) { return c >= '0' && c <= '9'; }, '0');
    return name == kDatasetFile || name == kTokenizerFile || name == kSentencePieceFile || form == "train_000000.bin" || form == "val_000000.bin";
}
// Those in a directory whose name is followed by this suffix, without it.
static std::vector<std::string> dataset_files(const fs::path& directory, const std::string& suffix) {
    std::vector<std::string> paths;
    for (const std::string& name : list_directory(directory.string()))
        if (name.ends_with(suffix) && is_dataset_file(name.substr(0, name.size() - suffix.size())))
            paths.push_back((directory / name.substr(0, name.size() - suffix.size())).string());
    return paths;
}

// What runs that were killed have left. One that was killed while its files got their names (see replace_files) had written all of them: the
// rest follows. They are the dataset that is there until this run has a new one.
static void recover(const fs::path& directory) {
    const fs::path json = directory / kDatasetFile;
    if (!fs::exists(json) && fs::exists(json.string() + ".old")) {
        for (const std::string& path : dataset_files(directory, ".tmp"))
            if (path != json) fs::rename(path + ".tmp", path);
        fs::rename(json.string() + ".tmp", json);
    }
    for (const std::string suffix : {".tmp", ".old"})
        for (const std::string& path : dataset_files(directory, suffix)) remove_file(path + suffix);
}

// The output's, made if need be. One that was made, and nothing is in it at the end, goes again.
struct Directory {
    const fs::path path;
    bool made = false;
    explicit Directory(const std::string& name) : path(name) {
        std::error_code error;
        made = fs::create_directories(path, error);
        if (error) fail("cannot create directory %s: %s", name.c_str(), error.message().c_str());
    }
    ~Directory() {
        std::error_code ignored;  // it is not empty
        if (made) fs::remove(path, ignored);
    }
};

// Shards of one split. They get their names when the whole dataset is there: see replace_files.
struct ShardWriter {
    const fs::path directory;
    const std::string split;
    const int64_t shard_tokens;
    const bool wide;  // tokens of 32 bits
    int64_t total = 0;
    std::vector<std::unique_ptr<NewFile>> shards;

    ShardWriter(const fs::path& directory, const std::string& split, int64_t shard_tokens, bool wide)
        : directory(directory), split(split), shard_tokens(shard_tokens), wide(wide) {}
    void append(const int* tokens, size_t count) {
        while (count > 0) {
            if (!open) begin();
            const size_t n = std::min(count, size_t(shard_tokens - in_shard));
            if (wide) {
                shards.back()->write(tokens, n * sizeof(int));
            } else {
                buffer.assign(tokens, tokens + n);
                shards.back()->write(buffer.data(), n * sizeof(uint16_t));
            }
            tokens += n, count -= n, in_shard += n, total += n;
            if (in_shard == shard_tokens) close();
        }
    }
    void close() {
        if (!open) return;
        // The header goes last: until then the file has no magic number, and nothing can take it for a shard.
        const int32_t header[kTokenHeaderInts] = {kTokenMagic, wide ? 2 : 1, int32_t(in_shard)};
        shards.back()->write_at(0, header, sizeof(header));
        shards.back()->close();
        open = false;
    }

   private:
    bool open = false;     // the last one
    int64_t in_shard = 0;  // tokens in it
    std::vector<uint16_t> buffer;

    void begin() {
        if (shards.size() > 999999) fail("more than a million shards: raise --shard-tokens");
        char digits[16];
        snprintf(digits, sizeof(digits), "_%06d", int(shards.size()));
        shards.push_back(std::make_unique<NewFile>((directory / (split + digits + ".bin")).string()));
        const char no_header[kTokenHeaderInts * sizeof(int32_t)] = {};
        shards.back()->write(no_header, sizeof(no_header));
        in_shard = 0;
        open = true;
    }
};

// ------------------------------------------------------------------------------------------------------------------
// Text on its way to the shards, in segments, in order: as soon as there are enough of them, all cores encode them. A long text becomes
// several, cut where no word of a tokenizer goes across; or else, so that memory does not grow with the longest word, after kLongest bytes.
struct Encoder {
    static constexpr size_t kSegment = 1 << 16, kLongest = 1 << 22, kBatch = 1 << 20;  // bytes
    static constexpr size_t kOverhead = 256;                                           // of a segment, which may be a few bytes long
    struct Segment {
        std::string text = {};
        ShardWriter* to;
        bool begins = false;  // a document, or its part in a split: end-of-text, and then the text
        std::vector<int> tokens = {};
        int64_t replaced = 0;
    };
    const Tokenizer& tokenizer;
    WordCounts* words = nullptr;  // to be counted: then nothing is encoded
    std::vector<Segment> segments = {};
    size_t bytes = 0;
    int64_t replaced = 0;  // places that were not UTF-8

    void begin(ShardWriter* to) {
        if (bytes >= kBatch) run();
        add({.to = to, .begins = true});
    }
    void text(const char* data, size_t size) {
        std::string& last = segments.back().text;
        const size_t before = last.size();
        last.append(data, size);
        bytes += size;
        if (last.size() < kSegment) return;
        size_t cut = boundary(last, before);  // before that it was too short
        if (cut == std::string::npos) {
            if (last.size() < kLongest) return;
            cut = last.size();  // less its last character, which may not be whole
            while (cut > last.size() - 3 && (last[cut - 1] & 0xC0) == 0x80) cut--;
            cut--;
        }
        Segment rest{.text = last.substr(cut), .to = segments.back().to};
        last.resize(cut);
        bytes -= rest.text.size();
        if (bytes >= kBatch) run();
        add(std::move(rest));
    }
    void run() {
        if (words) {
            std::vector<std::string_view> texts;
            for (const Segment& s : segments) texts.push_back(s.text);
            replaced += words->add(texts);
        } else {
#pragma omp parallel for schedule(dynamic)
            for (size_t i = 0; i < segments.size(); i++) {
                Segment& s = segments[i];
                if (s.begins) s.tokens.push_back(tokenizer.end_of_text);
                s.replaced = tokenizer.encode(s.tokens, s.text, !s.begins);
            }
            for (Segment& s : segments) {
                s.to->append(s.tokens.data(), s.tokens.size());
                replaced += s.replaced;
            }
        }
        segments.clear();
        bytes = 0;
    }

   private:
    void add(Segment&& segment) {
        bytes += segment.text.size() + kOverhead;
        segments.push_back(std::move(segment));
    }
    // Where the text can be cut, at `from` or later; npos: nowhere yet.
    size_t boundary(const std::string& text, size_t from) const {
        if (tokenizer.kind == "bytes" && !words) return text.size();
        size_t at = word_boundary(text, from);
        // A model of SentencePiece takes one space as what it puts in front of every text.
        const auto lone_space = [&] { return text[at] == ' ' && at + 1 < text.size() && text[at + 1] > ' ' && text[at + 1] < 0x7F; };
        while (tokenizer.sentencepiece && at != std::string::npos && !lone_space()) at = word_boundary(text, at + 1);
        return at;
    }
};

// Deals text to the two splits in units: documents, but of one that is too long its beginning and then pieces. Too long is what exceeds
// the share of all text that validation is to get; where there are documents enough for a whole one in validation, four times that.
// A unit that is cut ends at the first end of a line after its size, half a piece later at the latest. Where a document is cut between
// the splits, what follows begins with end-of-text: no token is in both, and no model reads from one split into the other.
struct Splitter {
    static constexpr size_t kHeld = 16 << 20;

    Encoder& encoder;
    ShardWriter &train, &val;
    const double fraction;
    int64_t total_bytes, total_documents;  // of all input, as far as known
    int64_t bytes = 0, documents = 0, cuts = 0;

    // What is too long depends on how much text there is, which files do not say well and streams not at all: the first 16 MiB wait
    // here until there is more, or no more.
    bool holding = true;
    std::string held = {};
    std::vector<size_t> held_ends = {};  // of documents

    ShardWriter* writer = nullptr;  // of the open unit
    bool unit_open = false, document_open = false;
    int64_t units = 0, chosen = 0;  // dealt so far; of them, for validation
    int64_t unit_bytes = 0, limit = 0, piece = 0;

    void text(const char* data, size_t size) {
        if (!holding) return deal(data, size);
        held.append(data, size);
        if (held.size() + held_ends.size() * sizeof(size_t) >= kHeld) release();
    }
    void end_document() {
        if (!holding) end_dealt();
        else if (held.size() > (held_ends.empty() ? 0 : held_ends.back())) held_ends.push_back(held.size());
    }
    void end_input() {
        if (!holding) return;
        total_bytes = total_documents = 0;
        release();
    }

   private:
    void release() {
        holding = false;
        total_bytes = std::max<int64_t>(total_bytes, held.size());
        total_documents = std::max<int64_t>(total_documents, held_ends.size());
        size_t from = 0;
        for (size_t end : held_ends) {
            deal(held.data() + from, end - from);
            end_dealt();
            from = end;
        }
        deal(held.data() + from, held.size() - from);
        held = {};
        held_ends = {};
    }
    void deal(const char* data, size_t size) {
        while (size > 0) {
            if (!unit_open) open_unit();
            size_t n = take(data, std::min(size, kBlock));
            encoder.text(data, n);
            document_open = true;
            data += n, size -= n, bytes += n, unit_bytes += n;
        }
    }
    void end_dealt() {
        if (!document_open) return;
        document_open = unit_open = false;
        ++documents;
    }
    void open_unit() {
        // Stratified: the k-th validation unit lies somewhere in the k-th run of 1 / fraction units. The seed is part of the format.
        bool validation = fraction > 0 && double(units + 1) > (chosen + random_uniform(0, kShuffleStream, chosen)) / fraction;
        ShardWriter* next = validation ? &val : &train;
        if (!document_open || next != writer) encoder.begin(next);
        writer = next;
        // Pieces are small enough for some of validation even in a small text, large enough for long contexts in a large one.
        double share = fraction * double(std::max(total_bytes, bytes));
        piece = int64_t(std::clamp(share / 4, 256.0, 131072.0));
        bool enough = double(std::max(total_documents, documents)) * fraction >= 1;
        limit = fraction == 0 ? INT64_MAX / 2 : document_open ? piece : std::max(int64_t(enough ? 4 * share : share), piece);
        cuts += document_open;
        unit_bytes = 0;
        unit_open = true;
        count_units(1);
    }
    void count_units(int64_t n) {
        units += n;
        if (writer == &val) chosen += n;
    }
    // How much of data belongs to the open unit. Closes the unit if it is cut there.
    size_t take(const char* data, size_t size) {
        if (unit_bytes + int64_t(size) <= limit) return size;
        int64_t latest = limit + piece / 2 - unit_bytes;  // negative if only the rest of a UTF-8 character kept the unit open
        size_t from = std::max<int64_t>(limit - unit_bytes, 0), to = std::clamp<int64_t>(latest, from, size);
        if (const void* newline = memchr(data + from, '\n', to - from)) {
            to = static_cast<const char*>(newline) - data + 1;
        } else {
            while (to < size && int64_t(to) < latest + 3 && (data[to] & 0xC0) == 0x80) ++to;  // not within a UTF-8 character
            if (to == size) return size;
        }
        unit_open = false;
        count_units(limit / piece - 1);  // the start of a document counts as the pieces that it could have been
        return to;
    }
};

// ------------------------------------------------------------------------------------------------------------------
struct Input {
    std::string path;
    bool named;    // by the user; others were found in a directory
    int64_t size;  // on disk
    bool stream = false;
    std::string name() const { return path == "-" ? "standard input" : path; }
    bool json() const {  // lines of it, by the file's name
        std::string plain = path;
        for (const char* compressed : {".gz", ".zst"})
            if (plain.ends_with(compressed)) plain.resize(plain.size() - strlen(compressed));
        return plain.ends_with(".jsonl") || plain.ends_with(".json") || plain.ends_with(".ndjson");
    }
};

struct Progress {
    static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

    int64_t total = 0;  // bytes on disk, or what `unit` is of; 0 = unknown
    const std::string what = "";
    const double unit = 1e6;
    const char* const unit_name = "MB";
    const double start = now();
    const bool terminal = isatty(STDERR_FILENO);
    double next = start + (terminal ? 0.2 : 10);

    void show(int64_t done) {
        const double time = now();
        if (time < next) return;
        next = time + (terminal ? 0.2 : 10);
        double rate = done / (time - start);
        fprintf(stderr, "%s%s%.*f %s at %.*f %s/s", terminal ? "\r" : "", what.c_str(), unit > 1, done / unit, unit_name, unit > 1, rate / unit,
                unit_name);
        if (total > 0) {
            long left = long((total - done) / std::max(rate, 1.0));
            fprintf(stderr, ", %.1f %%, %ld:%02ld left", 100.0 * done / total, left / 60, left % 60);
        }
        fputs(terminal ? "\033[K" : "\n", stderr);
    }
    ~Progress() {
        if (terminal) fputs("\r\033[K", stderr);
    }
};

// Lists what to read. Directories: every regular file below, in the order of their paths, but no hidden ones and none of the output's.
static std::vector<Input> list_inputs(const std::vector<std::string>& paths, const fs::path& output) {
    std::vector<Input> inputs;
    std::error_code error;
    for (const std::string& path : paths) {
        if (path == "-") {
            inputs.push_back({path, true, 0, true});
            continue;
        }
        fs::file_status status = fs::status(path, error);
        if (!fs::exists(status)) fail("cannot read %s: %s", path.c_str(), error ? error.message().c_str() : "no such file");
        if (!fs::is_directory(status)) {
            // A pipe that is open already, like the shell's <(...), has somebody who writes.
            const bool stream = fs::is_fifo(status) && (path.starts_with("/dev/fd/") || path == "/dev/stdin");
            const int64_t size = fs::is_regular_file(status) ? int64_t(fs::file_size(path)) : 0;
            if (fs::is_regular_file(status) && size == 0) fail("%s is empty", path.c_str());
            inputs.push_back({path, true, size, stream});
            continue;
        }
        std::vector<Input> found;
        fs::recursive_directory_iterator entry(path, error), end;
        for (; !error && entry != end; entry.increment(error)) {
            bool hidden = entry->path().filename().string().starts_with('.');
            if (entry->is_directory() && (hidden || fs::equivalent(entry->path(), output, error))) entry.disable_recursion_pending();
            error.clear();  // the output need not exist yet
            const bool ours = is_dataset_file(entry->path().filename().string()) && fs::equivalent(entry->path().parent_path(), output, error);
            error.clear();
            if (!hidden && !entry->exists()) fail("%s is a link to nothing: remove it", entry->path().c_str());
            if (!hidden && !ours && entry->is_regular_file() && entry->file_size() > 0)
                found.push_back({entry->path().string(), false, int64_t(entry->file_size())});
        }
        if (error) fail("cannot list %s: %s", path.c_str(), error.message().c_str());
        std::sort(found.begin(), found.end(), [](const Input& a, const Input& b) { return a.path < b.path; });
        if (found.empty()) fail("no files in %s", path.c_str());
        inputs.insert(inputs.end(), found.begin(), found.end());
    }
    return inputs;
}

static int64_t total_size(const std::vector<Input>& inputs) {  // on disk; 0 = unknown
    int64_t total = 0;
    for (const Input& input : inputs) {
        if (input.stream) return 0;
        total += input.size;
    }
    return total;
}

static TextFile open_input(const Input& input) {
    const std::string name = input.name();
    return TextFile(name, input.path == "-" ? dup(STDIN_FILENO) : input.stream ? open(name.c_str(), O_RDONLY | O_CLOEXEC)
                                                              : InputFile(name, "cannot read").release());
}

// Reads one file of text, and passes its documents on. False: it is not text. like_json: its name, if it begins as JSON.
static bool read_text(const Input& input, Splitter& splitter, Progress& progress, int64_t done, std::string& like_json) {
    const std::string name = input.name();
    TextFile file = open_input(input);
    std::string block(kBlock, 0), text;  // text: read but not passed on yet
    bool line_start = true;              // text begins at the start of a line
    for (bool first = true, last = false; !last; first = false) {
        const size_t n = file.read(block.data(), block.size());
        if (first && n == 0 && input.named) fail("%s is empty", name.c_str());
        if (first && memchr(block.data(), 0, n)) {
            if (input.named) fail("%s is not text: it has zero bytes (UTF-16 must be converted to UTF-8)", name.c_str());
            return false;
        }
        if (first && n > 1 && block[0] == '{' && block[1] == '"') like_json = name;
        text.append(block, 0, n);
        last = n == 0;
        // All but the end, in which a separator's line may be incomplete.
        size_t ready = last ? text.size() : text.size() - std::min(text.size(), kSeparator.size() + 2);
        size_t from = 0;
        for (size_t at = text.find(kSeparator); at < ready; at = text.find(kSeparator, at + 1)) {
            size_t end = at + kSeparator.size();
            if (end < text.size() && text[end] == '\r') ++end;
            bool whole_line = (at == 0 ? line_start : text[at - 1] == '\n') && (end == text.size() || text[end] == '\n');
            if (!whole_line) continue;
            splitter.text(text.data() + from, at - from);
            splitter.end_document();
            from = std::min(end + 1, text.size());
        }
        ready = std::max(ready, from);
        splitter.text(text.data() + from, ready - from);
        if (ready > 0) line_start = text[ready - 1] == '\n';
        text.erase(0, ready);
        progress.show(done + file.consumed());
    }
    splitter.end_document();
    return true;
}

// JSON lines, each a document. Lines are taken apart by all cores, a batch at a time; a bad one is skipped, and counted.
struct JsonLines {
    static constexpr size_t kBatch = 1 << 20, kLongest = 64 << 20;  // bytes: of lines, of a line
    const std::string field;
    const bool strict;  // a bad line is an error
    int64_t bad = 0;
    std::string first_bad = {}, mistaken = {};  // mistaken: a file that was read as text, and begins as JSON

    void read(const Input& input, Splitter& splitter, Progress& progress, int64_t done) {
        TextFile file = open_input(input);
        std::string block(kBlock, 0), text;
        int64_t line = 0;  // that have been read
        size_t end = 0;    // of the last whole line in the text; 0: there is none
        bool too_long = false;
        for (bool last = false; !last;) {
            const size_t n = file.read(block.data(), block.size());
            last = n == 0;
            const size_t before = text.size();  // in it no end of a line is looked for twice
            text.append(block, 0, n);
            progress.show(done + file.consumed());
            if (last && !text.empty() && !text.ends_with('\n')) text += '\n';
            if (const size_t at = std::string_view(text).substr(before).rfind('\n'); at != std::string_view::npos) end = before + at + 1;
            if (end == 0 && text.size() > kLongest) too_long = true, text.clear();
            if (end == 0 || (!last && text.size() < kBatch)) continue;
            std::vector<std::string_view> lines;
            for (size_t at = 0; at < end; at = text.find('\n', at) + 1) lines.push_back(std::string_view(text).substr(at, text.find('\n', at) - at));
            if (too_long) report(input, line + 1, "longer than " + std::to_string(kLongest >> 20) + " MiB"), lines[0] = {};
            too_long = false;
            documents(lines, input, line, splitter);
            line += int64_t(lines.size());
            text.erase(0, end);
            end = 0;
        }
    }

   private:
    void documents(const std::vector<std::string_view>& lines, const Input& input, int64_t before, Splitter& splitter) {
        std::vector<std::string> texts(lines.size()), problems(lines.size());
        const auto blank = [&](size_t i) { return lines[i].find_first_not_of(" \t\r") == std::string_view::npos; };
#pragma omp parallel for schedule(dynamic, 16)
        for (size_t i = 0; i < lines.size(); i++)
            if (!blank(i)) read_json_line(lines[i], field, texts[i], problems[i]);
        for (size_t i = 0; i < lines.size(); i++) {
            if (!problems[i].empty()) {
                report(input, before + int64_t(i) + 1, problems[i]);
                continue;
            }
            splitter.text(texts[i].data(), texts[i].size());
            splitter.end_document();
        }
    }
    void report(const Input& input, int64_t line, const std::string& problem) {
        const std::string where = input.name() + ", line " + std::to_string(line) + ": " + problem.substr(0, 200);
        if (strict) fail("%s; without --strict bad lines are skipped", where.c_str());
        if (bad++ == 0) first_bad = printable(where);
    }
};

// ------------------------------------------------------------------------------------------------------------------
// Tasks: examples without end, of random letters, that ask for something in their own context. Each has `length` tokens, end-of-text first, and
// before every answer a '=': only what follows one can be known.
//   recall      pairs of a key and its value, then keys again: "ak bt ... b=t a=k ..." without the spaces (associative recall)
//   induction   random letters, among them '!' and a letter after it; then, now and again, "!=" and that letter (induction heads)
//   copying     8 letters among dots, then "=" and each of them in turn (selective copying)
struct Task {
    static constexpr char kAnswerMark = '=';
    static constexpr int kCopied = 8, kLeastLength = 32;
    const std::string name;
    const int length;  // tokens, end-of-text included
    uint64_t drawn = 0;

    int draw(int n) { return int(random_bits(0, kTaskStream, drawn++) % uint64_t(n)); }
    char letter() { return char('a' + draw(26)); }
    void shuffle(std::string& letters) {
        for (size_t i = letters.size(); i > 1; i--) std::swap(letters[i - 1], letters[draw(int(i))]);
    }
    std::string padded(const std::string& text) const { return text + std::string(length - 1 - text.size(), '.'); }
    std::string recall() {
        const int pairs = std::min(26, length / 8);
        std::string keys = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", values, text;
        shuffle(keys);
        for (int i = 0; i < pairs; i++) values += letter(), text += {keys[i], values[i]};
        while (int(text.size()) + 3 < length) {
            const int i = draw(pairs);
            text += {keys[i], kAnswerMark, values[i]};
        }
        return padded(text);
    }
    std::string induction() {
        const char after = letter();
        std::string text;
        for (int i = draw(length / 4); i > 0; i--) text += letter();
        text += {'!', after};
        while (int(text.size()) + 6 < length)
            if (draw(6) == 0) text += {'!', kAnswerMark, after};
            else text += letter();
        return padded(text + '!' + kAnswerMark + after);
    }
    std::string copying() {
        const int answers = 2 * kCopied, dots = length - 1 - answers - kCopied;
        std::string places = std::string(kCopied, 'x') + std::string(dots, '.'), text;
        shuffle(places);
        std::string copied;
        for (char& place : places)
            if (place == 'x') copied += place = letter();
        text = places;
        for (const char c : copied) text += {kAnswerMark, c};
        return text;
    }
    std::string example() { return name == "recall" ? recall() : name == "induction" ? induction() : copying(); }
};

struct Options {
    std::vector<std::string> paths;
    std::string output, tokenizer = "bytes", format = "auto", field = "text", task;
    int task_length = 64, task_examples = 100'000;
    double fraction = 0.01;
    int shard_tokens = 100'000'000, train_tokenizer = 0;
    bool strict = false;

    void check(const CommandLine& command) const {
        const bool trains = command.has("--train-tokenizer");
        if (!command.has("--task")) {
            if (command.has("--task-length") || command.has("--task-examples")) fail("--task-length and --task-examples go with --task");
            if (paths.empty() || output.empty()) fail("--input and --output are required");
        } else {
            if (task != "recall" && task != "induction" && task != "copying") fail("--task %s: there are recall, induction and copying", task.c_str());
            if (task_length < Task::kLeastLength || task_length > 1 << 20) fail("--task-length %d: must be from %d to 2^20", task_length, Task::kLeastLength);
            if (task_examples < 2) fail("--task-examples %d: must be at least 2", task_examples);
            for (const char* flag : {"--input", "--format", "--field", "--strict", "--tokenizer", "--train-tokenizer"})
                if (command.has(flag)) fail("--task makes its own text: it does not go with %s", flag);
            if (output.empty()) fail("--output is required");
        }
        if (!(fraction >= 0 && fraction <= 0.5)) fail("--val-fraction %g: must be from 0 to 0.5", fraction);
        if (shard_tokens < 1) fail("--shard-tokens %d: must be at least 1", shard_tokens);
        if (format != "auto" && format != "text" && format != "jsonl") fail("--format %s: there are auto, text and jsonl", format.c_str());
        if (trains && (train_tokenizer < kLeastVocab || train_tokenizer > kMostVocab))
            fail("--train-tokenizer %d: must be from %d to %d tokens", train_tokenizer, kLeastVocab, kMostVocab);
        if (trains && command.has("--tokenizer")) fail("--tokenizer or --train-tokenizer, not both");
    }
};

// Passes all documents on; returns how many files were no text.
static int64_t read_inputs(const std::vector<Input>& inputs, const Options& options, const std::string& what, JsonLines& json, Splitter& splitter) {
    Progress progress{.total = total_size(inputs), .what = what};
    int64_t done = 0, skipped = 0;
    for (const Input& input : inputs) {
        if (options.format == "jsonl" || (options.format == "auto" && input.json())) json.read(input, splitter, progress, done);
        else if (!read_text(input, splitter, progress, done, json.mistaken)) ++skipped;
        done += input.size;
    }
    splitter.end_input();
    return skipped;
}

// A tokenizer of the inputs' own words. They are read for it once before they are read for the dataset.
static std::string train_tokenizer(const std::vector<Input>& inputs, const Options& options) {
    for (const Input& input : inputs)
        if (input.stream) fail("--train-tokenizer: %s cannot be read twice: give files", input.name().c_str());
    const Tokenizer none;
    WordCounts words;
    Encoder encoder{none, &words};
    ShardWriter nowhere(options.output, "train", 1, false);
    Splitter splitter{encoder, nowhere, nowhere, 0, 0, 0};
    JsonLines json{options.field, options.strict};
    read_inputs(inputs, options, "words: ", json, splitter);
    encoder.run();
    if (words.counts.empty()) fail("no text in %s", options.paths[0].c_str());
    Progress progress{.total = options.train_tokenizer, .what = "tokenizer: ", .unit = 1, .unit_name = "tokens"};
    return train_bpe(words, options.train_tokenizer, [&](int tokens) { progress.show(tokens); });
}

// Gives all files of a dataset their names.
static void write_dataset(const std::string& output, const Tokenizer& tokenizer, ShardWriter& train, ShardWriter& val, const JsonObject& about) {
    train.close();
    val.close();
    JsonObject json;
    json.set("tokenizer", JsonObject(tokenizer.to_json(), "the tokenizer")).set("train_tokens", train.total).set("val_tokens", val.total);
    json.add(about);
    std::vector<std::unique_ptr<NewFile>> files = std::move(train.shards);
    std::move(val.shards.begin(), val.shards.end(), std::back_inserter(files));
    const auto add = [&](const std::string& name, const std::string& text) {
        files.push_back(std::make_unique<NewFile>((fs::path(output) / name).string()));
        files.back()->write(text);
        files.back()->close();
    };
    if (!tokenizer.file_name().empty()) add(tokenizer.file_name(), tokenizer.file());
    add(kDatasetFile, json.text(2) + "\n");  // the last: who finds it finds all
    std::vector<std::string> gone = dataset_files(output, "");  // shards of an earlier run that this one has no other for
    std::erase_if(gone, [&](const std::string& path) {          // a tokenizer may be somebody else's
        const std::string name = fs::path(path).filename();
        return name == kTokenizerFile || name == kSentencePieceFile ||
               std::any_of(files.begin(), files.end(), [&](const auto& file) { return file->path == path; });
    });
    replace_files(files, gone);
}

// Examples of a task, of which the first are for validation.
static void make_task(const Options& options) {
    const Tokenizer tokenizer;
    const Directory made(options.output);
    recover(options.output);
    ShardWriter train(options.output, "train", options.shard_tokens, false), val(options.output, "val", options.shard_tokens, false);
    Task task{options.task, options.task_length};
    const int held_out = options.fraction == 0 ? 0 : std::max(1, int(options.fraction * options.task_examples));
    for (int i = 0; i < options.task_examples; i++) {
        std::vector<int> tokens = {tokenizer.end_of_text};
        tokenizer.encode(tokens, task.example());
        (i < held_out ? val : train).append(tokens.data(), tokens.size());
    }
    JsonObject about;
    about.set("documents", options.task_examples).set("split", held_out ? "documents" : "none").set("example_tokens", task.length);
    about.set("answer_mark", int(Task::kAnswerMark));
    write_dataset(options.output, tokenizer, train, val, about);
    printf("%s: %d training and %d validation examples of %s, of %d tokens each\n", options.output.c_str(), options.task_examples - held_out, held_out,
           options.task.c_str(), task.length);
}

static void prepare(const Options& options) {
    const std::string& output = options.output;
    const double fraction = options.fraction;
    Tokenizer tokenizer;
    if (options.train_tokenizer == 0) tokenizer = Tokenizer::load(options.tokenizer);
    std::vector<Input> inputs = list_inputs(options.paths, output);
    std::error_code ignored;
    const bool has_file = options.train_tokenizer != 0 || !tokenizer.file_name().empty();
    if (has_file && fs::exists(fs::path(output) / kModelFile, ignored))
        fail("--output %s: it has a checkpoint, whose tokenizer must stay: choose another directory", output.c_str());
    if (options.train_tokenizer != 0) tokenizer = Tokenizer::of_bpe(train_tokenizer(inputs, options), "the tokenizer");

    const Directory made(output);
    recover(output);
    const bool wide = tokenizer.vocab > 1 << 16;
    ShardWriter train(output, "train", options.shard_tokens, wide), val(output, "val", options.shard_tokens, wide);
    Encoder encoder{tokenizer};
    Splitter splitter{encoder, train, val, fraction, total_size(inputs), int64_t(inputs.size())};
    JsonLines lines{options.field, options.strict};
    const int64_t skipped = read_inputs(inputs, options, "", lines, splitter);
    encoder.run();
    const std::string bad = std::to_string(lines.bad) + " bad line" + (lines.bad == 1 ? "" : "s") + " skipped; the first: " + lines.first_bad;
    if (splitter.documents == 0) fail("no text in %s%s", options.paths[0].c_str(), lines.bad > 0 ? (": " + bad).c_str() : "");
    if (train.total == 0 || (fraction > 0 && val.total == 0))
        fail("too little text for --val-fraction %g: %lld bytes; change it, or use 0 for no validation", fraction,
             (long long)splitter.bytes);
    JsonObject about;
    about.set("documents", splitter.documents).set("split", fraction == 0 ? "none" : splitter.cuts == 0 ? "documents" : "pieces");
    write_dataset(output, tokenizer, train, val, about);
    if (lines.bad > 0) fprintf(stderr, "warning: %s\n", bad.c_str());
    if (options.train_tokenizer > tokenizer.vocab)
        fprintf(stderr, "note: the text has pairs for a tokenizer of %d tokens, not more\n", tokenizer.vocab);
    if (encoder.replaced > 0)
        fprintf(stderr, "warning: %lld places in the text are not UTF-8 and became U+FFFD\n", (long long)encoder.replaced);
    if (!lines.mistaken.empty())
        fprintf(stderr, "note: %s begins as JSON does; --format jsonl makes each of its lines a document\n", printable(lines.mistaken).c_str());
    printf("%s: %lld training and %lld validation tokens (%.2f %%) of a vocabulary of %d, from %lld document%s%s\n", output.c_str(), (long long)train.total,
           (long long)val.total, 100.0 * val.total / (train.total + val.total), tokenizer.vocab, (long long)splitter.documents,
           splitter.documents == 1 ? "" : "s", skipped ? (", not text and skipped: " + std::to_string(skipped)).c_str() : "");
}

static int data_prep(int argc, char** argv) {
    Options options;
    CommandLine command("Turns text into token files for train. A file of text is one document, or several if it has lines that read "
                        "<|endoftext|>; in a .jsonl or .json file each line is one. The end-of-text token comes before every document.");
    command.add("--input", options.paths, "files, directories of them, or - for standard input; each may be compressed by gzip or zstd");
    command.add("--output", options.output, "directory for train_*.bin, val_*.bin and dataset.json; created if need be");
    command.add("--format", options.format, "auto: by the file's name; text; or jsonl, where each line is a JSON object");
    command.add("--field", options.field, "of the JSON object: what has the text");
    command.add("--strict", options.strict, "stop at a bad line of JSON; without it they are counted and skipped");
    command.add("--tokenizer", options.tokenizer,
                std::string("bytes: a token is a byte, 256 is end-of-text; or byte-level BPE: a tokenizer.json, or a directory with one, with "
                            "encoder.json and vocab.bpe (GPT-2), or with vocab.json and merges.txt; letters and numbers are those of Unicode ") +
                    unicode_version() + "; or a .model of SentencePiece");
    command.add("--train-tokenizer", options.train_tokenizer,
                "make a tokenizer of so many tokens of the input itself first: byte-level BPE, each digit apart, written as tokenizer.json");
    command.add("--val-fraction", options.fraction,
                "share for validation, 0 to 0.5: of every 1/share documents one, chosen at random but always the same; a document "
                "longer than the share of all text (4 times that if there are at least 1/share documents) is dealt in pieces of about "
                "1/4 of the share, 128 KiB at most, cut at the ends of lines");
    command.add("--shard-tokens", options.shard_tokens, "most tokens in one file");
    command.add("--task", options.task, "instead of text: examples of recall (of a key's value), induction (what followed a mark), or copying (of letters among "
                                        "dots); only what stands behind a '=' is to be predicted", "Tasks");
    command.add("--task-length", options.task_length, "tokens of an example", "Tasks");
    command.add("--task-examples", options.task_examples, "examples in all, of which --val-fraction are for validation", "Tasks");
    if (!command.parse(argc, argv)) return 0;
    options.check(command);
    if (options.task.empty()) prepare(options);
    else make_task(options);
    return 0;
}

int main(int argc, char** argv) {
    set_up_libraries(argv);
    return run_main(data_prep, argc, argv);
}
