#include "tokenizer.h"

#include <filesystem>

#include "files.h"
#include "json.h"

namespace fs = std::filesystem;

static Tokenizer with(Bpe&& bpe) {
    Tokenizer t;
    t.kind = "bpe";
    t.bpe = std::make_shared<Bpe>(std::move(bpe));
    t.vocab = int(t.bpe->pieces.size());
    t.end_of_text = t.bpe->end_of_text;
    return t;
}

Tokenizer Tokenizer::load(const std::string& name) {
    Tokenizer t;
    if (name == t.kind) return t;
    std::error_code ignored;
    const std::string inside = (fs::path(name) / kSentencePieceFile).string();
    const bool directory = fs::is_directory(name, ignored);
    if (directory ? !fs::exists(inside, ignored) : !name.ends_with(".model")) return with(Bpe::load(name));
    t.kind = "sentencepiece";
    t.sentencepiece = std::make_shared<SentencePiece>(directory ? inside : name);
    t.vocab = t.sentencepiece->vocab;
    t.end_of_text = t.sentencepiece->end_of_text;
    return t;
}
Tokenizer Tokenizer::of_bpe(const std::string& file, const std::string& where) { return with(Bpe::of_file(file, where)); }
Tokenizer Tokenizer::none(int vocab, int end_of_text) {
    Tokenizer t;
    t.kind = "none";
    t.vocab = vocab;
    t.end_of_text = end_of_text;
    return t;
}

int64_t Tokenizer::encode(std::vector<int>& tokens, std::string_view text, bool follows) const {
    int64_t replaced = 0;
    if (bpe) bpe->encode(tokens, valid_utf8(text, &replaced));
    else if (sentencepiece) sentencepiece->encode(tokens, valid_utf8(text, &replaced), follows);
    else if (kind == "bytes") for (const char byte : text) tokens.push_back(static_cast<unsigned char>(byte));
    else if (!text.empty()) fail("a text, but no tokenizer that makes tokens of it: give tokens");
    return replaced;
}

std::string Tokenizer::decode(int token) const {
    if (token == end_of_text || kind == "none") return "";
    return bpe ? bpe->pieces[token] : sentencepiece ? sentencepiece->piece(token) : std::string(1, char(token));
}

bool Tokenizer::same_as(const Tokenizer& other) const {
    return kind == other.kind && vocab == other.vocab && end_of_text == other.end_of_text && file() == other.file();
}

std::string Tokenizer::to_json() const {
    return JsonObject().set("kind", kind).set("vocab", vocab).set("end_of_text", end_of_text).text();
}

Tokenizer Tokenizer::from_json(const std::string& text, const std::string& where) {
    Tokenizer named;
    const JsonObject json(text, where + ": the tokenizer");
    json.get("kind", named.kind);
    json.get("vocab", named.vocab);
    json.get("end_of_text", named.end_of_text);
    const std::string names = named.file_name(), file = (fs::path(where).parent_path() / names).string();
    if (named.kind != "bytes" && named.kind != "none" && names.empty())
        fail("%s: tokenizer \"%s\" is unknown; there are \"bytes\", \"bpe\", \"sentencepiece\" and \"none\"", where.c_str(),
             printable(named.kind).c_str());
    if (named.kind == "none") {
        if (named.vocab < 1 || named.end_of_text < -1 || named.end_of_text >= named.vocab)
            fail("%s: its tokenizer has %d tokens, end-of-text %d", where.c_str(), named.vocab, named.end_of_text);
        return named;
    }
    const Tokenizer t = load(names.empty() ? named.kind : file);
    if (named.vocab != t.vocab || named.end_of_text != t.end_of_text)
        fail("%s: its tokenizer has %d tokens, end-of-text %d; %s has %d and %d", where.c_str(), named.vocab, named.end_of_text,
             names.empty() ? "the bytes tokenizer" : file.c_str(), t.vocab, t.end_of_text);
    return t;
}

std::string Tokenizer::file_name() const { return kind == "bpe" ? kTokenizerFile : kind == "sentencepiece" ? kSentencePieceFile : ""; }
const std::string& Tokenizer::file() const {
    static const std::string none;
    return bpe ? bpe->file : sentencepiece ? sentencepiece->file : none;
}

void Tokenizer::save(const std::string& directory) const {
    const auto write = [&](const std::string& name, const std::string& text) {
        write_atomically((fs::path(directory) / name).string(), [&](NewFile& file) { file.write(text); });
    };
    if (!file_name().empty()) write(file_name(), file());
    if (kind == "bytes") write(kTokenizerFile, Bpe::of_bytes());
    if (kind == "bytes" || kind == "bpe") {
        const std::string end = bpe ? bpe->end_text : "<|endoftext|>";
        JsonObject json;
        json.set("tokenizer_class", "PreTrainedTokenizerFast").set("bos_token", end).set("eos_token", end);
        write("tokenizer_config.json", json.text(2) + "\n");
    }
}
