// Neighbourhoods of a run of centres, as Python gives them, and as loops over species and lanes want their pairs.
#pragma once

#include "harmonics.hpp"
#include "power_spectrum.hpp"

namespace gpmlp {

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

    GPMLP_INLINE Directions<T> directions(int p) const { return {load(&x[p]), load(&y[p]), load(&z[p]), load(&inverse[p])}; }

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

} // namespace gpmlp
