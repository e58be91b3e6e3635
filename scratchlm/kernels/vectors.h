// Vectors of fp32 numbers as wide as the processor's, in the compiler's own terms (GCC, Clang), and fp32 or bf16 numbers in memory.
//
// No intrinsics but for one number in all places of a vector, and the instruction that multiplies pairs of bf16 numbers.
// -DVECTOR=n: another width, for tests. -DBF16: `Chosen` are bf16 numbers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(VECTOR)
constexpr int WIDTH = VECTOR;
#elif defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.4426950408889634f;

typedef float floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t words __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t halves __attribute__((vector_size(WIDTH * 2)));

template <class V> inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}
template <class V> inline void store(void* to, V v) { std::memcpy(to, &v, sizeof(V)); }

inline floats all(float x) {
#if defined(__AVX512F__) && !defined(VECTOR)
    return (floats)_mm512_set1_ps(x);
#elif defined(__AVX2__) && !defined(VECTOR)
    return (floats)_mm256_set1_ps(x);
#else
    floats v;
    for (int i = 0; i < WIDTH; ++i) v[i] = x;
    return v;
#endif
}

// a b + c, rounded once.
inline floats fused(floats a, floats b, floats c) {
#if defined(__AVX512F__) && !defined(VECTOR)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__) && !defined(VECTOR)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline floats as_floats(words w) { return (floats)w; }
inline words as_words(floats f) { return (words)f; }

// --- the two kinds of numbers ---------------------------------------------------------------------------------------------

struct Single {
    typedef float number;
    static constexpr int PER_WORD = 1;
    static inline floats plus_product(floats sum, words a, words b) { return fused(as_floats(a), as_floats(b), sum); }
    static inline floats widened(const number* from) { return load<floats>(from); }
    static inline float widened(number x) { return x; }
    static inline void rounded(number* to, floats x) { store(to, x); }
    static inline number rounded(float x) { return x; }
};

struct Brain {  // bf16: the upper half of an fp32 number
    typedef uint16_t number;
    static constexpr int PER_WORD = 2;
    static inline floats plus_product(floats sum, words a, words b) {
#if defined(__AVX512BF16__) && !defined(VECTOR)
        return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        const words upper = words{} + 0xffff0000u;
        sum = fused(as_floats(a << 16), as_floats(b << 16), sum);
        return fused(as_floats(a & upper), as_floats(b & upper), sum);
#endif
    }
    static inline floats widened(const number* from) {
        return as_floats(__builtin_convertvector(load<halves>(from), words) << 16);
    }
    static inline float widened(number x) {
        const uint32_t bits = (uint32_t)x << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    }
    // To the nearest, ties to even, in the upper halves; every NaN is the same one, since its own bits may carry over.
    static inline words nearest(floats x) {
        const words bits = as_words(x), quiet = words{} + 0x7fc00000u;
        return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : quiet;
    }
    static inline void rounded(number* to, floats x) { store(to, __builtin_convertvector(nearest(x) >> 16, halves)); }
    static inline number rounded(float x) {
        if (x != x) return 0x7fc0;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    }
};

// The vector at place j of a row, `beyond` in all places after its end.
template <class Kind> inline floats part(const typename Kind::number* row, ptrdiff_t j, ptrdiff_t length, float beyond) {
    if (j + WIDTH <= length) return Kind::widened(row + j);
    floats v = all(beyond);
    for (ptrdiff_t i = 0; j + i < length; ++i) v[i] = Kind::widened(row[j + i]);
    return v;
}

// The same back into memory, but for what is beyond the end.
template <class Kind> inline void put(typename Kind::number* row, ptrdiff_t j, ptrdiff_t length, floats v) {
    if (j + WIDTH <= length) return Kind::rounded(row + j, v);
    for (ptrdiff_t i = 0; j + i < length; ++i) row[j + i] = Kind::rounded(v[i]);
}

// 2^x: x = n + f with |f| ≤ 1/2, the series of e^(f ln 2), n added to the exponent. Below the normal numbers 0; NaN stays.
inline floats exp2_of(floats x) {
    const floats magic = all(12582912.0f);  // 1.5 · 2^23: what is added to it is rounded to whole numbers
    const ints tiny = x < all(-126.0f);
    const floats held = (floats)(((ints)x & ~tiny));  // 2^0 where it will be 0
    const floats shifted = held + magic;
    const floats f = held - (shifted - magic);
    floats p = all(1.5403530393381608e-4f);  // (ln 2)^k / k!
    p = fused(p, f, all(1.3333558146428443e-3f));
    p = fused(p, f, all(9.618129107628477e-3f));
    p = fused(p, f, all(5.550410866482158e-2f));
    p = fused(p, f, all(2.402265069591007e-1f));
    p = fused(p, f, all(6.931471805599453e-1f));
    p = fused(p, f, all(1.0f));
    const ints raised = (ints)p + ((ints)as_words(shifted) << 23);
    const floats power = (floats)(raised & ~tiny);
    return x == x ? power : x;  // a NaN's own bits would go into the exponent
}

inline float sum_of(floats v) {
    float total = 0;
    for (int i = 0; i < WIDTH; ++i) total += v[i];
    return total;
}
inline float largest_of(floats v) {
    float best = v[0];
    for (int i = 1; i < WIDTH; ++i) best = v[i] > best ? v[i] : best;
    return best;
}

inline ptrdiff_t up(ptrdiff_t n, ptrdiff_t to) { return (n + to - 1) / to * to; }

// Memory of one thread, a part of what the caller gives for all of them.
struct Workspace {
    char* base;
    size_t used = 0;
    template <class T> T* take(size_t count) {
        char* at = base + used;
        used += up(count * sizeof(T), 64);
        return reinterpret_cast<T*>(at);
    }
};

#if defined(BF16)
typedef Brain Chosen;
#else
typedef Single Chosen;
#endif

}  // namespace
