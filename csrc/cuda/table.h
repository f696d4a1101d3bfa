// Problems as the tables of domerge_fast/backends/gpu/tables.py describe them, and their elements.
#pragma once

#include <cmath>
#include <cstring>

#include "block.h"
#include "launch.h"
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace domerge {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };  // as algebra/side.py has them

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

struct BlockRow {
    Address data;
    int64_t pitch;
    int64_t first_row;  // of the stacked X
    double scale;
};

struct ProblemRow {
    int64_t first_owner;
    int64_t rank;
    int64_t d;
    int64_t first_block;
    int64_t blocks;
    int64_t columns;
};

struct Table {
    const BlockRow* blocks;
    const int64_t* owner;
    const ProblemRow* problems;
};

inline Table table_of(const TableNumbers& numbers) {
    return Table{at<const BlockRow>(std::get<0>(numbers)), at<const int64_t>(std::get<1>(numbers)),
                 at<const ProblemRow>(std::get<2>(numbers))};
}

// The same pointer, of which the compiler then knows that it is not one to shared memory: it cannot
// tell where an address that comes from memory points.
template <class T>
DOMERGE_DEVICE T* global(T* p) {
#ifdef __CUDACC__
    __builtin_assume(__isGlobal(p));
#endif
    return p;
}

template <class T>
DOMERGE_DEVICE T least(T a, T b) {
    return a < b ? a : b;
}

// What one load or store moves; T is float, double or uint32_t.
template <class T, int kCount>
struct alignas(16) Vector {
    T at[kCount];
};

template <class V, class T>
DOMERGE_DEVICE V& vector_at(T* p) {
    return *reinterpret_cast<V*>(p);
}

DOMERGE_DEVICE bool is_aligned(const void* p, int bytes) {
    return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0;
}

DOMERGE_DEVICE float from_bits(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

DOMERGE_DEVICE uint32_t to_bits(float value) {
#ifdef __CUDACC__
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

struct Float32 {
    using Storage = float;
    static DOMERGE_DEVICE uint32_t bits(Storage x) { return to_bits(x); }
    static DOMERGE_DEVICE float load(Storage x) { return x; }
    static DOMERGE_DEVICE Storage store(float x) { return x; }
};

struct BFloat16 {
    using Storage = uint16_t;
    static DOMERGE_DEVICE uint32_t bits(Storage x) { return x; }
    static DOMERGE_DEVICE float load(Storage x) { return from_bits(uint32_t{x} << 16); }
    static DOMERGE_DEVICE Storage store(float x) {
#ifdef __CUDACC__
        uint16_t rounded;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
        return rounded;
#else
        const uint32_t bits = to_bits(x);
        if (x != x) return static_cast<Storage>(bits >> 16 | 0x40u);
        return static_cast<Storage>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
    }
};

struct Float16 {
    using Storage = uint16_t;
    static DOMERGE_DEVICE uint32_t bits(Storage x) { return x; }
#ifdef __CUDACC__
    static DOMERGE_DEVICE float load(Storage x) { return __half2float(__ushort_as_half(x)); }
    static DOMERGE_DEVICE Storage store(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
    static float load(Storage x) {
        const uint32_t sign = uint32_t{x} >> 15 << 31, rest = (x & 0x7fffu) << 13;
        if (rest >= 0x1fu << 23) return from_bits(sign | 0x70000000u | rest);
        return from_bits(sign | to_bits(from_bits(rest) * 0x1p112f));
    }
    static Storage store(float x) {
        const uint32_t bits = to_bits(x), sign = bits >> 31 << 15, rest = bits & 0x7fffffffu;
        if (x != x) return static_cast<Storage>(sign | 0x7e00u);
        const float size = from_bits(rest);
        if (size >= 65520.0f) return static_cast<Storage>(sign | 0x7c00u);
        if (size < 0x1p-14f)  // the last place of 0.5 is that of a subnormal number
            return static_cast<Storage>(sign | (to_bits(size + 0.5f) - to_bits(0.5f)));
        const uint32_t rounded = (rest + 0xfffu + (rest >> 13 & 1u)) >> 13;
        return static_cast<Storage>(sign | (rounded - (112u << 10)));
    }
#endif
};

// Two numbers in 16 bits each, the first in the lower half.
template <class Format>
DOMERGE_DEVICE uint32_t pack(float first, float second) {
#ifdef __CUDACC__
    uint32_t words;
    if constexpr (std::is_same_v<Format, BFloat16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words) : "f"(second), "f"(first));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words) : "f"(second), "f"(first));
    return words;
#else
    return Format::store(first) | uint32_t{Format::store(second)} << 16;
#endif
}

template <class Format>
constexpr int kLanes = 16 / sizeof(typename Format::Storage);

// kLanes elements as they lie in memory.
using Words = Vector<uint32_t, 4>;

template <class Format>
DOMERGE_DEVICE void unpack(const Words& words, float (&to)[kLanes<Format>]) {
    using Storage = typename Format::Storage;
    constexpr int kPerWord = 4 / sizeof(Storage);
    DOMERGE_UNROLL
    for (int i = 0; i < kLanes<Format>; ++i) {
        const uint32_t word = words.at[i / kPerWord] >> (i % kPerWord * 16);
        if constexpr (kPerWord == 1)
            to[i] = from_bits(word);
        else
            to[i] = Format::load(static_cast<Storage>(word));
    }
}

// The words after the first of these elements is dropped and another one appended.
template <class Storage>
DOMERGE_DEVICE void append(Words& words, const Storage* element) {
    if constexpr (sizeof(Storage) == 4) {
        words = {{words.at[1], words.at[2], words.at[3], element ? to_bits(*element) : 0u}};
    } else {
        DOMERGE_UNROLL
        for (int i = 0; i < 3; ++i) words.at[i] = words.at[i] >> 16 | words.at[i + 1] << 16;
        words.at[3] = words.at[3] >> 16 | (element ? uint32_t{*element} : 0u) << 16;
    }
}

// X of one problem up to a row and a column, kLanes elements at a time.
template <class Format>
struct Reader {
    using Storage = typename Format::Storage;
    const BlockRow* blocks;
    const int64_t* owner;
    int rows;
    int end;  // of the columns
    bool columns;

    DOMERGE_DEVICE Reader(const Table& table, const ProblemRow& problem, int64_t rows, int64_t end)
        : blocks(table.blocks),
          owner(table.owner + problem.first_owner),
          rows(static_cast<int>(rows)),
          end(static_cast<int>(end)),
          columns(problem.columns != 0) {}

    DOMERGE_DEVICE const BlockRow& block(int row) const { return blocks[owner[row]]; }

    DOMERGE_DEVICE const Storage* element(int row, int c) const {
        const BlockRow& own = block(row);
        const int64_t i = row - own.first_row;
        return global(reinterpret_cast<const Storage*>(own.data) +
                      (columns ? c * own.pitch + i : i * own.pitch + c));
    }

    // Whether the rows that a vector from this one on touches are of one block.
    DOMERGE_DEVICE bool is_in_one_block(int row) const {
        return !columns || owner[row] == owner[least(row + kLanes<Format>, rows) - 1];
    }

    // The elements from (row, c) on in the direction of memory: along the row, or down the column
    // for problems in columns. Zero outside; not scaled.
    DOMERGE_DEVICE Words read(int row, int c) const {
        Words words{};
        if (row >= rows || c >= end) return words;
        const int left = columns ? rows - row : end - c;
        const Storage* from = element(row, c);
        if (left >= kLanes<Format> && is_aligned(from, 16) && is_in_one_block(row))
            return vector_at<const Words>(from);
        DOMERGE_ROLLED
        for (int i = 0; i < kLanes<Format>; ++i) {
            const Storage* next = columns && i < left ? element(row + i, c) : from + i;
            append(words, i < left ? next : nullptr);
        }
        return words;
    }

    // What `read` gave, scaled.
    DOMERGE_DEVICE void scale(const Words& words, int row, float (&to)[kLanes<Format>]) const {
        unpack<Format>(words, to);
        if (row >= rows) return;
        float factor = static_cast<float>(block(row).scale);
        const bool alike = is_in_one_block(row);
        DOMERGE_UNROLL
        for (int i = 0; i < kLanes<Format>; ++i) {
            if (!alike && row + i < rows) factor = static_cast<float>(block(row + i).scale);
            to[i] *= factor;
        }
    }
};

template <class Format, int kCount>
DOMERGE_DEVICE void store_as(void* out, int64_t index, const float* values, int64_t count) {
    using Storage = typename Format::Storage;
    Storage* to = static_cast<Storage*>(out) + index;
    constexpr int kBytes = kCount * sizeof(Storage);
    if (count >= kCount && is_aligned(to, kBytes)) {
        struct alignas(kBytes) Whole {
            Storage at[kCount];
        } whole;
        DOMERGE_UNROLL
        for (int i = 0; i < kCount; ++i) whole.at[i] = Format::store(values[i]);
        vector_at<Whole>(to) = whole;
        return;
    }
    DOMERGE_UNROLL
    for (int i = 0; i < kCount; ++i)
        if (i < count) to[i] = Format::store(values[i]);
}

// out[index, index + kCount) = values, or the first `count` of them.
template <int kCount>
DOMERGE_DEVICE void store_values(DType dtype, void* out, int64_t index, const float* values,
                                 int64_t count) {
    if (dtype == DType::float32)
        store_as<Float32, kCount>(out, index, values, count);
    else if (dtype == DType::bfloat16)
        store_as<BFloat16, kCount>(out, index, values, count);
    else
        store_as<Float16, kCount>(out, index, values, count);
}

// visit(Format{}) with the type that a dtype code names.
template <class Visit>
void with_format(int dtype, Visit visit) {
    switch (static_cast<DType>(dtype)) {
        case DType::float32:
            return visit(Float32{});
        case DType::bfloat16:
            return visit(BFloat16{});
        case DType::float16:
            return visit(Float16{});
    }
    throw std::invalid_argument("no kernel for dtype " + std::to_string(dtype));
}

template <int kValue>
struct Size {
    static constexpr int value = kValue;
};

template <int... kValues>
struct Sizes {
    static std::vector<int64_t> list() { return {kValues...}; }

    // visit(Size<size>{}) for one of the sizes.
    template <class Visit>
    static void with(int64_t size, Visit visit) {
        if (!((size == kValues && (visit(Size<kValues>{}), true)) || ...))
            throw std::invalid_argument("no kernel for size " + std::to_string(size));
    }
};

}  // namespace domerge
