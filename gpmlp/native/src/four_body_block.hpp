// Four-body invariants behind the spectrum of a block of environments, as many at a time as there are lanes.
#pragma once

#include "block.hpp"

namespace gpmlp {

// y (lm, q) of the environments e and following, in lanes.
template <class T> void Block<T>::channel_densities(int e, int n, Scratch &scratch) const {
    const PowerSpectrum<T> &s = *spectrum;
    const FourBody<T> &f = *s.four_body;
    scratch.y_rows.resize(s.degrees * s.degrees * f.q_row);
    scratch.y.assign(f.size, V{});
    scratch.channel_pairs.resize(2 * f.q * f.q * FourBody<T>::MOST);
    for (int k = 0; k < n; k++) {
        f.channels.to_y(density_of(e + k), s.c_row, scratch.y_rows.data());
        for (int lm = 1; lm < f.size / f.q; lm++)
            for (int c = 0; c < f.q; c++) scratch.y[lm * f.q + c][k] = scratch.y_rows[lm * f.q_row + c];
    }
}

// Puts four-body invariants behind the features of n environments, and divides both by their length.
template <class T> void Block<T>::append_four_body(int n, Scratch &scratch, T *features, int row) {
    const PowerSpectrum<T> &s = *spectrum;
    const FourBody<T> &f = *s.four_body;
    scratch.b.resize(f.features);
    for (int lo = 0; lo < n; lo += W) {
        const int here = std::min(W, n - lo);
        channel_densities(lo, here, scratch);
        f.invariants(scratch.y.data(), scratch.channel_pairs.data(), scratch.b.data());
        for (int k = 0; k < here; k++) {
            T *x = features + std::size_t(lo + k) * row, scale = f.scales[pairs.slots[lo + k]];
            for (int i = 0; i < f.features; i++) x[s.pair_features + i] = scale * scratch.b[i][k];
            lengths[lo + k] = std::max(std::numeric_limits<T>::min(), std::sqrt(dot(x, x, s.features)));
            const T inverse = 1 / lengths[lo + k];
            for (int i = 0; i < s.features; i++) x[i] *= inverse;
        }
    }
}

// out = ∂E/∂(features before they were divided by their length) of environment e.
template <class T> template <class X> void Block<T>::before_division(int e, const X *x, const X *cotangent, X *out) const {
    const int n = spectrum->features;
    const X along = dot(x, cotangent, n), inverse = X(1) / lengths[e];
    for (int i = 0; i < n; i++) out[i] = (cotangent[i] - x[i] * along) * inverse;
}

// ∂E/∂y of the environments e and following, as rows in scratch.
template <class T>
template <class X>
void Block<T>::pull_back_four_body(int e, int n, const X *features, const X *cotangents, int row, Scratch &scratch) const {
    static thread_local Array<X> on_features;
    const PowerSpectrum<T> &s = *spectrum;
    const FourBody<T> &f = *s.four_body;
    on_features.resize(s.features);
    scratch.b.assign(f.features, V{}), scratch.on_y.resize(f.size);
    const int each = s.degrees * s.degrees * f.q_row;
    scratch.on_y_rows.assign(W * each, 0);
    for (int k = 0; k < n; k++) {
        before_division(e + k, features + std::size_t(k) * row, cotangents + std::size_t(k) * row, on_features.data());
        const X scale = f.scales[pairs.slots[e + k]];
        for (int i = 0; i < f.features; i++) scratch.b[i][k] = T(scale * on_features[s.pair_features + i]);
    }
    channel_densities(e, n, scratch);
    f.pull_back(scratch.y.data(), scratch.b.data(), scratch.channel_pairs.data(), scratch.on_y.data());
    for (int k = 0; k < n; k++)
        for (int lm = 1; lm < f.size / f.q; lm++)
            for (int c = 0; c < f.q; c++) scratch.on_y_rows[k * each + lm * f.q_row + c] = scratch.on_y[lm * f.q + c][k];
}

// Puts the derivatives of four-body invariants behind those of the spectrum in `out`, and divides both by the length of the
// features: x = z/|z|, dx = (dz - x (x . dz)) / |z|, where the spectrum alone has x . dz = 0.
template <class T>
template <class Wanted>
void Block<T>::append_four_body_slopes(int e, const T *features, int64_t first, Scratch &scratch, T *out, Wanted wanted) const {
    const PowerSpectrum<T> &s = *spectrum;
    const FourBody<T> &f = *s.four_body;
    const T *v = features + s.pair_features, scale = f.scales[pairs.slots[e]], inverse = 1 / lengths[e];
    scratch.pair_products.resize(f.products_size()), scratch.slopes.resize(s.size * 2 * W);
    scratch.on_y.resize(3 * f.size), scratch.b.resize(3 * f.features);
    channel_densities(e, 1, scratch);
    scratch.on_y_rows.resize(std::max<std::size_t>(scratch.on_y_rows.size(), f.size));
    for (int i = 0; i < f.size; i++) scratch.on_y_rows[i] = scratch.y[i][0];
    f.pair_products(scratch.on_y_rows.data(), scratch.pair_products.data());
    for (int species = 0; species < s.n_species; species++) {
        const int begin = pairs.starts[e * s.n_species + species], end = pairs.starts[e * s.n_species + species + 1];
        for (int p = begin; p < end; p += W) {
            bool any = false;
            for (int k = 0; k < W && p + k < end; k++) any = any || wanted(pairs.order[p + k]);
            if (!any) continue;
            channel_slopes(species, p, end - 1, scratch);
            V along[3] = {};
            for (int a = 0; a < 3; a++) {
                V *db = &scratch.b[a * f.features];
                f.push_forward(scratch.pair_products.data(), &scratch.on_y[a * f.size], db);
                for (int i = 0; i < f.features; i++) db[i] = scale * db[i], along[a] += v[i] * db[i];
            }
            for (int k = 0; k < W && p + k < end; k++) {
                if (!wanted(pairs.order[p + k])) continue;
                T *to = out + std::size_t(pairs.order[p + k] - first) * 3 * s.features;
                for (int a = 0; a < 3; a++, to += s.features) {
                    const V *db = &scratch.b[a * f.features];
                    const T share = along[a][k];
                    for (int i = 0; i < s.pair_features; i++) to[i] = (to[i] - features[i] * share) * inverse;
                    for (int i = 0; i < f.features; i++) to[s.pair_features + i] = (db[i][k] - v[i] * share) * inverse;
                }
            }
        }
    }
}

// scratch.on_y (xyz, lm, q) = ∂y/∂r of the pairs p and following, with neighbours of one species, in lanes.
template <class T> void Block<T>::channel_slopes(int species, int p, int last, Scratch &scratch) const {
    const PowerSpectrum<T> &s = *spectrum;
    const FourBody<T> &f = *s.four_body;
    const V direction[3] = {load(&pairs.x[p]), load(&pairs.y[p]), load(&pairs.z[p])};
    const int each = s.degrees * s.degrees * W;
    T *slopes = scratch.slopes.data(), *y = scratch.harmonics.data();
    scratch.radial_channels.resize(2 * f.q);
    V *value = scratch.radial_channels.data(), *slope = value + f.q;
    radial_slopes(p, last, slopes), harmonics_with_gradients(s.degrees, s.recurrence.data(), pairs.directions(p), y);
    for (int l = 1; l <= f.l_max; l++) {
        std::fill_n(value, 2 * f.q, V{});
        const T *channels = f.channels.of_degree(l) + species * s.n_max * f.q_row, *radial = slopes + l * s.full * 2 * W;
        for (int n = 0; n < s.n_max; n++, channels += f.q_row, radial += 2 * W) {
            const V r = load(radial), d = load(radial + W);
            for (int c = 0; c < f.q; c++) value[c] += channels[c] * r, slope[c] += channels[c] * d;
        }
        for (int lm = l * l; lm < (l + 1) * (l + 1); lm++)
            for (int a = 0; a < 3; a++) {
                V *to = &scratch.on_y[a * f.size + lm * f.q];
                const V along = direction[a] * load(y + lm * W), across = load(y + (a + 1) * each + lm * W);
                for (int c = 0; c < f.q; c++) to[c] = along * slope[c] + across * value[c];
            }
    }
}

} // namespace gpmlp
