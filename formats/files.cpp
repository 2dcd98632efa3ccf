#include "files.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <cstring>
#include <utility>

void fail(const char* format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    throw Error(text);
}

std::string printable(const std::string& text) {
    std::string safe;
    for (const char c : text) {
        char code[8];
        snprintf(code, sizeof(code), c == '\n' ? "\\n" : "\\x%02x", static_cast<unsigned char>(c));
        if (static_cast<unsigned char>(c) < ' ' || c == 127) safe += code;
        else safe += c;
    }
    return safe;
}

// A stream that is not open: the first file that a program opens would take its number, and what is printed would land in it. Reading from
// one, unlike from an empty one, remains an error.
static void open_streams() {
    for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
        if (fcntl(stream, F_GETFD) < 0) open("/dev/null", stream == STDIN_FILENO ? O_WRONLY : O_RDWR);  // takes the lowest free number
}

// Of loops that have their arrays on the stack, with room to spare. Returns whether it had to be raised.
static bool raise_stack_limit() {
    constexpr rlim_t kStack = 8 << 20;
    rlimit limit{};
    getrlimit(RLIMIT_STACK, &limit);
    if (limit.rlim_cur >= kStack) return false;
    if (limit.rlim_max < kStack)
        fail("the stack is limited to %llu KB, and cannot be raised: run it after ulimit -s 8192", (unsigned long long)(limit.rlim_max >> 10));
    limit.rlim_cur = kStack;
    setrlimit(RLIMIT_STACK, &limit);
    return true;
}

int run_main(int (*body)(int, char**), int argc, char** argv) {
    open_streams();
    signal(SIGXFSZ, SIG_IGN);  // a file beyond the size limit is an error of write()
    int code = 1;
    try {
        raise_stack_limit();
        code = body(argc, argv);
    } catch (const std::bad_alloc&) {
        fprintf(stderr, "error: out of memory on the host; use a smaller model, --batch or --seq-len\n");
    } catch (const std::exception& e) {
        fprintf(stderr, "error: %s\n", printable(e.what()).c_str());
    }
    if ((fflush(stdout) != 0 || ferror(stdout)) && code == 0) {
        fprintf(stderr, "error: standard output cannot be written: what was printed is not complete\n");
        code = 1;
    }
    return code;
}

extern "C" char* openblas_get_corename() __attribute__((weak));
std::string blas_processor() { return openblas_get_corename ? openblas_get_corename() : ""; }

// One that this processor can do all of, where OpenBLAS has not found it out; or null.
static const char* better_processor() {
#ifdef __x86_64__
    if (blas_processor() != "Prescott" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    return wide ? "SkylakeX" : "Haswell";
#else
    return nullptr;
#endif
}

// At the end of a parallel loop threads wait for the last one: by default they spin for milliseconds, which is quickest while every thread
// has a core to itself. Beside another program there are fewer cores than that, and those who spin keep from its core the thread that all
// wait for. Spinning for a small part of that loses nothing on an idle machine, and little on a busy one. libgomp reads how long from the
// environment as it is loaded, before main: so the program sets it and starts anew as itself, in the same process. Whoever
// has said in the environment how threads should wait is left alone, and so is the second start. Where it fails, all is as before.
// The size of the threads' stacks is settled as early, by the limit of the first one's; and OpenBLAS chooses its functions. One that is older
// than the processor takes it for the first there was of 64 bits, which makes matrix products several times slower: it is told better.
void set_up_libraries(char** argv) {
    bool anew = false;
    try {
        anew = raise_stack_limit();
    } catch (const Error&) {
        return;  // run_main will say so
    }
    if (!getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY")) {
        setenv("GOMP_SPINCOUNT", "10000", 1);
        anew = true;
    }
    if (const char* better = better_processor(); better && !getenv("OPENBLAS_CORETYPE")) {
        setenv("OPENBLAS_CORETYPE", better, 1);
        anew = true;
    }
    if (!anew) return;
    char path[PATH_MAX];  // its own, not /proc/self/exe: as that, the process would be called "exe"
    const ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
    if (length <= 0) return;
    path[length] = 0;
    execv(path, argv);
}

static std::string called(const std::string& path, const std::string& what) { return what.empty() ? path : what + " " + path; }

InputFile::InputFile(const std::string& path, const std::string& what) : path(path) {
    file = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);  // O_NONBLOCK: a pipe would wait for its writer
    struct stat info {};
    std::string wrong;
    if (file < 0 || fstat(file, &info) != 0) wrong = strerror(errno);
    else if (!S_ISREG(info.st_mode))
        wrong = std::string("is a ") + (S_ISDIR(info.st_mode) ? "directory" : S_ISFIFO(info.st_mode) ? "pipe" : "device") + ", not a file";
    size = info.st_size;
    if (wrong.empty()) return;
    if (file >= 0) close(file);
    fail("%s: %s", called(path, what).c_str(), wrong.c_str());
}
InputFile::~InputFile() {
    if (file >= 0) close(file);
}
void InputFile::read(int64_t offset, void* data, size_t bytes) const {
    for (size_t done = 0; done < bytes;) {
        const ssize_t n = pread(file, static_cast<char*>(data) + done, bytes - done, offset + int64_t(done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail("%s: cannot be read (%s)", path.c_str(), strerror(errno));
        if (n == 0) fail("%s: has been cut short: it ends before byte %lld", path.c_str(), (long long)(offset + int64_t(bytes)));
        done += size_t(n);
    }
}

static std::string read_all(int file, const std::string& name) {
    std::string text;
    std::vector<char> block(1 << 16);
    for (ssize_t n; (n = read(file, block.data(), block.size())) != 0;) {
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail("%s: cannot be read (%s)", name.c_str(), strerror(errno));
        text.append(block.data(), size_t(n));
    }
    return text;
}

std::string read_file(const std::string& path, const std::string& what) {
    const InputFile file(path, what);
    return read_all(file.descriptor(), called(path, what));
}

std::string read_standard_input() { return read_all(STDIN_FILENO, "standard input"); }

std::vector<std::string> list_directory(const std::string& path) {
    DIR* const directory = opendir(path.c_str());
    if (!directory) fail("%s: %s", path.c_str(), strerror(errno));
    std::vector<std::string> names;
    errno = 0;
    while (const dirent* entry = readdir(directory)) {
        if (const std::string name = entry->d_name; name != "." && name != "..") names.push_back(name);
        errno = 0;
    }
    const int reason = errno;
    closedir(directory);
    if (reason) fail("%s: cannot be listed (%s)", path.c_str(), strerror(reason));
    std::sort(names.begin(), names.end());
    return names;
}

void remove_file(const std::string& path) {
    if (unlink(path.c_str()) != 0 && errno != ENOENT) fail("cannot remove %s: %s", path.c_str(), strerror(errno));
}

void write_all(int file, const std::string& name, const void* data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        const ssize_t n = write(file, static_cast<const char*>(data) + done, bytes - done);
        if (n < 0 && errno != EINTR) fail("cannot write %s: %s", name.c_str(), strerror(errno));
        done += size_t(std::max<ssize_t>(n, 0));
    }
}

NewFile::NewFile(const std::string& path) : path(path) {
    const std::string temporary = path + ".tmp";
    // A link or a pipe that somebody made under this name is not followed, not waited for, and not kept.
    file = unlink(temporary.c_str()) != 0 && errno != ENOENT ? -1 : open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (file < 0) fail("cannot write %s: %s", temporary.c_str(), strerror(errno));
}
NewFile::~NewFile() {
    if (file >= 0) ::close(file);
    if (!renamed) unlink((path + ".tmp").c_str());
}
void NewFile::flush() {
    write_all(file, path, buffer.data(), buffer.size());
    buffer.clear();
}
void NewFile::write(const void* data, size_t bytes) {
    constexpr size_t kBuffered = 1 << 20;
    while (bytes > 0) {
        const size_t n = std::min(bytes, kBuffered - buffer.size());
        buffer.insert(buffer.end(), static_cast<const char*>(data), static_cast<const char*>(data) + n);
        if (buffer.size() == kBuffered) flush();
        data = static_cast<const char*>(data) + n;
        bytes -= n;
    }
}
void NewFile::write_at(int64_t offset, const void* data, size_t bytes) {
    flush();
    if (pwrite(file, data, bytes, offset) != ssize_t(bytes)) fail("cannot write %s: %s", path.c_str(), strerror(errno));
}
void NewFile::close() {
    flush();
    if (fsync(file) != 0) fail("cannot write %s: %s", path.c_str(), strerror(errno));
    if (::close(std::exchange(file, -1)) != 0) fail("cannot write %s: %s", path.c_str(), strerror(errno));
}

// A name is safe on the disk only when its directory is.
static void flush_directory(const std::string& of_file) {
    const size_t slash = of_file.rfind('/');
    const std::string path = slash == std::string::npos ? "." : of_file.substr(0, slash + 1);
    const int directory = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    const bool good = directory >= 0 && (fsync(directory) == 0 || errno == EINVAL);  // EINVAL: this file system has no such thing
    const int reason = errno;
    if (directory >= 0) close(directory);
    if (!good)
        throw NotFlushed(of_file + " is written, but its directory cannot be flushed: it may be lost if the power fails (" + strerror(reason) +
                         ")");
}

static void rename_file(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()) != 0) fail("cannot rename %s to %s: %s", from.c_str(), to.c_str(), strerror(errno));
}

void replace_files(const std::vector<std::unique_ptr<NewFile>>& files, const std::vector<std::string>& gone) {
    std::vector<std::pair<std::string, std::string>> renamed;
    const auto rename_to = [&](const std::string& from, const std::string& to) {
        rename_file(from, to);
        renamed.emplace_back(from, to);
    };
    std::vector<std::string> old;
    for (auto file = files.rbegin(); file != files.rend(); ++file)
        if (access((*file)->path.c_str(), F_OK) == 0) old.push_back((*file)->path);
    old.insert(old.end(), gone.begin(), gone.end());
    try {
        for (const std::string& path : old) rename_to(path, path + ".old");
        for (const auto& file : files) rename_to(file->path + ".tmp", file->path);
    } catch (const Error& e) {
        for (auto r = renamed.rbegin(); r != renamed.rend(); ++r)
            if (rename(r->second.c_str(), r->first.c_str()) != 0)
                fail("%s; and what was there before could not be put back: it is in files that end in .old", e.what());
        fail("%s; what was there before is unharmed", e.what());
    }
    for (const auto& file : files) file->renamed = true;
    flush_directory(files.back()->path);
    std::string left;
    for (const std::string& path : old)
        if (unlink((path + ".old").c_str()) != 0 && left.empty()) left = path + ".old: " + strerror(errno);
    if (!left.empty()) fail("%s is written, but what was there before cannot be removed: %s", files.back()->path.c_str(), left.c_str());
}

void write_atomically(const std::string& path, const std::function<void(NewFile&)>& write) {
    NewFile file(path);
    try {
        write(file);
        file.close();
        rename_file(path + ".tmp", path);
    } catch (const Error& e) {
        fail("%s; what was there before is unharmed", e.what());
    }
    file.renamed = true;
    flush_directory(path);
}
