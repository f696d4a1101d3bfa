#include "launches.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>

#include "packed.h"

namespace domerge {

namespace {

using Numbers = LaunchTables::Numbers;
using Addresses = LaunchTables::Addresses;

constexpr int64_t kAlignment = 16;      // of roots and of parts, in numbers
constexpr int64_t kTableAlignment = 2;  // 16 bytes, which Triton compiles kernels for

int64_t above(int64_t count, int64_t piece) {
    return (count + piece - 1) / piece;
}

int64_t aligned(int64_t count, int64_t alignment) {
    return above(count, alignment) * alignment;
}

// From where the first result begins, in numbers of so many bytes.
int64_t distance(const Addresses& out, size_t k, int64_t bytes) {
    return static_cast<int64_t>(out.at(k) - out[0]) / bytes;
}

// The first `count` numbers by the position of the smallest size that holds what is said of each;
// the last holds all larger.
template <class Size>
std::vector<Numbers> buckets(const Numbers& sizes, int64_t count, const Size& size) {
    std::vector<Numbers> members(sizes.size());
    for (int64_t k = 0; k < count; ++k) {
        const auto at = std::lower_bound(sizes.begin(), sizes.end() - 1, size(k));
        members[at - sizes.begin()].push_back(k);
    }
    return members;
}

// The memory of tables that are gone, for the next ones of this thread: fresh memory takes longer
// than all that is written into it.
thread_local Numbers spare;
constexpr size_t kMostSpare = 4 << 20;  // numbers: 32 MiB

}  // namespace

// Rows by falling cost: what starts last should be short.
class LaunchTables::Sorted {
 public:
    void add(int64_t cost, std::initializer_list<int64_t> row) {
        Numbers& own = rows_[cost];
        own.insert(own.end(), row);
    }
    void put(LaunchTables& tables) const {
        for (const auto& [cost, own] : rows_) tables.put(own);
    }

 private:
    std::map<int64_t, Numbers, std::greater<int64_t>> rows_;
};

LaunchTables::LaunchTables() : numbers_(std::move(spare)) {
    numbers_.clear();
}

LaunchTables::~LaunchTables() {
    if (numbers_.capacity() > spare.capacity() && numbers_.capacity() <= kMostSpare)
        spare = std::move(numbers_);
}

int64_t LaunchTables::largest_rank() const {
    return ranks_.empty() ? 0 : *std::max_element(ranks_.begin(), ranks_.end());
}

const Numbers& LaunchTables::finished() {
    finished_ = true;
    return numbers_;
}

int64_t LaunchTables::begin(int64_t width) {
    if (finished_) throw std::logic_error("tables that are read cannot become more");
    numbers_.resize(aligned(numbers_.size(), kTableAlignment));
    places_.emplace_back(numbers_.size(), 0, width);
    return places_.size() - 1;
}

int64_t LaunchTables::ended(int64_t table) {
    auto& [first, rows, width] = places_[table];
    rows = (numbers_.size() - first) / std::max<int64_t>(width, 1);
    return table;
}

int64_t LaunchTables::add(const Numbers& values, int64_t width) {
    const int64_t table = begin(width);
    put(values);
    return ended(table);
}

int64_t LaunchTables::add_sorted(const Sorted& rows, int64_t width) {
    const int64_t table = begin(width);
    rows.put(*this);
    return ended(table);
}

int64_t LaunchTables::describe(std::string_view addresses, std::string_view heads,
                               std::string_view rows, int64_t count) {
    const size_t blocks = addresses.size() / sizeof(int64_t);
    if (rows.size() != 4 * addresses.size())
        throw std::invalid_argument("one address a row is wanted");
    int64_t first_row = 0, first_block = 0, odd = 0;
    for (size_t p = 0; p < heads.size() / sizeof(Head); ++p) {
        const auto head = nth<Head>(heads, p);
        problems_.push_back({first_row, head.rank, head.d, first_block, head.blocks, head.columns});
        first_row += head.rank;
        first_block += head.blocks;
        odd |= head.d & (count - 1);
    }
    if (first_block != static_cast<int64_t>(blocks))
        throw std::invalid_argument("one row a block is wanted");
    numbers_.reserve(numbers_.size() + 4 * blocks + first_row + 6 * problems_.size() + 6);
    int64_t table = begin(4);
    ranks_.reserve(blocks);
    for (const Problem& x : problems_) {
        int64_t start = 0;
        for (int64_t b = x.first_block; b < x.first_block + x.blocks; ++b) {
            const auto at = nth<int64_t>(addresses, b);
            const auto row = nth<Row>(rows, b);
            int64_t scale;
            std::memcpy(&scale, &row.scale, sizeof(scale));
            put({at, row.pitch, start, scale});
            ranks_.push_back(row.rank);
            start += row.rank;
            odd |= (at & 15) | ((row.rank | row.pitch) & (count - 1));
        }
    }
    ended(table);
    table = begin(0);
    for (size_t b = 0; b < blocks; ++b) numbers_.resize(numbers_.size() + ranks_[b], b);
    ended(table);
    table = begin(6);
    for (const Problem& x : problems_)
        put({x.first_row, x.rank, x.d, x.first_block, x.blocks, x.columns});
    ended(table);
    return odd != 0 ? 1 : count;
}

std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> LaunchTables::gram(const Numbers& sizes,
                                                                               const Addresses& out,
                                                                               int64_t chunk) {
    std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> found;
    const auto rank = [&](int64_t k) { return problems_[k].rank; };
    const std::vector<Numbers> members = buckets(sizes, problems_.size(), rank);
    for (size_t s = 0; s < sizes.size(); ++s) {
        if (members[s].empty()) continue;
        Sorted tiles;
        Numbers sums;
        int64_t parts = 0;
        for (const int64_t k : members[s]) {
            const Problem& x = problems_[k];
            const int64_t offset = distance(out, k, sizeof(float));
            const int64_t stretches = above(x.d, chunk);
            for (int64_t i = 0; i < above(x.rank, sizes[s]); ++i)
                for (int64_t j = 0; j <= i; ++j) {
                    for (int64_t n = 0; n < stretches; ++n) {
                        const int64_t first = n * chunk, end = std::min(first + chunk, x.d);
                        const int64_t part = stretches > 1 ? parts + n : -1;
                        tiles.add(end - first, {k, i, j, first, end, part, offset});
                    }
                    if (stretches == 1) continue;
                    sums.insert(sums.end(), {k, i, j, parts, stretches, offset});
                    parts += stretches;
                }
        }
        const int64_t table = add_sorted(tiles, 7);
        found.emplace_back(sizes[s], table, add(sums, 6), parts);
    }
    return found;
}

int64_t LaunchTables::block_gram(const Addresses& out) {
    Sorted jobs;
    for (size_t p = 0; p < problems_.size(); ++p) {
        const Problem& x = problems_[p];
        int64_t at = distance(out, p, sizeof(double));
        for (int64_t b = x.first_block; b < x.first_block + x.blocks; ++b) {
            const int64_t numbers = ranks_[b] * ranks_[b];
            jobs.add(x.d * numbers, {static_cast<int64_t>(p), b, ranks_[b], at});
            at += numbers;
        }
    }
    return add_sorted(jobs, 4);
}

std::pair<int64_t, std::vector<std::tuple<int64_t, int64_t, int64_t>>> LaunchTables::orthogonalize(
    const Numbers& sizes, const Addresses& grams, const Addresses& out,
    const std::vector<Numbers>& ranks, const Numbers& counts) {
    struct Work {
        int64_t rank;
        int64_t adapters;
        int64_t first;
    };
    Numbers starts;
    std::vector<Work> work;
    for (size_t side = 0; side < ranks.size(); ++side) {
        Work own{0, static_cast<int64_t>(ranks[side].size()), static_cast<int64_t>(starts.size())};
        starts.push_back(0);
        for (const int64_t rank : ranks[side]) starts.push_back(own.rank += rank);
        work.insert(work.end(), counts.at(side), own);
    }
    const int64_t first = add(starts, 0);
    std::vector<std::tuple<int64_t, int64_t, int64_t>> found;
    const auto rank = [&](int64_t k) { return work[k].rank; };
    const std::vector<Numbers> members = buckets(sizes, work.size(), rank);
    for (size_t s = 0; s < sizes.size(); ++s) {
        if (members[s].empty()) continue;
        Sorted jobs;
        int64_t most = 0;
        for (const int64_t k : members[s]) {
            const Work& x = work[k];
            const int64_t at = grams.at(k), offset = distance(out, k, sizeof(float));
            jobs.add(x.rank, {at, x.rank, x.adapters, x.first, offset, k});
            most = std::max(most, x.adapters);
        }
        found.emplace_back(sizes[s], add_sorted(jobs, 6), most);
    }
    return {first, found};
}

void LaunchTables::coefficients(const Addresses& cs, const Numbers& rows, const Numbers& counts) {
    cs_ = cs, read_ = cs;
    for (size_t side = 0; side < rows.size(); ++side)
        rows_.insert(rows_.end(), counts.at(side), rows[side]);
    if (cs_.size() != problems_.size() || rows_.size() != problems_.size())
        throw std::invalid_argument("a C, or 0, is wanted for every problem");
}

int64_t LaunchTables::part_numbers(const std::function<int64_t(int64_t, int64_t)>& numbers) {
    std::map<std::pair<int64_t, int64_t>, int64_t> known;
    int64_t total = 0;
    for (size_t k = 0; k < cs_.size(); ++k) {
        part_places_.push_back(total);
        if (cs_[k] == 0) continue;
        int64_t& own = known[{rows_[k], problems_[k].rank}];
        if (own == 0) own = aligned(numbers(rows_[k], problems_[k].rank), kAlignment);
        total += own;
    }
    return total;
}

std::pair<int64_t, int64_t> LaunchTables::split(uint64_t memory, int64_t height) {
    const int64_t tiles = begin(2);
    for (size_t k = 0; k < cs_.size(); ++k)
        for (int64_t row = 0; cs_[k] != 0 && row < rows_[k]; row += height)
            put({static_cast<int64_t>(k), row});
    ended(tiles);
    const int64_t work = begin(3);
    for (size_t k = 0; k < cs_.size(); ++k) {
        if (cs_[k] != 0) read_[k] = memory + sizeof(float) * part_places_.at(k);
        put({static_cast<int64_t>(cs_[k]), rows_[k], static_cast<int64_t>(read_[k])});
    }
    return {tiles, ended(work)};
}

std::pair<int64_t, std::vector<std::pair<int64_t, int64_t>>> LaunchTables::apply(
    const Numbers& sizes, const Numbers& columns, const Addresses& out, int64_t bytes) {
    const int64_t work = begin(3);
    for (size_t k = 0; k < problems_.size(); ++k)
        put({static_cast<int64_t>(read_.at(k)), rows_[k], distance(out, k, bytes)});
    ended(work);
    std::vector<std::pair<int64_t, int64_t>> found;
    const auto rows = [&](int64_t k) { return rows_[k]; };
    const std::vector<Numbers> members = buckets(sizes, problems_.size(), rows);
    for (size_t s = 0; s < sizes.size(); ++s) {
        if (members[s].empty()) continue;
        const int64_t tiles = begin(3);
        for (const int64_t k : members[s])
            for (int64_t row = 0; row < rows_[k]; row += sizes[s])
                for (int64_t column = 0; column < problems_[k].d; column += columns.at(s))
                    put({k, row, column});
        found.emplace_back(sizes[s], ended(tiles));
    }
    return {work, found};
}

std::tuple<int64_t, int64_t, int64_t> LaunchTables::roots(
    const Addresses& packed, const std::function<int64_t(int64_t)>& numbers, int64_t most) {
    std::map<int64_t, int64_t> known;
    Numbers offsets;
    int64_t total = 0;
    const int64_t work = begin(3);
    for (size_t p = 0; p < problems_.size(); ++p) {
        const Problem& x = problems_[p];
        int64_t at = packed.at(p);
        for (int64_t b = x.first_block; b < x.first_block + x.blocks; ++b) {
            const int64_t rank = ranks_[b];
            put({at, rank <= most ? rank : 0, total});
            offsets.push_back(total);
            int64_t& own = known[rank];
            if (own == 0) own = aligned(numbers(rank), kAlignment);
            total += own;
            at += sizeof(double) * rank * rank;
        }
    }
    ended(work);
    return {work, add(offsets, 0), total};
}

std::tuple<int64_t, int64_t, int64_t, std::vector<std::tuple<int64_t, int64_t, int64_t>>>
LaunchTables::apply_decouple(const Numbers& sizes, const Numbers& columns, const Addresses& out,
                             int64_t bytes, const std::vector<std::vector<double>>& omegas,
                             const Numbers& counts) {
    const int64_t work = begin(2);
    for (size_t k = 0; k < problems_.size(); ++k)
        put({static_cast<int64_t>(read_.at(k)), distance(out, k, bytes)});
    ended(work);
    const int64_t weights = begin(0);
    for (size_t side = 0; side < omegas.size(); ++side) {
        Numbers bits(omegas[side].size());
        std::memcpy(bits.data(), omegas[side].data(), sizeof(double) * bits.size());
        for (int64_t p = 0; p < counts.at(side); ++p) put(bits);
    }
    ended(weights);
    std::vector<std::tuple<int64_t, int64_t, int64_t>> found;
    int64_t slots = 0;
    const auto rank = [&](int64_t k) { return problems_[k].rank; };
    const std::vector<Numbers> members = buckets(sizes, problems_.size(), rank);
    for (size_t s = 0; s < sizes.size(); ++s) {
        if (members[s].empty()) continue;
        const int64_t tiles = begin(3);
        int64_t most = 0;
        for (const int64_t k : members[s]) {
            const int64_t own = above(problems_[k].d, columns.at(s));
            for (int64_t slot = 0; slot < own; ++slot) put({k, slot * columns.at(s), slot});
            slots = std::max(slots, own);
            most = std::max(most, problems_[k].rank);
        }
        found.emplace_back(sizes[s], ended(tiles), most);
    }
    return {work, weights, slots, found};
}

std::vector<std::pair<int64_t, int64_t>> LaunchTables::largest(const Addresses& tensors,
                                                               const Numbers& sizes,
                                                               const Numbers& codes,
                                                               const Numbers& bytes,
                                                               int64_t chunk) {
    std::vector<std::pair<int64_t, int64_t>> found;
    for (int64_t code = 0; code < static_cast<int64_t>(bytes.size()); ++code) {
        bool present = false;
        for (size_t k = 0; k < tensors.size(); ++k)
            present |= codes.at(k) == code && sizes.at(k) > 0;
        if (!present) continue;
        const int64_t tiles = begin(3);
        for (size_t k = 0; k < tensors.size(); ++k)
            for (int64_t first = 0; codes.at(k) == code && first < sizes.at(k); first += chunk)
                put({static_cast<int64_t>(k),
                     static_cast<int64_t>(tensors[k]) + first * bytes[code],
                     std::min(chunk, sizes[k] - first)});
        found.emplace_back(code, ended(tiles));
    }
    return found;
}

std::vector<std::pair<int64_t, int64_t>> LaunchTables::block_largest(std::string_view addresses,
                                                                     std::string_view heads,
                                                                     std::string_view rows,
                                                                     const Numbers& bytes,
                                                                     int64_t chunk) {
    Addresses at;
    Numbers sizes, codes;
    for (size_t p = 0; p < heads.size() / sizeof(Head); ++p) {
        const auto head = nth<Head>(heads, p);
        for (int64_t n = 0; n < head.blocks; ++n) {
            const auto row = nth<Row>(rows, at.size());
            at.push_back(nth<uint64_t>(addresses, at.size()));
            sizes.push_back(row.rank * head.d);
            codes.push_back(row.dtype);
        }
    }
    return largest(at, sizes, codes, bytes, chunk);
}

}  // namespace domerge
