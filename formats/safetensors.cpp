#include "safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "files.h"
#include "json.h"

using Json = nlohmann::ordered_json;

static int64_t dtype_bytes(const std::string& dtype) {
    if (dtype == "F64" || dtype == "I64") return 8;
    if (dtype == "F32" || dtype == "I32") return 4;
    if (dtype == "BF16") return 2;
    return 0;
}

static std::vector<int64_t> sizes(const Json& array, const std::string& of) {
    if (!array.is_array()) fail("%s: %.100s where a list of sizes belongs", of.c_str(), array.dump().c_str());
    std::vector<int64_t> numbers;
    for (const Json& n : array) {
        if (!n.is_number_unsigned() || n.get<uint64_t>() > uint64_t(INT64_MAX))
            fail("%s: %.100s where a size belongs", of.c_str(), n.dump().c_str());
        numbers.push_back(n.get<int64_t>());
    }
    return numbers;
}

// What the header says of a tensor, in a file of so many bytes whose tensors begin at `data`.
static Safetensors::Entry read_entry(const Json& value, const std::string& name, int64_t data, int64_t size) {
    const char* n = name.c_str();
    Safetensors::Entry e;
    value.at("dtype").get_to(e.dtype);
    e.shape = sizes(value.at("shape"), name);
    const std::vector<int64_t> ends = sizes(value.at("data_offsets"), name);
    e.count = 1;
    for (const int64_t d : e.shape)
        if (__builtin_mul_overflow(e.count, d, &e.count)) fail("%s has an impossible shape", n);
    const int64_t width = dtype_bytes(e.dtype);
    if (!width) fail("%s has dtype %s; F64, F32, BF16, I64 and I32 can be read", n, e.dtype.c_str());
    if (ends.size() != 2 || ends[1] < ends[0] || ends[1] > size - data) fail("%s lies outside the file, which is cut off or damaged", n);
    e.offset = data + ends[0];
    e.bytes = ends[1] - ends[0];
    if (e.count > e.bytes / width || e.bytes != e.count * width)
        fail("%s has %lld bytes, its shape says otherwise", n, (long long)e.bytes);
    return e;
}

Safetensors::Safetensors(const std::string& path) : path(path), file(path) {
    const char* p = path.c_str();
    const int64_t size = file.size;
    if (size < 8) fail("%s: too short for a safetensors file (%lld bytes)", p, (long long)size);
    uint64_t header_bytes = 0;
    file.read(0, &header_bytes, sizeof(header_bytes));
    if (header_bytes > uint64_t(size - 8))
        fail("%s: not a safetensors file, or cut off: it claims a header of %llu bytes and has %lld in all", p,
             (unsigned long long)header_bytes, (long long)size);
    if (header_bytes > 100'000'000)  // the format's own limit
        fail("%s: not a safetensors file: it claims a header of %llu bytes", p, (unsigned long long)header_bytes);
    std::string header(header_bytes, 0);
    file.read(8, header.data(), header.size());
    const Json json = parse_json<Json>(header, path + ": not a safetensors file: its header");
    if (!json.is_object()) fail("%s: not a safetensors file: its header is no JSON object", p);
    try {
        for (const auto& [name, value] : json.items()) {
            if (name != "__metadata__")
                entries.emplace_back(name, read_entry(value, path + ": tensor " + name, 8 + int64_t(header_bytes), size));
            else
                for (const auto& [key, text] : value.items()) metadata.emplace_back(key, text.get<std::string>());
        }
    } catch (const Json::exception& e) {
        fail("%s: not a safetensors file: its header is no JSON of the right form (%s)", p, e.what());
    }
}

bool Safetensors::has(const std::string& name) const {
    return std::any_of(entries.begin(), entries.end(), [&](const auto& e) { return e.first == name; });
}

const Safetensors::Entry& Safetensors::find(const std::string& name) const {
    for (const auto& [key, entry] : entries)
        if (key == name) return entry;
    fail("%s: has no tensor %s", path.c_str(), name.c_str());
}

std::string Safetensors::meta(const std::string& key) const {
    for (const auto& [name, text] : metadata)
        if (name == key) return text;
    fail("%s: its metadata has no \"%s\"; it was not written by this project's train", path.c_str(), key.c_str());
}

std::string Safetensors::meta(const std::string& key, const std::string& otherwise) const {
    const bool known = std::any_of(metadata.begin(), metadata.end(), [&](const auto& m) { return m.first == key; });
    return known ? meta(key) : otherwise;
}

struct Bfloat16 {  // the upper half of a float
    uint16_t bits;
    operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

template <class Stored, class T>
static void convert(T* out, const std::vector<char>& raw) {
    for (size_t i = 0; i < raw.size() / sizeof(Stored); i++) {
        Stored value;
        memcpy(&value, raw.data() + i * sizeof(Stored), sizeof(Stored));
        if constexpr (std::is_same_v<Stored, Bfloat16>) out[i] = T(float(value));
        else out[i] = T(value);
    }
}

template <class T>
static void read_tensor(const InputFile& file, const Safetensors::Entry& e, T* out) {
    std::vector<char> raw(e.bytes);
    file.read(e.offset, raw.data(), raw.size());
    if (e.dtype == "F64") convert<double>(out, raw);
    else if (e.dtype == "F32") convert<float>(out, raw);
    else if (e.dtype == "BF16") convert<Bfloat16>(out, raw);
    else if (e.dtype == "I64") convert<int64_t>(out, raw);
    else convert<int32_t>(out, raw);
}

void Safetensors::read(const std::string& name, double* out) const { read_tensor(file, find(name), out); }
void Safetensors::read(const std::string& name, float* out) const { read_tensor(file, find(name), out); }
void Safetensors::read(const std::string& name, int* out) const { read_tensor(file, find(name), out); }

void Safetensors::write(const std::string& path, const std::vector<NewEntry>& list, const Metadata& metadata,
                        const std::function<const void*(size_t i)>& data) {
    Json header;
    for (const auto& [key, text] : metadata) header["__metadata__"][key] = text;
    int64_t offset = 0;
    for (const NewEntry& e : list) {
        header[e.name] = {{"dtype", e.dtype}, {"shape", e.shape}, {"data_offsets", {offset, offset + e.bytes}}};
        offset += e.bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
    write_atomically(path, [&](NewFile& file) {
        const uint64_t size = text.size();
        file.write(&size, sizeof(size));
        file.write(text);
        for (size_t i = 0; i < list.size(); i++) file.write(data(i), size_t(list[i].bytes));
    });
}
