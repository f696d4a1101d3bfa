// One op on one module's side, for instructions.py to count the instructions of.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../csrc/cpu/dispatch.h"

using namespace domerge;

// What is counted.
extern "C" __attribute__((noinline)) void measured(const std::function<void()>& op) {
    op();
}

namespace {

uint64_t address(const void* p) {
    return reinterpret_cast<uint64_t>(p);
}

// bfloat16 numbers between -1 and 1.
std::vector<uint16_t> random_factors(int64_t count) {
    std::vector<uint16_t> values(count);
    uint64_t state = 1;
    for (uint16_t& value : values) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const float x = static_cast<float>(state >> 40) / (1 << 23) - 1.0f;
        uint32_t bits;
        __builtin_memcpy(&bits, &x, sizeof bits);
        value = static_cast<uint16_t>(bits >> 16);
    }
    return values;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) return std::fprintf(stderr, "usage: OP ADAPTERS RANK WIDTH\n"), 2;
    const std::string op = argv[1];
    const int64_t count = std::atoll(argv[2]), r = std::atoll(argv[3]), d = std::atoll(argv[4]);
    const int64_t rank = count * r;
    const auto factors = random_factors(rank * d);
    std::vector<uint64_t> data;
    for (int64_t i = 0; i < count; ++i) data.push_back(address(&factors[i * r * d]));
    const std::vector<int64_t> ranks(count, r);
    const std::vector<int> dtypes(count, static_cast<int>(DType::bfloat16));
    const std::vector<double> scales(count, 1.0), omegas(count, 1.0 / count);
    const Problems rows(data, ranks, std::vector<int64_t>(count, d), dtypes, scales, {count}, {d},
                        {false});
    const Problems columns(data, ranks, ranks, dtypes, scales, {count}, {d}, {true});
    const Kernels& kernels = choose_kernels();

    std::vector<float> gram_of_rows(rank * rank), c(rank * rank);
    std::vector<double> blocks(rank * r), norms(count), stats(5);
    std::vector<uint16_t> out(rank * d);
    gram(kernels, rows, {address(gram_of_rows.data())}, false, 1);
    block_gram(kernels, columns, {address(blocks.data())}, 1);
    const auto descend = [&](int64_t steps, double tol = 0.0) {
        orthogonalize(kernels, {address(gram_of_rows.data())}, ranks, {count}, {address(c.data())},
                      address(stats.data()), false, 1.0, steps, tol, 1);
    };
    descend(1);
    const int bfloat16 = static_cast<int>(DType::bfloat16);
    const std::map<std::string, std::function<void()>> ops = {
        {"gram", [&] { gram(kernels, rows, {address(gram_of_rows.data())}, false, 1); }},
        {"block_gram", [&] { block_gram(kernels, columns, {address(blocks.data())}, 1); }},
        {"orthogonalize", [&] { descend(50, 1e-3); }},
        {"orthogonalize, 1 step", [&] { descend(1); }},
        {"orthogonalize, 4 steps", [&] { descend(4); }},
        {"apply",
         [&] {
             apply(kernels, columns, {address(c.data())}, {rank}, {address(out.data())}, bfloat16,
                   1);
         }},
        {"apply_decouple",
         [&] {
             apply_decouple(kernels, rows, {address(c.data())}, {address(blocks.data())}, omegas,
                            1.0, {}, {address(out.data())}, bfloat16, {address(norms.data())}, 1);
         }},
    };
    const auto found = ops.find(op);
    if (found == ops.end()) return std::fprintf(stderr, "no op %s\n", op.c_str()), 2;
    measured(found->second);
    std::printf("steps %g\n", stats[0]);
    return 0;
}
