// Expansions of all environments of surroundings, kept for their derivatives, and shared by threads: what
// descriptors/cpu.py calls.
#pragma once

#include <atomic>
#include <limits>
#include <memory>
#include <numeric>

#include "abi.hpp"
#include "block.hpp"
#include "threads.hpp"

namespace gpmlp {

constexpr int64_t BLOCK = 16; // environments that one thread expands together
constexpr double EVERYWHERE = std::numeric_limits<double>::infinity();

template <class T> typename Block<T>::Scratch &scratch_of_thread() {
    static thread_local typename Block<T>::Scratch scratch;
    return scratch;
}

// Features of surroundings, with what their derivatives need.
template <class T> class Expansion : public Object {
    const PowerSpectrum<T> &spectrum;
    const T *features; // (environments, features), of the caller, who keeps it
    std::vector<int64_t> first_pairs;
    std::vector<Block<T>> blocks;

  public:
    bool complete; // whether the spectrum was made for all species

    Expansion(const PowerSpectrum<T> &spectrum, const Surroundings<T> &given, T *features, int64_t threads)
        : spectrum(spectrum), features(features), first_pairs(given.first_pairs()), blocks((given.n + BLOCK - 1) / BLOCK) {
        std::atomic<bool> known{true};
        Pool::share(blocks.size(), threads, [&](int64_t b) {
            const int64_t lo = b * BLOCK, hi = std::min(given.n, lo + BLOCK);
            int64_t environments[BLOCK];
            std::iota(environments, environments + (hi - lo), lo);
            if (!blocks[b].expand(spectrum, given, first_pairs.data(), environments, int(hi - lo), EVERYWHERE, false,
                                  scratch_of_thread<T>(), features + lo * spectrum.features, spectrum.features))
                known = false;
        });
        complete = known;
    }

    // Pair gradients (pairs, 3) from cotangents of the features.
    void pull_back(const T *cotangents, T *out, int64_t threads) const {
        std::fill_n(out, 3 * first_pairs.back(), T(0));
        Pool::share(blocks.size(), threads, [&](int64_t b) {
            const int64_t lo = b * BLOCK, n = std::min(BLOCK, int64_t(first_pairs.size()) - 1 - lo), from = lo * spectrum.features;
            blocks[b].pull_back(int(n), features + from, cotangents + from, spectrum.features, scratch_of_thread<T>(), out);
        });
    }

    // ∂(features)/∂r (pairs, 3, features) of the environments lo to hi.
    void jacobian(int64_t lo, int64_t hi, T *out, int64_t threads) const {
        const int64_t begin = lo / BLOCK, last = (hi + BLOCK - 1) / BLOCK;
        Pool::share(std::max<int64_t>(0, last - begin), threads, [&](int64_t b) {
            b += begin;
            for (int64_t e = std::max(lo, b * BLOCK); e < std::min(hi, (b + 1) * BLOCK); e++)
                blocks[b].jacobian(int(e - b * BLOCK), features + e * spectrum.features, first_pairs[lo], scratch_of_thread<T>(), out,
                                   [](int64_t) { return true; });
        });
    }
};

} // namespace gpmlp

// sizes: n_max, l_max, number of species, intervals, largest atomic number + 1. table (intervals, 6, l_max + 1, n_max). channels
// (l_max + 1, species x n, kept). Arguments of gpmlp_add_four_body: four_body.hpp.
#define GPMLP_SPECTRUM(T, SUFFIX)                                                                                                          \
    GPMLP_API int64_t gpmlp_spectrum##SUFFIX(const int64_t *sizes, const int64_t *slots, const T *table, const T *prefactors,              \
                                             const T *center, const T *recurrence, double per_step, int64_t function, double cutoff,       \
                                             double width, double cutoff_exponent, double scale, double exponent) {                        \
        return gpmlp::guarded([&] {                                                                                                        \
            const gpmlp::NeighborWeights weights{function, cutoff, width, cutoff_exponent, scale, exponent};                               \
            return gpmlp::address_of(new gpmlp::PowerSpectrum<T>(sizes, slots, table, prefactors, center, recurrence, per_step, weights)); \
        });                                                                                                                                \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_compress##SUFFIX(int64_t spectrum, int64_t kept, const T *channels, const T *prefactors) {                     \
        return gpmlp::guarded([&] {                                                                                                        \
            gpmlp::changed<gpmlp::PowerSpectrum<T>>(spectrum).compress(int(kept), channels, prefactors);                                   \
            return 0;                                                                                                                      \
        });                                                                                                                                \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_add_four_body##SUFFIX(int64_t spectrum, const int64_t *sizes, const int64_t *degrees, const int64_t *starts,   \
                                                  const int64_t *places, const T *values, const T *factors, const T *channels,             \
                                                  const T *scales) {                                                                       \
        return gpmlp::guarded([&] {                                                                                                        \
            auto &to = gpmlp::changed<gpmlp::PowerSpectrum<T>>(spectrum);                                                                  \
            to.add(std::make_unique<gpmlp::FourBody<T>>(sizes, to.d_row, degrees, starts, places, values, factors, channels, scales));     \
            return 0;                                                                                                                      \
        });                                                                                                                                \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_expand##SUFFIX(int64_t spectrum, int64_t n, int64_t n_pairs, const int64_t *species, const int64_t *centers,   \
                                           const int64_t *neighbor_species, const T *vectors, T *features, int64_t threads) {              \
        return gpmlp::guarded([&] {                                                                                                        \
            const auto &made = gpmlp::object<gpmlp::PowerSpectrum<T>>(spectrum);                                                           \
            const gpmlp::Surroundings<T> given{n, n_pairs, species, centers, neighbor_species, vectors};                                   \
            auto out = std::make_unique<gpmlp::Expansion<T>>(made, given, features, threads);                                              \
            return out->complete ? gpmlp::address_of(out.release()) : 0;                                                                   \
        });                                                                                                                                \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_pull_back##SUFFIX(int64_t expansion, const T *cotangents, T *out, int64_t threads) {                           \
        return gpmlp::guarded([&] {                                                                                                        \
            gpmlp::object<gpmlp::Expansion<T>>(expansion).pull_back(cotangents, out, threads);                                             \
            return 0;                                                                                                                      \
        });                                                                                                                                \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_jacobian##SUFFIX(int64_t expansion, int64_t lo, int64_t hi, T *out, int64_t threads) {                         \
        return gpmlp::guarded([&] {                                                                                                        \
            gpmlp::object<gpmlp::Expansion<T>>(expansion).jacobian(lo, hi, out, threads);                                                  \
            return 0;                                                                                                                      \
        });                                                                                                                                \
    }

GPMLP_SPECTRUM(double, _f64)
GPMLP_SPECTRUM(float, _f32)
