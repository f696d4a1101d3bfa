// Which entries of a row of an update are kept, and what becomes of them: Trim in entries.py.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "philox.h"
#include "updates.h"

namespace domerge {
namespace DOMERGE_ISA {

DOMERGE_INLINE FloatVec magnitude(FloatVec v) {
    return bits<FloatVec>(bits<BitsVec>(v) & 0x7fffffffu);
}

// The probabilities of the entries of a row: 1, the same for all, or by rank.
enum class Odds { sure, equal, ranked };

inline Odds odds_of(const Trim& trim) {
    if (trim.spread != 0.0f) return Odds::ranked;
    return trim.keep == 1.0f ? Odds::sure : Odds::equal;
}

inline bool keeps_all(const Trim& trim) {
    return odds_of(trim) == Odds::sure && trim.low <= 0.0f &&
           trim.high == std::numeric_limits<float>::infinity();
}

template <Odds kOdds>
struct RowTrim {
    const Trim& trim;
    const float* tau;
    const uint32_t* words;       // random, unless sure
    const float* probabilities;  // if ranked

    DOMERGE_INLINE FloatVec probability(int64_t c) const {
        if constexpr (kOdds == Odds::ranked) return load<FloatVec>(probabilities + c);
        return broadcast(trim.keep);
    }

    DOMERGE_INLINE IndexVec kept(int64_t c) const {
        const FloatVec size = magnitude(load<FloatVec>(tau + c));
        const IndexVec band = (size >= trim.low) & (size <= trim.high);
        if constexpr (kOdds == Odds::sure) return band;
        const IndexVec drawn = bits<IndexVec>(load<BitsVec>(words + c) >> 8);
        return band & (__builtin_convertvector(drawn, FloatVec) < probability(c) * 0x1p24f);
    }

    template <bool kRescale>
    DOMERGE_INLINE FloatVec value(int64_t c) const {
        const FloatVec v = load<FloatVec>(tau + c) * trim.gain;
        if constexpr (kRescale) return where(kept(c), v / probability(c), FloatVec{});
        return where(kept(c), v, FloatVec{});
    }
};

// One adapter's trim, row after row.
class Trimmer {
 public:
    // width: of the widest row.
    Trimmer(const Trim& trim, const Draw& draw, int64_t width, Arena& arena)
        : trim_(trim), draw_(draw), odds_(odds_of(trim)) {
        const int64_t most = round_up(width, kPanel);
        if (odds_ != Odds::sure) words_ = take<uint32_t>(arena, most);
        if (odds_ != Odds::ranked) return;
        probabilities_ = take<float>(arena, most);
        keys_ = take<uint64_t>(arena, width);
        other_ = take<uint64_t>(arena, width);
        ends_ = take<uint32_t>(arena, kDigits * kBins);
    }

    // body(RowTrim) for tau = columns [column, column + n) of a row: all of them if ranked.
    template <class Body>
    DOMERGE_INLINE void with_row(const float* tau, int64_t row, int64_t column, int64_t n,
                                 Body body) {
        if (odds_ == Odds::sure) return body(RowTrim<Odds::sure>{trim_, tau, nullptr, nullptr});
        draw_words(draw_, row, column, n, words_);
        if (odds_ == Odds::equal) return body(RowTrim<Odds::equal>{trim_, tau, words_, nullptr});
        find_probabilities(tau, n);
        body(RowTrim<Odds::ranked>{trim_, tau, words_, probabilities_});
    }

    // tau = the trimmed values, in place.
    void apply(float* tau, int64_t row, int64_t column, int64_t n) {
        if (keeps_all(trim_) && trim_.gain == 1.0f) return;
        with_row(tau, row, column, n, [&](auto trimmed) {
            if (trim_.rescale && odds_ != Odds::sure)
                for (int64_t c = 0; c < n; c += kWidth)
                    store(tau + c, trimmed.template value<true>(c));
            else
                for (int64_t c = 0; c < n; c += kWidth)
                    store(tau + c, trimmed.template value<false>(c));
        });
    }

 private:
    static constexpr int kDigits = 3, kDigitBits = 11, kBins = 1 << kDigitBits;

    template <class T>
    static T* take(Arena& arena, int64_t count) {
        return static_cast<T*>(arena.take(count * sizeof(T)));
    }

    void find_probabilities(const float* tau, int64_t n) {
        sort_columns(tau, n);
        for (int64_t rank = 0; rank < n; ++rank)
            probabilities_[static_cast<uint32_t>(keys_[rank])] = static_cast<float>(rank);
        const float last = static_cast<float>(n - 1);
        const FloatVec slope = broadcast(2.0f * trim_.spread);
        const FloatVec least_of_all = broadcast(trim_.keep - trim_.spread);
        for (int64_t c = 0; c < n; c += kWidth) {
            const FloatVec rank = load<FloatVec>(probabilities_ + c);
            const FloatVec q = n > 1 ? rank / last : broadcast(0.5f);
            store(probabilities_ + c, multiply_add(slope, q, least_of_all));
        }
    }

    // keys_ [n] = (bits of |tau|, column) in rising order: by digits, the lowest first.
    void sort_columns(const float* tau, int64_t n) {
        for (int64_t i = 0; i < kDigits * kBins; ++i) ends_[i] = 0;
        for (int64_t c = 0; c < n; ++c) {
            uint32_t size;
            __builtin_memcpy(&size, tau + c, sizeof size);
            size &= 0x7fffffffu;
            keys_[c] = uint64_t{size} << 32 | static_cast<uint64_t>(c);
            for (int d = 0; d < kDigits; ++d) ++ends_[d * kBins + digit(keys_[c], d)];
        }
        for (int d = 0; d < kDigits; ++d) {
            uint32_t* begins = ends_ + d * kBins;
            uint32_t total = 0;
            for (int64_t i = 0; i < kBins; ++i) {
                const uint32_t count = begins[i];
                begins[i] = total;
                total += count;
            }
            for (int64_t c = 0; c < n; ++c) other_[begins[digit(keys_[c], d)]++] = keys_[c];
            std::swap(keys_, other_);
        }
    }

    static uint32_t digit(uint64_t key, int d) {
        return static_cast<uint32_t>(key >> (32 + d * kDigitBits)) & (kBins - 1);
    }

    const Trim& trim_;
    const Draw& draw_;
    Odds odds_;
    uint32_t* words_ = nullptr;
    float* probabilities_ = nullptr;
    uint64_t* keys_ = nullptr;
    uint64_t* other_ = nullptr;
    uint32_t* ends_ = nullptr;
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
