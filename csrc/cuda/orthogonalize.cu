// One launch of descents on R x R matrices (descent_steps.h).
#include "orthogonalize.h"

#include <algorithm>

#include "descent_steps.h"

namespace domerge {
namespace {

using DescentSizes = Sizes<16, 32, 64, 96, 128, 192, 256>;

constexpr int64_t kReserved = 1 << 10;  // of shared memory, beside what a block asks for

// How a launch is spread over a device: blocks that all run at once, as each takes problems until
// none are left.
template <class Kernel>
struct Spread {
    int resident;
    int64_t blocks;

    Spread(const Device& device, int64_t problems)
        : resident(Kernel::State::resident(device.shared_bytes)) {
        const int64_t each = Kernel::State::shared_bytes(resident) + kReserved;
        const int64_t fitting = (device.shared_bytes + kReserved) / each;
        const int64_t at_once = std::min<int64_t>(Kernel::kBlocksPerSm, fitting);
        blocks = std::min(problems, device.multiprocessors * at_once);
    }
};

}  // namespace

std::vector<int64_t> orthogonalize_sizes() {
    return DescentSizes::list();
}

int64_t orthogonalize_scratch(int64_t size, int64_t problems, bool frobenius) {
    int64_t bytes = 0;
    DescentSizes::with(size, [&](auto chosen) {
        using Kernel = Descent<decltype(chosen)::value>;
        const Spread<Kernel> spread(current_device(), problems);
        bytes = spread.blocks * Kernel::State::scratch_bytes(spread.resident, frobenius);
    });
    return bytes;
}

void orthogonalize(int64_t size, Address work, int64_t problems, Address starts, Address out,
                   Address stats, Address scratch, bool frobenius, double gamma, int64_t steps,
                   double tol, Stream stream) {
    DescentSizes::with(size, [&](auto chosen) {
        using Kernel = Descent<decltype(chosen)::value>;
        const Spread<Kernel> spread(current_device(), problems);
        const DescentParams params{at<const int64_t>(work),
                                   at<const int64_t>(starts),
                                   at<float>(out),
                                   at<double>(stats),
                                   at<char>(scratch),
                                   problems,
                                   spread.blocks,
                                   spread.resident,
                                   frobenius,
                                   gamma,
                                   steps,
                                   tol};
        launch<Kernel>(spread.blocks, Kernel::State::shared_bytes(spread.resident), params, stream);
    });
}

}  // namespace domerge
