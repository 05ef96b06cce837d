// Sizes and tables of a SOAP power spectrum, which may have four-body invariants beside it: what it is computed from.
#pragma once

#include <memory>

#include "abi.hpp"
#include "four_body.hpp"
#include "radial.hpp"

namespace gpmlp {

constexpr int LARGEST_Z = 118;

// A power spectrum's sizes and tables.
template <class T> struct PowerSpectrum : Object {
    int n_max, l_max, n_species;
    int degrees, channels;       // l_max + 1; species x n
    int pair_features, features; // unique products of channels x l; the same, and what is beside them
    int full, size;              // n_max in whole lanes; numbers of one power in a row of the table
    int c_row, g_row;            // rows of densities and of products of channels, in whole lanes
    int intervals;
    double per_step;            // intervals per A
    Array<T> table;             // quintics by interval, power (highest first), l and n; zeros behind n_max
    Array<T> prefactors;        // (features,)
    Array<T> slope_factors;     // the same, twice on the diagonal, whose products hold a channel twice
    Array<T> center;            // (n_max,) density of the central atom at l = 0
    Array<T> recurrence;        // (l, m, 2), descriptors/spherical_harmonics.py: recurrence_coefficients
    std::vector<int64_t> slots; // place of each atomic number among the species, or -1
    NeighborWeights weights;
    std::unique_ptr<const FourBody<T>> four_body; // beside the spectrum, if there are any

    // sizes: n_max, l_max, number of species, intervals, largest atomic number + 1. table (intervals, 6, l_max + 1,
    // n_max).
    PowerSpectrum(const int64_t *sizes, const int64_t *slots, const T *table, const T *prefactors, const T *center, const T *recurrence,
                  double per_step, NeighborWeights weights)
        : n_max(sizes[0]), l_max(sizes[1]), n_species(sizes[2]), intervals(sizes[3]), per_step(per_step), slots(slots, slots + sizes[4]),
          weights(weights) {
        degrees = l_max + 1, channels = n_max * n_species, features = pair_features = channels * (channels + 1) / 2 * degrees;
        full = round_up<T>(n_max), size = degrees * full;
        c_row = round_up<T>((n_species - 1) * n_max + full), g_row = round_up<T>(channels);
        const std::size_t rows = std::size_t(intervals) * POWERS * degrees;
        this->table.assign(rows * full, 0);
        for (std::size_t row = 0; row < rows; row++) std::copy_n(table + row * n_max, n_max, &this->table[row * full]);
        this->prefactors.assign(prefactors, prefactors + features), slope_factors = this->prefactors,
                                                                    this->center.assign(center, center + n_max);
        this->recurrence.assign(recurrence, recurrence + 2 * degrees * degrees);
        for (int a = 0, k = 0; a < channels; k += (channels - a) * degrees, a++)
            for (int l = 0; l < degrees; l++) slope_factors[k + l] *= 2;
    }

    void add(std::unique_ptr<const FourBody<T>> beside) { four_body = std::move(beside), features = pair_features + four_body->features; }

    int slot_of(int64_t z) const { return z >= 0 && z < static_cast<int64_t>(slots.size()) ? static_cast<int>(slots[z]) : -1; }
    std::size_t density_size() const { return std::size_t(degrees) * degrees * c_row; }
};

} // namespace gpmlp
