// The tables of int64 numbers that launches on a GPU read, made on the host, one after the other in
// one piece of memory, which a single copy brings to the device. What a launch reads of each is
// said in domerge_fast/backends/gpu/kernels.py.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace domerge {

class LaunchTables {
 public:
    using Numbers = std::vector<int64_t>;
    using Addresses = std::vector<uint64_t>;
    // Where it begins in `finished()`, its rows, and the numbers of a row; 0: it is a vector.
    using Place = std::tuple<int64_t, int64_t, int64_t>;

    LaunchTables();
    ~LaunchTables();
    LaunchTables(const LaunchTables&) = delete;

    // All of them; from then on none can be made.
    const Numbers& finished();
    const std::vector<Place>& places() const { return places_; }
    // Blocks of problems: how many there are, and the largest r_i.
    int64_t blocks() const { return ranks_.size(); }
    int64_t largest_rank() const;

    // All below make tables and return their numbers, by which `places` has them. Of every side of
    // several modules there is one entry in what is said of sides, and how many modules it has in
    // `counts`. out: where results begin. sizes: those that kernels are padded to, rising; there
    // is a list of tiles for each that serves some.

    // Of numbers as they are given.
    int64_t add(const Numbers& values, int64_t width);

    // Three, of problems as algebra/side.py packs them: blocks (address, pitch, first row within
    // its problem, scale), the owner of every row, problems (first row in owner, R, d, first block,
    // blocks, columns). Returns how many neighbours one read can take of every block, in either
    // layout: `count`, a power of two, or 1.
    int64_t describe(std::string_view addresses, std::string_view heads, std::string_view rows,
                     int64_t count);

    // For Kernels.gram: (size, tiles, sums, number of parts). chunk: columns at a stretch.
    std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> gram(const Numbers& sizes,
                                                                     const Addresses& out,
                                                                     int64_t chunk);

    int64_t block_gram(const Addresses& out);

    // For Kernels.orthogonalize: starts, (size, work, largest T). ranks: of sides.
    std::pair<int64_t, std::vector<std::tuple<int64_t, int64_t, int64_t>>> orthogonalize(
        const Numbers& sizes, const Addresses& grams, const Addresses& out,
        const std::vector<Numbers>& ranks, const Numbers& counts);

    // What `apply` and `apply_decouple` read: C [rows, R], 0 where there is none. rows: of sides.
    void coefficients(const Addresses& cs, const Numbers& rows, const Numbers& counts);

    // How many float32 the parts of all C take; numbers(rows, R): those of one.
    int64_t part_numbers(const std::function<int64_t(int64_t, int64_t)>& numbers);

    // For Splitting.launch: tiles of `height` rows of C, and work, from C to parts in `memory`,
    // which `apply` and `apply_decouple` read in place of C then.
    std::pair<int64_t, int64_t> split(uint64_t memory, int64_t height);

    // For Kernels.apply: work, (size, tiles). columns: of a tile, by size. bytes: of a number.
    std::pair<int64_t, std::vector<std::pair<int64_t, int64_t>>> apply(const Numbers& sizes,
                                                                       const Numbers& columns,
                                                                       const Addresses& out,
                                                                       int64_t bytes);

    // For Kernels.roots: work, offsets, and how many numbers all roots take. packed: of problems;
    // numbers(r): those of a root. Roots of r above `most` are made elsewhere.
    std::tuple<int64_t, int64_t, int64_t> roots(const Addresses& packed,
                                                const std::function<int64_t(int64_t)>& numbers,
                                                int64_t most);

    // For Kernels.apply_decouple: work, omegas, slots, (size, tiles, largest R). omegas: of sides.
    std::tuple<int64_t, int64_t, int64_t, std::vector<std::tuple<int64_t, int64_t, int64_t>>>
    apply_decouple(const Numbers& sizes, const Numbers& columns, const Addresses& out,
                   int64_t bytes, const std::vector<std::vector<double>>& omegas,
                   const Numbers& counts);

    // For Kernels.largest, of every dtype that there is: (code, tiles). sizes: numbers of every
    // tensor; codes: as algebra/side.py has them; bytes: of a number, by code.
    std::vector<std::pair<int64_t, int64_t>> largest(const Addresses& tensors, const Numbers& sizes,
                                                     const Numbers& codes, const Numbers& bytes,
                                                     int64_t chunk);

    // `largest` of all blocks of problems, as for `describe`; blocks are without gaps.
    std::vector<std::pair<int64_t, int64_t>> block_largest(std::string_view addresses,
                                                           std::string_view heads,
                                                           std::string_view rows,
                                                           const Numbers& bytes, int64_t chunk);

 private:
    struct Problem {
        int64_t first_row;
        int64_t rank;
        int64_t d;
        int64_t first_block;
        int64_t blocks;
        int64_t columns;
    };

    class Sorted;

    int64_t begin(int64_t width);
    int64_t ended(int64_t table);
    int64_t add_sorted(const Sorted& rows, int64_t width);
    void put(std::initializer_list<int64_t> row) { numbers_.insert(numbers_.end(), row); }
    void put(const Numbers& row) { numbers_.insert(numbers_.end(), row.begin(), row.end()); }

    bool finished_ = false;
    Numbers numbers_;
    std::vector<Place> places_;
    std::vector<Problem> problems_;
    Numbers ranks_;        // of blocks
    Addresses cs_, read_;  // every C, and what is read in its place
    Numbers rows_, part_places_;
};

}  // namespace domerge
