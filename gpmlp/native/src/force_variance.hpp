// Standard deviations of the force components of single atoms, from all environments that contain them: the equations of
// gp/variance.py, gp/prior.py and uncertainty/calibration.py.
#pragma once

#include <array>
#include <numeric>

#include "model.hpp"

namespace gpmlp {

using Square = std::array<std::array<double, 3>, 3>; // a covariance of force components

// Σ_k f(λ_k) v_k v_kᵀ of the eigenvalues and eigenvectors of a symmetric matrix, by Jacobi's rotations (Golub, Van Loan,
// Matrix Computations (2013), section 8.5).
template <class F> Square on_eigenvalues(Square a, F f) {
    Square v = {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}}, out = {};
    for (int sweep = 0; sweep < 30; sweep++) {
        for (int p = 0; p < 2; p++) {
            for (int q = p + 1; q < 3; q++) {
                if (a[p][q] == 0) continue;
                const double tau = (a[q][q] - a[p][p]) / (2 * a[p][q]), t = (tau < 0 ? -1 : 1) / (std::abs(tau) + std::hypot(1, tau));
                const double c = 1 / std::hypot(1, t), s = t * c;
                for (auto *m : {&a, &v})
                    for (int k = 0; k < 3; k++) {
                        const double x = (*m)[k][p], y = (*m)[k][q];
                        (*m)[k][p] = c * x - s * y, (*m)[k][q] = s * x + c * y;
                    }
                for (int k = 0; k < 3; k++) {
                    const double x = a[p][k], y = a[q][k];
                    a[p][k] = c * x - s * y, a[q][k] = s * x + c * y;
                }
                a[p][q] = a[q][p] = 0;
            }
        }
    }
    for (int k = 0; k < 3; k++) {
        const double value = f(a[k][k]);
        for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++) out[i][j] += value * v[i][k] * v[j][k];
    }
    return out;
}

// The posterior covariance of all inducing variables, as factors.
class Posterior : public Object {
  public:
    // Inducing variables of one species and descriptor, from column `from` on; L of their covariance, row by row.
    struct Block {
        int term, slot;
        const InducingColumns *columns;
        int64_t from;
        Array<double> lower;
    };

    std::vector<Block> blocks; // term by term
    std::vector<Kernel> kernels;
    std::vector<double> prior;    // (terms, species) δ², eV²
    Array<double> signal, factor; // δ of each column; Rᵀ, row by row
    int64_t columns = 0;

    // a = D L⁻¹ k and b = R⁻ᵀ a, in place of rows k (3, columns).
    void whiten(Array<double> &a, Array<double> &b) const {
        for (const Block &block : blocks)
            for (int x = 0; x < 3; x++) solve(block.lower.data(), block.columns->columns(), &a[x * columns + block.from]);
        b.resize(a.size());
        for (int x = 0; x < 3; x++) {
            double *of = &a[x * columns], *to = &b[x * columns];
            for (int64_t k = 0; k < columns; k++) to[k] = of[k] *= signal[k];
            solve(factor.data(), columns, to);
        }
    }

  private:
    // In place of y the solution of L x = y, L in rows of 1, 2, ... numbers.
    static void solve(const double *lower, int64_t n, double *y) {
        for (int64_t i = 0; i < n; lower += ++i) y[i] = (y[i] - dot(lower, y, int(i))) / lower[i];
    }
};

// Atoms whose standard deviations are wanted, and the environments that they are part of.
class ForceVariance {
    const Model &model;
    const Posterior &posterior;
    const int64_t n_chosen, *chosen;
    std::vector<int64_t> kept, species, centers, neighbors, neighbor_species; // environments, and of these alone
    std::vector<double> vectors;
    std::vector<std::vector<int>> members; // of each atom chosen: environments, by species

    struct Scratch {
        LocalVariance::Scratch of_columns;
        Array<double> y, products, a, b;
    };

  public:
    ForceVariance(const Model &model, const Posterior &posterior, const Surroundings<double> &given, const int64_t *neighbor,
                  int64_t n_chosen, const int64_t *chosen)
        : model(model), posterior(posterior), n_chosen(n_chosen), chosen(chosen), members(n_chosen) {
        std::vector<int64_t> place(given.n, -1), number(given.n, -1);
        for (int64_t c = 0; c < n_chosen; c++) place[chosen[c]] = c;
        std::vector<bool> wanted(given.n);
        for (int64_t c = 0; c < n_chosen; c++) wanted[chosen[c]] = true;
        for (int64_t p = 0; p < given.n_pairs; p++)
            if (place[neighbor[p]] >= 0) wanted[given.centers[p]] = true;
        for (int64_t e = 0; e < given.n; e++)
            if (wanted[e]) number[e] = int64_t(kept.size()), kept.push_back(e), species.push_back(given.species[e]);
        for (int64_t c = 0; c < n_chosen; c++) members[c].push_back(int(number[chosen[c]]));
        for (int64_t p = 0; p < given.n_pairs; p++) {
            const int64_t e = number[given.centers[p]];
            if (e < 0) continue;
            centers.push_back(e), neighbors.push_back(neighbor[p]), neighbor_species.push_back(given.neighbor_species[p]);
            vectors.insert(vectors.end(), given.vectors + 3 * p, given.vectors + 3 * p + 3);
            if (const int64_t c = place[neighbor[p]]; c >= 0) members[c].push_back(int(e));
        }
        for (auto &mine : members) {
            std::sort(mine.begin(), mine.end(), [&](int a, int b) { return std::pair(species[a], a) < std::pair(species[b], b); });
            mine.erase(std::unique(mine.begin(), mine.end()), mine.end());
        }
    }

    // sigma (atoms chosen, 3), eV/A. False if a species is unknown.
    bool operator()(double *sigma, int64_t threads) const {
        const Surroundings<double> given{int64_t(kept.size()), int64_t(centers.size()), species.data(),
                                         centers.data(),       neighbor_species.data(), vectors.data()};
        std::vector<double> energies(given.n), gradients(3 * given.n_pairs), novelty(given.n, 0.0), forces(3 * n_chosen, 0.0);
        const bool widened = model.calibration.typical_novelty > 0 && model.clusters.size();
        const Wanted to{energies.data(), gradients.data(), nullptr, nullptr, widened ? novelty.data() : nullptr};
        if (!model.evaluate(given, to, threads)) return false;
        const std::vector<int64_t> first_pairs = given.first_pairs();
        std::atomic<bool> complete{true};
        Pool::share(n_chosen, threads, [&](int64_t c) {
            double force[3] = {};
            int own = 0;
            for (int e : members[c]) {
                if (kept[e] == chosen[c]) own = e;
                for (int64_t p = first_pairs[e]; p < first_pairs[e + 1]; p++) {
                    const double sign = (kept[e] == chosen[c]) - (neighbors[p] == chosen[c]);
                    for (int x = 0; x < 3; x++) force[x] += sign * gradients[3 * p + x];
                }
            }
            if (!of_atom(given, first_pairs, c, force, model.calibration.widening(novelty[own]), sigma + 3 * c)) complete = false;
        });
        return complete;
    }

  private:
    bool of_atom(const Surroundings<double> &given, const std::vector<int64_t> &first_pairs, int64_t c, const double *force,
                 double widening, double *sigma) const {
        static thread_local Scratch s;
        const std::vector<int> &mine = members[c];
        std::vector<int64_t> environments(mine.begin(), mine.end());
        const int n = int(mine.size()), n_species = int(model.species.size());
        s.a.assign(3 * posterior.columns, 0);
        Square prior = {};
        for (std::size_t k = 0; k < model.terms.size(); k++) {
            const int row = PanelMatrix<double>::row_length(model.terms[k]->features());
            s.y.assign(std::size_t(4) * n * row, 0);
            const Neighborhood around{given, first_pairs.data(), neighbors.data(), environments.data(), kept.data(), n, chosen[c]};
            if (!model.terms[k]->derivatives(around, s.y.data(), row)) return false;
            for (int lo = 0, hi; lo < n; lo = hi) {
                const int slot = model.place_of(species[mine[lo]]);
                for (hi = lo; hi < n && species[mine[hi]] == species[mine[lo]]; hi++) {
                }
                const double *y = &s.y[std::size_t(4) * lo * row];
                for (const auto &block : posterior.blocks)
                    if (block.term == int(k) && block.slot == slot)
                        block.columns->subtract_slopes(hi - lo, y, row, posterior.columns, &s.a[block.from], s.of_columns.of_columns);
                add_prior(posterior.kernels[k], posterior.prior[k * n_species + slot], hi - lo, y, row, s.products, prior);
            }
        }
        posterior.whiten(s.a, s.b);
        const auto products = [&](const Array<double> &rows) {
            Square out;
            for (int i = 0; i < 3; i++)
                for (int j = 0; j < 3; j++)
                    out[i][j] = dot(&rows[i * posterior.columns], &rows[j * posterior.columns], int(posterior.columns));
            return out;
        };
        calibrate(prior, products(s.a), products(s.b), force, widening, sigma);
        return true;
    }

    // δ² Σ [f' v_ea.v_e'b + f'' (v_ea.x_e')(x_e.v_e'b)] over n environments of one species, of whose rows each fourth is x and
    // the next are v.
    static void add_prior(const Kernel &kernel, double square, int n, const double *y, int row, Array<double> &products, Square &out) {
        const int rows = 4 * n, wide = PanelMatrix<double>::row_length(rows);
        products.resize(std::size_t(rows) * wide);
        PanelMatrix<double>(row, rows, y, 1, row).multiply(rows, y, row, products.data(), wide);
        for (int e = 0; e < n; e++) {
            for (int o = 0; o < n; o++) {
                const double *with_x = &products[std::size_t(4) * e * wide + 4 * o];
                Lanes<double> f, first, second;
                kernel.profile(fill(with_x[0]), f, first, second);
                for (int a = 0; a < 3; a++)
                    for (int b = 0; b < 3; b++) {
                        const double *with_v = with_x + std::size_t(1 + a) * wide;
                        out[a][b] += square * (first[0] * with_v[1 + b] + second[0] * with_v[0] * with_x[1 + b]);
                    }
            }
        }
    }

    void calibrate(const Square &prior, const Square &explained, const Square &data, const double *force, double widening,
                   double *sigma) const {
        constexpr double ROUNDING = 1e-12, FREE = 1e-6, KEPT = 1e-6; // as in gp/variance.py
        const Calibration &c = model.calibration;
        Square difference;
        for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++) difference[i][j] = 0.5 * (prior[i][j] - explained[i][j] + prior[j][i] - explained[j][i]);
        const double least = ROUNDING * (prior[0][0] + prior[1][1] + prior[2][2]) / 3, constant = c.misspecification;
        const Square inducing = on_eigenvalues(difference, [&](double v) { return v > 0 ? c.share * v * (v / (v + least)) : 0; });
        const Square misfit = on_eigenvalues(data, [&](double v) {
            v = std::max(v, 0.0);
            return constant > 0 ? constant * (v + KEPT * FREE * constant) / (v + FREE * constant) : 0;
        });
        double parts[3] = {}, squared_force = 0;
        for (int x = 0; x < 3; x++) {
            parts[0] += c.weights[0] * widening * inducing[x][x] / 3, parts[1] += c.weights[1] * widening * data[x][x] / 3;
            parts[2] += c.weights[2] * (widening * misfit[x][x] + c.label_noise) / 3, squared_force += force[x] * force[x] / 3;
        }
        const double factor = c.scale * c.local(parts, squared_force);
        for (int x = 0; x < 3; x++) {
            const double grown = c.weights[0] * inducing[x][x] + c.weights[1] * data[x][x] + c.weights[2] * misfit[x][x];
            const double total = widening * grown + c.weights[2] * c.label_noise;
            sigma[x] = std::sqrt(factor * factor * total + c.forbidden * c.forbidden);
        }
    }
};

} // namespace gpmlp

// terms, slots, columns: of each block; lowers: L of each, row by row, one after the other; signal, factor Rᵀ of all columns;
// prior: δ² (terms, species of the model); kernels (n_parts, 4): term, and as in gpmlp_inducing_centres.
GPMLP_API int64_t gpmlp_add_posterior(int64_t model, int64_t n_blocks, int64_t n_terms, int64_t n_parts, const int64_t *terms,
                                      const int64_t *slots, const int64_t *columns, const double *lowers, const double *signal,
                                      const double *factor, const double *prior, const double *kernels) {
    return gpmlp::guarded([&] {
        auto made = std::make_shared<gpmlp::Posterior>();
        auto &of = gpmlp::changed<gpmlp::Model>(model);
        const auto blocks = gpmlp::objects<gpmlp::InducingColumns>(n_blocks, columns);
        for (int64_t k = 0; k < n_blocks; k++) {
            const int64_t n = blocks[k]->columns(), size = n * (n + 1) / 2;
            made->blocks.push_back({int(terms[k]), int(slots[k]), blocks[k], made->columns, {lowers, lowers + size}});
            made->columns += n, lowers += size;
        }
        made->signal.assign(signal, signal + made->columns);
        made->factor.assign(factor, factor + made->columns * (made->columns + 1) / 2);
        made->prior.assign(prior, prior + n_terms * of.species.size());
        made->kernels.resize(n_terms, gpmlp::Kernel(0, nullptr));
        for (int64_t k = 0; k < n_parts; k++, kernels += 4)
            made->kernels[std::size_t(kernels[0])].parts.push_back({kernels[1], int(kernels[2]), kernels[3]});
        of.posterior = made;
        return 0;
    });
}

// Calibrated standard deviations of the force components of n_chosen different atoms into sigma (n_chosen, 3), eV/A.
// Environments as in gpmlp_evaluate, and of each pair the environment of its neighbour; all that contain a chosen atom have to
// be there and complete, of others nothing is used. Where atoms see their own images, `neighbors` names the atom, not the image.
// Status as of gpmlp_evaluate.
GPMLP_API int64_t gpmlp_force_sigma(int64_t model, int64_t n, int64_t n_pairs, const int64_t *species, const int64_t *centers,
                                    const int64_t *neighbors, const int64_t *neighbor_species, const double *vectors, int64_t n_chosen,
                                    const int64_t *chosen, double *sigma, int64_t threads) {
    return gpmlp::guarded([&] {
        const auto &of = gpmlp::object<gpmlp::Model>(model);
        if (!of.posterior) return 2;
        const auto &posterior = static_cast<const gpmlp::Posterior &>(*of.posterior);
        const gpmlp::Surroundings<double> given{n, n_pairs, species, centers, neighbor_species, vectors};
        return gpmlp::ForceVariance(of, posterior, given, neighbors, n_chosen, chosen)(sigma, threads) ? 0 : 1;
    });
}
