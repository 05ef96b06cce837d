// Covariance rows of forces and stresses from products of feature Jacobians with inducing vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.hpp"

namespace gpmlp {

// Slopes of the kernel: f' (environments, M) and f'' x.t (environments, directions, M) of M centres and their
// directions.
template <class T> struct KernelSlopes {
    const T *first, *bend;
    int64_t centers, directions;
};

// Pairs by environment: starts (environments + 1), and of each pair the row of its neighbour in the forces, and its
// vector; of each environment the row of its centre, its structure and 1 / V of that. Rows behind the last of the
// forces go nowhere.
template <class T> struct RowPairs {
    const int64_t *starts, *targets, *center_rows, *structure;
    const T *vectors, *weight;
};

// What is added to: forces (atoms, 3, columns) and stresses (structures, 6, columns), null if not wanted.
template <class T> struct RowSums {
    T *forces, *stresses;
    int64_t atoms, columns;
};

constexpr int64_t STRIP = 128; // columns done together: what they add up to for an environment stays in the innermost cache

// One strip of one pair: g = f' J x (+ f'' (x.t) J x of gradients), taken from its neighbour and added to its centre
// and virial.
template <class T, bool BENT, bool ON_NEIGHBOR, bool STRAINED>
inline void add_pair(int64_t n, const T *__restrict slope, const T *__restrict bend, const T *__restrict on_value,
                     const T *__restrict on_center, int64_t row, const T *r, T *__restrict neighbor, int64_t columns,
                     T (*__restrict center)[STRIP], T (*__restrict virial)[STRIP]) {
    const T x = r[0], y = r[1], z = r[2], hx = T(0.5) * x, hy = T(0.5) * y, hz = T(0.5) * z;
    for (int64_t k = 0; k < n; k++) {
        T gx = slope[k] * on_value[k], gy = slope[k] * on_value[row + k], gz = slope[k] * on_value[2 * row + k];
        if (BENT) {
            gx += bend[k] * on_center[k];
            gy += bend[k] * on_center[row + k];
            gz += bend[k] * on_center[2 * row + k];
        }
        center[0][k] += gx;
        center[1][k] += gy;
        center[2][k] += gz;
        if (ON_NEIGHBOR) {
            neighbor[k] -= gx;
            neighbor[columns + k] -= gy;
            neighbor[2 * columns + k] -= gz;
        }
        if (STRAINED) { // Voigt's order
            virial[0][k] += x * gx;
            virial[1][k] += y * gy;
            virial[2][k] += z * gz;
            virial[3][k] += hy * gz + hz * gy;
            virial[4][k] += hx * gz + hz * gx;
            virial[5][k] += hx * gy + hy * gx;
        }
    }
}

// The strips of `count` columns of one environment from column `begin` of one direction on (0 the values, then the
// gradients).
template <class T, bool BENT, bool STRAINED>
void add_environment(const T *products, int64_t row, int64_t at, int64_t count, int64_t e, int64_t direction, int64_t begin,
                     const KernelSlopes<T> &kernel, const RowPairs<T> &pairs, const RowSums<T> &sums) {
    const int64_t m = kernel.centers, to = direction * m + begin, in_product = direction * (row / (kernel.directions + 1)) + at;
    const T *slope = kernel.first + e * m + begin;
    const T *bend = BENT ? kernel.bend + (e * kernel.directions + direction - 1) * m + begin : nullptr;
    T center[3][STRIP] = {}, virial[6][STRIP] = {};
    for (int64_t p = pairs.starts[e]; p < pairs.starts[e + 1]; p++) {
        const T *value = products + 3 * (p - pairs.starts[e]) * row + in_product, *of_center = value - in_product + at;
        const T *r = pairs.vectors + 3 * p;
        if (pairs.targets[p] < sums.atoms) {
            T *neighbor = sums.forces + 3 * pairs.targets[p] * sums.columns + to;
            add_pair<T, BENT, true, STRAINED>(count, slope, bend, value, of_center, row, r, neighbor, sums.columns, center, virial);
        } else {
            add_pair<T, BENT, false, STRAINED>(count, slope, bend, value, of_center, row, r, nullptr, 0, center, virial);
        }
    }
    if (pairs.center_rows[e] < sums.atoms) {
        T *force = sums.forces + 3 * pairs.center_rows[e] * sums.columns + to;
        for (int x = 0; x < 3; x++, force += sums.columns)
            for (int64_t k = 0; k < count; k++) force[k] += center[x][k];
    }
    if (STRAINED) {
        T *stress = sums.stresses + 6 * pairs.structure[e] * sums.columns + to;
        for (int v = 0; v < 6; v++, stress += sums.columns)
            for (int64_t k = 0; k < count; k++) stress[k] += pairs.weight[e] * virial[v][k];
    }
}

// Add what the pairs of the environments lo to hi contribute to the columns of the centres begin to end: with the
// derivatives g = d/dr f(s) = f' J x of values and g = d/dr f'(s) x.t = f' J t + f'' (x.t) J x of gradients,
// forces[neighbour] -= g, forces[centre] += g and stresses[structure] += (r g + g r) / 2V.
//
// products: (3 pairs, columns) J x of these centres, then J t by direction and centre; rows from the pairs of `lo` on.
template <class T>
void add_rows(const T *products, int64_t lo, int64_t hi, int64_t begin, int64_t end, const KernelSlopes<T> &kernel,
              const RowPairs<T> &pairs, const RowSums<T> &sums) {
    const int64_t n = end - begin, row = n * (kernel.directions + 1);
    for (int64_t e = lo; e < hi; e++) {
        const T *here = products + 3 * (pairs.starts[e] - pairs.starts[lo]) * row;
        for (int64_t d = 0; pairs.starts[e] < pairs.starts[e + 1] && d <= kernel.directions; d++) {
            for (int64_t k = 0; k < n; k += STRIP) {
                const auto add = d ? (sums.stresses ? add_environment<T, true, true> : add_environment<T, true, false>)
                                   : (sums.stresses ? add_environment<T, false, true> : add_environment<T, false, false>);
                add(here, row, k, std::min(STRIP, n - k), e, d, begin + k, kernel, pairs, sums);
            }
        }
    }
}

} // namespace gpmlp

// The stresses are not looked at without `with_stresses`.
#define GPMLP_COVARIANCE_ROWS(T, SUFFIX)                                                                                                   \
    GPMLP_API int64_t gpmlp_add_rows##SUFFIX(                                                                                              \
        const T *products, int64_t lo, int64_t hi, int64_t begin, int64_t end, const T *first, const T *bend, int64_t centers,             \
        int64_t directions, const int64_t *starts, const int64_t *targets, const int64_t *center_rows, const int64_t *structure,           \
        const T *vectors, const T *weight, T *forces, int64_t atoms, T *stresses, int64_t with_stresses) {                                 \
        gpmlp::add_rows<T>(products, lo, hi, begin, end, {first, bend, centers, directions},                                               \
                           {starts, targets, center_rows, structure, vectors, weight},                                                     \
                           {forces, with_stresses ? stresses : nullptr, atoms, centers * (directions + 1)});                               \
        return 0;                                                                                                                          \
    }

GPMLP_COVARIANCE_ROWS(double, _f64)
GPMLP_COVARIANCE_ROWS(float, _f32)
