// A descent on R x R matrices as launches of one phase of all problems each.
#include "descent_tiles.h"

#include "tiles_phases.h"
#include "tiles_scalars.h"

namespace domerge {
namespace {

int64_t tiles_across(int64_t size) {
    return (size + kTile - 1) / kTile;
}

TilesParams params_of(const TiledDescent& x) {
    TilesParams params{};
    params.work = at<const int64_t>(x.work);
    params.starts = at<const int64_t>(x.starts);
    params.memory = at<char>(x.memory);
    params.each = x.each;
    params.across = tiles_across(x.size);
    params.out = at<float>(x.out);
    params.stats = at<double>(x.stats);
    params.frobenius = x.frobenius;
    params.gamma = x.gamma;
    params.tol = x.tol;
    return params;
}

template <class Kernel>
void on_tiles(const TiledDescent& x, const TilesParams& params, Stream stream) {
    launch<Kernel>(x.problems * params.across * params.across, Kernel::kSharedBytes, params,
                   stream);
}

template <class Body>
void on_problems(const TiledDescent& x, const TilesParams& params, Stream stream) {
    using Kernel = OfProblem<Body>;
    launch<Kernel>(x.problems, Kernel::kSharedBytes, params, stream);
}

}  // namespace

int64_t tiled_descent_bytes(int64_t size, int64_t adapters, bool frobenius) {
    return places_of(tiles_across(size), adapters, frobenius).end;
}

void TiledDescent::begin(Stream stream) const {
    TilesParams params = params_of(*this);
    params.begins = true;
    on_problems<Start>(*this, params, stream);
    on_tiles<Fill>(*this, params, stream);
    if (frobenius) {
        on_tiles<Quartics>(*this, params, stream);
        on_problems<SetWeights>(*this, params, stream);
    }
    on_tiles<Weigh>(*this, params, stream);
    on_problems<Begin>(*this, params, stream);
}

void TiledDescent::step(bool first, Stream stream) const {
    TilesParams params = params_of(*this);
    params.first = first;
    on_tiles<Gradient>(*this, params, stream);
    on_tiles<Metric>(*this, params, stream);
    on_tiles<Turn>(*this, params, stream);
    on_tiles<Changes>(*this, params, stream);
    if (frobenius) on_tiles<Quartics>(*this, params, stream);
    on_problems<Search>(*this, params, stream);
    on_tiles<Advance>(*this, params, stream);
}

void TiledDescent::finish(Stream stream) const {
    const TilesParams params = params_of(*this);
    on_tiles<Leave>(*this, params, stream);
    on_problems<Finish>(*this, params, stream);
}

}  // namespace domerge
