// The SOAP power spectrum and its derivatives, one environment at a time: the equations of gpmlp/descriptors/soap.py; four-body
// invariants may be beside it, of as many environments at a time as there are lanes.
//
// Expansion, spectrum and their slopes are products of small matrices, for each angular momentum and species; what an
// environment needs stays in the innermost caches.
#pragma once

#include <limits>

#include "neighborhoods.hpp"

namespace gpmlp {

// Expansion, features and derivatives of a block of environments; memory is kept for the next block.
template <class T> class Block {
    static constexpr int W = WIDTH<T>;
    using V = Lanes<T>;
    const PowerSpectrum<T> *spectrum = nullptr;
    Array<T> density;     // (environments, lm, c_row), of a compressed one the last only, unless more is made of it
    Array<T> compressed;  // (environments, lm, y_row), if it is
    Array<T> norms;       // of the spectra
    Array<T> lengths;     // of features, before they were divided by them: 1 of a spectrum alone
    Array<T> kept_radial; // (pairs, 2, size) w I_nl and slopes, where the block is small enough for the cache
    bool keeps_radial = false;

  public:
    Pairs<T> pairs;

    // Scratch of one thread, whatever block it works on.
    struct Scratch {
        Array<T> radial, harmonics, products, on_products, on_channels, on_density, slopes, mixed;
        Array<T> columns, value, slope, inner, factors, unit, row;
        Array<T> y_rows, on_y_rows, pair_products;
        std::vector<V, Aligned<V>> y, on_y, b, channel_pairs, radial_channels;
    };

    // Features of n environments, of their pairs closer than `reach`, into rows of `features`; false if there is a
    // species that the spectrum was not made for.
    template <class G>
    bool expand(const PowerSpectrum<T> &s, const Surroundings<G> &given, const int64_t *first_pairs, const int64_t *environments, int n,
                double reach, bool keep_radial, Scratch &scratch, T *features, int row) {
        spectrum = &s, keeps_radial = keep_radial;
        if (!pairs.lay_out(s, given, first_pairs, environments, n, reach)) return false;
        if (keep_radial) kept_radial.resize(std::size_t(pairs.starts.back()) * 2 * s.size);
        density.resize((keeps_density() ? n : 1) * s.density_size()), norms.resize(n);
        if (s.compression) compressed.resize(n * s.compressed_size());
        scratch.radial.resize(pairs.widest * s.size), scratch.harmonics.resize(s.degrees * s.degrees * round_up<T>(pairs.widest));
        scratch.products.resize(s.degrees * s.channels * s.g_row);
        with_degrees([&](auto degrees) {
            for (int e = 0; e < n; e++) {
                expand_density(degrees, e, scratch);
                T *x = features + std::size_t(e) * row;
                norms[e] = std::max(std::numeric_limits<T>::min(), multiply_channels(degrees, e, scratch, x));
                const T inverse = 1 / norms[e];
                for (int k = 0; k < s.pair_features; k++) x[k] *= inverse;
            }
        });
        lengths.assign(n, 1);
        if (s.four_body) append_four_body(n, scratch, features, row);
        return true;
    }

    // Adds ∂E/∂r of the pairs of the first n environments to their places in `out` (pairs, 3), from rows of features and
    // ∂E/∂(features).
    template <class X, class G> void pull_back(int n, const X *features, const X *cotangents, int row, Scratch &scratch, G *out) const {
        const PowerSpectrum<T> &s = *spectrum;
        static thread_local Array<X> x, cotangent;
        scratch.on_products.resize(s.degrees * s.channels * s.g_row), scratch.on_density.resize(s.degrees * s.degrees * s.d_row);
        scratch.on_channels.resize(s.degrees * s.degrees * s.g_row);
        scratch.row.resize(std::max<std::size_t>(scratch.row.size(), s.pair_features)), scratch.slopes.resize(s.size * 2 * W),
            scratch.mixed.resize(s.degrees * s.degrees * std::max(2 * W, s.d_row));
        x.resize(s.pair_features), cotangent.resize(s.features);
        with_degrees([&](auto degrees) {
            for (int e = 0; e < n; e++, features += row, cotangents += row) {
                if (!s.four_body) {
                    to_density(degrees, e, features, cotangents, scratch);
                } else {
                    if (e % W == 0) pull_back_four_body(e, std::min(W, n - e), features, cotangents, row, scratch);
                    before_division(e, features, cotangents, cotangent.data());
                    for (int k = 0; k < s.pair_features; k++) x[k] = features[k] * lengths[e];
                    to_density(degrees, e, x.data(), cotangent.data(), scratch);
                    const T *on_y = &scratch.on_y_rows[(e % W) * s.degrees * s.degrees * s.four_body->q_row];
                    s.four_body->channels.add_pull_back(on_y, scratch.on_density.data(), scratch.mixed.data());
                }
                for (int species = 0; species < s.n_species; species++) pull_back_to(degrees, e, species, scratch, out);
            }
        });
    }

    // ∂(features)/∂r of the pairs of environment e into their places in `out` (pairs, 3, features), which begins with
    // pair `first`; only of those pairs that are `wanted`.
    //
    // With A_bl = Σ_m Y_lm c_blm and B_bl = Σ_m ∂Y_lm c_blm the derivative of the product (a, b) is [R'_a A_b + R'_b
    // A_a] r^ + R_a B_b
    // + R_b B_a, where R_a is zero unless a is of the neighbour's species, or of a compressed density that species on channel a.
    template <class Wanted> void jacobian(int e, const T *features, int64_t first, Scratch &scratch, T *out, Wanted wanted) const {
        const PowerSpectrum<T> &s = *spectrum;
        const int deep = round_up<T>(s.degrees), products = s.pair_features / s.degrees, width = s.pair_features + W;
        // by channel and l, filled up to whole lanes; channels of other species stay zero
        for (auto *part : {&scratch.value, &scratch.slope}) part->assign((s.channels + W) * deep, 0);
        scratch.columns.resize(2 * s.full * deep), scratch.inner.resize(4 * s.y_row * deep),
            scratch.harmonics.resize(std::max<std::size_t>(scratch.harmonics.size(), 4 * s.degrees * s.degrees * W));
        scratch.row.resize(3 * width);
        by_product(s.prefactors.data(), 1 / norms[e], products, deep, scratch.factors);
        by_product(features, lengths[e], products, deep, scratch.unit);
        for (int species = 0; species < s.n_species; species++) {
            const int begin = pairs.starts[e * s.n_species + species], end = pairs.starts[e * s.n_species + species + 1];
            const int channel = species * s.n_max * deep;
            for (int p = begin; p < end; p++) {
                if ((p - begin) % W == 0)
                    harmonics_with_gradients(s.degrees, s.recurrence.data(), pairs.directions(p), scratch.harmonics.data());
                if (!wanted(pairs.order[p])) continue;
                if (s.compression)
                    compressed_columns(species, p, deep, scratch);
                else
                    radial_columns(p, deep, &scratch.value[channel], &scratch.slope[channel]);
                contract(e, deep, scratch.harmonics.data() + (p - begin) % W, scratch.inner.data());
                T along[3];
                multiply_slopes(species, p, deep, width, scratch, along);
                T *to = out + std::size_t(pairs.order[p] - first) * 3 * s.features;
                for (int k = 0; k < 3; k++) { // x = p/|p|: dx = (dp - x (x . dp)) / |p|
                    const T share = along[k] * lengths[e];
                    for (int i = 0; i < s.pair_features; i++) to[k * s.features + i] = scratch.row[k * width + i] - features[i] * share;
                }
            }
            if (s.compression) continue;
            for (auto *part : {&scratch.value, &scratch.slope}) std::fill_n(part->begin() + channel, s.n_max * deep, T(0));
        }
        if (s.four_body) append_four_body_slopes(e, features, first, scratch, out, wanted);
    }

  private:
    // work(l_max + 1): as a constant where it is a usual one, so that loops over degrees are unrolled.
    template <class Work> void with_degrees(Work work) const {
        switch (spectrum->degrees) {
        case 5: return work(std::integral_constant<int, 5>());
        case 7: return work(std::integral_constant<int, 7>());
        default: return work(spectrum->degrees);
        }
    }

    bool keeps_density() const { return !spectrum->compression || spectrum->four_body; }
    const T *density_of(int e) const { return &density[keeps_density() ? e * spectrum->density_size() : 0]; }

    // What products are made of, (lm, y_row).
    const T *channels_of(int e) const { return spectrum->compression ? &compressed[e * spectrum->compressed_size()] : density_of(e); }

    // Of four_body_block.hpp.
    void channel_densities(int e, int n, Scratch &scratch) const;
    void append_four_body(int n, Scratch &scratch, T *features, int row);
    template <class X> void before_division(int e, const X *x, const X *cotangent, X *out) const;
    template <class X> void pull_back_four_body(int e, int n, const X *features, const X *cotangents, int row, Scratch &scratch) const;
    template <class Wanted>
    void append_four_body_slopes(int e, const T *features, int64_t first, Scratch &scratch, T *out, Wanted wanted) const;
    void channel_slopes(int species, int p, int last, Scratch &scratch) const;

    // Adds ∂E/∂r of the pairs with neighbours of one species, from ∂E/∂c in scratch.
    template <class D, class G> void pull_back_to(D constant, int e, int species, Scratch &scratch, G *out) const {
        const int degrees = constant;
        const PowerSpectrum<T> &s = *spectrum;
        const int begin = pairs.starts[e * s.n_species + species], end = pairs.starts[e * s.n_species + species + 1];
        T *slopes = scratch.slopes.data(), *mixed = scratch.mixed.data();
        for (int p = begin; p < end; p += W) {
            radial_slopes(p, end - 1, slopes);
#pragma GCC unroll 9
            for (int l = 0; l < degrees; l++) {
                const Strided<T> on{&scratch.on_density[l * l * s.d_row + species * s.n_max], s.d_row, 1};
                multiply(2 * l + 1, 2 * W, s.n_max, on, slopes + l * s.full * 2 * W, 2 * W, mixed + l * l * 2 * W, 2 * W);
            }
            V on[3];
            pull_back_harmonics<T>(constant, s.recurrence.data(), pairs.directions(p), mixed, on);
            for (int k = 0; k < W && p + k < end; k++)
                for (int a = 0; a < 3; a++) out[3 * pairs.order[p + k] + a] += on[a][k];
        }
    }

    GPMLP_INLINE RadialFunctions<T> radial_functions(int pair, bool kept = false) const {
        const int size = spectrum->size;
        const V w = fill(pairs.weight[pair]);
        return {&spectrum->table[std::size_t(pairs.interval[pair]) * POWERS * size],
                kept ? &kept_radial[std::size_t(pair) * 2 * size] : nullptr,
                size,
                fill(pairs.offset[pair]),
                w,
                w * T(spectrum->per_step),
                fill(pairs.d_weight[pair])};
    }

    // c_lm,an = Σ_j w I_nl Y_lm of environment e.
    template <class D> void expand_density(D constant, int e, Scratch &scratch) {
        const int degrees = constant;
        const PowerSpectrum<T> &s = *spectrum;
        const int *starts = &pairs.starts[e * s.n_species], first = starts[0], count = starts[s.n_species] - first;
        const int width = round_up<T>(pairs.widest);
        const int row = keeps_radial ? 2 * s.size : s.size;
        T *radial = keeps_radial ? &kept_radial[std::size_t(first) * row] : scratch.radial.data();
        T *y = scratch.harmonics.data(), *c = &density[keeps_density() ? e * s.density_size() : 0];
        for (int p = 0; p < count; p++) {
            T *to = radial + p * row;
            const RadialFunctions<T> radial_of = radial_functions(first + p);
            if (keeps_radial) {
                for (int at = 0, size = s.size; at < size; at += W) {
                    V value, slope;
                    radial_of.value_and_slope(at, value, slope);
                    store(to + at, value), store(to + size + at, slope);
                }
            } else {
                for (int at = 0, size = s.size; at < size; at += W) store(to + at, radial_of.value(at));
            }
        }
        for (int p = 0; p < count; p += W) harmonics<T>(constant, s.recurrence.data(), pairs.directions(first + p), width, y + p);
        // the last lanes of a species reach into the next, with zeros, and so come before it
        for (int species = 0; species < s.n_species; species++) {
            const int begin = starts[species] - first, depth = starts[species + 1] - starts[species];
#pragma GCC unroll 9
            for (int l = 0; l < degrees; l++) {
                const Strided<T> of_l{y + l * l * width + begin, width, 1};
                multiply(2 * l + 1, s.full, depth, of_l, radial + begin * row + l * s.full, row, c + l * l * s.c_row + species * s.n_max,
                         s.c_row);
            }
        }
        for (int k = 0; k < s.n_max; k++) c[pairs.slots[e] * s.n_max + k] += s.center[k];
        if (s.compression) s.compression->to_y(c, s.c_row, &compressed[e * s.compressed_size()]);
    }

    // p_ab,l = prefactor Σ_m c_lm,a c_lm,b of environment e; returns their norm.
    template <class D> T multiply_channels(D constant, int e, Scratch &scratch, T *p) const {
        const int degrees = constant;
        const PowerSpectrum<T> &s = *spectrum;
        const T *c = channels_of(e);
        T *products = scratch.products.data();
#pragma GCC unroll 9
        for (int l = 0; l < degrees; l++)
            for (int a = 0; a < s.channels; a += W) { // b from the lanes of a on
                const T *at = c + l * l * s.y_row + a;
                const int rows = std::min(W, s.channels - a);
                multiply(rows, s.g_row - a, 2 * l + 1, Strided<T>{at, 1, s.y_row}, at, s.y_row,
                         products + (l * s.channels + a) * s.g_row + a, s.g_row);
            }
        const int channels = s.channels, g_row = s.g_row, of_degree = channels * g_row;
        T *to = p;
        for (int a = 0; a < channels; a++)
            for (int b = a; b < channels; b++, to += degrees) {
                const T *ab = products + a * g_row + b;
#pragma GCC unroll 9
                for (int l = 0; l < degrees; l++) to[l] = ab[l * of_degree];
            }
        for (int k = 0, n = s.pair_features; k < n; k++) p[k] *= s.prefactors[k];
        return std::sqrt(dot(p, p, s.pair_features));
    }

    // ∂E/∂c (lm, channels) of environment e from ∂E/∂x, by way of ∂E/∂p = (∂E/∂x - x (x . ∂E/∂x)) / |p|.
    template <class D, class X> void to_density(D constant, int e, const X *x, const X *cotangent, Scratch &scratch) const {
        const int degrees = constant;
        const PowerSpectrum<T> &s = *spectrum;
        const X along = dot(x, cotangent, s.pair_features), inverse = X(1) / norms[e];
        T *on_products = scratch.on_products.data(), *on_spectrum = scratch.row.data();
        for (int k = 0, n = s.pair_features; k < n; k++) on_spectrum[k] = T((cotangent[k] - x[k] * along) * inverse) * s.slope_factors[k];
        const int channels = s.channels, g_row = s.g_row, of_degree = channels * g_row;
        const T *from = on_spectrum;
        for (int a = 0; a < channels; a++)
            for (int b = a; b < channels; b++, from += degrees) {
                T *ab = on_products + a * g_row + b, *ba = on_products + b * g_row + a;
#pragma GCC unroll 9
                for (int l = 0; l < degrees; l++) ab[l * of_degree] = ba[l * of_degree] = from[l];
            }
        const T *c = channels_of(e);
        T *on_channels = (s.compression ? scratch.on_channels : scratch.on_density).data();
#pragma GCC unroll 9
        for (int l = 0; l < degrees; l++) {
            const Strided<T> of_l{c + l * l * s.y_row, s.y_row, 1};
            multiply(2 * l + 1, s.g_row, s.channels, of_l, on_products + l * s.channels * s.g_row, s.g_row, on_channels + l * l * s.g_row,
                     s.g_row);
        }
        if (s.compression) s.compression->pull_back(on_channels, scratch.on_density.data());
    }

    // out[l n, 2 pair lanes] = w I_nl and d(w I_nl)/dr of the pairs p and following, up to `last`.
    void radial_slopes(int p, int last, T *out) const {
        RadialFunctions<T> of[W];
        for (int k = 0; k < W; k++) of[k] = radial_functions(std::min(p + k, last), keeps_radial);
        for (int at = 0, size = spectrum->size; at < size; at += W) {
            V value[W], slope[W];
#pragma GCC unroll 8
            for (int k = 0; k < W; k++) of[k].value_and_slope(at, value[k], slope[k]);
            transpose(value), transpose(slope);
#pragma GCC unroll 8
            for (int k = 0; k < W; k++) store(out + (at + k) * 2 * W, value[k]), store(out + (at + k) * 2 * W + W, slope[k]);
        }
    }

    // Numbers of each feature, by product of channels with l filled up to whole lanes, times a scale.
    void by_product(const T *given, T scale, int products, int deep, Array<T> &out) const {
        out.assign(products * deep, 0);
        for (int product = 0; product < products; product++)
            for (int l = 0; l < spectrum->degrees; l++) out[product * deep + l] = given[product * spectrum->degrees + l] * scale;
    }

    // value[n, l] = w I_nl and slope[n, l] = d(w I_nl)/dr of one pair, l in whole lanes.
    void radial_columns(int pair, int deep, T *value, T *slope) const {
        const int full = spectrum->full, l_max = spectrum->l_max;
        const RadialFunctions<T> radial_of = radial_functions(pair);
        for (int l = 0; l <= l_max; l += W)
            for (int at = 0; at < full; at += W) {
                V v[W], d[W];
                for (int k = 0; k < W; k++) radial_of.value_and_slope(std::min(l + k, l_max) * full + at, v[k], d[k]);
                transpose(v), transpose(d);
                for (int k = 0; k < W; k++) store(value + (at + k) * deep + l, v[k]), store(slope + (at + k) * deep + l, d[k]);
            }
    }

    // The same of the channels of a compressed density, Σ_n P_nq w I_nl, into scratch.value and scratch.slope.
    void compressed_columns(int species, int pair, int deep, Scratch &scratch) const {
        const PowerSpectrum<T> &s = *spectrum;
        T *value = scratch.columns.data(), *slope = value + s.full * deep;
        radial_columns(pair, deep, value, slope);
        for (int l = 0; l < s.degrees; l++) {
            const T *p = s.compression->of_degree(l) + species * s.n_max * s.y_row;
            for (int q = 0; q < s.channels; q++) {
                T v = 0, d = 0;
                for (int n = 0; n < s.n_max; n++)
                    v += p[n * s.y_row + q] * value[n * deep + l], d += p[n * s.y_row + q] * slope[n * deep + l];
                scratch.value[q * deep + l] = v, scratch.slope[q * deep + l] = d;
            }
        }
    }

    // out[k, channel, l] = Σ_m y[k, lm] c[lm, channel] of environment e, for Y and the three parts of its gradient, of
    // one lane of y.
    void contract(int e, int deep, const T *y, T *out) const {
        const PowerSpectrum<T> &s = *spectrum;
        const T *c = channels_of(e);
        for (int k = 0; k < 4; k++, y += s.degrees * s.degrees * W)
            for (int l = 0; l < s.degrees; l += W)
                for (int channel = 0; channel < s.y_row; channel += W) {
                    V sums[W] = {};
                    for (int j = 0; j < W; j++) {
                        const int degree = std::min(l + j, s.l_max);
                        for (int lm = degree * degree; lm < (degree + 1) * (degree + 1); lm++)
                            sums[j] += fill(y[lm * W]) * load(c + lm * s.y_row + channel);
                    }
                    transpose(sums);
                    for (int j = 0; j < W; j++) store(out + (k * s.y_row + channel + j) * deep + l, sums[j]);
                }
    }

    // row[xyz, feature] = dp/dr / |p| of one neighbour, and along[xyz] = x . dp/dr / |p|. Lanes behind the last l of a
    // product reach into the next: the first ones, l = 0 and following, are computed last.
    void multiply_slopes(int species, int pair, int deep, int width, Scratch &scratch, T *along) const {
        const PowerSpectrum<T> &s = *spectrum;
        const int n = s.n_max, each = s.y_row * deep;
        const V x = fill(pairs.x[pair]), y = fill(pairs.y[pair]), z = fill(pairs.z[pair]);
        V on_x = {}, on_y = {}, on_z = {};
        T *row = scratch.row.data();
        for (int l = deep - W; l >= 0; l -= W) {
            const T *value = &scratch.value[l], *slope = &scratch.slope[l], *inner = &scratch.inner[l];
            int product = 0;
            for (int a = 0; a < s.channels; a++) {
                const V ra = load(value + a * deep), da = load(slope + a * deep), ya = load(inner + a * deep);
                const T *of_a = inner + a * deep + each;
                const V xa = load(of_a), ua = load(of_a + each), za = load(of_a + 2 * each);
                const bool mine = s.compression || a / n == species;
                for (int b = a; b < s.channels; b++, product++) {
                    V gx = {}, gy = {}, gz = {};
                    if (mine || b / n == species) {
                        const T *of_b = inner + b * deep;
                        const V rb = load(value + b * deep), f = load(&scratch.factors[product * deep + l]),
                                u = load(&scratch.unit[product * deep + l]);
                        const V across = da * load(of_b) + load(slope + b * deep) * ya;
                        gx = f * (ra * load(of_b + each) + rb * xa + across * x);
                        gy = f * (ra * load(of_b + 2 * each) + rb * ua + across * y);
                        gz = f * (ra * load(of_b + 3 * each) + rb * za + across * z);
                        on_x += u * gx, on_y += u * gy, on_z += u * gz;
                    }
                    T *to = row + product * s.degrees + l;
                    store(to, gx), store(to + width, gy), store(to + 2 * width, gz);
                }
            }
        }
        along[0] = sum<T>(on_x), along[1] = sum<T>(on_y), along[2] = sum<T>(on_z);
    }
};

} // namespace gpmlp

#include "four_body_block.hpp"
