// Vectors of several numbers (lanes) that one instruction acts on, and products of small matrices with them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#define GPMLP_INLINE inline __attribute__((always_inline))
#define GPMLP_INLINED __attribute__((always_inline)) // of lambdas

namespace gpmlp {

constexpr int LANE_BYTES = 32;

template <class T> struct LanesOf;
template <> struct LanesOf<double> {
    typedef double type __attribute__((vector_size(LANE_BYTES)));
    typedef int64_t places __attribute__((vector_size(LANE_BYTES)));
};
template <> struct LanesOf<float> {
    typedef float type __attribute__((vector_size(LANE_BYTES)));
    typedef int32_t places __attribute__((vector_size(LANE_BYTES)));
};
template <class T> using Lanes = typename LanesOf<T>::type;
template <class T> constexpr int WIDTH = LANE_BYTES / sizeof(T);

template <class T> GPMLP_INLINE Lanes<T> load(const T *from) {
    Lanes<T> out;
    std::memcpy(&out, from, LANE_BYTES);
    return out;
}

template <class T> GPMLP_INLINE void store(T *to, Lanes<T> lanes) { std::memcpy(to, &lanes, LANE_BYTES); }

GPMLP_INLINE Lanes<double> fill(double x) { return Lanes<double>{x, x, x, x}; }
GPMLP_INLINE Lanes<float> fill(float x) { return Lanes<float>{x, x, x, x, x, x, x, x}; }

// Elementwise a where `mask` is set (the result of a comparison), else b.
template <class T> GPMLP_INLINE Lanes<T> choose(typename LanesOf<T>::places mask, Lanes<T> a, Lanes<T> b) { return mask ? a : b; }

template <class T> GPMLP_INLINE T sum(Lanes<T> lanes) {
    T total = 0;
    for (int k = 0; k < WIDTH<T>; k++) total += lanes[k];
    return total;
}

// The next multiple of the number of lanes.
template <class T> constexpr int round_up(int count) { return (count + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>; }

// Memory that begins at the boundary of a cache line, with room for the lanes behind the last number.
template <class T> struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <class U> Aligned(const Aligned<U> &) {}
    T *allocate(std::size_t n) { return static_cast<T *>(::operator new((n + LANE_BYTES) * sizeof(T), std::align_val_t(64))); }
    void deallocate(T *p, std::size_t) { ::operator delete(p, std::align_val_t(64)); }
    template <class U> bool operator==(const Aligned<U> &) const { return true; }
    template <class U> bool operator!=(const Aligned<U> &) const { return false; }
};
template <class T> using Array = std::vector<T, Aligned<T>>;

// Four (eight) lanes as the rows of a matrix -> its columns.
GPMLP_INLINE void transpose(Lanes<double> (&v)[4]) {
    const auto e = __builtin_shufflevector(v[0], v[1], 0, 4, 2, 6), f = __builtin_shufflevector(v[0], v[1], 1, 5, 3, 7);
    const auto g = __builtin_shufflevector(v[2], v[3], 0, 4, 2, 6), h = __builtin_shufflevector(v[2], v[3], 1, 5, 3, 7);
    v[0] = __builtin_shufflevector(e, g, 0, 1, 4, 5), v[1] = __builtin_shufflevector(f, h, 0, 1, 4, 5);
    v[2] = __builtin_shufflevector(e, g, 2, 3, 6, 7), v[3] = __builtin_shufflevector(f, h, 2, 3, 6, 7);
}

GPMLP_INLINE void transpose(Lanes<float> (&v)[8]) {
    Lanes<float> a[8], b[8];
    for (int k = 0; k < 8; k += 2) {
        a[k] = __builtin_shufflevector(v[k], v[k + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        a[k + 1] = __builtin_shufflevector(v[k], v[k + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int k = 0; k < 8; k += 4)
        for (int j = 0; j < 2; j++) {
            b[k + j] = __builtin_shufflevector(a[k + j], a[k + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[k + j + 2] = __builtin_shufflevector(a[k + j], a[k + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; j++) {
        v[j] = __builtin_shufflevector(b[j], b[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        v[j + 4] = __builtin_shufflevector(b[j], b[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// Σ_k a[k] b[k], in four sums of lanes; always in the same order.
template <class T> inline T dot(const T *a, const T *b, int n) {
    constexpr int W = WIDTH<T>;
    Lanes<T> s[4] = {};
    int k = 0;
    for (; k + 4 * W <= n; k += 4 * W)
        for (int j = 0; j < 4; j++) s[j] += load(a + k + j * W) * load(b + k + j * W);
    for (; k + W <= n; k += W) s[0] += load(a + k) * load(b + k);
    T rest = 0;
    for (; k < n; k++) rest += a[k] * b[k];
    return sum<T>((s[0] + s[1]) + (s[2] + s[3])) + rest;
}

// The same with sums in double precision.
inline double wide_dot(const double *a, const double *b, int n) { return dot(a, b, n); }
inline double wide_dot(const float *a, const float *b, int n) {
    double sums[8] = {};
    int k = 0;
    for (; k + 8 <= n; k += 8)
        for (int j = 0; j < 8; j++) sums[j] += double(a[k + j]) * double(b[k + j]);
    for (; k < n; k++) sums[0] += double(a[k]) * double(b[k]);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Features of one environment in double precision, of unit norm to its rounding.
template <class T> inline void widen(int d, const T *from, double *to) {
    std::copy_n(from, d, to);
    if (std::is_same_v<T, double>) return;
    const double inverse = 1 / std::max(1e-12, std::sqrt(dot(to, to, d)));
    for (int k = 0; k < d; k++) to[k] *= inverse;
}

// A matrix of which element (i, k) is data[i * row + k * deep].
template <class T> struct Strided {
    const T *data;
    int row, deep;
};

// R rows and C lanes of columns of c = a b, kept in registers while the depth is summed over (by way of memory if loops are not unrolled).
template <int R, int C, class T> GPMLP_INLINE void multiply_tile(int depth, Strided<T> a, const T *b, int b_row, T *c, int c_row) {
    constexpr int W = WIDTH<T>;
    Lanes<T> s[R][C] = {};
    for (int k = 0; k < depth; k++) {
        Lanes<T> x[C];
#pragma GCC unroll 8
        for (int j = 0; j < C; j++) x[j] = load(b + k * b_row + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            const Lanes<T> u = fill(a.data[i * a.row + k * a.deep]);
#pragma GCC unroll 8
            for (int j = 0; j < C; j++) s[i][j] += u * x[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int j = 0; j < C; j++) store(c + i * c_row + j * W, s[i][j]);
}

template <int R, class T> GPMLP_INLINE void multiply_rows(int columns, int depth, Strided<T> a, const T *b, int b_row, T *c, int c_row) {
    constexpr int W = WIDTH<T>;
    int at = 0;
    for (; at + 2 * W <= columns; at += 2 * W) multiply_tile<R, 2>(depth, a, b + at, b_row, c + at, c_row);
    if (at < columns) multiply_tile<R, 1>(depth, a, b + at, b_row, c + at, c_row);
}

// c (rows, columns) = a (rows, depth) b (depth, columns); columns are a multiple of the lanes, rows of b and c follow
// after b_row and c_row.
template <class T> GPMLP_INLINE void multiply(int rows, int columns, int depth, Strided<T> a, const T *b, int b_row, T *c, int c_row) {
    constexpr int MOST = 6; // of 16 registers, 12 hold sums
    for (int i = 0, pieces = (rows + MOST - 1) / MOST; i < rows; pieces--) {
        const int here = (rows - i + pieces - 1) / pieces;
        const Strided<T> from{a.data + i * a.row, a.row, a.deep};
        T *to = c + i * c_row;
        switch (here) {
        case 1: multiply_rows<1>(columns, depth, from, b, b_row, to, c_row); break;
        case 2: multiply_rows<2>(columns, depth, from, b, b_row, to, c_row); break;
        case 3: multiply_rows<3>(columns, depth, from, b, b_row, to, c_row); break;
        case 4: multiply_rows<4>(columns, depth, from, b, b_row, to, c_row); break;
        case 5: multiply_rows<5>(columns, depth, from, b, b_row, to, c_row); break;
        default: multiply_rows<6>(columns, depth, from, b, b_row, to, c_row);
        }
        i += here;
    }
}

} // namespace gpmlp
