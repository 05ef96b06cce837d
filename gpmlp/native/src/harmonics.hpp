// Real spherical harmonics of lanes of directions, and their gradients: the equations of descriptors/spherical_harmonics.py.
#pragma once

#include "lanes.hpp"

namespace gpmlp {

// Lanes of unit vectors, and 1 / (the distances that they go along), 1/A.
template <class T> struct Directions {
    Lanes<T> x, y, z, inverse;
};

// Q_lm of descriptors/spherical_harmonics.py by increasing l, with dQ_lm/dz. `recurrence`: (l, m, 2), of as many degrees.
template <class T> struct Polynomial {
    Lanes<T> q, q_before, slope, slope_before;

    Polynomial(const T *recurrence, int degrees, int m) : q(fill(recurrence[2 * (m * degrees + m)])), q_before{}, slope{}, slope_before{} {}

    GPMLP_INLINE void to_degree(const T *recurrence, int degrees, int l, int m, Lanes<T> z) {
        const T *k = recurrence + 2 * (l * degrees + m);
        const Lanes<T> a = fill(k[0]), b = fill(k[1]), az = a * z;
        const Lanes<T> next_slope = az * slope + (a * q + b * slope_before), next = az * q + b * q_before;
        slope_before = slope, slope = next_slope, q_before = q, q = next;
    }
};

// Re and Im of (x + iy)^m by increasing m, with those of the order below.
template <class T> struct Azimuth {
    Lanes<T> re = fill(T(1)), im{}, re_before{}, im_before{}, order{};

    GPMLP_INLINE void to_next(Lanes<T> x, Lanes<T> y) {
        re_before = re, im_before = im, order += T(1);
        re = x * re_before - y * im_before, im = x * im_before + y * re_before;
    }
};

// out[lm, lanes] = Y_lm, rows of `width`.
template <class T, class D> GPMLP_INLINE void harmonics(D degrees, const T *recurrence, const Directions<T> &to, int width, T *out) {
    using V = Lanes<T>;
    Azimuth<T> azimuth;
    for (int m = 0; m < degrees; m++) {
        if (m) azimuth.to_next(to.x, to.y);
        V q = fill(recurrence[2 * (m * degrees + m)]), before = {};
        for (int l = m; l < degrees; l++) {
            if (l > m) {
                const T *k = recurrence + 2 * (l * degrees + m);
                const V next = (fill(k[0]) * to.z) * q + fill(k[1]) * before;
                before = q, q = next;
            }
            if (m) store(out + (l * l + l - m) * width, q * azimuth.im);
            store(out + (l * l + l + m) * width, q * azimuth.re);
        }
    }
}

// ∂E/∂r from `mixed` (lm, 2 lanes): Σ_n ∂E/∂c_lmn I_nl, and the same of I'_nl. Y is a polynomial in x, y, z, whose gradient goes
// beyond the sphere: only what is across the direction turns it.
template <class T, class D>
GPMLP_INLINE void pull_back_harmonics(D degrees, const T *recurrence, const Directions<T> &to, const T *mixed, Lanes<T> (&out)[3]) {
    using V = Lanes<T>;
    constexpr int W = WIDTH<T>;
    V on_x = {}, on_y = {}, on_z = {}, on_r = {};
    Azimuth<T> azimuth;
    for (int m = 0; m < degrees; m++) {
        if (m) azimuth.to_next(to.x, to.y);
        Polynomial<T> polynomial(recurrence, degrees, m);
        V re_q = {}, re_d = {}, re_r = {}, im_q = {}, im_d = {}, im_r = {};
        for (int l = m; l < degrees; l++) {
            if (l > m) polynomial.to_degree(recurrence, degrees, l, m, to.z);
            // the same for m = 0, where im is zero
            const T *plus = mixed + (l * l + l + m) * 2 * W, *minus = mixed + (l * l + l - m) * 2 * W;
            const V of_re = load(plus), of_im = load(minus), q = polynomial.q, d = polynomial.slope;
            re_q += q * of_re, re_d += d * of_re, re_r += q * load(plus + W);
            im_q += q * of_im, im_d += d * of_im, im_r += q * load(minus + W);
        }
        on_r += azimuth.re * re_r + azimuth.im * im_r;
        on_z += azimuth.re * re_d + azimuth.im * im_d;
        // d(x + iy)^m = m (x + iy)^(m-1) (dx + i dy)
        on_x += azimuth.order * (azimuth.re_before * re_q + azimuth.im_before * im_q);
        on_y += azimuth.order * (azimuth.re_before * im_q - azimuth.im_before * re_q);
    }
    const V radial = on_r - to.inverse * (on_x * to.x + on_y * to.y + on_z * to.z);
    out[0] = to.inverse * on_x + radial * to.x, out[1] = to.inverse * on_y + radial * to.y, out[2] = to.inverse * on_z + radial * to.z;
}

// out[0, lm, lanes] = Y_lm and out[1 + xyz, lm, lanes] = ∂Y_lm/∂r.
template <class T> void harmonics_with_gradients(int degrees, const T *recurrence, const Directions<T> &to, T *out) {
    using V = Lanes<T>;
    constexpr int W = WIDTH<T>;
    const int each = degrees * degrees * W;
    const V x = to.x, y = to.y, z = to.z, inverse = to.inverse;
    const auto put = [&](int lm, V value, V on_x, V on_y, V on_z) {
        const V along = on_x * x + on_y * y + on_z * z; // of the gradient only what is across the pair
        T *at = out + lm * W;
        store(at, value);
        store(at + each, inverse * (on_x - along * x)), store(at + 2 * each, inverse * (on_y - along * y)),
            store(at + 3 * each, inverse * (on_z - along * z));
    };
    Azimuth<T> a;
    for (int m = 0; m < degrees; m++) {
        if (m) a.to_next(x, y);
        Polynomial<T> polynomial(recurrence, degrees, m);
        for (int l = m; l < degrees; l++) {
            if (l > m) polynomial.to_degree(recurrence, degrees, l, m, z);
            const V q = polynomial.q, d = polynomial.slope,
                    slope = a.order * q; // d(x + iy)^m = m (x + iy)^(m-1) (dx + i dy)
            if (m) put(l * l + l - m, q * a.im, slope * a.im_before, slope * a.re_before, d * a.im);
            put(l * l + l + m, q * a.re, slope * a.re_before, -slope * a.im_before, d * a.re);
        }
    }
}

} // namespace gpmlp
