#include "tokenizer.h"

#include <filesystem>

#include "files.h"
#include "json.h"

Tokenizer Tokenizer::load(const std::string& name) {
    Tokenizer t;
    if (name == t.kind) return t;
    t.bpe = std::make_shared<Bpe>(Bpe::load(name));
    t.kind = "bpe";
    t.vocab = int(t.bpe->pieces.size());
    t.end_of_text = t.bpe->end_of_text;
    return t;
}

int64_t Tokenizer::encode(std::vector<int>& tokens, std::string_view text) const {
    int64_t replaced = 0;
    if (bpe) bpe->encode(tokens, valid_utf8(text, &replaced));
    else tokens.insert(tokens.end(), reinterpret_cast<const unsigned char*>(text.begin()), reinterpret_cast<const unsigned char*>(text.end()));
    return replaced;
}

std::string Tokenizer::decode(int token) const { return bpe ? bpe->pieces[token] : token == end_of_text ? "" : std::string(1, char(token)); }

std::string Tokenizer::to_json() const {
    return JsonObject().set("kind", kind).set("vocab", vocab).set("end_of_text", end_of_text).text();
}

Tokenizer Tokenizer::from_json(const std::string& text, const std::string& where) {
    Tokenizer named;
    const JsonObject json(text, where + ": the tokenizer");
    json.get("kind", named.kind);
    json.get("vocab", named.vocab);
    json.get("end_of_text", named.end_of_text);
    if (named.kind != "bytes" && named.kind != "bpe")
        fail("%s: tokenizer \"%s\" is unknown; there are \"bytes\" and \"bpe\"", where.c_str(), printable(named.kind).c_str());
    const std::string file = (std::filesystem::path(where).parent_path() / kTokenizerFile).string();
    const Tokenizer t = load(named.kind == "bpe" ? file : named.kind);
    if (named.vocab != t.vocab || named.end_of_text != t.end_of_text)
        fail("%s: its tokenizer has %d tokens, end-of-text %d; %s has %d and %d", where.c_str(), named.vocab, named.end_of_text,
             t.bpe ? file.c_str() : "the bytes tokenizer", t.vocab, t.end_of_text);
    return t;
}

void Tokenizer::save(const std::string& directory) const {
    if (bpe) write_atomically((std::filesystem::path(directory) / kTokenizerFile).string(), [&](NewFile& file) { file.write(bpe->file); });
}
