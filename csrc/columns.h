// What is said of modules one after the other, as numbers side by side: a call for all of them,
// where Python would take a step for each.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace domerge {

// Where pieces end whose shares add up to 1: before the share that would exceed it, one at least in
// a piece; or, where `least` is not 0, behind the one that reaches it, `least` at least in a piece.
inline std::vector<int64_t> cut(const std::vector<double>& shares, int64_t least) {
    std::vector<int64_t> ends;
    const int64_t count = shares.size();
    int64_t begin = 0;
    double filled = 0;
    const auto end_at = [&](int64_t k) {
        ends.push_back(k);
        begin = k;
        filled = 0;
    };
    for (int64_t k = 0; k < count; ++k) {
        if (least == 0 && k > begin && filled + shares[k] > 1) end_at(k);
        filled += shares[k];
        if (least > 0 && filled >= 1 && k + 1 - begin >= least) end_at(k + 1);
    }
    if (begin < count) ends.push_back(count);
    return ends;
}

// Positions from begin to end by their number in `which`, in the order that the first of each has:
// the number, the names at these positions, and the positions as bytes.
inline pybind11::list by_number(const std::vector<int64_t>& which, const pybind11::tuple& names,
                                int64_t begin, int64_t end) {
    std::vector<int64_t> order;
    std::vector<std::vector<int64_t>> members;
    for (int64_t k = begin; k < end; ++k) {
        const size_t number = which.at(k);
        if (number >= members.size()) members.resize(number + 1);
        if (members[number].empty()) order.push_back(number);
        members[number].push_back(k);
    }
    pybind11::list found;
    for (const int64_t number : order) {
        const std::vector<int64_t>& own = members[number];
        pybind11::tuple called(own.size());
        for (size_t k = 0; k < own.size(); ++k) called[k] = names[own[k]];
        found.append(pybind11::make_tuple(
            number, called,
            pybind11::bytes(reinterpret_cast<const char*>(own.data()), 8 * own.size())));
    }
    return found;
}

}  // namespace domerge
