// Four-body invariants beside the power spectrum, and their derivatives: the equations of gpmlp/descriptors/four_body.py.
//
// Numbers N are one environment's, or lanes of as many environments or pairs: sums over a list of the couplings that are not zero.
#pragma once

#include "abi.hpp"
#include "lanes.hpp"

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
    Array<T> factors;       // (features,) √ of how many invariants are equal by symmetry
    Array<T> to_channels;   // (l, density channels, q_row) P, l from 1 on
    Array<T> from_channels; // (l, channels, g_row) the same, transposed
    int density_channels, g_row;

  public:
    static constexpr int MOST = 2 * 8 + 1; // m of one degree
    int l_max, q, q_row, size, features;   // degree; channels, and in whole lanes; (l_max + 1)² q; invariants
    Array<T> scales;                       // of the part of four bodies in the features, by place of the central species

    // sizes: l_max, channels, channels of the density, species, couplings, entries. degrees (couplings, 3), starts
    // (couplings + 1,) entries of each, places (entries, 3) of m.
    FourBody(const int64_t *sizes, int g_row, const int64_t *degrees, const int64_t *starts, const int64_t *places, const T *values,
             const T *factors, const T *channels, const T *scales)
        : density_channels(sizes[2]), g_row(g_row), l_max(sizes[0]), q(sizes[1]), q_row(round_up<T>(q)), features(0),
          scales(scales, scales + sizes[3]) {
        size = (l_max + 1) * (l_max + 1) * q;
        for (int64_t k = 0; k < sizes[4]; k++) {
            couplings.push_back({{int(degrees[3 * k]), int(degrees[3 * k + 1]), int(degrees[3 * k + 2])}, int(starts[k]), int(starts[k + 1])});
            for_places(couplings.back(), [&](int, int, int) { features++; });
        }
        for (int64_t k = 0; k < sizes[5]; k++)
            entries.push_back({{int(places[3 * k]), int(places[3 * k + 1]), int(places[3 * k + 2])}, values[k]});
        this->factors.assign(factors, factors + features);
        to_channels.assign(std::size_t(l_max) * density_channels * q_row, 0);
        from_channels.assign(std::size_t(l_max) * q * g_row, 0);
        for (int l = 0; l < l_max; l++)
            for (int k = 0; k < density_channels; k++)
                for (int c = 0; c < q; c++) {
                    const T p = channels[(l * density_channels + k) * q + c];
                    to_channels[(l * density_channels + k) * q_row + c] = from_channels[(l * q + c) * g_row + k] = p;
                }
    }

    // P of a degree from 1 on, by channel of the density.
    const T *channels_of(int l) const { return &to_channels[std::size_t(l - 1) * density_channels * q_row]; }

    // y (lm, q_row) of a density (lm, c_row), of l from 1 on.
    void to_y(const T *density, int c_row, T *y) const {
        for (int l = 1; l <= l_max; l++)
            multiply(2 * l + 1, q_row, density_channels, Strided<T>{density + l * l * c_row, c_row, 1}, channels_of(l), q_row,
                     y + l * l * q_row, q_row);
    }

    // Adds ∂E/∂c (lm, g_row) from ∂E/∂y (lm, q_row); `scratch`: of 2 l_max + 1 rows.
    void add_to_density(const T *on_y, T *on_density, T *scratch) const {
        for (int l = 1; l <= l_max; l++) {
            multiply(2 * l + 1, g_row, q, Strided<T>{on_y + l * l * q_row, q_row, 1}, &from_channels[std::size_t(l - 1) * q * g_row], g_row,
                     scratch, g_row);
            T *to = on_density + l * l * g_row;
            for (int k = 0; k < (2 * l + 1) * g_row; k++) to[k] += scratch[k];
        }
    }

    // b (features,) of y (lm, q); `pairs`: q² MOST numbers.
    template <class N> void invariants(const N *y, N *pairs, N *b) const {
        int i = 0;
        for (const Coupling &c : couplings) {
            const N *last = y + c.l[2] * c.l[2] * q;
            multiply_channels(c, 0, 1, y, pairs);
            for_places(c, [&](int q1, int q2, int q3) {
                const N *p = pairs + q1 * q + q2;
                N sum = p[0] * last[q3];
                for (int m = 1; m <= 2 * c.l[2]; m++) sum += p[m * q * q] * last[m * q + q3];
                b[i] = sum * factors[i], i++;
            });
        }
    }

    // ∂E/∂y (lm, q) from ∂E/∂b; `pairs`: 2 q² MOST numbers.
    template <class N> void pull_back(const N *y, const N *on_b, N *pairs, N *on_y) const {
        std::fill_n(on_y, size, N{});
        N *on_pairs = pairs + q * q * MOST;
        int i = 0;
        for (const Coupling &c : couplings) {
            const N *last = y + c.l[2] * c.l[2] * q, *first = y + c.l[0] * c.l[0] * q, *second = y + c.l[1] * c.l[1] * q;
            N *on_first = on_y + c.l[0] * c.l[0] * q, *on_second = on_y + c.l[1] * c.l[1] * q, *on_last = on_y + c.l[2] * c.l[2] * q;
            multiply_channels(c, 0, 1, y, pairs);
            std::fill_n(on_pairs, q * q * (2 * c.l[2] + 1), N{});
            for_places(c, [&](int q1, int q2, int q3) {
                const N g = on_b[i] * factors[i];
                const int at = q1 * q + q2;
                i++;
                for (int m = 0; m <= 2 * c.l[2]; m++) {
                    on_pairs[m * q * q + at] += g * last[m * q + q3];
                    on_last[m * q + q3] += g * pairs[m * q * q + at];
                }
            });
            for (int k = c.first; k < c.last; k++) {
                const Entry &e = entries[k];
                const N *b = second + e.m[1] * q, *on = on_pairs + e.m[2] * q * q;
                N *on_b2 = on_second + e.m[1] * q;
                for (int q1 = 0; q1 < q; q1++, on += q) {
                    const N a = first[e.m[0] * q + q1] * e.value;
                    N sum = {};
                    for (int q2 = 0; q2 < q; q2++) sum += on[q2] * b[q2], on_b2[q2] += a * on[q2];
                    on_first[e.m[0] * q + q1] += sum * e.value;
                }
            }
        }
    }

    // Σ_m G y y of two of the three, of each coupling: what derivatives of b by y are made of.
    void pair_products(const T *y, T *products) const {
        for (const Coupling &c : couplings)
            for (int without = 2; without >= 0; without--, products += q * q * MOST)
                multiply_channels(c, without == 0 ? 1 : 0, without == 2 ? 1 : 2, y, products);
    }
    std::size_t products_size() const { return couplings.size() * 3 * q * q * MOST; }

    // The change of b (features,) along a change of y (lm, q).
    template <class N> void push_forward(const T *products, const N *dy, N *db) const {
        int i = 0;
        for (const Coupling &c : couplings) {
            const T *t12 = products, *t13 = t12 + q * q * MOST, *t23 = t13 + q * q * MOST;
            const N *first = dy + c.l[0] * c.l[0] * q, *second = dy + c.l[1] * c.l[1] * q, *last = dy + c.l[2] * c.l[2] * q;
            for_places(c, [&](int q1, int q2, int q3) {
                N sum = {};
                for (int m = 0; m <= 2 * c.l[2]; m++) sum += last[m * q + q3] * t12[(m * q + q1) * q + q2];
                for (int m = 0; m <= 2 * c.l[1]; m++) sum += second[m * q + q2] * t13[(m * q + q1) * q + q3];
                for (int m = 0; m <= 2 * c.l[0]; m++) sum += first[m * q + q1] * t23[(m * q + q2) * q + q3];
                db[i] = sum * factors[i], i++;
            });
            products += 3 * q * q * MOST;
        }
    }

  private:
    // work(q1, q2, q3) for those that symmetry leaves distinct, in their order.
    template <class Work> GPMLP_INLINE void for_places(const Coupling &c, Work work) const {
        for (int q1 = 0; q1 < q; q1++)
            for (int q2 = c.l[0] == c.l[1] ? q1 : 0; q2 < q; q2++)
                for (int q3 = c.l[1] == c.l[2] ? q2 : 0; q3 < q; q3++) work(q1, q2, q3);
    }

    // out[m of the third, q of one, q of other] = Σ G y_one y_other.
    template <class N> void multiply_channels(const Coupling &c, int one, int other, const N *y, N *out) const {
        const int third = 3 - one - other;
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
};

} // namespace gpmlp
