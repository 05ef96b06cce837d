// The SOAP power spectrum and its derivatives, one environment at a time: the equations of gpmlp/descriptors/soap.py; four-body
// invariants may be beside it, of as many environments at a time as there are lanes.
//
// Expansion, spectrum and their slopes are products of small matrices, for each angular momentum and species; what an
// environment needs stays in the innermost caches.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "abi.hpp"
#include "four_body.hpp"
#include "lanes.hpp"

namespace gpmlp {

constexpr int POWERS = 6; // coefficients of a quintic
constexpr int LARGEST_Z = 118;

// x^exponent, by multiplications where that is a small whole number.
template <class V> inline V power(V x, double exponent) {
    V out = x - x + 1;
    for (int k = 0; k < static_cast<int>(exponent); k++) out *= x;
    return out;
}
inline bool is_small_integer(double x) { return x == std::floor(x) && 0 <= x && x <= 12; }

// Weights of neighbours by distance, as descriptors/radial.py has them.
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

// A power spectrum's sizes and tables.
template <class T> struct PowerSpectrum : Object {
    int n_max, l_max, n_species;
    int degrees, channels;           // l_max + 1; species x n
    int pair_features, features;     // unique products of channels x l; the same, and what is beside them
    int full, size;                  // n_max in whole lanes; numbers of one power in a row of the table
    int c_row, g_row;                // rows of densities and of products of channels, in whole lanes
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

// The neighbourhoods of a run of centres, as Python gives them: core/environments.py: Surroundings.
template <class T> struct Surroundings {
    int64_t n, n_pairs;
    const int64_t *species, *centers,
        *neighbor_species; // atomic number of each centre; centre of each pair, sorted; its neighbour's number
    const T *vectors;      // (pairs, 3) from centre to neighbour, A

    std::vector<int64_t> first_pairs() const {
        std::vector<int64_t> out(n + 1, n_pairs);
        for (int64_t p = n_pairs; p--;) out[centers[p]] = p;
        for (int64_t e = n; e--;) out[e] = std::min(out[e], out[e + 1]);
        return out;
    }
};

// The pairs of environments lo to hi, sorted by environment, then by species of the neighbour.
template <class T> struct Pairs {
    std::vector<int64_t> order; // which pair each is
    std::vector<int> starts;    // where each environment and species begins
    std::vector<int> slots;     // (environments,) place of the species of the centre
    std::vector<int> interval;  // of the radial table
    int widest = 0;             // most pairs of one environment
    Array<T> x, y, z, inverse;  // directions, 1/r
    Array<T> weight, d_weight;  // w(r) and its slope
    Array<T> offset;            // place in the interval, 0 to 1

    // Of pairs closer than `reach`. False if there is a species that the spectrum was not made for.
    template <class V>
    bool lay_out(const PowerSpectrum<T> &spectrum, const Surroundings<V> &given, const int64_t *first_pairs, const int64_t *environments,
                 int n, double reach) {
        const int species = spectrum.n_species;
        int most = 0;
        for (int i = 0; i < n; i++) most += int(first_pairs[environments[i] + 1] - first_pairs[environments[i]]);
        resize(most, n, species);
        int at[LARGEST_Z + 2], here = 0;
        for (int i = 0; i < n; i++) {
            const int64_t begin = first_pairs[environments[i]], end = first_pairs[environments[i] + 1];
            if ((slots[i] = spectrum.slot_of(given.species[environments[i]])) < 0) return false;
            std::fill(at, at + species + 1, 0);
            for (int64_t p = begin; p < end; p++) {
                const int slot = spectrum.slot_of(given.neighbor_species[p]);
                if (slot < 0) return false;
                at[slot + 1] += is_within(given.vectors + 3 * p, reach);
            }
            at[0] = here;
            for (int s = 0; s < species; s++) starts[i * species + s] = at[s], at[s + 1] += at[s];
            widest = std::max(widest, at[species] - here);
            here = at[species];
            for (int64_t p = begin; p < end; p++) {
                const V *r = given.vectors + 3 * p;
                if (!is_within(r, reach)) continue;
                const int to = at[spectrum.slot_of(given.neighbor_species[p])]++;
                order[to] = p, x[to] = T(r[0]), y[to] = T(r[1]), z[to] = T(r[2]);
            }
        }
        starts[n * species] = here;
        // lanes of the last pairs reach beyond them
        for (auto *column : {&x, &y, &z}) std::fill_n(column->begin() + here, WIDTH<T>, T(1));
        for (int p = 0; p < here; p += WIDTH<T>) measure(spectrum, p);
        return true;
    }

  private:
    template <class V> static bool is_within(const V *r, double reach) { return r[0] * r[0] + r[1] * r[1] + r[2] * r[2] < reach * reach; }

    void resize(int n, int environments, int species) {
        widest = 0;
        slots.resize(environments), starts.resize(environments * species + 1);
        order.resize(n), interval.resize(n + WIDTH<T>);
        for (auto *column : {&x, &y, &z, &inverse, &weight, &d_weight, &offset}) column->resize(n + WIDTH<T>);
    }

    // Directions, weights and places in the table of the pairs p and following.
    GPMLP_INLINE void measure(const PowerSpectrum<T> &spectrum, int p) {
        const Lanes<T> dx = load(&x[p]), dy = load(&y[p]), dz = load(&z[p]);
        Lanes<T> r = dx * dx + dy * dy + dz * dz, w, slope;
        for (int k = 0; k < WIDTH<T>; k++) r[k] = std::sqrt(r[k]);
        const Lanes<T> one_over_r = fill(T(1)) / r;
        spectrum.weights.template operator()<T>(r, w, slope);
        store(&x[p], dx * one_over_r), store(&y[p], dy * one_over_r), store(&z[p], dz * one_over_r);
        store(&inverse[p], one_over_r), store(&weight[p], w), store(&d_weight[p], slope);
        for (int k = 0; k < WIDTH<T>; k++) {
            const double scaled = r[k] * spectrum.per_step; // of some hundred intervals single precision would leave five digits
            interval[p + k] = scaled < spectrum.intervals - 1 ? std::max(0, int(scaled)) : spectrum.intervals - 1;
            offset[p + k] = T(scaled - interval[p + k]);
        }
    }
};

// Q_lm of descriptors/spherical_harmonics.py by increasing l, with dQ_lm/dz.
template <class T> struct Polynomial {
    Lanes<T> q, q_before, slope, slope_before;

    Polynomial(const PowerSpectrum<T> &s, int m) : q(fill(s.recurrence[2 * (m * s.degrees + m)])), q_before{}, slope{}, slope_before{} {}

    GPMLP_INLINE void to_degree(const PowerSpectrum<T> &s, int l, int m, Lanes<T> z) {
        const T *k = &s.recurrence[2 * (l * s.degrees + m)];
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

// Expansion, features and derivatives of a block of environments; memory is kept for the next block.
template <class T> class Block {
    static constexpr int W = WIDTH<T>;
    using V = Lanes<T>;
    const PowerSpectrum<T> *spectrum = nullptr;
    Array<T> density;     // (environments, lm, c_row)
    Array<T> norms;       // of the spectra
    Array<T> lengths;     // of features, before they were divided by them: 1 of a spectrum alone
    Array<T> kept_radial; // (pairs, 2, size) w I_nl and slopes, where the block is small enough for the cache
    bool keeps_radial = false;

  public:
    Pairs<T> pairs;

    // Scratch of one thread, whatever block it works on.
    struct Scratch {
        Array<T> radial, harmonics, products, on_products, on_density, slopes, mixed;
        Array<T> value, slope, inner, factors, unit, row;
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
        density.resize(n * s.density_size()), norms.resize(n);
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
    template <class X> void pull_back(int n, const X *features, const X *cotangents, int row, Scratch &scratch, X *out) const {
        const PowerSpectrum<T> &s = *spectrum;
        static thread_local Array<X> x, cotangent;
        scratch.on_products.resize(s.degrees * s.channels * s.g_row), scratch.on_density.resize(s.degrees * s.degrees * s.g_row);
        scratch.row.resize(std::max<std::size_t>(scratch.row.size(), s.pair_features)), scratch.slopes.resize(s.size * 2 * W),
            scratch.mixed.resize(s.degrees * s.degrees * std::max(2 * W, s.g_row));
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
                    s.four_body->add_to_density(on_y, scratch.on_density.data(), scratch.mixed.data());
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
    // + R_b B_a, where R_a is zero unless a is of the neighbour's species.
    template <class Wanted> void jacobian(int e, const T *features, int64_t first, Scratch &scratch, T *out, Wanted wanted) const {
        const PowerSpectrum<T> &s = *spectrum;
        const int deep = round_up<T>(s.degrees), products = s.pair_features / s.degrees, width = s.pair_features + W;
        // by channel and l, filled up to whole lanes; channels of other species stay zero
        for (auto *part : {&scratch.value, &scratch.slope}) part->assign((s.channels + W) * deep, 0);
        scratch.inner.resize(4 * s.c_row * deep),
            scratch.harmonics.resize(std::max<std::size_t>(scratch.harmonics.size(), 4 * s.degrees * s.degrees * W));
        scratch.row.resize(3 * width);
        by_product(s.prefactors.data(), 1 / norms[e], products, deep, scratch.factors);
        by_product(features, lengths[e], products, deep, scratch.unit);
        for (int species = 0; species < s.n_species; species++) {
            const int begin = pairs.starts[e * s.n_species + species], end = pairs.starts[e * s.n_species + species + 1];
            const int channel = species * s.n_max * deep;
            for (int p = begin; p < end; p++) {
                if ((p - begin) % W == 0) harmonics_with_gradients(p, scratch.harmonics.data());
                if (!wanted(pairs.order[p])) continue;
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

    // y (lm, q) of the environments e and following, in lanes.
    void channel_densities(int e, int n, Scratch &scratch) const {
        const PowerSpectrum<T> &s = *spectrum;
        const FourBody<T> &f = *s.four_body;
        scratch.y_rows.resize(s.degrees * s.degrees * f.q_row);
        scratch.y.assign(f.size, V{});
        scratch.channel_pairs.resize(2 * f.q * f.q * FourBody<T>::MOST);
        for (int k = 0; k < n; k++) {
            f.to_y(&density[(e + k) * s.density_size()], s.c_row, scratch.y_rows.data());
            for (int lm = 1; lm < f.size / f.q; lm++)
                for (int c = 0; c < f.q; c++) scratch.y[lm * f.q + c][k] = scratch.y_rows[lm * f.q_row + c];
        }
    }

    // Puts four-body invariants behind the features of n environments, and divides both by their length.
    void append_four_body(int n, Scratch &scratch, T *features, int row) {
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
    template <class X> void before_division(int e, const X *x, const X *cotangent, X *out) const {
        const int n = spectrum->features;
        const X along = dot(x, cotangent, n), inverse = X(1) / lengths[e];
        for (int i = 0; i < n; i++) out[i] = (cotangent[i] - x[i] * along) * inverse;
    }

    // ∂E/∂y of the environments e and following, as rows in scratch.
    template <class X>
    void pull_back_four_body(int e, int n, const X *features, const X *cotangents, int row, Scratch &scratch) const {
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
    template <class Wanted>
    void append_four_body_slopes(int e, const T *features, int64_t first, Scratch &scratch, T *out, Wanted wanted) const {
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
    void channel_slopes(int species, int p, int last, Scratch &scratch) const {
        const PowerSpectrum<T> &s = *spectrum;
        const FourBody<T> &f = *s.four_body;
        const V direction[3] = {load(&pairs.x[p]), load(&pairs.y[p]), load(&pairs.z[p])};
        const int each = s.degrees * s.degrees * W;
        T *slopes = scratch.slopes.data(), *y = scratch.harmonics.data();
        scratch.radial_channels.resize(2 * f.q);
        V *value = scratch.radial_channels.data(), *slope = value + f.q;
        radial_slopes(p, last, slopes), harmonics_with_gradients(p, y);
        for (int l = 1; l <= f.l_max; l++) {
            std::fill_n(value, 2 * f.q, V{});
            const T *channels = f.channels_of(l) + species * s.n_max * f.q_row, *radial = slopes + l * s.full * 2 * W;
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

    // Adds ∂E/∂r of the pairs with neighbours of one species, from ∂E/∂c in scratch.
    template <class D, class X> void pull_back_to(D constant, int e, int species, Scratch &scratch, X *out) const {
        const int degrees = constant;
        const PowerSpectrum<T> &s = *spectrum;
        const int begin = pairs.starts[e * s.n_species + species], end = pairs.starts[e * s.n_species + species + 1];
        T *slopes = scratch.slopes.data(), *mixed = scratch.mixed.data();
        for (int p = begin; p < end; p += W) {
            radial_slopes(p, end - 1, slopes);
#pragma GCC unroll 9
            for (int l = 0; l < degrees; l++) {
                const Strided<T> on{&scratch.on_density[l * l * s.g_row + species * s.n_max], s.g_row, 1};
                multiply(2 * l + 1, 2 * W, s.n_max, on, slopes + l * s.full * 2 * W, 2 * W, mixed + l * l * 2 * W, 2 * W);
            }
            V on_x, on_y, on_z;
            to_pairs(constant, p, mixed, on_x, on_y, on_z);
            for (int k = 0; k < W && p + k < end; k++) {
                X *g = out + 3 * pairs.order[p + k];
                g[0] += on_x[k], g[1] += on_y[k], g[2] += on_z[k];
            }
        }
    }

    // w I_nl of one pair and its slope, W quintics of one interval of the table at a time, by Horner's rule.
    struct RadialFunctions {
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

    GPMLP_INLINE RadialFunctions radial_functions(int pair, bool kept = false) const {
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
        T *y = scratch.harmonics.data(), *c = &density[e * s.density_size()];
        for (int p = 0; p < count; p++) {
            T *to = radial + p * row;
            const RadialFunctions radial_of = radial_functions(first + p);
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
        for (int p = 0; p < count; p += W) harmonics(constant, first + p, width, y + p);
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
    }

    // out[lm, pair lanes] = Y_lm of the pairs p and following.
    template <class D> GPMLP_INLINE void harmonics(D degrees, int p, int width, T *out) const {
        const V x = load(&pairs.x[p]), y = load(&pairs.y[p]), z = load(&pairs.z[p]);
        const T *recurrence = spectrum->recurrence.data();
        Azimuth<T> azimuth;
        for (int m = 0; m < degrees; m++) {
            if (m) azimuth.to_next(x, y);
            V q = fill(recurrence[2 * (m * degrees + m)]), before = {};
            for (int l = m; l < degrees; l++) {
                if (l > m) {
                    const T *k = recurrence + 2 * (l * degrees + m);
                    const V next = (fill(k[0]) * z) * q + fill(k[1]) * before;
                    before = q, q = next;
                }
                if (m) store(out + (l * l + l - m) * width, q * azimuth.im);
                store(out + (l * l + l + m) * width, q * azimuth.re);
            }
        }
    }

    // p_ab,l = prefactor Σ_m c_lm,a c_lm,b of environment e; returns their norm.
    template <class D> T multiply_channels(D constant, int e, Scratch &scratch, T *p) const {
        const int degrees = constant;
        const PowerSpectrum<T> &s = *spectrum;
        const T *c = &density[e * s.density_size()];
        T *products = scratch.products.data();
#pragma GCC unroll 9
        for (int l = 0; l < degrees; l++)
            for (int a = 0; a < s.channels; a += W) { // b from the lanes of a on
                const T *at = c + l * l * s.c_row + a;
                const int rows = std::min(W, s.channels - a);
                multiply(rows, s.g_row - a, 2 * l + 1, Strided<T>{at, 1, s.c_row}, at, s.c_row,
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
        const T *c = &density[e * s.density_size()];
#pragma GCC unroll 9
        for (int l = 0; l < degrees; l++) {
            const Strided<T> of_l{c + l * l * s.c_row, s.c_row, 1};
            multiply(2 * l + 1, s.g_row, s.channels, of_l, on_products + l * s.channels * s.g_row, s.g_row,
                     &scratch.on_density[l * l * s.g_row], s.g_row);
        }
    }

    // out[l n, 2 pair lanes] = w I_nl and d(w I_nl)/dr of the pairs p and following, up to `last`.
    void radial_slopes(int p, int last, T *out) const {
        RadialFunctions of[W];
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

    // ∂E/∂r of the pairs p and following. `mixed` (lm, 2 pair lanes) is Σ_n ∂E/∂c_lmn of I_nl and of I'_nl; Y is a
    // polynomial in x, y, z, whose gradient goes beyond the sphere: only what is across the pair turns it.
    template <class D> GPMLP_INLINE void to_pairs(D degrees, int p, const T *mixed, V &out_x, V &out_y, V &out_z) const {
        const V x = load(&pairs.x[p]), y = load(&pairs.y[p]), z = load(&pairs.z[p]), inverse = load(&pairs.inverse[p]);
        V on_x = {}, on_y = {}, on_z = {}, on_r = {};
        Azimuth<T> azimuth;
        for (int m = 0; m < degrees; m++) {
            if (m) azimuth.to_next(x, y);
            Polynomial<T> polynomial(*spectrum, m);
            V re_q = {}, re_d = {}, re_r = {}, im_q = {}, im_d = {}, im_r = {};
            for (int l = m; l < degrees; l++) {
                if (l > m) polynomial.to_degree(*spectrum, l, m, z);
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
        const V radial = on_r - inverse * (on_x * x + on_y * y + on_z * z);
        out_x = inverse * on_x + radial * x, out_y = inverse * on_y + radial * y, out_z = inverse * on_z + radial * z;
    }

    // Numbers of each feature, by product of channels with l filled up to whole lanes, times a scale.
    void by_product(const T *given, T scale, int products, int deep, Array<T> &out) const {
        out.assign(products * deep, 0);
        for (int product = 0; product < products; product++)
            for (int l = 0; l < spectrum->degrees; l++) out[product * deep + l] = given[product * spectrum->degrees + l] * scale;
    }

    // out[0, lm, pair lanes] = Y_lm and out[1 + xyz, lm, pair lanes] = ∂Y_lm/∂r of the pairs p and following.
    void harmonics_with_gradients(int p, T *out) const {
        const int degrees = spectrum->degrees, each = degrees * degrees * W;
        const V x = load(&pairs.x[p]), y = load(&pairs.y[p]), z = load(&pairs.z[p]), inverse = load(&pairs.inverse[p]);
        const auto put = [&](int lm, V value, V on_x, V on_y, V on_z) {
            const V along = on_x * x + on_y * y + on_z * z; // of the gradient only what is across the pair
            T *to = out + lm * W;
            store(to, value);
            store(to + each, inverse * (on_x - along * x)), store(to + 2 * each, inverse * (on_y - along * y)),
                store(to + 3 * each, inverse * (on_z - along * z));
        };
        Azimuth<T> a;
        for (int m = 0; m < degrees; m++) {
            if (m) a.to_next(x, y);
            Polynomial<T> polynomial(*spectrum, m);
            for (int l = m; l < degrees; l++) {
                if (l > m) polynomial.to_degree(*spectrum, l, m, z);
                const V q = polynomial.q, d = polynomial.slope,
                        slope = a.order * q; // d(x + iy)^m = m (x + iy)^(m-1) (dx + i dy)
                if (m) put(l * l + l - m, q * a.im, slope * a.im_before, slope * a.re_before, d * a.im);
                put(l * l + l + m, q * a.re, slope * a.re_before, -slope * a.im_before, d * a.re);
            }
        }
    }

    // value[n, l] = w I_nl and slope[n, l] = d(w I_nl)/dr of one pair, l in whole lanes.
    void radial_columns(int pair, int deep, T *value, T *slope) const {
        const int full = spectrum->full, l_max = spectrum->l_max;
        const RadialFunctions radial_of = radial_functions(pair);
        for (int l = 0; l <= l_max; l += W)
            for (int at = 0; at < full; at += W) {
                V v[W], d[W];
                for (int k = 0; k < W; k++) radial_of.value_and_slope(std::min(l + k, l_max) * full + at, v[k], d[k]);
                transpose(v), transpose(d);
                for (int k = 0; k < W; k++) store(value + (at + k) * deep + l, v[k]), store(slope + (at + k) * deep + l, d[k]);
            }
    }

    // out[k, channel, l] = Σ_m y[k, lm] c[lm, channel] of environment e, for Y and the three parts of its gradient, of
    // one lane of y.
    void contract(int e, int deep, const T *y, T *out) const {
        const PowerSpectrum<T> &s = *spectrum;
        const T *c = &density[e * s.density_size()];
        for (int k = 0; k < 4; k++, y += s.degrees * s.degrees * W)
            for (int l = 0; l < s.degrees; l += W)
                for (int channel = 0; channel < s.c_row; channel += W) {
                    V sums[W] = {};
                    for (int j = 0; j < W; j++) {
                        const int degree = std::min(l + j, s.l_max);
                        for (int lm = degree * degree; lm < (degree + 1) * (degree + 1); lm++)
                            sums[j] += fill(y[lm * W]) * load(c + lm * s.c_row + channel);
                    }
                    transpose(sums);
                    for (int j = 0; j < W; j++) store(out + (k * s.c_row + channel + j) * deep + l, sums[j]);
                }
    }

    // row[xyz, feature] = dp/dr / |p| of one neighbour, and along[xyz] = x . dp/dr / |p|. Lanes behind the last l of a
    // product reach into the next: the first ones, l = 0 and following, are computed last.
    void multiply_slopes(int species, int pair, int deep, int width, Scratch &scratch, T *along) const {
        const PowerSpectrum<T> &s = *spectrum;
        const int n = s.n_max, each = s.c_row * deep;
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
                const bool mine = a / n == species;
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
