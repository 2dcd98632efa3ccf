#include "files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdlib>
#include <cstring>

void fail(const char* format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    throw Error(text);
}

int run_main(int (*body)(int, char**), int argc, char** argv) {
    try {
        return body(argc, argv);
    } catch (const std::bad_alloc&) {
        fprintf(stderr, "error: out of memory on the host; use a smaller model, --batch or --seq-len\n");
    } catch (const std::exception& e) {
        fprintf(stderr, "error: %s\n", e.what());
    }
    return 1;
}

// At the end of a parallel loop threads wait for the last one: by default they spin for milliseconds, which is quickest while every thread
// has a core to itself. Beside another program there are fewer cores than that, and those who spin keep from its core the thread that all
// wait for. Spinning for a small part of that loses nothing on an idle machine, and little on a busy one. libgomp reads how long from the
// environment as it is loaded, before main: so the program sets it and starts anew as itself, in the same process. Whoever
// has said in the environment how threads should wait is left alone, and so is the second start. Where it fails, all is as before.
void spin_briefly(char** argv) {
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    setenv("GOMP_SPINCOUNT", "10000", 1);
    char path[PATH_MAX];  // its own, not /proc/self/exe: as that, the process would be called "exe"
    const ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
    if (length <= 0) return;
    path[length] = 0;
    execv(path, argv);
}

std::string read_file(const std::string& path, const char* what) {
    std::FILE* file = fopen(path.c_str(), "rb");
    if (!file) fail("%s %s: %s", what, path.c_str(), strerror(errno));
    std::string text;
    char block[1 << 16];
    size_t n;
    while ((n = fread(block, 1, sizeof(block), file)) > 0) text.append(block, n);
    const bool broken = ferror(file);
    fclose(file);
    if (broken) fail("%s %s: cannot be read (%s)", what, path.c_str(), strerror(errno));
    return text;
}

void write_atomically(const std::string& path, const std::function<void(std::FILE*)>& write) {
    const std::string temporary = path + ".tmp";
    std::FILE* file = fopen(temporary.c_str(), "wb");
    if (!file) fail("cannot write %s: %s", temporary.c_str(), strerror(errno));
    errno = 0;
    try {
        write(file);
    } catch (...) {
        fclose(file);
        unlink(temporary.c_str());
        throw;
    }
    bool good = !ferror(file) && fflush(file) == 0 && fsync(fileno(file)) == 0;
    int reason = errno;
    if (fclose(file) != 0 && good) good = false, reason = errno;
    if (good && rename(temporary.c_str(), path.c_str()) != 0) good = false, reason = errno;
    if (!good) {
        unlink(temporary.c_str());
        fail("cannot write %s: %s; what was there before is unharmed", path.c_str(), strerror(reason));
    }
    // The new name is safe only when the directory is.
    const size_t slash = path.rfind('/');
    const int directory = open(slash == std::string::npos ? "." : path.substr(0, slash + 1).c_str(), O_RDONLY);
    if (directory >= 0) {
        fsync(directory);
        close(directory);
    }
}
