// Functions of a neighbour's distance: its weight w(r), as descriptors/radial.py has it, and tabulated radial functions.
#pragma once

#include <cmath>

#include "lanes.hpp"

namespace gpmlp {

constexpr int POWERS = 6; // coefficients of a quintic

// x^exponent, by multiplications where that is a small whole number.
template <class V> inline V power(V x, double exponent) {
    V out = x - x + 1;
    for (int k = 0; k < static_cast<int>(exponent); k++) out *= x;
    return out;
}
inline bool is_small_integer(double x) { return x == std::floor(x) && 0 <= x && x <= 12; }

// w(r) = smooth cutoff times scaling.
struct NeighborWeights {
    enum Function : int64_t { SMOOTHSTEP, POLY, NONE };
    int64_t function;
    double cutoff, width, cutoff_exponent, scale, exponent;

    // w(r) and dw/dr.
    template <class T> GPMLP_INLINE void operator()(Lanes<T> r, Lanes<T> &w, Lanes<T> &slope) const {
        const Lanes<T> zero = {}, one = fill(T(1));
        const auto clamp = [&](Lanes<T> x) { return choose<T>(x > zero, choose<T>(x < one, x, one), zero); };
        if (function == SMOOTHSTEP) {
            const Lanes<T> x = clamp((r - T(cutoff) + T(width)) / T(width));
            w = one - x * x * x * (T(10) - T(15) * x + T(6) * x * x);
            slope = T(-30) * (x * (one - x)) * (x * (one - x)) / T(width);
        } else if (function == POLY) {
            const Lanes<T> x = clamp(r / T(cutoff)), base = (one - x) * (one - x) * (one + T(2) * x);
            w = raise<T>(base, cutoff_exponent);
            slope = T(-6 * cutoff_exponent) * raise<T>(base, cutoff_exponent - 1) * x * (one - x) / T(cutoff);
        } else {
            w = choose<T>(r < T(cutoff), one, zero), slope = zero;
        }
        if (exponent == 0) return;
        const Lanes<T> u = raise<T>(r / T(scale), exponent), scaling = one / (one + u);
        const Lanes<T> least = fill(T(1e-12)), bent = T(-exponent) * u / choose<T>(r > least, r, least) * scaling * scaling;
        slope = slope * scaling + w * bent;
        w = w * scaling;
    }

    template <class T> static GPMLP_INLINE Lanes<T> raise(Lanes<T> x, double exponent) {
        if (is_small_integer(exponent)) return power(x, exponent);
        for (int k = 0; k < WIDTH<T>; k++) x[k] = static_cast<T>(std::pow(x[k], static_cast<T>(exponent)));
        return x;
    }
};

// w I_nl of one pair and its slope, the lanes of quintics of one interval of the table at a time, by Horner's rule.
template <class T> struct RadialFunctions {
    using V = Lanes<T>;
    const T *table, *kept;
    int size;
    V t, w, slope_w, d_w;

    GPMLP_INLINE V value(int at) const {
        V value = load(table + at);
        for (int power = 1; power < POWERS; power++) value = value * t + load(table + power * size + at);
        return value * w;
    }

    GPMLP_INLINE void value_and_slope(int at, V &value, V &slope) const {
        if (kept) {
            value = load(kept + at), slope = load(kept + size + at);
            return;
        }
        V v = load(table + at), d = v;
        v = v * t + load(table + size + at);
        for (int power = 2; power < POWERS; power++) d = d * t + v, v = v * t + load(table + power * size + at);
        value = v * w, slope = d * slope_w + v * d_w;
    }
};

} // namespace gpmlp
