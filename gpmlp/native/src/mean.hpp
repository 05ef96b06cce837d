// Posterior mean of local energies of one central species, ε(x) and ∂ε/∂x for rows of features: the equations of
// potential/mean.py.
#pragma once

#include <cmath>
#include <vector>

#include "abi.hpp"
#include "matrix.hpp"

namespace gpmlp {

// A zonal kernel f(s), as gp/kernels.py has them: a weighted sum of powers of s and of exponentials exp((s - 1)
// inverse).
struct Kernel {
    struct Part {
        double weight;
        int zeta; // 0: an exponential
        double inverse;
    };
    std::vector<Part> parts;

    // from: (n, 3) weight, zeta (0: exponential), inverse square of the length.
    Kernel(int64_t n, const double *from) {
        for (; n--; from += 3) parts.push_back({from[0], int(from[1]), from[2]});
    }

    // f, f' and f'' of four dot products.
    GPMLP_INLINE void profile(Lanes<double> s, Lanes<double> &f, Lanes<double> &first, Lanes<double> &second) const {
        f = first = second = Lanes<double>{};
        for (const Part &part : parts) {
            const double w = part.weight, z = part.zeta;
            if (part.zeta == 0) {
                Lanes<double> value = (s - 1.0) * part.inverse;
                for (int k = 0; k < WIDTH<double>; k++) value[k] = std::exp(value[k]);
                f += w * value, first += w * part.inverse * value, second += w * part.inverse * part.inverse * value;
            } else if (part.zeta == 1) {
                f += w * s, first += w;
            } else {
                Lanes<double> lowest = fill(w);
                for (int k = 2; k < part.zeta; k++) lowest *= s;
                f += lowest * s * s, first += z * lowest * s, second += z * (z - 1) * lowest;
            }
        }
    }
};

// f and f' of rows of features with the first centres of a mean, which variances want too.
struct KernelRows {
    int width = 0; // of a row, in whole lanes: how many centres; 0 where nobody keeps them
    Array<double> values, slopes;

    void resize(int n, int to) { width = round_up<double>(to), values.resize(std::size_t(n) * width), slopes.resize(values.size()); }
    const double *value(int i) const { return values.data() + std::size_t(i) * width; }
    const double *first(int i) const { return slopes.data() + std::size_t(i) * width; }
};

constexpr int CENTRES = 256; // of an inducing set together: what rows have to do with them stays in cache

struct Mean : Object {
    // Memory of one thread.
    struct Scratch {
        Array<double> dots, along, projected, steep;
        KernelRows kept;
    };

    // Whether it fills scratch.kept, as far as its width goes.
    virtual bool keeps_kernel() const { return false; }

    // For n rows of features, which follow each other after `row` numbers, as do slopes, in whole panels.
    virtual void operator()(int n, const double *x, int row, double *energies, double *slopes, Scratch &scratch) const = 0;
};

// ε = v.x + x.H x / 2.
class QuadraticForm : public Mean {
    int d;
    Array<double> linear;
    PanelMatrix<double> hessian;

  public:
    QuadraticForm(int d, const double *linear, const double *hessian) : d(d), linear(linear, linear + d), hessian(d, d, hessian, d, 1) {}

    void operator()(int n, const double *x, int row, double *energies, double *slopes, Scratch &) const override {
        hessian.multiply(n, x, row, slopes, row);
        for (int i = 0; i < n; i++, x += row, slopes += row) {
            for (int k = 0; k < d; k++) slopes[k] += linear[k];
            energies[i] = 0.5 * (dot(x, slopes, d) + dot(x, linear.data(), d));
        }
    }
};

// ε = Σ_j [α_j f(x.x_j) + f'(x.x_j) x.τ_j], whose tangents τ may be absent.
class InducingCentres : public Mean {
    int m, d;
    Kernel kernel;
    bool tangents;
    Array<double> weights;
    PanelMatrix<double> to_dots, to_along, from_dots, from_along; // features and tangents, transposed and as they are

  public:
    InducingCentres(int m, int d, const double *features, const double *weights, const double *tangents, Kernel kernel)
        : m(m), d(d), kernel(std::move(kernel)), tangents(tangents), weights(weights, weights + m), to_dots(d, m, features, 1, d),
          from_dots(m, d, features, d, 1) {
        this->weights.resize(PanelMatrix<double>::row_length(m), 0);
        if (tangents) to_along = {d, m, tangents, 1, d}, from_along = {m, d, tangents, d, 1};
    }

    bool keeps_kernel() const override { return true; }

    void operator()(int n, const double *x, int row, double *energies, double *slopes, Scratch &scratch) const override {
        scratch.dots.resize(std::size_t(n) * CENTRES), scratch.along.resize(std::size_t(n) * CENTRES);
        double *dots = scratch.dots.data(), *along = scratch.along.data();
        std::fill_n(energies, n, 0.0);
        for (int from = 0; from < m; from += CENTRES) {
            const int to = std::min(m, from + CENTRES);
            to_dots.multiply_part(n, 0, d, from, to, x, row, dots, CENTRES, false);
            if (tangents) to_along.multiply_part(n, 0, d, from, to, x, row, along, CENTRES, false);
            for (int i = 0; i < n; i++) {
                const std::size_t at = std::size_t(i) * scratch.kept.width + from;
                energies[i] += on_arguments(from, to, dots + i * CENTRES, along + i * CENTRES, scratch.kept.width - from,
                                            scratch.kept.values.data() + at, scratch.kept.slopes.data() + at);
            }
            from_dots.multiply_part(n, from, to, 0, d, dots, CENTRES, slopes, row, from > 0);
            if (tangents) from_along.multiply_part(n, from, to, 0, d, along, CENTRES, slopes, row, true);
        }
    }

  private:
    // Share of ε of the centres from, ..., to of one row; x.x_j becomes ∂ε/∂(x.x_j) = α f' + f'' x.τ, and x.τ_j becomes
    // f'. The first `kept` of f and f' are kept.
    double on_arguments(int from, int to, double *dots, double *along, int kept, double *values, double *slopes) const {
        Lanes<double> energy = {};
        for (int j = 0; j < to - from; j += WIDTH<double>) {
            Lanes<double> f, first, second;
            kernel.profile(load(dots + j), f, first, second);
            if (j < kept) store(values + j, f), store(slopes + j, first);
            const Lanes<double> weight = load(&weights[from + j]);
            energy += weight * f;
            Lanes<double> on_dots = first * weight;
            if (tangents) {
                const Lanes<double> t = load(along + j);
                energy += first * t, on_dots += second * t;
                store(along + j, first);
            }
            store(dots + j, on_dots);
        }
        return sum<double>(energy);
    }
};

// ε = v.x + x.U s Uᵀ x / 2, of a quadratic form's leading directions U (features, rank).
class LowRankForm : public Mean {
    int d, rank;
    Array<double> linear, values;
    PanelMatrix<double> to_directions, from_directions;

  public:
    LowRankForm(int d, int rank, const double *linear, const double *directions, const double *values)
        : d(d), rank(rank), linear(linear, linear + d), values(values, values + rank), to_directions(d, rank, directions, rank, 1),
          from_directions(rank, d, directions, 1, rank) {}

    void operator()(int n, const double *x, int row, double *energies, double *slopes, Scratch &scratch) const override {
        const int wide = PanelMatrix<double>::row_length(rank);
        scratch.dots.resize(std::size_t(n) * wide);
        double *along = scratch.dots.data();
        to_directions.multiply(n, x, row, along, wide);
        for (int i = 0; i < n; i++)
            for (int k = 0; k < rank; k++) along[std::size_t(i) * wide + k] *= values[k];
        from_directions.multiply(n, along, wide, slopes, row);
        for (int i = 0; i < n; i++, x += row, slopes += row) {
            for (int k = 0; k < d; k++) slopes[k] += linear[k];
            energies[i] = 0.5 * (dot(x, slopes, d) + dot(x, linear.data(), d));
        }
    }
};

// ε = c + v.x + ε'(Wᵀx), of a mean ε' in the space of leading directions W (features, rank).
class ProjectedMean : public Mean {
    int d, rank;
    double constant;
    Array<double> linear;
    PanelMatrix<double> to_directions, from_directions;
    const Mean &inner;

  public:
    ProjectedMean(int d, int rank, double constant, const double *linear, const double *directions, const Mean &inner)
        : d(d), rank(rank), constant(constant), linear(linear, linear + d), to_directions(d, rank, directions, rank, 1),
          from_directions(rank, d, directions, 1, rank), inner(inner) {}

    void operator()(int n, const double *x, int row, double *energies, double *slopes, Scratch &scratch) const override {
        const int wide = PanelMatrix<double>::row_length(rank);
        scratch.projected.resize(std::size_t(n) * wide), scratch.steep.resize(std::size_t(n) * wide);
        to_directions.multiply(n, x, row, scratch.projected.data(), wide);
        inner(n, scratch.projected.data(), wide, energies, scratch.steep.data(), scratch);
        from_directions.multiply(n, scratch.steep.data(), wide, slopes, row);
        for (int i = 0; i < n; i++, x += row, slopes += row) {
            energies[i] += dot(x, linear.data(), d) + constant;
            for (int k = 0; k < d; k++) slopes[k] += linear[k];
        }
    }
};

} // namespace gpmlp

GPMLP_API int64_t gpmlp_quadratic_form(int64_t d, const double *linear, const double *hessian) {
    return gpmlp::guarded([&] { return gpmlp::address_of(new gpmlp::QuadraticForm(int(d), linear, hessian)); });
}

GPMLP_API int64_t gpmlp_low_rank_form(int64_t d, int64_t rank, const double *linear, const double *directions, const double *values) {
    return gpmlp::guarded([&] { return gpmlp::address_of(new gpmlp::LowRankForm(int(d), int(rank), linear, directions, values)); });
}

// inner: a mean of rank features.
GPMLP_API int64_t gpmlp_projected_mean(int64_t d, int64_t rank, double constant, const double *linear, const double *directions,
                                       int64_t inner) {
    return gpmlp::guarded([&] {
        return gpmlp::address_of(
            new gpmlp::ProjectedMean(int(d), int(rank), constant, linear, directions, gpmlp::object<gpmlp::Mean>(inner)));
    });
}

// tangents: (m, d), or nothing if n_tangents is 0. parts: of the kernel, (n_parts, 3) weight, zeta (0: exponential),
// inverse square of the length.
GPMLP_API int64_t gpmlp_inducing_centres(int64_t m, int64_t d, int64_t n_tangents, int64_t n_parts, const double *features,
                                         const double *weights, const double *tangents, const double *parts) {
    return gpmlp::guarded([&] {
        return gpmlp::address_of(
            new gpmlp::InducingCentres(int(m), int(d), features, weights, n_tangents ? tangents : nullptr, gpmlp::Kernel(n_parts, parts)));
    });
}
