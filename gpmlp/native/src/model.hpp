// A potential's mean for runs of environments: local energies and pair gradients of all terms and baselines.
#pragma once

#include <atomic>
#include <memory>

#include "baselines.hpp"
#include "mean.hpp"
#include "pairs.hpp"
#include "power_spectrum.hpp"
#include "threads.hpp"

namespace gpmlp {

constexpr int64_t ROWS = 60, MANY_ROWS = 240; // environments of a block, where features are few or many: then matrices are large
constexpr int64_t LEAST_ROWS = 12;            // that are worth another thread
constexpr int MANY_FEATURES = 512;

// What a block of environments of one species is evaluated from and to.
struct Run {
    const Surroundings<double> &given;
    const int64_t *first_pairs, *environments;
    int n, slot;       // how many environments; place of their species in the model
    double *energies;  // of all environments, eV
    double *gradients; // (pairs, 3) ∂E/∂r_ij of all pairs, eV/A
};

// One descriptor, and the mean of local energies for each central species.
struct Term {
    virtual ~Term() = default;
    // Adds to energies and gradients; features go to `out` (environments, features) if it is given. False if there is a
    // species that the descriptor was not made for.
    virtual bool add(const Run &run, double *out) const = 0;
    virtual int features() const = 0;
    virtual double cutoff() const = 0; // A
};

template <class T> class SpectrumTerm : public Term {
    const PowerSpectrum<T> &spectrum;
    std::vector<const Mean *> means; // by place of the species in the model; null where the term holds nothing of it

    struct Scratch {
        Block<T> block;
        typename Block<T>::Scratch of_block;
        Mean::Scratch of_mean;
        Array<T> narrow;
        Array<double> x, slopes, energies;
    };

  public:
    SpectrumTerm(const PowerSpectrum<T> &spectrum, std::vector<const Mean *> means) : spectrum(spectrum), means(std::move(means)) {}

    int features() const override { return spectrum.features; }
    double cutoff() const override { return spectrum.weights.cutoff; }

    bool add(const Run &run, double *out) const override {
        static thread_local Scratch s;
        const int d = spectrum.features, row = PanelMatrix<double>::row_length(d);
        s.x.resize(std::size_t(run.n) * row), s.slopes.resize(std::size_t(run.n) * row), s.energies.resize(run.n);
        if (!expand(run, s, row)) return false;
        for (int i = 0; out && i < run.n; i++) std::copy_n(&s.x[std::size_t(i) * row], d, out + run.environments[i] * d);
        if (!means[run.slot]) return true;
        (*means[run.slot])(run.n, s.x.data(), row, s.energies.data(), s.slopes.data(), s.of_mean);
        for (int i = 0; i < run.n; i++) {
            run.energies[run.environments[i]] += s.energies[i];
            s.block.pull_back(i, &s.x[std::size_t(i) * row], &s.slopes[std::size_t(i) * row], s.of_block, run.gradients);
        }
        return true;
    }

  private:
    // Features in double precision, of unit norm to its rounding.
    bool expand(const Run &run, Scratch &s, int row) const {
        const double reach = spectrum.weights.cutoff;
        if constexpr (std::is_same_v<T, double>) {
            return s.block.expand(spectrum, run.given, run.first_pairs, run.environments, run.n, reach, true, s.of_block, s.x.data(), row);
        } else {
            const int d = spectrum.features;
            s.narrow.resize(std::size_t(run.n) * d);
            if (!s.block.expand(spectrum, run.given, run.first_pairs, run.environments, run.n, reach, true, s.of_block, s.narrow.data(), d))
                return false;
            for (int i = 0; i < run.n; i++) {
                double *x = &s.x[std::size_t(i) * row];
                for (int k = 0; k < d; k++) x[k] = s.narrow[std::size_t(i) * d + k];
                const double inverse = 1 / std::max(1e-12, std::sqrt(dot(x, x, d)));
                for (int k = 0; k < d; k++) x[k] *= inverse;
            }
            return true;
        }
    }
};

class Model : public Object {
    Baselines baselines;

  public:
    const std::vector<int64_t> species; // atomic numbers, in the order of their places
    std::vector<std::unique_ptr<Term>> terms;
    std::vector<std::unique_ptr<Object>> made_of; // if it came from a file, what terms refer to

    Model(std::vector<int64_t> species, Baselines baselines) : baselines(std::move(baselines)), species(std::move(species)) {}

    // Largest of the terms and baselines, A.
    double cutoff() const {
        double out = baselines.farthest;
        for (const auto &term : terms) out = std::max(out, term->cutoff());
        return out;
    }

    // Local energies, and their sums: energies (structures,), forces (atoms, 3) and stresses (structures, 3, 3), by volumes.
    // False if a species is unknown.
    bool predict(const Surroundings<double> &given, int64_t n_structures, const int64_t *structure, const int64_t *neighbors,
                 const double *volumes, double *energies, double *local, double *forces, double *stresses, int64_t threads) const {
        const std::unique_ptr<double[]> gradients(new double[3 * given.n_pairs]);
        const std::vector<double *> no_features(terms.size());
        if (!evaluate(given, local, gradients.get(), no_features.data(), threads)) return false;
        std::fill_n(energies, n_structures, 0.0);
        std::fill_n(forces, 3 * given.n, 0.0);
        std::fill_n(stresses, 9 * n_structures, 0.0);
        for (int64_t a = 0; a < given.n; a++) energies[structure[a]] += local[a];
        add_pair_gradients(given.n_pairs, structure, given.centers, neighbors, given.vectors, gradients.get(), forces, stresses);
        for (int64_t s = 0; s < n_structures; s++) {
            double *stress = stresses + 9 * s;
            for (int x = 0; x < 3; x++)
                for (int y = 0; y <= x; y++)
                    stress[3 * x + y] = stress[3 * y + x] = 0.5 * (stress[3 * x + y] + stress[3 * y + x]) / volumes[s];
        }
        return true;
    }

    // Energies of all environments and gradients of all pairs, those of pairs beyond all cutoffs zero; features of term
    // k into features[k] unless that is null. False if a species is unknown.
    bool evaluate(const Surroundings<double> &given, double *energies, double *gradients, double *const *features, int64_t threads) const {
        const std::vector<int64_t> first_pairs = given.first_pairs();
        std::vector<int64_t> order(given.n);
        std::vector<Run> runs;
        if (!divide(given, first_pairs.data(), threads, order, energies, gradients, runs)) return false;
        std::atomic<bool> complete{true};
        Pool::share(runs.size(), threads, [&](int64_t r) {
            const Run &run = runs[r];
            for (int i = 0; i < run.n; i++) {
                const int64_t e = run.environments[i];
                energies[e] = 0;
                std::fill(gradients + 3 * first_pairs[e], gradients + 3 * first_pairs[e + 1], 0.0);
            }
            for (std::size_t k = 0; k < terms.size(); k++)
                if (!terms[k]->add(run, features[k])) complete = false;
            for (int i = 0; i < run.n; i++) add_baselines(run, run.environments[i]);
        });
        return complete;
    }

  private:
    int place_of(int64_t z) const {
        for (std::size_t k = 0; k < species.size(); k++)
            if (species[k] == z) return int(k);
        return -1;
    }

    // Environments of each species together, in runs whose features stay in cache, as many for each thread.
    bool divide(const Surroundings<double> &given, const int64_t *first_pairs, int64_t threads, std::vector<int64_t> &order,
                double *energies, double *gradients, std::vector<Run> &runs) const {
        std::vector<int64_t> ends(species.size() + 1);
        for (int64_t e = 0; e < given.n; e++) {
            const int place = place_of(given.species[e]);
            if (place < 0) return false;
            ends[place + 1]++;
        }
        for (std::size_t k = 0; k < species.size(); k++) ends[k + 1] += ends[k];
        std::vector<int64_t> at(ends.begin(), ends.end() - 1);
        for (int64_t e = 0; e < given.n; e++) order[at[place_of(given.species[e])]++] = e;
        int widest = 1;
        for (const auto &term : terms) widest = std::max(widest, term->features());
        const int64_t most = widest < MANY_FEATURES ? ROWS : MANY_ROWS;
        for (std::size_t k = 0; k < species.size(); k++) {
            const int64_t count = ends[k + 1] - ends[k], rounds = (count + most * threads - 1) / (most * threads);
            const int64_t rows = std::max(LEAST_ROWS, (count + rounds * threads - 1) / std::max<int64_t>(1, rounds * threads));
            for (int64_t lo = ends[k]; lo < ends[k + 1]; lo += rows)
                runs.push_back({given, first_pairs, &order[lo], int(std::min(rows, ends[k + 1] - lo)), int(k), energies, gradients});
        }
        return true;
    }

    void add_baselines(const Run &run, int64_t e) const {
        double energy = baselines.isolated[run.slot], repulsion = 0;
        const double far = baselines.farthest * baselines.farthest;
        for (int64_t p = run.first_pairs[e]; far > 0 && p < run.first_pairs[e + 1]; p++) {
            const double *v = run.given.vectors + 3 * p, square = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
            if (!(square < far)) continue;
            const int other = place_of(run.given.neighbor_species[p]);
            const double r = std::sqrt(square);
            if (other < 0 || !(r < baselines.outer[run.slot * species.size() + other])) continue;
            double slope;
            repulsion += baselines.repulsion(run.slot, other, r, slope);
            for (int k = 0; k < 3; k++) run.gradients[3 * p + k] += slope * v[k] / r;
        }
        run.energies[e] = (run.energies[e] + energy) + repulsion;
    }
};

} // namespace gpmlp

// isolated (species,) eV; inner, outer (species, species) A, outer 0 where there is no repulsion.
GPMLP_API int64_t gpmlp_model(int64_t n, const int64_t *species, const double *isolated, const double *inner, const double *outer,
                              double coulomb) {
    return gpmlp::guarded([&] {
        gpmlp::Baselines b{{isolated, isolated + n}, {species, species + n}, {inner, inner + n * n}, {outer, outer + n * n}, coulomb, 0};
        for (double r : b.outer) b.farthest = std::max(b.farthest, r);
        return gpmlp::address_of(new gpmlp::Model({species, species + n}, std::move(b)));
    });
}

// means: addresses by place of the species in the model, 0 where the term holds nothing of it; single: whether the
// spectrum is in single precision.
GPMLP_API int64_t gpmlp_add_term(int64_t model, int64_t spectrum, int64_t single, int64_t n, const int64_t *means) {
    return gpmlp::guarded([&] {
        std::vector<const gpmlp::Mean *> of_species;
        for (int64_t k = 0; k < n; k++) of_species.push_back(means[k] ? &gpmlp::object<gpmlp::Mean>(means[k]) : nullptr);
        auto &terms = const_cast<gpmlp::Model &>(gpmlp::object<gpmlp::Model>(model)).terms;
        if (single)
            terms.push_back(std::make_unique<gpmlp::SpectrumTerm<float>>(gpmlp::object<gpmlp::PowerSpectrum<float>>(spectrum), of_species));
        else
            terms.push_back(
                std::make_unique<gpmlp::SpectrumTerm<double>>(gpmlp::object<gpmlp::PowerSpectrum<double>>(spectrum), of_species));
        return 0;
    });
}

// features: for each term the address of (environments, features) numbers to fill, or 0. Status 1: a species is
// unknown.
GPMLP_API int64_t gpmlp_evaluate(int64_t model, int64_t n, int64_t n_pairs, const int64_t *species, const int64_t *centers,
                                 const int64_t *neighbor_species, const double *vectors, double *energies, double *gradients,
                                 const int64_t *features, int64_t threads) {
    return gpmlp::guarded([&] {
        const gpmlp::Surroundings<double> given{n, n_pairs, species, centers, neighbor_species, vectors};
        const auto *addresses = reinterpret_cast<double *const *>(features);
        return gpmlp::object<gpmlp::Model>(model).evaluate(given, energies, gradients, addresses, threads) ? 0 : 1;
    });
}

// The same summed: energies (structures,), local (atoms,) eV, forces (atoms, 3) eV/A, stresses (structures, 3, 3) eV/A^3.
// structure: of each atom. volumes: A^3.
GPMLP_API int64_t gpmlp_predict(int64_t model, int64_t n_structures, int64_t n, int64_t n_pairs, const int64_t *structure,
                                const int64_t *species, const int64_t *centers, const int64_t *neighbors, const int64_t *neighbor_species,
                                const double *vectors, const double *volumes, double *energies, double *local, double *forces,
                                double *stresses, int64_t threads) {
    return gpmlp::guarded([&] {
        const gpmlp::Surroundings<double> given{n, n_pairs, species, centers, neighbor_species, vectors};
        return gpmlp::object<gpmlp::Model>(model).predict(given, n_structures, structure, neighbors, volumes, energies, local, forces,
                                                          stresses, threads)
                   ? 0
                   : 1;
    });
}
