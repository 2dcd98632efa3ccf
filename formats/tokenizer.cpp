#include "tokenizer.h"

#include "files.h"
#include "json.h"

void Tokenizer::encode(std::vector<int>& tokens, const char* text, size_t size) const {
    for (size_t i = 0; i < size; i++) tokens.push_back(static_cast<unsigned char>(text[i]));
}

std::string Tokenizer::decode(int token) const { return token == end_of_text ? "" : std::string(1, char(token)); }

std::string Tokenizer::to_json() const {
    return JsonObject().set("kind", kind).set("vocab", vocab).set("end_of_text", end_of_text).text();
}

Tokenizer Tokenizer::from_json(const std::string& text, const std::string& where) {
    Tokenizer t;
    const JsonObject json(text, where + ": the tokenizer");
    json.get("kind", t.kind);
    json.get("vocab", t.vocab);
    json.get("end_of_text", t.end_of_text);
    if (t.kind != "bytes") fail("%s: tokenizer \"%s\" is unknown; there is \"bytes\"", where.c_str(), t.kind.c_str());
    if (t.vocab != 257 || t.end_of_text != 256) fail("%s: the bytes tokenizer has vocab 257 and end_of_text 256", where.c_str());
    return t;
}
