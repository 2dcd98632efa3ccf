// What every format and program shares: errors, how threads wait, numbers in text, whole files. No kernel, no Model is known in formats/.
#pragma once

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// ---- errors: whatever a user can cause is one clear line (what is wrong, where, what to do) and exit code 1
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct NotFlushed : Error {  // all is written and has its name, but the directory may forget that when the power fails
    using Error::Error;
};
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);  // throws Error
std::string printable(const std::string& text);                              // control characters as \\n, \\x1b ...: what others wrote
int run_main(int (*body)(int, char**), int argc, char** argv);  // prints "error: ..." to stderr, returns 1; also if stdout was not written

// ---- what libraries read from the environment as they are loaded: how threads wait, and their stacks; for which processor OpenBLAS computes.
// The first call in the main() of a program that computes: see files.cpp. Starts the program anew, if need be.
void set_up_libraries(char** argv);
std::string blas_processor();  // as OpenBLAS calls it; "" of another BLAS

// ---- numbers. The whole text as a decimal number. Not std::errc(): it is none, or out of T's range.
template <class T>
std::errc parse_number(const std::string& text, T& value) {
    const char* last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), last, value);
    return error == std::errc() && end != last ? std::errc::invalid_argument : error;
}

// ---- files
// Open for reading. A directory, a pipe or a device is refused, and never waited for.
class InputFile {
   public:
    const std::string path;
    int64_t size;
    explicit InputFile(const std::string& path, const std::string& what = "");  // what: the path is, in errors
    InputFile(InputFile&& from) : path(from.path), size(from.size), file(from.release()) {}
    ~InputFile();
    void read(int64_t offset, void* data, size_t bytes) const;  // fails unless they are all there
    int descriptor() const { return file; }
    int release() { return std::exchange(file, -1); }           // as descriptor(); whoever takes it closes it

   private:
    int file;
};
std::string read_file(const std::string& path, const std::string& what);
std::string read_standard_input();
std::vector<std::string> list_directory(const std::string& path);  // the names in it, sorted; fails unless they are all of them
void remove_file(const std::string& path);                         // fails if it is still there
void write_all(int file, const std::string& name, const void* data, size_t bytes);

// A file that is written under another name, path + ".tmp", until it is whole: see replace_files. What was there under that name goes.
class NewFile {
   public:
    const std::string path;
    explicit NewFile(const std::string& path);
    ~NewFile();  // removes it, unless it has been renamed
    NewFile(const NewFile&) = delete;
    void write(const void* data, size_t bytes);
    void write(const std::string& text) { write(text.data(), text.size()); }
    void write_at(int64_t offset, const void* data, size_t bytes);  // over what has been written
    void close();                                                   // after flushing it to the disk

   private:
    int file;
    bool renamed = false;
    std::vector<char> buffer;
    void flush();
    friend void replace_files(const std::vector<std::unique_ptr<NewFile>>&, const std::vector<std::string>&);
    friend void write_atomically(const std::string&, const std::function<void(NewFile&)>&);
};
// All files are closed. They get their names, and the files in `gone` vanish: all of it, or if anything fails nothing. While that happens there
// is no file under the last of the names: who finds it finds all of them. What fails later (the old files cannot be removed, the directory
// not be flushed) is an error that says so.
void replace_files(const std::vector<std::unique_ptr<NewFile>>& files, const std::vector<std::string>& gone);
// One file. A reader sees the old one or the new one, whatever happens.
void write_atomically(const std::string& path, const std::function<void(NewFile&)>& write);
