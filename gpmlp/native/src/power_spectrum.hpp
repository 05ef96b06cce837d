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
    int degrees, density_channels; // l_max + 1; species x n
    int channels;                  // that products are made of: those of the density, or of a compressed one
    int pair_features, features;   // unique products of channels x l; the same, and what is beside them
    int full, size;                // n_max in whole lanes; numbers of one power in a row of the table
    int c_row, d_row;              // rows of densities and of derivatives by them, in whole lanes
    int y_row, g_row;              // the same of the channels that products are made of
    int intervals;
    double per_step;            // intervals per A
    Array<T> table;             // quintics by interval, power (highest first), l and n; zeros behind n_max
    Array<T> prefactors;        // (features,)
    Array<T> slope_factors;     // the same, twice on the diagonal, whose products hold a channel twice
    Array<T> center;            // (n_max,) density of the central atom at l = 0
    Array<T> recurrence;        // (l, m, 2), descriptors/spherical_harmonics.py: recurrence_coefficients
    std::vector<int64_t> slots; // place of each atomic number among the species, or -1
    NeighborWeights weights;
    std::unique_ptr<const DensityChannels<T>> compression; // of the density, if it is compressed
    std::unique_ptr<const FourBody<T>> four_body;          // beside the spectrum, if there are any

    // sizes: n_max, l_max, number of species, intervals, largest atomic number + 1. table (intervals, 6, l_max + 1,
    // n_max).
    PowerSpectrum(const int64_t *sizes, const int64_t *slots, const T *table, const T *prefactors, const T *center, const T *recurrence,
                  double per_step, NeighborWeights weights)
        : n_max(sizes[0]), l_max(sizes[1]), n_species(sizes[2]), intervals(sizes[3]), per_step(per_step), slots(slots, slots + sizes[4]),
          weights(weights) {
        degrees = l_max + 1, density_channels = n_max * n_species;
        full = round_up<T>(n_max), size = degrees * full;
        c_row = round_up<T>((n_species - 1) * n_max + full), d_row = round_up<T>(density_channels);
        multiply_channels(density_channels, c_row, prefactors);
        const std::size_t rows = std::size_t(intervals) * POWERS * degrees;
        this->table.assign(rows * full, 0);
        for (std::size_t row = 0; row < rows; row++) std::copy_n(table + row * n_max, n_max, &this->table[row * full]);
        this->center.assign(center, center + n_max), this->recurrence.assign(recurrence, recurrence + 2 * degrees * degrees);
    }

    // Products are those of so many channels of each degree in place of all; p (degrees, density channels, kept).
    void compress(int kept, const T *p, const T *prefactors) {
        compression = std::make_unique<DensityChannels<T>>(0, l_max, density_channels, kept, d_row, p);
        multiply_channels(kept, compression->y_row, prefactors);
    }

    void add(std::unique_ptr<const FourBody<T>> beside) { four_body = std::move(beside), features = pair_features + four_body->features; }

    int slot_of(int64_t z) const { return z >= 0 && z < static_cast<int64_t>(slots.size()) ? static_cast<int>(slots[z]) : -1; }
    std::size_t density_size() const { return std::size_t(degrees) * degrees * c_row; }
    std::size_t compressed_size() const { return std::size_t(degrees) * degrees * y_row; }

  private:
    // Products are those of so many channels, in rows of this length.
    void multiply_channels(int n, int row, const T *factors) {
        channels = n, y_row = row, g_row = round_up<T>(n), features = pair_features = n * (n + 1) / 2 * degrees;
        prefactors.assign(factors, factors + features), slope_factors = prefactors;
        for (int a = 0, k = 0; a < n; k += (n - a) * degrees, a++)
            for (int l = 0; l < degrees; l++) slope_factors[k + l] *= 2;
    }
};

} // namespace gpmlp
