#include "safetensors.h"

#include <algorithm>
#include <bit>
#include <cerrno>
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

Safetensors::Safetensors(const std::string& path) : path(path) {
    const char* p = path.c_str();
    file = fopen(p, "rb");
    if (!file) fail("%s: %s", p, strerror(errno));
    try {
        uint64_t header_bytes = 0;
        if (fseek(file, 0, SEEK_END) != 0) fail("%s: not a regular file", p);
        const int64_t size = ftell(file);
        rewind(file);
        if (size < 8 || fread(&header_bytes, 8, 1, file) != 1)
            fail("%s: too short for a safetensors file (%lld bytes)", p, (long long)size);
        if (header_bytes > uint64_t(size - 8))
            fail("%s: not a safetensors file, or cut off: it claims a header of %llu bytes and has %lld in all", p,
                 (unsigned long long)header_bytes, (long long)size);
        if (header_bytes > 100'000'000)  // the format's own limit
            fail("%s: not a safetensors file: it claims a header of %llu bytes", p, (unsigned long long)header_bytes);
        std::string header(header_bytes, 0);
        if (fread(header.data(), 1, header.size(), file) != header.size()) fail("%s: cannot be read (%s)", p, strerror(errno));
        const Json json = parse_json(header);
        const int64_t data = 8 + int64_t(header_bytes);
        for (const auto& [name, value] : json.items()) {
            if (name == "__metadata__") {
                for (const auto& [key, text] : value.items()) metadata.emplace_back(key, text.get<std::string>());
                continue;
            }
            Entry e;
            value.at("dtype").get_to(e.dtype);
            value.at("shape").get_to(e.shape);
            const auto ends = value.at("data_offsets").get<std::vector<int64_t>>();
            e.count = 1;
            for (int64_t n : e.shape)
                if (n < 0 || __builtin_mul_overflow(e.count, n, &e.count)) fail("%s: tensor %s has an impossible shape", p, name.c_str());
            const int64_t width = dtype_bytes(e.dtype);
            if (!width) fail("%s: tensor %s has dtype %s; F64, F32, BF16, I64 and I32 can be read", p, name.c_str(), e.dtype.c_str());
            if (ends.size() != 2 || ends[0] < 0 || ends[1] < ends[0] || ends[1] > size - data)
                fail("%s: cut off or damaged: tensor %s lies outside the file", p, name.c_str());
            e.offset = data + ends[0];
            e.bytes = ends[1] - ends[0];
            if (e.count > e.bytes / width || e.bytes != e.count * width)
                fail("%s: tensor %s has %lld bytes, its shape says otherwise", p, name.c_str(), (long long)e.bytes);
            entries.emplace_back(name, e);
        }
    } catch (const Json::exception& e) {
        fclose(file);
        fail("%s: not a safetensors file: its header is no JSON of the right form", p);
    } catch (...) {
        fclose(file);
        throw;
    }
}

Safetensors::~Safetensors() { fclose(file); }

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
static void read_tensor(std::FILE* file, const std::string& path, const std::string& name, const Safetensors::Entry& e, T* out) {
    std::vector<char> raw(e.bytes);
    if (fseek(file, e.offset, SEEK_SET) != 0 || fread(raw.data(), 1, raw.size(), file) != raw.size())
        fail("%s: tensor %s cannot be read (%s)", path.c_str(), name.c_str(), strerror(errno));
    if (e.dtype == "F64") convert<double>(out, raw);
    else if (e.dtype == "F32") convert<float>(out, raw);
    else if (e.dtype == "BF16") convert<Bfloat16>(out, raw);
    else if (e.dtype == "I64") convert<int64_t>(out, raw);
    else convert<int32_t>(out, raw);
}

void Safetensors::read(const std::string& name, double* out) const { read_tensor(file, path, name, find(name), out); }
void Safetensors::read(const std::string& name, float* out) const { read_tensor(file, path, name, find(name), out); }
void Safetensors::read(const std::string& name, int* out) const { read_tensor(file, path, name, find(name), out); }

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
    write_atomically(path, [&](std::FILE* file) {
        const uint64_t size = text.size();
        fwrite(&size, 8, 1, file);
        fwrite(text.data(), 1, text.size(), file);
        for (size_t i = 0; i < list.size(); i++)
            if (fwrite(data(i), 1, list[i].bytes, file) != size_t(list[i].bytes)) return;  // write_atomically reports it
    });
}
