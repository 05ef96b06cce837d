// Four-body invariants beside the power spectrum, and their derivatives: the equations of gpmlp/descriptors/four_body.py.
//
// Numbers N are one environment's, or lanes of as many environments or pairs: sums over a list of the couplings that are not zero.
#pragma once

#include <type_traits>

#include "abi.hpp"
#include "density_channels.hpp"

namespace gpmlp {

template <class T> class FourBody {
    // b of degrees l1 <= l2 <= l3 of all channels; entries first to last of the list.
    struct Coupling {
        int l[3], first, last;
    };
    // An element of a coupling's tensor that is not zero.
    struct Entry {
        int m[3];
        T value;
    };
    std::vector<Coupling> couplings;
    std::vector<Entry> entries;
    Array<T> factors; // (features,) √ of how many invariants are equal by symmetry

  public:
    static constexpr int MOST = 2 * 8 + 1, MOST_CHANNELS = 12; // m of one degree, and channels: gpmlp/recipe.py
    DensityChannels<T> channels;                               // P, of l from 1 on
    int l_max, q, q_row, size, features;                       // degree; channels, and in whole lanes; (l_max + 1)² q; invariants
    Array<T> scales; // of the part of four bodies in the features, by place of the central species

    // sizes: l_max, channels, channels of the density, species, couplings, entries. degrees (couplings, 3), starts
    // (couplings + 1,) entries of each, places (entries, 3) of m.
    FourBody(const int64_t *sizes, int d_row, const int64_t *degrees, const int64_t *starts, const int64_t *places, const T *values,
             const T *factors, const T *channels, const T *scales)
        : channels(1, sizes[0], sizes[2], sizes[1], d_row, channels), l_max(sizes[0]), q(sizes[1]), q_row(round_up<T>(q)), features(0),
          scales(scales, scales + sizes[3]) {
        size = (l_max + 1) * (l_max + 1) * q;
        for (int64_t k = 0; k < sizes[4]; k++) {
            couplings.push_back(
                {{int(degrees[3 * k]), int(degrees[3 * k + 1]), int(degrees[3 * k + 2])}, int(starts[k]), int(starts[k + 1])});
            for_pairs(q, couplings.back(), [&](int, int, int from) { features += q - from; });
        }
        for (int64_t k = 0; k < sizes[5]; k++)
            entries.push_back({{int(places[3 * k]), int(places[3 * k + 1]), int(places[3 * k + 2])}, values[k]});
        this->factors.assign(factors, factors + features);
    }

    // b (features,) of y (lm, q); `pairs`: q² MOST numbers.
    template <class N> void invariants(const N *y, N *pairs, N *b) const {
        with_channels([&](auto constant) {
            const int q = constant;
            N sums[MOST_CHANNELS];
            int i = 0;
            for (const Coupling &c : couplings) {
                const N *last = y + c.l[2] * c.l[2] * q;
                multiply_channels(constant, c, 0, 1, y, pairs);
                for_pairs(constant, c, [&](int q1, int q2, int from) {
                    for (int k = 0; k < q; k++) sums[k] = N{};
                    for (int m = 0; m <= 2 * c.l[2]; m++) {
                        const N p = pairs[(m * q + q1) * q + q2];
                        for (int k = 0; k < q; k++) sums[k] += p * last[m * q + k];
                    }
                    for (int k = from; k < q; k++) b[i] = sums[k] * factors[i], i++;
                });
            }
        });
    }

    // ∂E/∂y (lm, q) from ∂E/∂b; `pairs`: 2 q² MOST numbers.
    template <class N> void pull_back(const N *y, const N *on_b, N *pairs, N *on_y) const {
        std::fill_n(on_y, size, N{});
        with_channels([&](auto constant) {
            const int q = constant;
            N *on_pairs = pairs + q * q * MOST, g[MOST_CHANNELS];
            int i = 0;
            for (const Coupling &c : couplings) {
                const N *last = y + c.l[2] * c.l[2] * q;
                N *on_last = on_y + c.l[2] * c.l[2] * q;
                multiply_channels(constant, c, 0, 1, y, pairs);
                std::fill_n(on_pairs, q * q * (2 * c.l[2] + 1), N{});
                for_pairs(constant, c, [&](int q1, int q2, int from) {
                    for (int k = 0; k < from; k++) g[k] = N{};
                    for (int k = from; k < q; k++) g[k] = on_b[i] * factors[i], i++;
                    for (int m = 0; m <= 2 * c.l[2]; m++) {
                        const int at = (m * q + q1) * q + q2;
                        const N p = pairs[at];
                        N sum = {};
                        for (int k = 0; k < q; k++) sum += g[k] * last[m * q + k], on_last[m * q + k] += g[k] * p;
                        on_pairs[at] = sum;
                    }
                });
                pull_back_channels(constant, c, y, on_pairs, on_y);
            }
        });
    }

    // Σ_m G y y of two of the three, of each coupling: what derivatives of b by y are made of.
    void pair_products(const T *y, T *products) const {
        for (const Coupling &c : couplings)
            for (int without = 2; without >= 0; without--, products += q * q * MOST)
                multiply_channels(q, c, without == 0 ? 1 : 0, without == 2 ? 1 : 2, y, products);
    }
    std::size_t products_size() const { return couplings.size() * 3 * q * q * MOST; }

    // The change of b (features,) along a change of y (lm, q).
    template <class N> void push_forward(const T *products, const N *dy, N *db) const {
        with_channels([&](auto constant) {
            const int q = constant;
            N sums[MOST_CHANNELS];
            int i = 0;
            for (const Coupling &c : couplings) {
                const T *t12 = products, *t13 = t12 + q * q * MOST, *t23 = t13 + q * q * MOST;
                const N *first = dy + c.l[0] * c.l[0] * q, *second = dy + c.l[1] * c.l[1] * q, *last = dy + c.l[2] * c.l[2] * q;
                for_pairs(constant, c, [&](int q1, int q2, int from) {
                    for (int k = 0; k < q; k++) sums[k] = N{};
                    for (int m = 0; m <= 2 * c.l[2]; m++)
                        for (int k = 0; k < q; k++) sums[k] += last[m * q + k] * t12[(m * q + q1) * q + q2];
                    for (int m = 0; m <= 2 * c.l[1]; m++)
                        for (int k = 0; k < q; k++) sums[k] += second[m * q + q2] * t13[(m * q + q1) * q + k];
                    for (int m = 0; m <= 2 * c.l[0]; m++)
                        for (int k = 0; k < q; k++) sums[k] += first[m * q + q1] * t23[(m * q + q2) * q + k];
                    for (int k = from; k < q; k++) db[i] = sums[k] * factors[i], i++;
                });
                products += 3 * q * q * MOST;
            }
        });
    }

  private:
    // work(q): as a constant where it is the usual one, so that loops over channels are unrolled.
    template <class Work> void with_channels(Work work) const {
        if (q == 5)
            work(std::integral_constant<int, 5>());
        else
            work(q);
    }

    // work(q1, q2, first q3) of the invariants that symmetry leaves distinct, in their order.
    template <class Q, class Work> GPMLP_INLINE void for_pairs(Q constant, const Coupling &c, Work work) const {
        const int q = constant;
        for (int q1 = 0; q1 < q; q1++)
            for (int q2 = c.l[0] == c.l[1] ? q1 : 0; q2 < q; q2++) work(q1, q2, c.l[1] == c.l[2] ? q2 : 0);
    }

    // out[m of the third, q of one, q of other] = Σ G y_one y_other.
    template <class Q, class N>
    GPMLP_INLINE void multiply_channels(Q constant, const Coupling &c, int one, int other, const N *y, N *out) const {
        const int q = constant, third = 3 - one - other;
        const N *a = y + c.l[one] * c.l[one] * q, *b = y + c.l[other] * c.l[other] * q;
        std::fill_n(out, q * q * (2 * c.l[third] + 1), N{});
        for (int k = c.first; k < c.last; k++) {
            const Entry &e = entries[k];
            const N *of_b = b + e.m[other] * q;
            N *to = out + e.m[third] * q * q;
            for (int q1 = 0; q1 < q; q1++, to += q) {
                const N x = a[e.m[one] * q + q1] * e.value;
                for (int q2 = 0; q2 < q; q2++) to[q2] += x * of_b[q2];
            }
        }
    }

    // Adds ∂E/∂y of the first two, from that of their products.
    template <class Q, class N>
    GPMLP_INLINE void pull_back_channels(Q constant, const Coupling &c, const N *y, const N *on_pairs, N *on_y) const {
        const int q = constant;
        for (int k = c.first; k < c.last; k++) {
            const Entry &e = entries[k];
            const int first = (c.l[0] * c.l[0] + e.m[0]) * q, second = (c.l[1] * c.l[1] + e.m[1]) * q;
            const N *on = on_pairs + e.m[2] * q * q;
            for (int q1 = 0; q1 < q; q1++, on += q) {
                const N a = y[first + q1] * e.value;
                N sum = {};
                for (int q2 = 0; q2 < q; q2++) sum += on[q2] * y[second + q2], on_y[second + q2] += a * on[q2];
                on_y[first + q1] += sum * e.value;
            }
        }
    }
};

} // namespace gpmlp
