// Counts, sums and merges of the entries of updates that are never held whole. What is computed is
// said, to the bit, in domerge_fast/entries.py. The compiler may fuse a product into a sum, so sums
// here are of what is no product, or by multiply_add.
#pragma once

#include "trim.h"

namespace domerge {
namespace DOMERGE_ISA {

constexpr int64_t kLowBits = 15;   // of the 31 of a magnitude
constexpr int64_t kSumLanes = 16;  // interleaved parts in which a row is summed

// counts [2, bins] of even and odd columns: equal neighbours do not wait for each other.
DOMERGE_INLINE void count(uint32_t* counts, int64_t bins, const uint16_t* bin, int64_t n) {
    int64_t c = 0;
    for (; c + 1 < n; c += 2) {
        ++counts[bin[c]];
        ++counts[bins + bin[c + 1]];
    }
    if (c < n) ++counts[bin[c]];
}

inline void count_upper(const float* tau, int64_t n, uint32_t* counts) {
    constexpr int64_t kBins = int64_t{1} << (31 - kLowBits);
    for (int64_t c = 0; c < n; c += kWidth) {
        const BitsVec size = bits<BitsVec>(load<FloatVec>(tau + c)) & 0x7fffffffu;
        uint16_t bin[kWidth];
        store(bin, __builtin_convertvector(size >> kLowBits, HalfVec));
        if (n - c >= kWidth)
            count(counts, kBins, bin, kWidth);
        else
            count(counts, kBins, bin, n - c);
    }
}

inline void count_lower(const float* tau, int64_t n, uint32_t prefix, uint32_t* counts) {
    constexpr int64_t kBins = int64_t{1} << kLowBits;
    for (int64_t c = 0; c < n; c += kWidth) {
        const BitsVec size = bits<BitsVec>(load<FloatVec>(tau + c)) & 0x7fffffffu;
        if (!any(bits<IndexVec>((size >> kLowBits) == prefix))) continue;
        uint32_t lane[kWidth];
        store(lane, size);
        for (int64_t i = 0; i < least(kWidth, n - c); ++i)
            if (lane[i] >> kLowBits == prefix) ++counts[lane[i] & (kBins - 1)];
    }
}

// counts [2, bins] += those of one adapter; behind *prefix if that is given.
inline void entry_counts(const UpdateItem& item, const uint32_t* prefix, uint32_t* counts,
                         Arena& arena) {
    Updates(item, false, arena).for_strips([&](const Strip& strip) {
        for (int64_t i = 0; i < strip.rows; ++i) {
            if (prefix)
                count_lower(strip.of(0, i), strip.n, *prefix, counts);
            else
                count_upper(strip.of(0, i), strip.n, counts);
        }
    });
}

// parts [2, kSumLanes] += the magnitudes of a row, and those of them that are kept.
template <Odds kOdds>
DOMERGE_INLINE void add_parts(const RowTrim<kOdds>& row, int64_t n, double* parts) {
    constexpr int64_t kHalf = kWidth / 2;
    for (int64_t lane = 0; lane < kSumLanes; lane += kWidth) {
        double *all = parts + lane, *kept = all + kSumLanes;
        Widened every{load<DoubleVec>(all), load<DoubleVec>(all + kHalf)};
        Widened some{load<DoubleVec>(kept), load<DoubleVec>(kept + kHalf)};
        for (int64_t c = lane; c < n; c += kSumLanes) {
            const FloatVec size = magnitude(load<FloatVec>(row.tau + c));
            const Widened wide = widen(size),
                          wide_kept = widen(where(row.kept(c), size, FloatVec{}));
            every.low += wide.low;
            every.high += wide.high;
            some.low += wide_kept.low;
            some.high += wide_kept.high;
        }
        store(all, every.low);
        store(all + kHalf, every.high);
        store(kept, some.low);
        store(kept + kHalf, some.high);
    }
}

// sums [rows of the item, 2]: of one adapter's magnitudes, and of those that are kept.
inline void entry_sums(const UpdateItem& item, const Trim& trim, const Draw& draw, double* sums,
                       Arena& arena) {
    Updates updates(item, odds_of(trim) == Odds::ranked, arena);
    Trimmer trimmer(trim, draw, updates.width(), arena);
    const int64_t rows = item.end - item.begin, size = 2 * kSumLanes;
    double* parts = static_cast<double*>(arena.take(rows * size * sizeof(double)));
    for (int64_t i = 0; i < rows * size; ++i) parts[i] = 0.0;
    updates.for_strips([&](const Strip& strip) {
        for (int64_t i = 0; i < strip.rows; ++i) {
            const int64_t row = strip.row + i;
            trimmer.with_row(strip.of(0, i), row, strip.column, strip.n, [&](auto trimmed) {
                add_parts(trimmed, strip.n, parts + (row - item.begin) * size);
            });
        }
    });
    for (int64_t i = 0; i < rows * 2; ++i) {
        sums[i] = parts[i * kSumLanes];
        for (int64_t lane = 1; lane < kSumLanes; ++lane) sums[i] += parts[i * kSumLanes + lane];
    }
}

// The rule of a merge, as numbers of the adapters.
struct Votes {
    int64_t count;
    const float* weights;
    const float* votes;   // what v_i is multiplied by to vote
    const float* shares;  // what an adapter that agrees adds to the divisor
    float divisor;        // where all agree
    bool divides;
    float scale;
};

DOMERGE_INLINE FloatVec quotient(FloatVec sum, FloatVec divisor) {
    return sum / where(divisor == 0.0f, broadcast(1.0f), divisor);
}

// The sign bit of what is elected, of values[0], values[stride], ...
template <Sign kSign>
DOMERGE_INLINE BitsVec elect(const Votes& rule, const float* values, int64_t stride) {
    if constexpr (kSign == Sign::total) {
        FloatVec total{};
        for (int64_t i = 0; i < rule.count; ++i)
            total =
                multiply_add(broadcast(rule.votes[i]), load<FloatVec>(values + i * stride), total);
        return bits<BitsVec>(~(total >= 0.0f)) & 0x80000000u;
    }
    IndexVec surplus{};
    for (int64_t i = 0; i < rule.count; ++i) {
        const FloatVec vote = load<FloatVec>(values + i * stride) * rule.votes[i];
        surplus += (vote < 0.0f) - (vote > 0.0f);
    }
    return bits<BitsVec>(surplus) & 0x80000000u;
}

// out [n] = the merge of rows `stride` apart.
template <Sign kSign>
inline void merge_row(const Votes& rule, const float* values, int64_t stride, int64_t n,
                      float* out) {
    for (int64_t c = 0; c < n; c += kWidth, values += kWidth) {
        FloatVec sum{}, divisor = broadcast(rule.divisor);
        if constexpr (kSign == Sign::none) {
            for (int64_t i = 0; i < rule.count; ++i)
                sum = multiply_add(broadcast(rule.weights[i]), load<FloatVec>(values + i * stride),
                                   sum);
        } else {
            const BitsVec elected = elect<kSign>(rule, values, stride);
            divisor = FloatVec{};
            for (int64_t i = 0; i < rule.count; ++i) {
                const FloatVec v = load<FloatVec>(values + i * stride);
                const BitsVec vote = bits<BitsVec>(v * rule.votes[i]) ^ elected;
                const IndexVec agrees = bits<FloatVec>(vote) > 0.0f;
                sum = multiply_add(broadcast(rule.weights[i]), where(agrees, v, FloatVec{}), sum);
                divisor += where(agrees, broadcast(rule.shares[i]), FloatVec{});
            }
        }
        if (rule.divides) sum = quotient(sum, divisor);
        store_some<Float32>(out + c, sum * rule.scale, n - c);
    }
}

class Merger {
 public:
    Merger(const MergeRule& rule, int64_t count, Arena& arena) : sign_(rule.sign) {
        float* votes = take_matrix(arena, 2, count);
        float* shares = votes + count;
        votes_ =
            Votes{count, rule.weights, votes, shares, 0.0f, rule.mean != Mean::sum, rule.scale};
        for (int64_t i = 0; i < count; ++i) {
            votes[i] = rule.weighted ? rule.weights[i] : 1.0f;
            shares[i] = rule.mean == Mean::weight ? rule.weights[i] : 1.0f;
            votes_.divisor += shares[i];
        }
    }

    void operator()(const float* values, int64_t stride, int64_t n, float* out) const {
        if (sign_ == Sign::none)
            merge_row<Sign::none>(votes_, values, stride, n, out);
        else if (sign_ == Sign::total)
            merge_row<Sign::total>(votes_, values, stride, n, out);
        else
            merge_row<Sign::frequency>(votes_, values, stride, n, out);
    }

 private:
    Sign sign_;
    Votes votes_;
};

// Rows of out [m, n].
inline void entry_merge(const UpdateItem& item, const MergeRule& rule, float* out, Arena& arena) {
    const int64_t count = item.a->count;
    bool whole = false;
    for (int64_t i = 0; i < count; ++i) whole |= odds_of(rule.trims[i]) == Odds::ranked;
    Updates updates(item, whole, arena);
    const Merger merge(rule, count, arena);
    std::vector<Trimmer> trimmers;
    for (int64_t i = 0; i < count; ++i)
        trimmers.emplace_back(rule.trims[i], rule.draws[i], updates.width(), arena);
    updates.for_strips([&](const Strip& strip) {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t k = 0; k < strip.rows; ++k)
                trimmers[i].apply(strip.of(i, k), strip.row + k, strip.column, strip.n);
        for (int64_t k = 0; k < strip.rows; ++k)
            merge(strip.of(0, k), strip.stride(), strip.n,
                  out + (strip.row + k) * item.a->d + strip.column);
    });
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
