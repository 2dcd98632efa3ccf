// Random numbers: a hash of (seed, stream, counter), so that any draw can be repeated in any order on any device. Which documents are for
// validation, the order of the data and the first weights all hang on it: it is a part of the formats.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ON_DEVICE_TOO __host__ __device__
#else
#define ON_DEVICE_TOO
#endif

enum RandomStream : uint64_t { kInitStream = 1, kShuffleStream, kSampleStream, kNoiseStream, kTaskStream };

// The finaliser of splitmix64 (Steele, Lea, Flood 2014), applied to each of the three words in turn; Word: one of 64 bits, or a vector of them.
inline constexpr uint64_t kRandomStep = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio: keeps small words apart
template <class Word>
ON_DEVICE_TOO inline void mix_bits(Word& x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
}
ON_DEVICE_TOO inline uint64_t random_key(uint64_t seed, uint64_t stream) {  // of all draws of a stream
    uint64_t x = seed + kRandomStep;
    mix_bits(x);
    x += stream * kRandomStep;
    mix_bits(x);
    return x;
}
ON_DEVICE_TOO inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t counter) {
    uint64_t x = random_key(seed, stream) + counter * kRandomStep;
    mix_bits(x);
    return x;
}

inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t counter) {  // [0, 1), 53 bits
    return double(random_bits(seed, stream, counter) >> 11) * 0x1p-53;
}

ON_DEVICE_TOO inline double random_normal(uint64_t seed, uint64_t stream, uint64_t counter) {  // Box-Muller; uses one counter
    const uint64_t bits = random_bits(seed, stream, counter);
    const double u = double((bits >> 32) + 1) * 0x1p-32, v = double(bits & 0xffffffffu) * 0x1p-32;  // u in (0, 1], so that log is finite
#ifdef __CUDA_ARCH__
    return sqrt(-2 * log(u)) * cospi(2 * v);  // cos would need a stack, for arguments that are large
#else
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * v);
#endif
}
