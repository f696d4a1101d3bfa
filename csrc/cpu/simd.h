// Vectors of whatever width the instruction set has, by the compilers' vector extension.
#pragma once

#include <cstdint>
#include <utility>

#include "../common/problem.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define DOMERGE_INLINE inline __attribute__((always_inline))

namespace domerge {
namespace DOMERGE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int kWidth = kVectorBytes / 4;

typedef float FloatVec __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVec __attribute__((vector_size(kVectorBytes)));
typedef uint32_t BitsVec __attribute__((vector_size(kVectorBytes)));
typedef int32_t IndexVec __attribute__((vector_size(kVectorBytes)));
typedef uint64_t WideVec __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));
typedef float HalfFloatVec __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
    using type = FloatVec;
};
template <>
struct VecOf<double> {
    using type = DoubleVec;
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class V>
DOMERGE_INLINE V load(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
DOMERGE_INLINE void store(void* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

template <class To, class From>
DOMERGE_INLINE To bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
    To to;
    __builtin_memcpy(&to, &v, sizeof to);
    return to;
}

DOMERGE_INLINE FloatVec where(IndexVec mask, FloatVec yes, FloatVec no) {
    return bits<FloatVec>((bits<IndexVec>(yes) & mask) | (bits<IndexVec>(no) & ~mask));
}

DOMERGE_INLINE BitsVec where(IndexVec mask, BitsVec yes, BitsVec no) {
    return (yes & bits<BitsVec>(mask)) | (no & ~bits<BitsVec>(mask));
}

// (Subtracting zero changes no float; adding it does.)
DOMERGE_INLINE FloatVec broadcast(float x) {
    return x - FloatVec{};
}

// a b + c, rounded once.
DOMERGE_INLINE FloatVec multiply_add(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    for (int i = 0; i < kWidth; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

// The products of the lower halves of the lanes.
DOMERGE_INLINE WideVec multiply_low(WideVec a, WideVec b) {
#if defined(__AVX512F__)
    return bits<WideVec>(_mm512_mul_epu32(bits<__m512i>(a), bits<__m512i>(b)));
#elif defined(__AVX2__)
    return bits<WideVec>(_mm256_mul_epu32(bits<__m256i>(a), bits<__m256i>(b)));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Whether a lane of the mask is set.
DOMERGE_INLINE bool any(IndexVec mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(bits<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(bits<__m256>(mask)) != 0;
#else
    const WideVec wide = bits<WideVec>(mask);
    uint64_t all = 0;
    for (int i = 0; i < kWidth / 2; ++i) all |= wide[i];
    return all != 0;
#endif
}

DOMERGE_INLINE FloatVec square_root(FloatVec v) {
    for (int i = 0; i < kWidth; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
}

struct Widened {
    DoubleVec low, high;
};

DOMERGE_INLINE Widened widen(FloatVec v) {
    HalfFloatVec half[2];
    __builtin_memcpy(half, &v, sizeof v);
    return Widened{__builtin_convertvector(half[0], DoubleVec),
                   __builtin_convertvector(half[1], DoubleVec)};
}

// The sum of the lanes, in double and always in the same order.
DOMERGE_INLINE double sum_lanes(FloatVec v) {
    const Widened wide = widen(v);
    double lanes[kWidth / 2];
    store(lanes, wide.low + wide.high);
    for (int half = kWidth / 4; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// Of whole numbers below 2^16. (Compilers make several instructions of `convertvector`.)
DOMERGE_INLINE BitsVec widen(HalfVec v) {
#if defined(__AVX512F__)
    return bits<BitsVec>(_mm512_cvtepu16_epi32(bits<__m256i>(v)));
#elif defined(__AVX2__)
    return bits<BitsVec>(_mm256_cvtepu16_epi32(bits<__m128i>(v)));
#else
    return __builtin_convertvector(v, BitsVec);
#endif
}

DOMERGE_INLINE HalfVec narrow(BitsVec v) {
#if defined(__AVX512F__)
    return bits<HalfVec>(_mm512_cvtepi32_epi16(bits<__m512i>(v)));
#else
    return __builtin_convertvector(v, HalfVec);
#endif
}

struct Float32 {
    using Storage = float;
    static DOMERGE_INLINE FloatVec load(const float* p) { return DOMERGE_ISA::load<FloatVec>(p); }
    static DOMERGE_INLINE void store(float* p, FloatVec v) { DOMERGE_ISA::store(p, v); }
};

struct BFloat16 {
    using Storage = uint16_t;
    static DOMERGE_INLINE FloatVec load(const uint16_t* p) {
        return bits<FloatVec>(widen(DOMERGE_ISA::load<HalfVec>(p)) << 16);
    }
    static DOMERGE_INLINE void store(uint16_t* p, FloatVec v) {
        const BitsVec b = bits<BitsVec>(v);
        const BitsVec rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
        const BitsVec safe = where(v != v, BitsVec{} + 0x7fc0u, rounded);
        DOMERGE_ISA::store(p, narrow(safe));
    }
};

#if defined(__AVX512F__)
struct Float16 {
    using Storage = uint16_t;
    static DOMERGE_INLINE FloatVec load(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static DOMERGE_INLINE void store(uint16_t* p, FloatVec v) {
        const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
    }
};
#elif defined(__F16C__)
struct Float16 {
    using Storage = uint16_t;
    static DOMERGE_INLINE FloatVec load(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static DOMERGE_INLINE void store(uint16_t* p, FloatVec v) {
        const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
    }
};
#else
struct Float16 {
    using Storage = uint16_t;
    static DOMERGE_INLINE FloatVec load(const uint16_t* p) {
        const BitsVec h = __builtin_convertvector(DOMERGE_ISA::load<HalfVec>(p), BitsVec);
        // Shifted into a float's fields, the number is 2^-112 times itself, subnormals included.
        const FloatVec scaled = bits<FloatVec>((h & 0x7fffu) << 13) * 0x1p112f;
        const IndexVec special = (h & 0x7c00u) == 0x7c00u;
        const BitsVec magnitude =
            where(special, bits<BitsVec>(scaled) | 0x7f800000u, bits<BitsVec>(scaled));
        return bits<FloatVec>(magnitude | ((h & 0x8000u) << 16));
    }
    static DOMERGE_INLINE void store(uint16_t* p, FloatVec v) {
        const BitsVec all = bits<BitsVec>(v);
        const BitsVec b = all & 0x7fffffffu;
        // The last place of a float in [0.5, 1) is that of a half subnormal: adding rounds.
        const BitsVec subnormal = bits<BitsVec>(bits<FloatVec>(b) + 0.5f) - 0x3f000000u;
        const BitsVec normal = (b + 0xfffu + ((b >> 13) & 1u) - 0x38000000u) >> 13;
        BitsVec h = where(b < 0x38800000u, subnormal, normal);
        h = where(b >= 0x47800000u, BitsVec{} + 0x7c00u, h);
        h = where(b > 0x7f800000u, BitsVec{} + 0x7e00u, h);
        DOMERGE_ISA::store(p, __builtin_convertvector(h | ((all >> 16) & 0x8000u), HalfVec));
    }
};
#endif

// Runs body(Float32{}), body(BFloat16{}) or body(Float16{}).
template <class Body>
DOMERGE_INLINE void with_dtype(DType dtype, Body body) {
    if (dtype == DType::float32)
        body(Float32{});
    else if (dtype == DType::bfloat16)
        body(BFloat16{});
    else
        body(Float16{});
}

template <class Format>
DOMERGE_INLINE FloatVec load_some(const typename Format::Storage* p, int64_t n) {
    if (n >= kWidth) return Format::load(p);
    typename Format::Storage buffer[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return Format::load(buffer);
}

template <class Format>
DOMERGE_INLINE void store_some(typename Format::Storage* p, FloatVec v, int64_t n) {
    if (n >= kWidth) return Format::store(p, v);
    typename Format::Storage buffer[kWidth];
    Format::store(buffer, v);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DOMERGE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef DOMERGE_SHUFFLE
#define DOMERGE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IndexVec{__VA_ARGS__})
#endif

// Swaps the off-diagonal quarters of each 2H x 2H square held in the rows a (upper) and b (lower).
template <int H, int... L>
DOMERGE_INLINE void exchange(FloatVec& a, FloatVec& b, std::integer_sequence<int, L...>) {
    const FloatVec upper = DOMERGE_SHUFFLE(a, b, ((L & H) ? kWidth + L - H : L)...);
    const FloatVec lower = DOMERGE_SHUFFLE(a, b, ((L & H) ? kWidth + L : L + H)...);
    a = upper;
    b = lower;
}

template <int H>
DOMERGE_INLINE void transpose_stage(FloatVec (&rows)[kWidth]) {
    if constexpr (H < kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
            if (!(i & H))
                exchange<H>(rows[i], rows[i + H], std::make_integer_sequence<int, kWidth>{});
        transpose_stage<2 * H>(rows);
    }
}

// Transposes a kWidth x kWidth square in registers.
DOMERGE_INLINE void transpose_square(FloatVec (&rows)[kWidth]) {
    transpose_stage<1>(rows);
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
