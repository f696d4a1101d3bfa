// X itself, scaled and converted on the way from the blocks to the result, which is written from
// front to back.
#pragma once

#include "load.h"

namespace domerge {
namespace DOMERGE_ISA {

// The same columns of the row below are fetched meanwhile: they lie in another page, which no
// prefetcher expects.
template <class Out>
void copy_rows(const ApplyItem& item, typename Out::Storage* out, Watch& watch) {
    const Problem& problem = *item.problem;
    const int64_t n = item.end - item.begin;
    out += item.begin;
    for (int64_t b = 0; b < problem.count; ++b) {
        const Block& block = problem.blocks[b];
        const float scale = static_cast<float>(block.scale);
        with_dtype(block.dtype, [&](auto format) {
            using In = decltype(format);
            const auto* from = static_cast<const typename In::Storage*>(block.data) + item.begin;
            for (int64_t i = 0; i < block.rank; ++i, from += block.pitch, out += problem.d) {
                poll();
                Watch own = watch;
                for (int64_t c = 0; c < n; c += kWidth) {
                    __builtin_prefetch(from + block.pitch + c);
                    const FloatVec v = load_some<In>(from + c, n - c) * scale;
                    own.add(v, n - c);
                    store_some<Out>(out + c, v, n - c);
                }
                watch = own;
            }
        });
    }
}

// Columns [begin, end) of blocks in columns, to rows of the result. Whole vectors are read and
// written: what they hold beyond a block is overwritten by the next block, and beyond a row by the
// next row of the same item. `AtEnd` where they may reach beyond the item. with_format(dtype, body)
// calls body with the format of a block.
template <class Out, bool AtEnd, class WithFormat>
DOMERGE_INLINE void copy_stretch(const ApplyItem& item, int64_t begin, int64_t end,
                                 typename Out::Storage* out, Watch& watch, WithFormat with_format) {
    const Problem& problem = *item.problem;
    const int64_t last = item.end * problem.rank;
    Watch own = watch;
    for (int64_t c = begin, to = c * problem.rank; c < end; ++c) {
        if (c % kColumnsAhead == 0) poll();
        for (int64_t b = 0; b < problem.count; to += problem.blocks[b++].rank) {
            const Block& block = problem.blocks[b];
            const FloatVec scale = broadcast(static_cast<float>(block.scale));
            with_format(block.dtype, [&](auto format) {
                using In = decltype(format);
                const auto* from =
                    static_cast<const typename In::Storage*>(block.data) + c * block.pitch;
                const int64_t left = (problem.d - 1 - c) * block.pitch + block.rank;
                __builtin_prefetch(from + kColumnsAhead * block.pitch);
                for (int64_t i = 0; i < block.rank; i += kWidth) {
                    const FloatVec v =
                        (AtEnd ? load_some<In>(from + i, left - i) : In::load(from + i)) * scale;
                    own.add(v, block.rank - i);
                    store_some<Out>(out + to + i, v, AtEnd ? last - to - i : kWidth);
                }
            });
        }
    }
    watch = own;
}

template <class Out, class WithFormat>
void copy_columns(const ApplyItem& item, typename Out::Storage* out, Watch& watch,
                  WithFormat with_format) {
    // Of a row there is at least one number.
    const int64_t sure = item.end - item.begin > kWidth ? item.end - kWidth : item.begin;
    copy_stretch<Out, false>(item, item.begin, sure, out, watch, with_format);
    copy_stretch<Out, true>(item, sure, item.end, out, watch, with_format);
}

inline bool have_one_dtype(const Problem& problem) {
    for (int64_t b = 1; b < problem.count; ++b)
        if (problem.blocks[b].dtype != problem.blocks[0].dtype) return false;
    return true;
}

inline void copy_item(const ApplyItem& item, Watch& watch) {
    const Problem& problem = *item.problem;
    with_dtype(item.out_dtype, [&](auto out_format) {
        using Out = decltype(out_format);
        auto* out = static_cast<typename Out::Storage*>(item.out);
        const auto by_dtype = [](DType dtype, auto body) { with_dtype(dtype, body); };
        if (!problem.columns)
            copy_rows<Out>(item, out, watch);
        else if (have_one_dtype(problem))
            with_dtype(problem.blocks[0].dtype, [&](auto format) {
                copy_columns<Out>(item, out, watch, [format](DType, auto body) { body(format); });
            });
        else
            copy_columns<Out>(item, out, watch, by_dtype);
    });
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
