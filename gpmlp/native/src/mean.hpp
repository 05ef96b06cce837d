// Posterior mean of local energies of one central species, ε(x) and ∂ε/∂x for rows of features: the equations of
// potential/mean.py.
#pragma once

#include <cmath>
#include <type_traits>
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
            const double w = part.weight;
            if (part.zeta == 0) {
                Lanes<double> value = (s - 1.0) * part.inverse;
                for (int k = 0; k < WIDTH<double>; k++) value[k] = std::exp(value[k]);
                f += w * value, first += w * part.inverse * value, second += w * part.inverse * part.inverse * value;
            } else if (part.zeta == 1) {
                f += w * s, first += w;
            } else {
                add_power(w, part.zeta, s, f, first, second);
            }
        }
    }

    // work(profile): that of one power as a constant where it is a usual one, so that no loop is left in it.
    template <class Work> void with_profile(Work work) const {
        const auto constant = [&](auto zeta) {
            work([=, w = parts[0].weight](Lanes<double> s, Lanes<double> &f, Lanes<double> &first, Lanes<double> &second) GPMLP_INLINED {
                f = first = second = Lanes<double>{};
                add_power(w, zeta, s, f, first, second);
            });
        };
        switch (parts.size() == 1 ? parts[0].zeta : 0) {
        case 2: return constant(std::integral_constant<int, 2>());
        case 3: return constant(std::integral_constant<int, 3>());
        case 4: return constant(std::integral_constant<int, 4>());
        default: work([&](auto &&...arguments) GPMLP_INLINED { profile(arguments...); });
        }
    }

  private:
    template <class Z>
    static GPMLP_INLINE void add_power(double w, Z zeta, Lanes<double> s, Lanes<double> &f, Lanes<double> &first, Lanes<double> &second) {
        const double z = zeta;
        Lanes<double> lowest = fill(w);
        for (int k = 2; k < zeta; k++) lowest *= s;
        f += lowest * s * s, first += z * lowest * s, second += z * (z - 1) * lowest;
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

// Memory of one thread.
struct MeanScratch {
    Array<double> dots, along, projected, steep, x, slopes;
    Array<float> single_dots;
    KernelRows kept;

    template <class T> Array<T> &dots_in() {
        if constexpr (std::is_same_v<T, float>)
            return single_dots;
        else
            return dots;
    }
};

// Of features in this precision; energies are in double always.
template <class T> struct Mean : Object {
    // Whether it fills scratch.kept, as far as its width goes.
    virtual bool keeps_kernel() const { return false; }

    // For n rows of features, which follow each other after `row` numbers, as do slopes, in whole panels.
    virtual void operator()(int n, const T *x, int row, double *energies, T *slopes, MeanScratch &scratch) const = 0;
};

// ε = v.x + x.H x / 2.
template <class T> class QuadraticForm : public Mean<T> {
    int d;
    Array<T> linear;
    PanelMatrix<T> hessian;

  public:
    QuadraticForm(int d, const T *linear, const T *hessian) : d(d), linear(linear, linear + d), hessian(d, d, hessian, d, 1) {}

    void operator()(int n, const T *x, int row, double *energies, T *slopes, MeanScratch &) const override {
        hessian.multiply(n, x, row, slopes, row);
        for (int i = 0; i < n; i++, x += row, slopes += row) {
            for (int k = 0; k < d; k++) slopes[k] += linear[k];
            energies[i] = 0.5 * (wide_dot(x, slopes, d) + wide_dot(x, linear.data(), d));
        }
    }
};

// ε = Σ_j [α_j f(x.x_j) + f'(x.x_j) x.τ_j], whose tangents τ may be absent.
class InducingCentres : public Mean<double> {
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

    void operator()(int n, const double *x, int row, double *energies, double *slopes, MeanScratch &scratch) const override {
        scratch.dots.resize(std::size_t(n) * CENTRES), scratch.along.resize(std::size_t(n) * CENTRES);
        double *dots = scratch.dots.data(), *along = scratch.along.data();
        std::fill_n(energies, n, 0.0);
        for (int from = 0; from < m; from += CENTRES) {
            const int to = std::min(m, from + CENTRES);
            to_dots.multiply_part(n, 0, d, from, to, x, row, dots, CENTRES, false);
            if (tangents) to_along.multiply_part(n, 0, d, from, to, x, row, along, CENTRES, false);
            kernel.with_profile([&](auto profile) {
                for (int i = 0; i < n; i++) {
                    const std::size_t at = std::size_t(i) * scratch.kept.width + from;
                    energies[i] += on_arguments(profile, from, to, dots + i * CENTRES, along + i * CENTRES, scratch.kept.width - from,
                                                scratch.kept.values.data() + at, scratch.kept.slopes.data() + at);
                }
            });
            from_dots.multiply_part(n, from, to, 0, d, dots, CENTRES, slopes, row, from > 0);
            if (tangents) from_along.multiply_part(n, from, to, 0, d, along, CENTRES, slopes, row, true);
        }
    }

  private:
    // Share of ε of the centres from, ..., to of one row; x.x_j becomes ∂ε/∂(x.x_j) = α f' + f'' x.τ, and x.τ_j becomes
    // f'. The first `kept` of f and f' are kept.
    template <class Profile>
    GPMLP_INLINE double on_arguments(Profile profile, int from, int to, double *dots, double *along, int kept, double *values,
                                     double *slopes) const {
        Lanes<double> energy = {};
        for (int j = 0; j < to - from; j += WIDTH<double>) {
            Lanes<double> f, first, second;
            profile(load(dots + j), f, first, second);
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
template <class T> class LowRankForm : public Mean<T> {
    int d, rank;
    Array<T> linear, values;
    PanelMatrix<T> to_directions, from_directions;

  public:
    LowRankForm(int d, int rank, const T *linear, const T *directions, const T *values)
        : d(d), rank(rank), linear(linear, linear + d), values(values, values + rank), to_directions(d, rank, directions, rank, 1),
          from_directions(rank, d, directions, 1, rank) {}

    void operator()(int n, const T *x, int row, double *energies, T *slopes, MeanScratch &scratch) const override {
        const int wide = PanelMatrix<T>::row_length(rank);
        Array<T> &dots = scratch.dots_in<T>();
        dots.resize(std::size_t(n) * wide);
        T *along = dots.data();
        to_directions.multiply(n, x, row, along, wide);
        for (int i = 0; i < n; i++)
            for (int k = 0; k < rank; k++) along[std::size_t(i) * wide + k] *= values[k];
        from_directions.multiply(n, along, wide, slopes, row);
        for (int i = 0; i < n; i++, x += row, slopes += row) {
            for (int k = 0; k < d; k++) slopes[k] += linear[k];
            energies[i] = 0.5 * (wide_dot(x, slopes, d) + wide_dot(x, linear.data(), d));
        }
    }
};

// ε = c + v.x + ε'(Wᵀx), of a mean ε' in the space of leading directions W (features, rank).
class ProjectedMean : public Mean<double> {
    int d, rank;
    double constant;
    Array<double> linear;
    PanelMatrix<double> to_directions, from_directions;
    const Mean<double> &inner;

  public:
    ProjectedMean(int d, int rank, double constant, const double *linear, const double *directions, const Mean<double> &inner)
        : d(d), rank(rank), constant(constant), linear(linear, linear + d), to_directions(d, rank, directions, rank, 1),
          from_directions(rank, d, directions, 1, rank), inner(inner) {}

    void operator()(int n, const double *x, int row, double *energies, double *slopes, MeanScratch &scratch) const override {
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

// Another mean, which wants double precision, of features in single precision.
class WidenedMean : public Mean<float> {
    const Mean<double> &inner;
    int d;

  public:
    WidenedMean(const Mean<double> &inner, int d) : inner(inner), d(d) {}

    bool keeps_kernel() const override { return inner.keeps_kernel(); }

    void operator()(int n, const float *x, int row, double *energies, float *slopes, MeanScratch &scratch) const override {
        const int wide = PanelMatrix<double>::row_length(d);
        scratch.x.resize(std::size_t(n) * wide), scratch.slopes.resize(std::size_t(n) * wide);
        for (int i = 0; i < n; i++) widen(d, x + std::size_t(i) * row, &scratch.x[std::size_t(i) * wide]);
        inner(n, scratch.x.data(), wide, energies, scratch.slopes.data(), scratch);
        for (int i = 0; i < n; i++) std::copy_n(&scratch.slopes[std::size_t(i) * wide], d, slopes + std::size_t(i) * row);
    }
};

} // namespace gpmlp

#define GPMLP_FORMS(T, SUFFIX)                                                                                                             \
    GPMLP_API int64_t gpmlp_quadratic_form##SUFFIX(int64_t d, const T *linear, const T *hessian) {                                         \
        return gpmlp::guarded([&] { return gpmlp::address_of(new gpmlp::QuadraticForm<T>(int(d), linear, hessian)); });                    \
    }                                                                                                                                      \
    GPMLP_API int64_t gpmlp_low_rank_form##SUFFIX(int64_t d, int64_t rank, const T *linear, const T *directions, const T *values) {        \
        return gpmlp::guarded(                                                                                                             \
            [&] { return gpmlp::address_of(new gpmlp::LowRankForm<T>(int(d), int(rank), linear, directions, values)); });                  \
    }

GPMLP_FORMS(double, _f64)
GPMLP_FORMS(float, _f32)

// inner: a mean of rank features.
GPMLP_API int64_t gpmlp_projected_mean(int64_t d, int64_t rank, double constant, const double *linear, const double *directions,
                                       int64_t inner) {
    return gpmlp::guarded([&] {
        return gpmlp::address_of(
            new gpmlp::ProjectedMean(int(d), int(rank), constant, linear, directions, gpmlp::object<gpmlp::Mean<double>>(inner)));
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

// inner: a mean of d features.
GPMLP_API int64_t gpmlp_widened_mean(int64_t d, int64_t inner) {
    return gpmlp::guarded([&] { return gpmlp::address_of(new gpmlp::WidenedMean(gpmlp::object<gpmlp::Mean<double>>(inner), int(d))); });
}
