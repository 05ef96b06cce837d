// A potential for runs of environments: local energies and pair gradients of all terms and baselines, and what is known
// of the error of a local energy.
#pragma once

#include <atomic>
#include <memory>
#include <optional>

#include "baselines.hpp"
#include "block.hpp"
#include "calibration.hpp"
#include "mean.hpp"
#include "novelty.hpp"
#include "pairs.hpp"
#include "tail.hpp"
#include "threads.hpp"
#include "variance.hpp"

namespace gpmlp {

constexpr int64_t ROWS = 60, MANY_ROWS = 240; // environments of a block, where features are few or many: then matrices are large
constexpr int64_t FEW_ROWS = 30;              // where variances are wanted, whose rows are as long as there are columns
constexpr int64_t LEAST_ROWS = 12;            // that are worth another thread
constexpr int MANY_FEATURES = 512;

// What evaluation fills, by environment or pair; null where it was not asked for, but for the first two.
struct Wanted {
    double *energies;           // eV
    double *gradients;          // (pairs, 3) ∂E/∂r_ij, eV/A
    double *variance = nullptr; // (environments, 2) eV², what the inducing set cannot represent (w = 1), what data leave
    double *sigma = nullptr;    // calibrated standard deviation of the local energy, eV
    double *novelty = nullptr;
    double *sums = nullptr; // (environments, 9) of its pairs: ∂E/∂r (3), eV/A, and r (x) ∂E/∂r, symmetrised, eV, in Voigt's order (6)
};

// What a block of environments of one species is evaluated from and to.
struct Run {
    const Surroundings<double> &given;
    const int64_t *first_pairs, *environments;
    int n, slot; // how many environments; place of their species in the model
    const Wanted &to;
    const LocalVariance *variance; // of the species, if it is wanted
    const Clusters *clusters;
    double *novelty; // (n,) of the run
};

// The environments of a run that an atom is part of.
struct Neighborhood {
    const Surroundings<double> &given;
    const int64_t *first_pairs, *neighbors, *environments, *atoms; // atom of each pair's neighbour; of these n environments, of each one
    int n;
    int64_t atom;
};

// One descriptor, and the mean of local energies for each central species.
struct Term {
    virtual ~Term() = default;
    // Adds to energies and gradients as term `k` of the model, and fills what else is wanted. False if there is a species
    // that the descriptor was not made for.
    virtual bool add(const Run &run, std::size_t k, LocalVariance::Scratch &of_variance) const = 0;
    // Of each environment the features and their derivatives with respect to the position of the atom, four rows of y, which is
    // zero before.
    virtual bool derivatives(const Neighborhood &around, double *y, int row) const = 0;
    virtual int features() const = 0;
    virtual double cutoff() const = 0; // A
};

template <class T> class SpectrumTerm : public Term {
    const PowerSpectrum<T> &spectrum;
    std::vector<const Mean<T> *> means; // by place of the species in the model; null where the term holds nothing of it

    struct Scratch {
        Block<T> block;
        typename Block<T>::Scratch of_block;
        MeanScratch of_mean;
        Clusters::Scratch of_clusters;
        Array<T> x, slopes;
        Array<double> wide, energies;
    };

  public:
    SpectrumTerm(const PowerSpectrum<T> &spectrum, std::vector<const Mean<T> *> means) : spectrum(spectrum), means(std::move(means)) {}

    int features() const override { return spectrum.features; }
    double cutoff() const override { return spectrum.weights.cutoff; }

    bool add(const Run &run, std::size_t k, LocalVariance::Scratch &of_variance) const override {
        static thread_local Scratch s;
        const int n = run.n, d = spectrum.features, row = PanelMatrix<T>::row_length(d);
        s.x.resize(std::size_t(n) * row), s.slopes.resize(std::size_t(n) * row), s.energies.resize(n);
        if (!s.block.expand(spectrum, run.given, run.first_pairs, run.environments, n, spectrum.weights.cutoff, true, s.of_block,
                            s.x.data(), row))
            return false;
        const Mean<T> *mean = means[run.slot];
        s.of_mean.kept.resize(n, run.variance && mean && mean->keeps_kernel() ? run.variance->shared_centres(k) : 0);
        if (mean) {
            (*mean)(n, s.x.data(), row, s.energies.data(), s.slopes.data(), s.of_mean);
            for (int i = 0; i < n; i++) run.to.energies[run.environments[i]] += s.energies[i];
            s.block.pull_back(n, s.x.data(), s.slopes.data(), row, s.of_block, run.to.gradients);
        }
        const bool far = k == 0 && run.clusters; // the space of the first descriptor
        const int long_row = PanelMatrix<double>::row_length(d);
        const double *x = run.variance || far ? wide(n, s, row, long_row) : nullptr;
        if (run.variance) run.variance->take(k, n, x, long_row, s.of_mean.kept, of_variance);
        if (far) (*run.clusters)(n, x, long_row, s.of_clusters, [&](int i, double novelty) { run.novelty[i] = novelty; });
        return true;
    }

    bool derivatives(const Neighborhood &around, double *y, int row) const override {
        static thread_local Scratch s;
        static thread_local Array<T> features, jacobian;
        const int n = around.n, d = spectrum.features, n_species = spectrum.n_species;
        features.resize(std::size_t(n) * d);
        if (!s.block.expand(spectrum, around.given, around.first_pairs, around.environments, n, spectrum.weights.cutoff, false, s.of_block,
                            features.data(), d))
            return false;
        for (int i = 0; i < n; i++, y += std::size_t(4) * row) {
            const int64_t e = around.environments[i], first = around.first_pairs[e];
            const bool central = around.atoms[e] == around.atom;
            const auto sign = [&](int64_t p) { return int(around.neighbors[p] == around.atom) - int(central); };
            const T *x = &features[std::size_t(i) * d];
            jacobian.resize(std::size_t(around.first_pairs[e + 1] - first) * 3 * d);
            s.block.jacobian(i, x, first, s.of_block, jacobian.data(), sign);
            widen(d, x, y);
            for (int q = s.block.pairs.starts[i * n_species]; q < s.block.pairs.starts[(i + 1) * n_species]; q++) {
                const int64_t p = s.block.pairs.order[q];
                const T *slope = &jacobian[std::size_t(p - first) * 3 * d];
                for (int a = 0; sign(p) && a < 3; a++)
                    for (int k = 0; k < d; k++) y[(a + 1) * row + k] += sign(p) * slope[a * d + k];
            }
        }
        return true;
    }

  private:
    // Rows of features in double precision.
    const double *wide(int n, Scratch &s, int row, int long_row) const {
        if constexpr (std::is_same_v<T, double>) {
            return s.x.data();
        } else {
            s.wide.resize(std::size_t(n) * long_row);
            for (int i = 0; i < n; i++) widen(spectrum.features, &s.x[std::size_t(i) * row], &s.wide[std::size_t(i) * long_row]);
            return s.wide.data();
        }
    }
};

class Model : public Object {
    Baselines baselines;
    int places[LARGEST_Z + 1]; // of atomic numbers

  public:
    const std::vector<int64_t> species; // atomic numbers, in the order of their places
    std::vector<std::unique_ptr<Term>> terms;
    std::vector<std::unique_ptr<Object>> made_of; // if it came from a file, what terms refer to
    std::vector<const LocalVariance *> variances; // by place of the species; empty where the model has none
    std::vector<const Clusters *> clusters;       // the same; null where training data hold nothing of the species
    std::shared_ptr<const Object> posterior;      // of force_variance.hpp, if it has one
    Calibration calibration;
    std::optional<Tail> tail; // which is no part of what environments give: engines add it

    Model(std::vector<int64_t> of_species, Baselines baselines) : baselines(std::move(baselines)), species(std::move(of_species)) {
        std::fill_n(places, LARGEST_Z + 1, -1);
        for (std::size_t k = species.size(); k--;)
            if (species[k] >= 0 && species[k] <= LARGEST_Z) places[species[k]] = int(k);
    }

    // Largest of the terms and baselines, A.
    double cutoff() const {
        double out = baselines.farthest;
        for (const auto &term : terms) out = std::max(out, term->cutoff());
        return out;
    }

    // Of an atomic number among the species of the model, -1 if it is none of them.
    int place_of(int64_t z) const { return z < 0 || z > LARGEST_Z ? -1 : places[z]; }

    bool knows(const Wanted &to) const { return (variances.size() || !(to.variance || to.sigma)) && (clusters.size() || !to.novelty); }

    // Local energies, and their sums: energies (structures,), forces (atoms, 3) and stresses (structures, 3, 3), by volumes.
    // `to` has the local energies and what is known of their errors; pair gradients need not be in it. False if a species is unknown.
    bool predict(const Surroundings<double> &given, int64_t n_structures, const int64_t *structure, const int64_t *neighbors,
                 const double *volumes, double *energies, double *forces, double *stresses, Wanted to, int64_t threads) const {
        const std::unique_ptr<double[]> made(to.gradients ? nullptr : new double[3 * given.n_pairs]), sums(new double[9 * given.n]);
        if (made) to.gradients = made.get();
        to.sums = sums.get();
        if (!evaluate(given, to, threads)) return false;
        std::fill_n(energies, n_structures, 0.0);
        std::fill_n(stresses, 9 * n_structures, 0.0);
        constexpr int VOIGT[6] = {0, 4, 8, 5, 2, 1};
        for (int64_t a = 0; a < given.n; a++) {
            const double *sums = to.sums + 9 * a;
            energies[structure[a]] += to.energies[a];
            for (int x = 0; x < 3; x++) forces[3 * a + x] = sums[x];
            for (int v = 0; v < 6; v++) stresses[9 * structure[a] + VOIGT[v]] += sums[3 + v];
        }
        for (int64_t p = 0; p < given.n_pairs; p++)
            for (int x = 0; x < 3; x++) forces[3 * neighbors[p] + x] -= to.gradients[3 * p + x];
        for (int64_t s = 0; s < n_structures; s++) {
            double *stress = stresses + 9 * s;
            for (const int v : VOIGT) stress[v] /= volumes[s];
            stress[3] = stress[1], stress[6] = stress[2], stress[7] = stress[5];
        }
        return true;
    }

    // Of all environments; gradients of pairs beyond all cutoffs are zero. False if a species is unknown.
    bool evaluate(const Surroundings<double> &given, const Wanted &to, int64_t threads) const {
        const std::vector<int64_t> first_pairs = given.first_pairs();
        std::vector<int64_t> order(given.n);
        std::vector<Run> runs;
        if (!divide(given, first_pairs.data(), threads, order, to, runs)) return false;
        std::atomic<bool> complete{true};
        Pool::share(runs.size(), threads, [&](int64_t r) {
            if (!evaluate_run(runs[r])) complete = false;
        });
        return complete;
    }

  private:
    bool evaluate_run(Run run) const {
        static thread_local LocalVariance::Scratch of_variance;
        double novelty[MANY_ROWS];
        std::fill_n(novelty, run.n, std::numeric_limits<double>::infinity());
        run.novelty = novelty;
        for (int i = 0; i < run.n; i++) {
            const int64_t e = run.environments[i];
            run.to.energies[e] = 0;
            std::fill(run.to.gradients + 3 * run.first_pairs[e], run.to.gradients + 3 * run.first_pairs[e + 1], 0.0);
        }
        for (std::size_t k = 0; k < terms.size(); k++)
            if (!terms[k]->add(run, k, of_variance)) return false;
        for (int i = 0; i < run.n; i++) {
            add_baselines(run, run.environments[i]);
            if (run.to.novelty) run.to.novelty[run.environments[i]] = novelty[i];
            if (run.to.sums) sum_pairs(run, run.environments[i]);
        }
        if (run.variance)
            run.variance->finish(run.n, of_variance, [&](int i, double inducing, double data) {
                const int64_t e = run.environments[i];
                if (run.to.variance) run.to.variance[2 * e] = inducing, run.to.variance[2 * e + 1] = data;
                if (run.to.sigma) run.to.sigma[e] = calibration.local_sigma(inducing, data, novelty[i]);
            });
        return true;
    }

    void sum_pairs(const Run &run, int64_t e) const {
        double x = 0, y = 0, z = 0, xx = 0, yy = 0, zz = 0, yz = 0, xz = 0, xy = 0;
        for (int64_t p = run.first_pairs[e]; p < run.first_pairs[e + 1]; p++) {
            const double *r = run.given.vectors + 3 * p, *g = run.to.gradients + 3 * p;
            x += g[0], y += g[1], z += g[2];
            xx += r[0] * g[0], yy += r[1] * g[1], zz += r[2] * g[2];
            yz += 0.5 * (r[1] * g[2] + r[2] * g[1]), xz += 0.5 * (r[0] * g[2] + r[2] * g[0]), xy += 0.5 * (r[0] * g[1] + r[1] * g[0]);
        }
        double *to = run.to.sums + 9 * e;
        for (const double sum : {x, y, z, xx, yy, zz, yz, xz, xy}) *to++ = sum;
    }

    // Environments of each species together, in runs whose features stay in cache, as many for each thread.
    bool divide(const Surroundings<double> &given, const int64_t *first_pairs, int64_t threads, std::vector<int64_t> &order,
                const Wanted &to, std::vector<Run> &runs) const {
        std::vector<int64_t> ends(species.size() + 1);
        for (int64_t e = 0; e < given.n; e++) {
            const int place = place_of(given.species[e]);
            if (place < 0) return false;
            ends[place + 1]++;
        }
        for (std::size_t k = 0; k < species.size(); k++) ends[k + 1] += ends[k];
        std::vector<int64_t> at(ends.begin(), ends.end() - 1);
        for (int64_t e = 0; e < given.n; e++) order[at[place_of(given.species[e])]++] = e;
        const bool errors = to.variance || to.sigma, far = to.novelty || (to.sigma && clusters.size() && calibration.typical_novelty > 0);
        int widest = 1;
        for (const auto &term : terms) widest = std::max(widest, term->features());
        const int64_t most = widest < MANY_FEATURES ? (errors ? FEW_ROWS : ROWS) : (errors ? ROWS : MANY_ROWS);
        for (std::size_t k = 0; k < species.size(); k++) {
            const int64_t count = ends[k + 1] - ends[k], rounds = (count + most * threads - 1) / (most * threads);
            const int64_t rows = std::max(LEAST_ROWS, (count + rounds * threads - 1) / std::max<int64_t>(1, rounds * threads));
            for (int64_t lo = ends[k]; lo < ends[k + 1]; lo += rows)
                runs.push_back({given, first_pairs, &order[lo], int(std::min(rows, ends[k + 1] - lo)), int(k), to,
                                errors ? variances[k] : nullptr, far ? clusters[k] : nullptr, nullptr});
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
            for (int k = 0; k < 3; k++) run.to.gradients[3 * p + k] += slope * v[k] / r;
        }
        run.to.energies[e] = (run.to.energies[e] + energy) + repulsion;
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
// spectrum, and what the means take, is in single precision.
GPMLP_API int64_t gpmlp_add_term(int64_t model, int64_t spectrum, int64_t single, int64_t n, const int64_t *means) {
    return gpmlp::guarded([&] {
        const auto add = [&](auto zero) {
            using T = decltype(zero);
            gpmlp::changed<gpmlp::Model>(model).terms.push_back(std::make_unique<gpmlp::SpectrumTerm<T>>(
                gpmlp::object<gpmlp::PowerSpectrum<T>>(spectrum), gpmlp::objects<gpmlp::Mean<T>>(n, means)));
        };
        single ? add(0.0f) : add(0.0);
        return 0;
    });
}

// c6 (species, species) eV A^6; begin, full, fall, outer: A, as in Tail.
GPMLP_API int64_t gpmlp_add_tail(int64_t model, int64_t n, const double *c6, double begin, double full, double fall, double outer) {
    return gpmlp::guarded([&] {
        gpmlp::changed<gpmlp::Model>(model).tail.emplace(n, c6, begin, full, fall, outer);
        return 0;
    });
}

// variances: addresses by place of the species, each there.
GPMLP_API int64_t gpmlp_add_variances(int64_t model, int64_t n, const int64_t *variances) {
    return gpmlp::guarded([&] {
        gpmlp::changed<gpmlp::Model>(model).variances = gpmlp::objects<gpmlp::LocalVariance>(n, variances);
        return 0;
    });
}

// clusters: addresses by place of the species, 0 where the training data hold nothing of it.
GPMLP_API int64_t gpmlp_add_novelty(int64_t model, int64_t n, const int64_t *clusters) {
    return gpmlp::guarded([&] {
        gpmlp::changed<gpmlp::Model>(model).clusters = gpmlp::objects<gpmlp::Clusters>(n, clusters);
        return 0;
    });
}

// numbers: share, three weights, scale, forbidden, typical novelty, misspecification, label noise; then those of
// LocalScale: force, and slope, middle, lowest and highest of three predictors.
GPMLP_API int64_t gpmlp_calibrate(int64_t model, const double *numbers) {
    return gpmlp::guarded([&] {
        const double *n = numbers, *of = n + 10;
        gpmlp::Calibration c{n[0], {n[1], n[2], n[3]}, n[4], n[5], n[6], n[7], n[8], {}};
        c.local.force = n[9];
        for (double *to : {c.local.slope, c.local.middle, c.local.lowest, c.local.highest}) std::copy_n(of, 3, to), of += 3;
        gpmlp::changed<gpmlp::Model>(model).calibration = c;
        return 0;
    });
}

// variance (environments, 2), sigma, novelty (environments,): null where they are not wanted. Status 1: a species is unknown; 2: the model
// does not hold what is wanted.
GPMLP_API int64_t gpmlp_evaluate(int64_t model, int64_t n, int64_t n_pairs, const int64_t *species, const int64_t *centers,
                                 const int64_t *neighbor_species, const double *vectors, double *energies, double *gradients,
                                 double *variance, double *sigma, double *novelty, int64_t threads) {
    return gpmlp::guarded([&] {
        const auto &of = gpmlp::object<gpmlp::Model>(model);
        const gpmlp::Surroundings<double> given{n, n_pairs, species, centers, neighbor_species, vectors};
        const gpmlp::Wanted to{energies, gradients, variance, sigma, novelty};
        return !of.knows(to) ? 2 : of.evaluate(given, to, threads) ? 0 : 1;
    });
}

// The same summed: energies (structures,), local (atoms,) eV, forces (atoms, 3) eV/A, stresses (structures, 3, 3) eV/A^3.
// structure: of each atom. volumes: A^3. What follows the stresses as in gpmlp_evaluate, null where it is not wanted.
GPMLP_API int64_t gpmlp_predict(int64_t model, int64_t n_structures, int64_t n, int64_t n_pairs, const int64_t *structure,
                                const int64_t *species, const int64_t *centers, const int64_t *neighbors, const int64_t *neighbor_species,
                                const double *vectors, const double *volumes, double *energies, double *local, double *forces,
                                double *stresses, double *gradients, double *variance, double *sigma, double *novelty, int64_t threads) {
    return gpmlp::guarded([&] {
        const auto &of = gpmlp::object<gpmlp::Model>(model);
        const gpmlp::Surroundings<double> given{n, n_pairs, species, centers, neighbor_species, vectors};
        const gpmlp::Wanted to{local, gradients, variance, sigma, novelty};
        if (!of.knows(to)) return 2;
        return of.predict(given, n_structures, structure, neighbors, volumes, energies, forces, stresses, to, threads) ? 0 : 1;
    });
}

// The same of atoms that have moved since their pairs were searched, for shifts (pairs, 3) by the rows of cells (structures, 3, 3), with
// the vectors (pairs, 3). Status 3, and nothing is predicted: in a structure an atom is half its room (structures,) or more from its
// reference (atoms, 3), or two are closer than `least`, A; else the calls (structures,) are counted. pair_threads: for the vectors.
GPMLP_API int64_t gpmlp_predict_moved(int64_t model, int64_t n_structures, int64_t n, int64_t n_pairs, const int64_t *structure,
                                      const int64_t *species, const int64_t *centers, const int64_t *neighbors,
                                      const int64_t *neighbor_species, const int64_t *shifts, const double *cells, const double *volumes,
                                      const double *reference, const double *room, double *calls, double least, const double *positions,
                                      double *vectors, double *energies, double *local, double *forces, double *stresses, int64_t threads,
                                      int64_t pair_threads) {
    return gpmlp::guarded([&] {
        std::vector<double> moved(n_structures);
        gpmlp::displacements(n, structure, positions, reference, n_structures, moved.data());
        for (int64_t s = 0; s < n_structures; s++)
            if (!(2 * moved[s] < room[s])) return 3;
        double closest;
        gpmlp::pair_vectors<double>(n_pairs, positions, cells, structure, {centers, neighbors, shifts}, vectors, &closest, pair_threads);
        if (!(closest >= least)) return 3;
        for (int64_t s = 0; s < n_structures; s++) calls[s]++;
        const gpmlp::Surroundings<double> given{n, n_pairs, species, centers, neighbor_species, vectors};
        const gpmlp::Wanted to{local, nullptr};
        const auto &of = gpmlp::object<gpmlp::Model>(model);
        return of.predict(given, n_structures, structure, neighbors, volumes, energies, forces, stresses, to, threads) ? 0 : 1;
    });
}
