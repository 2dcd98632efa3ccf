// Catch2's main program and, of version 2, all that it is made of.
#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_MAIN
#define CATCH_CONFIG_NO_POSIX_SIGNALS  // simt.h explains faults better
#include <catch2/catch.hpp>
#endif
