// Loops over pairs of atoms: their order, their vectors, those within a cutoff, sums of pair gradients to forces and
// virials.
//
// Pairs are (centre i, neighbour j, shift of j by lattice vectors); vectors and shifts have three numbers each, cells
// nine, the rows of which are lattice vectors. Nothing here is contracted: a pair has the same vector, to the last bit,
// whatever the instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "abi.hpp"
#include "threads.hpp"

namespace gpmlp {

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

// r = r_j + shift . cell - r_i; the one place where the order of these sums is laid down.
template <class T> inline void pair_vector(const T *from, const T *to, const int64_t *shift, const T *cell, T *r) {
    for (int x = 0; x < 3; x++) {
        const double shifted = shift[0] * double(cell[x]) + shift[1] * double(cell[3 + x]) + shift[2] * double(cell[6 + x]);
        r[x] = T((to[x] + shifted) - from[x]);
    }
}

template <class T> inline T square(const T *r) { return r[0] * r[0] + r[1] * r[1] + r[2] * r[2]; }


// Place of the shortest vector; `length` is set to its length.
template <class T> int64_t shortest_vector(int64_t n, const T *vectors, double *length) {
    int64_t where = 0;
    double least = std::numeric_limits<double>::infinity();
    for (int64_t p = 0; p < n; p++) {
        const double here = square(vectors + 3 * p);
        if (here < least) {
            where = p;
            least = here;
        }
    }
    *length = std::sqrt(least);
    return where;
}

// Pairs that are read, and pairs that are written with their vectors.
struct PairList {
    const int64_t *centers, *neighbors, *shifts;
};

// Vectors of the pairs first to last, and the shortest distance of them, squared.
template <class T>
double vectors_of(int64_t first, int64_t last, const T *positions, const T *cells, const int64_t *structure, const PairList &pairs,
                  T *out) {
    double least = std::numeric_limits<double>::infinity();
    for (int64_t p = first; p < last; p++) {
        const int64_t i = pairs.centers[p], j = pairs.neighbors[p];
        pair_vector(positions + 3 * i, positions + 3 * j, pairs.shifts + 3 * p, cells + 9 * structure[i], out + 3 * p);
        const double here = square(out + 3 * p);
        least = here < least ? here : least;
    }
    return least;
}

template <class T> struct NearPairs {
    int64_t *centers, *neighbors, *shifts;
    T *vectors;

    void move(int64_t from, int64_t n, int64_t to) const {
        std::copy_n(centers + from, n, centers + to);
        std::copy_n(neighbors + from, n, neighbors + to);
        std::copy_n(shifts + 3 * from, 3 * n, shifts + 3 * to);
        std::copy_n(vectors + 3 * from, 3 * n, vectors + 3 * to);
    }
};

// Of the pairs first to last those closer than the cutoff, in their order, to `out` from `first` on; `least` is set to
// the shortest distance of all, squared. Returns how many they are.
template <class T>
int64_t filter_pairs(int64_t first, int64_t last, const T *positions, const T *cells, const int64_t *structure, const PairList &pairs,
                     double cutoff, const NearPairs<T> &out, double &least) {
    int64_t kept = first;
    least = std::numeric_limits<double>::infinity();
    for (int64_t p = first; p < last; p++) { // what is too far is written over by the next
        const int64_t i = pairs.centers[p], j = pairs.neighbors[p], *shift = pairs.shifts + 3 * p;
        T *vector = out.vectors + 3 * kept;
        out.centers[kept] = i;
        out.neighbors[kept] = j;
        for (int x = 0; x < 3; x++) out.shifts[3 * kept + x] = shift[x];
        pair_vector(positions + 3 * i, positions + 3 * j, shift, cells + 9 * structure[i], vector);
        const double here = square(vector);
        least = here < least ? here : least;
        kept += here < cutoff * cutoff;
    }
    return kept - first;
}

// The longest way from the reference of an atom of each structure; no number where one of them is none.
template <class T>
void displacements(int64_t n_atoms, const int64_t *structure, const T *positions, const T *reference, int64_t n_structures, T *out) {
    std::fill_n(out, n_structures, T(0));
    for (int64_t a = 0; a < n_atoms; a++) {
        const T *to = positions + 3 * a, *from = reference + 3 * a, way[3] = {to[0] - from[0], to[1] - from[1], to[2] - from[2]};
        const T here = square(way);
        T &most = out[structure[a]];
        if (here > most || here != here) most = here;
    }
    for (int64_t s = 0; s < n_structures; s++) out[s] = std::sqrt(out[s]);
}

// F_i = sum_j (g_ij - g_ji) added to `forces` and sum r_ij (x) g_ij to `virials`, in the order of pairs.
template <class T>
void add_pair_gradients(int64_t n, const int64_t *structure, const int64_t *centers, const int64_t *neighbors, const T *vectors,
                        const T *gradients, T *forces, T *virials) {
    for (int64_t p = 0; p < n; p++) {
        const T *r = vectors + 3 * p, *g = gradients + 3 * p;
        T *on_center = forces + 3 * centers[p], *on_neighbor = forces + 3 * neighbors[p];
        T *virial = virials + 9 * structure[centers[p]];
        for (int x = 0; x < 3; x++) {
            on_center[x] += g[x];
            on_neighbor[x] -= g[x];
            for (int y = 0; y < 3; y++) virial[3 * y + x] += r[y] * g[x];
        }
    }
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// Vectors of all pairs; `closest` is set to the shortest distance of all.
template <class T>
void pair_vectors(int64_t n, const T *positions, const T *cells, const int64_t *structure, const PairList &pairs, T *out, double *closest,
                  int64_t threads) {
    const int64_t shares = std::max<int64_t>(1, threads);
    std::vector<double> least(shares);
    Pool::share(shares, threads, [&](int64_t s) {
        least[s] = vectors_of(n * s / shares, n * (s + 1) / shares, positions, cells, structure, pairs, out);
    });
    *closest = std::sqrt(*std::min_element(least.begin(), least.end()));
}

// The pairs closer than the cutoff, in their order, to `out`, which has room for all; `closest` is set to the shortest
// distance of all. Returns how many they are.
template <class T>
int64_t pairs_within(int64_t n, const T *positions, const T *cells, const int64_t *structure, const PairList &pairs, double cutoff,
                     const NearPairs<T> &out, double *closest, int64_t threads) {
    const int64_t shares = std::max<int64_t>(1, threads);
    std::vector<int64_t> counts(shares);
    std::vector<double> least(shares);
    Pool::share(shares, threads, [&](int64_t s) {
        const int64_t first = n * s / shares, last = n * (s + 1) / shares;
        counts[s] = filter_pairs(first, last, positions, cells, structure, pairs, cutoff, out, least[s]);
    });
    int64_t kept = counts[0];
    for (int64_t s = 1; s < shares; kept += counts[s++]) out.move(n * s / shares, counts[s], kept);
    *closest = std::sqrt(*std::min_element(least.begin(), least.end()));
    return kept;
}

inline bool before(const int64_t *a, const int64_t *b) {
    for (int x = 0; x < 3; x++) {
        if (a[x] != b[x]) return a[x] < b[x];
    }
    return false;
}

// Pairs (i, j), both directions of each, and their shifts, from any order into that of i, j and shift: two passes that
// keep the order of equals, by j and then by i. Atoms are counted from 0 to n_atoms in `pairs`, from `first` in i and
// j.
inline void sort_pairs(int64_t n, const int64_t *pairs, const int32_t *shifts, int64_t n_atoms, int64_t first, int64_t *i, int64_t *j,
                       int64_t *images) {
    std::vector<int64_t> starts(n_atoms + 1, 0), order(n);
    for (int64_t p = 0; p < n; p++) starts[pairs[2 * p] + 1]++;
    for (int64_t a = 0; a < n_atoms; a++) starts[a + 1] += starts[a];
    std::vector<int64_t> at = starts; // as often as an atom is i it is j
    for (int64_t p = 0; p < n; p++) order[at[pairs[2 * p + 1]]++] = p;
    for (const int64_t p : order) {
        const int64_t k = starts[pairs[2 * p]]++;
        i[k] = pairs[2 * p] + first;
        j[k] = pairs[2 * p + 1] + first;
        for (int x = 0; x < 3; x++) images[3 * k + x] = shifts[3 * p + x];
    }
    for (int64_t k = 1; k < n; k++) { // an atom and several images of another, in small cells
        for (int64_t t = k; t && i[t] == i[t - 1] && j[t] == j[t - 1] && before(images + 3 * t, images + 3 * (t - 1)); t--) {
            for (int x = 0; x < 3; x++) std::swap(images[3 * t + x], images[3 * (t - 1) + x]);
        }
    }
}

} // namespace gpmlp

GPMLP_API int64_t gpmlp_sort_pairs(int64_t n, const int64_t *pairs, const int32_t *shifts, int64_t n_atoms, int64_t first, int64_t *i,
                                   int64_t *j, int64_t *images) {
    return gpmlp::guarded([&] {
        gpmlp::sort_pairs(n, pairs, shifts, n_atoms, first, i, j, images);
        return 0;
    });
}

#define GPMLP_PAIRS(T, SUFFIX)                                                                                                             \
    GPMLP_API int64_t gpmlp_pair_vectors##SUFFIX(int64_t n, const T *positions, const T *cells, const int64_t *structure,                  \
                                                 const int64_t *centers, const int64_t *neighbors, const int64_t *shifts, T *out,          \
                                                 double *closest, int64_t threads) {                                                       \
        return gpmlp::guarded([&] {                                                                                                        \
            gpmlp::pair_vectors<T>(n, positions, cells, structure, {centers, neighbors, shifts}, out, closest, threads);                   \
            return 0;                                                                                                                      \
        });                                                                                                                                \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_shortest_vector##SUFFIX(int64_t n, const T *vectors, double *length) {                                         \
        return gpmlp::shortest_vector(n, vectors, length);                                                                                 \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_pairs_within##SUFFIX(int64_t n, const T *positions, const T *cells, const int64_t *structure,                  \
                                                 const int64_t *centers, const int64_t *neighbors, const int64_t *shifts, double cutoff,   \
                                                 int64_t *i, int64_t *j, int64_t *images, T *r, double *closest, int64_t threads) {        \
        return gpmlp::guarded([&] {                                                                                                        \
            return gpmlp::pairs_within<T>(n, positions, cells, structure, {centers, neighbors, shifts}, cutoff, {i, j, images, r},         \
                                          closest, threads);                                                                               \
        });                                                                                                                                \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_displacements##SUFFIX(int64_t n_atoms, const int64_t *structure, const T *positions, const T *reference,       \
                                                  int64_t n_structures, T *out) {                                                          \
        gpmlp::displacements(n_atoms, structure, positions, reference, n_structures, out);                                                 \
        return 0;                                                                                                                          \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_add_pair_gradients##SUFFIX(int64_t n, const int64_t *structure, const int64_t *centers,                        \
                                                       const int64_t *neighbors, const T *vectors, const T *gradients, T *forces,          \
                                                       T *virials) {                                                                       \
        gpmlp::add_pair_gradients(n, structure, centers, neighbors, vectors, gradients, forces, virials);                                  \
        return 0;                                                                                                                          \
    }

GPMLP_PAIRS(double, _f64)
GPMLP_PAIRS(float, _f32)
