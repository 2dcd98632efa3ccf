#include "safetensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "files.h"
#include "json.h"

using Json = nlohmann::json;

static int64_t dtype_bytes(const std::string& dtype) {
    if (dtype == "F64" || dtype == "I64") return 8;
    if (dtype == "F32" || dtype == "I32") return 4;
    if (dtype == "BF16" || dtype == "F16") return 2;
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
    if (!width) fail("%s has dtype %s; F64, F32, F16, BF16, I64 and I32 can be read", n, e.dtype.c_str());
    if (ends.size() != 2 || ends[1] < ends[0] || ends[1] > size - data) fail("%s lies outside the file, which is cut off or damaged", n);
    e.offset = data + ends[0];
    e.bytes = ends[1] - ends[0];
    if (e.count > e.bytes / width || e.bytes != e.count * width)
        fail("%s has %lld bytes, its shape says otherwise", n, (long long)e.bytes);
    return e;
}

// One file's tensors, added to those that are there.
void Safetensors::open(const std::string& path) {
    const InputFile& file = files.emplace_back(path);
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
            if (name != "__metadata__") {
                if (!places.emplace(name, entries.size()).second) fail("%s: tensor %s is there twice", p, name.c_str());
                entries.emplace_back(name, read_entry(value, path + ": tensor " + name, 8 + int64_t(header_bytes), size));
                entries.back().second.file = files.size() - 1;
            } else {
                for (const auto& [key, text] : value.items()) metadata.emplace_back(key, text.get<std::string>());
            }
        }
    } catch (const Json::exception& e) {
        fail("%s: not a safetensors file: its header is no JSON of the right form (%s)", p, e.what());
    }
}

// {"metadata": {...}, "weight_map": {tensor: file, ...}}, of files beside it.
Safetensors::Safetensors(const std::string& path) : path(path) {
    if (!path.ends_with(".index.json")) {
        open(path);
        return;
    }
    const char* p = path.c_str();
    const Json index = parse_json<Json>(read_file(path, "index"), path);
    if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) fail("%s: it has no \"weight_map\"", p);
    std::map<std::string, size_t> number;  // of each file
    std::vector<std::pair<std::string, std::string>> listed;
    for (const auto& [tensor, value] : index["weight_map"].items()) {
        const std::string file = value.is_string() ? value.get<std::string>() : "";
        if (file.empty() || file.find('/') != std::string::npos)
            fail("%s: tensor %s is in %.100s, which is no file beside it", p, tensor.c_str(), printable(value.dump()).c_str());
        listed.emplace_back(tensor, file);
        number.emplace(file, 0);
    }
    for (auto& [file, place] : number) {
        place = files.size();
        open((std::filesystem::path(path).parent_path() / file).string());
    }
    metadata.clear();
    for (const auto& [tensor, file] : listed)
        if (!has(tensor) || find(tensor).file != number[file]) fail("%s: %s has no tensor %s", p, file.c_str(), tensor.c_str());
    if (entries.size() != listed.size()) fail("%s: its files have %zu tensors, it lists %zu", p, entries.size(), listed.size());
}

const Safetensors::Entry& Safetensors::find(const std::string& name) const {
    const auto found = places.find(name);
    if (found == places.end()) fail("%s: has no tensor %s", path.c_str(), name.c_str());
    return entries[found->second].second;
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
struct Float16 {  // IEEE 754's: 1 bit of sign, 5 of exponent, 10 of fraction
    uint16_t bits;
    operator float() const {
        const int exponent = bits >> 10 & 0x1F, fraction = bits & 0x3FF;
        const float size = exponent == 0x1F ? (fraction ? NAN : INFINITY)
                           : exponent == 0  ? std::ldexp(float(fraction), -24)
                                            : std::ldexp(float(fraction | 0x400), exponent - 25);
        return bits >> 15 ? -size : size;
    }
};

template <class Stored, class T>
static void convert(T* out, const std::vector<char>& raw) {
    for (size_t i = 0; i < raw.size() / sizeof(Stored); i++) {
        Stored value;
        memcpy(&value, raw.data() + i * sizeof(Stored), sizeof(Stored));
        if constexpr (std::is_class_v<Stored>) out[i] = T(float(value));
        else out[i] = T(value);
    }
}

template <class T>
void Safetensors::read(const std::string& name, T* out, int64_t first, int64_t count) const {
    const Entry& e = find(name);
    const int64_t width = dtype_bytes(e.dtype);
    if (count < 0) count = e.count - first;
    if (first < 0 || count > e.count - first)
        fail("%s: tensor %s has %lld elements, not as many as are wanted", path.c_str(), name.c_str(), (long long)e.count);
    std::vector<char> raw(count * width);
    files[e.file].read(e.offset + first * width, raw.data(), raw.size());
    if (e.dtype == "F64") convert<double>(out, raw);
    else if (e.dtype == "F32") convert<float>(out, raw);
    else if (e.dtype == "F16") convert<Float16>(out, raw);
    else if (e.dtype == "BF16") convert<Bfloat16>(out, raw);
    else if (e.dtype == "I64") convert<int64_t>(out, raw);
    else convert<int32_t>(out, raw);
}
template void Safetensors::read(const std::string&, double*, int64_t, int64_t) const;
template void Safetensors::read(const std::string&, float*, int64_t, int64_t) const;
template void Safetensors::read(const std::string&, int*, int64_t, int64_t) const;

void Safetensors::write(const std::string& path, const std::vector<NewEntry>& list, const Metadata& metadata,
                        const std::function<const void*(size_t i)>& data) {
    nlohmann::ordered_json header;
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
