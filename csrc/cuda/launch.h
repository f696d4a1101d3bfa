// The launches, one an op: domerge_fast/backends/gpu/kernels.py (`Kernels`) and entries.py
// (`EntryKernels`) say what each reads and writes. Lists of rows are an address and a count.
// Nothing waits for a launch.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "types.h"

namespace domerge {

// Where a table of problems lies: blocks, owner, problems, and the code of its dtype.
using TableNumbers = std::tuple<Address, Address, Address, int>;

std::vector<int64_t> gram_sizes();
void gram(const TableNumbers& table, int64_t size, Address tiles, int64_t tile_count, Address sums,
          int64_t sum_count, Address parts, Address out, Stream stream);

void block_gram(const TableNumbers& table, Address work, int64_t count, Address out, Stream stream);

// Whether apply and apply_decouple read parts in place of C: of products on tensor cores.
bool takes_parts(int dtype, int out_dtype);
// Rows of C that a block splits, and the numbers of 32 bits that parts take.
int64_t split_rows();
int64_t split_numbers(int64_t rows, int64_t columns);
void split(const TableNumbers& table, Address tiles, int64_t tile_count, Address work,
           Stream stream);

std::vector<int64_t> apply_sizes();
int64_t apply_columns(int64_t size);
void apply(const TableNumbers& table, int64_t size, Address tiles, int64_t tile_count, Address work,
           Address out, int out_dtype, Stream stream);

// scratch: float64, as many as there are numbers in out.
void roots(Address work, int64_t count, Address out, Address norms, Address scratch, Stream stream);

// Where the numbers of an apply_decouple launch lie.
struct Decoupling {
    Address work;
    Address offsets;
    Address roots;
    Address norms;
    Address omegas;
    double scale;
    Address energies;
    int64_t slots;
    Address scratch;
};

std::vector<int64_t> apply_decouple_sizes();
int64_t apply_decouple_columns(int64_t size);
// Bytes that a launch on the current device needs in `scratch`, aligned to 16. rank: the largest R.
int64_t apply_decouple_scratch(int64_t size, int64_t tiles, int64_t rank);
void apply_decouple(const TableNumbers& table, int64_t size, int64_t rank, Address tiles,
                    int64_t tile_count, const Decoupling& numbers, Address out, int out_dtype,
                    Stream stream);

void largest(int dtype, Address tiles, int64_t count, Address tops, Stream stream);

// The updates of one module: where their rows begin, how many there are, and their shape.
struct UpdateNumbers {
    Address rows;
    int64_t adapters;
    int64_t m;
    int64_t n;
};

void entry_counts(const TableNumbers& table, const UpdateNumbers& updates, Address prefixes,
                  Address counts, Stream stream);
void entry_sums(const TableNumbers& table, const UpdateNumbers& updates, Address trims,
                Address draw, Address rows, Address totals, Stream stream);
void entry_merge(const TableNumbers& table, const UpdateNumbers& updates, Address trims,
                 Address draw, Address weights, int sign, bool weighted, int mean, double scale,
                 Address out, Stream stream);

// What the CUDA runtime finds here. `error` is empty, or says why there are no devices or why the
// kernels run on none of them. Versions as CUDA counts them: 1000 * major + 10 * minor; 0 when
// unknown.
struct CudaInfo {
    int devices;
    int driver;
    int runtime;
    std::string archs;
    std::string error;
};

CudaInfo cuda_info();

// Whether kernels built for `archs`, such as "80;90a;100", run on a device of compute capability
// 10 * major + minor: a binary does within its major version, the PTX of the newest on all later
// ones; 90a on 9.0 alone, and 100f within its major version.
bool serves(const std::string& archs, int capability);

// Whether a C++ compiler compiled the kernels, for the host.
bool on_host();
// The order in which the host runs threads and blocks; std::logic_error on a device.
void set_backwards(bool value);
// The shared memory that a block may have on the host; std::logic_error on a device.
void set_shared_bytes(int64_t value);
// How the host's tensor cores add (warp.h); std::logic_error on a device.
void set_extra_bits(int value);

}  // namespace domerge
