// safetensors files (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header (names, types, shapes, offsets,
// metadata), then the tensors.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "files.h"

inline constexpr const char* kModelFile = "model.safetensors";  // of a checkpoint's directory

struct Safetensors {  // a file, or the files that an index names, open for reading
    using Metadata = std::vector<std::pair<std::string, std::string>>;
    struct Entry {
        std::string dtype;  // F64, F32, F16, BF16, I64, I32
        std::vector<int64_t> shape;
        int64_t offset, bytes, count;  // offset from the start of the file
        size_t file;
    };
    const std::string path;
    std::vector<std::pair<std::string, Entry>> entries;
    Metadata metadata;  // of a file alone
    // Of Hugging Face's model.safetensors.index.json: all its files. Fails on anything malformed.
    explicit Safetensors(const std::string& path);
    bool has(const std::string& name) const { return places.count(name); }
    const Entry& find(const std::string& name) const;  // fails if there is none
    std::string meta(const std::string& key) const;    // fails if there is none
    std::string meta(const std::string& key, const std::string& otherwise) const;
    // Converts `count` elements from `first` on (-1: all that follow) to T: double, float or int.
    template <class T> void read(const std::string& name, T* out, int64_t first = 0, int64_t count = -1) const;

    struct NewEntry {
        std::string name, dtype;
        std::vector<int64_t> shape;
        int64_t bytes;
    };
    // Writes a whole file, atomically. data(i): the bytes of tensor i, which are used until the next call.
    static void write(const std::string& path, const std::vector<NewEntry>& list, const Metadata& metadata,
                      const std::function<const void*(size_t i)>& data);

   private:
    std::vector<InputFile> files;
    std::unordered_map<std::string, size_t> places;  // in entries
    void open(const std::string& path);
};
