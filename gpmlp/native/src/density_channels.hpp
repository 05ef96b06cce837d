// Densities on few channels: y_qlm = Σ_k P⁽ˡ⁾_kq c_klm, and what is pulled back through it: the equations of
// gpmlp/descriptors/compression.py, and of the channels of gpmlp/descriptors/four_body.py.
#pragma once

#include "lanes.hpp"

namespace gpmlp {

// P of the degrees `first` to `last`; k over channels of a density, q over those that it is brought to.
template <class T> class DensityChannels {
    Array<T> to;   // (l, density channels, y_row) P
    Array<T> from; // (l, channels, d_row) the same, transposed
    int density_channels, d_row;

  public:
    int first, last, channels, y_row;

    // p (degrees, density channels, channels). d_row: length of a row of ∂E/∂c, in whole lanes.
    DensityChannels(int first, int last, int density_channels, int channels, int d_row, const T *p)
        : density_channels(density_channels), d_row(d_row), first(first), last(last), channels(channels), y_row(round_up<T>(channels)) {
        const int degrees = last - first + 1;
        to.assign(std::size_t(degrees) * density_channels * y_row, 0);
        from.assign(std::size_t(degrees) * channels * d_row, 0);
        for (int l = 0; l < degrees; l++)
            for (int k = 0; k < density_channels; k++)
                for (int q = 0; q < channels; q++)
                    to[(l * density_channels + k) * y_row + q] = from[(l * channels + q) * d_row + k] =
                        p[(l * density_channels + k) * channels + q];
    }

    // P of a degree, by channel of the density.
    const T *of_degree(int l) const { return &to[std::size_t(l - first) * density_channels * y_row]; }

    // y (lm, y_row) of a density (lm, c_row).
    void to_y(const T *density, int c_row, T *y) const {
        for (int l = first; l <= last; l++)
            multiply(2 * l + 1, y_row, density_channels, Strided<T>{density + l * l * c_row, c_row, 1}, of_degree(l), y_row,
                     y + l * l * y_row, y_row);
    }

    // ∂E/∂c (lm, d_row) from ∂E/∂y (lm, y_row).
    void pull_back(const T *on_y, T *on_density) const {
        for (int l = first; l <= last; l++) pull_back(l, on_y, on_density + l * l * d_row);
    }

    // The same added to what is there; `scratch`: of 2 last + 1 rows.
    void add_pull_back(const T *on_y, T *on_density, T *scratch) const {
        for (int l = first; l <= last; l++) {
            pull_back(l, on_y, scratch);
            T *out = on_density + l * l * d_row;
            for (int k = 0; k < (2 * l + 1) * d_row; k++) out[k] += scratch[k];
        }
    }

  private:
    void pull_back(int l, const T *on_y, T *out) const {
        multiply(2 * l + 1, d_row, channels, Strided<T>{on_y + l * l * y_row, y_row, 1}, &from[std::size_t(l - first) * channels * d_row],
                 d_row, out, d_row);
    }
};

} // namespace gpmlp
