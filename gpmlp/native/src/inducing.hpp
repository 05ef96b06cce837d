// Inducing variables of one species and descriptor, and their covariances with local energies: the equations of
// gp/covariances.py.
#pragma once

#include "mean.hpp"

namespace gpmlp {

// Columns of K_fu: values of the local energy at centres x_j, and its gradients along tangents t there.
class InducingColumns : public Object {
    int m, n_tangents, n_columns;
    std::vector<int64_t> centre, tangent; // of each column; tangent -1 of a value
    bool plain;                           // whether the columns are the values at all centres, in order
    Kernel kernel;
    PanelMatrix<double> to_dots, to_along; // centres and tangents, transposed

  public:
    struct Scratch {
        Array<double> dots, along, values, first, second;
    };

    InducingColumns(int m, int d, int n_tangents, int n_columns, const double *features, const double *tangents, const int64_t *centre,
                    const int64_t *tangent, Kernel kernel)
        : m(m), n_tangents(n_tangents), n_columns(n_columns), centre(centre, centre + n_columns), tangent(tangent, tangent + n_columns),
          plain(m == n_columns), kernel(std::move(kernel)), to_dots(d, m, features, 1, d), to_along(d, n_tangents, tangents, 1, d) {
        for (int k = 0; k < n_columns; k++) plain = plain && centre[k] == k && tangent[k] < 0;
    }

    int columns() const { return n_columns; }
    int centres() const { return m; }

    // cov(ε(x), u) of n rows of features, of unit signal variance, each column to its place in rows of `out`. `known`:
    // the kernel of the rows with the centres, if it has that.
    void covariances(int n, const double *x, int row, const KernelRows &known, const int *places, double *out, int out_row,
                     Scratch &s) const {
        const int wide = PanelMatrix<double>::row_length(m), long_row = PanelMatrix<double>::row_length(n_tangents);
        const bool reused = known.width >= m;
        if (!reused) s.dots.resize(std::size_t(n) * wide), to_dots.multiply(n, x, row, s.dots.data(), wide);
        s.values.resize(wide), s.first.resize(wide);
        if (n_tangents) s.along.resize(std::size_t(n) * long_row), to_along.multiply(n, x, row, s.along.data(), long_row);
        for (int i = 0; i < n; i++, out += out_row) {
            const double *value = s.values.data(), *first = s.first.data(), *along = s.along.data() + std::size_t(i) * long_row;
            if (reused)
                value = known.value(i), first = known.first(i);
            else
                of_row(&s.dots[std::size_t(i) * wide], s, false);
            if (plain)
                for (int k = 0; k < m; k++) out[places[k]] = value[k];
            else // cov(ε(x), ∂_t ε(x_j)) = f'(x.x_j) x.t
                for (int k = 0; k < n_columns; k++)
                    out[places[k]] = tangent[k] < 0 ? value[centre[k]] : first[centre[k]] * along[tangent[k]];
        }
    }

    // Takes from rows `out` (3, columns), of length out_row, the derivatives of the covariances of n environments with respect to
    // the position of one atom. y: of each environment the features and their three derivatives, in rows.
    void subtract_slopes(int n, const double *y, int row, int64_t out_row, double *out, Scratch &s) const {
        const int wide = PanelMatrix<double>::row_length(m), long_row = PanelMatrix<double>::row_length(n_tangents);
        s.dots.resize(std::size_t(4) * n * wide), s.along.resize(std::size_t(4) * n * long_row);
        to_dots.multiply(4 * n, y, row, s.dots.data(), wide);
        if (n_tangents) to_along.multiply(4 * n, y, row, s.along.data(), long_row);
        s.values.resize(wide), s.first.resize(wide), s.second.resize(wide);
        for (int e = 0; e < n; e++) {
            const double *dots = &s.dots[std::size_t(4) * e * wide], *along = s.along.data() + std::size_t(4) * e * long_row;
            of_row(dots, s, true);
            for (int a = 0; a < 3; a++) {
                const double *on_dots = dots + std::size_t(a + 1) * wide, *on_along = along + std::size_t(a + 1) * long_row;
                double *to = out + a * out_row;
                for (int k = 0; k < n_columns; k++) { // d f(s) = f' dx.x_j  and  d [f'(s) x.t] = f' dx.t + f'' (x.t) dx.x_j
                    const int64_t j = centre[k], t = tangent[k];
                    to[k] -= t < 0 ? s.first[j] * on_dots[j] : s.first[j] * on_along[t] + s.second[j] * along[t] * on_dots[j];
                }
            }
        }
    }

  private:
    void of_row(const double *dots, Scratch &s, bool bent) const {
        for (int j = 0; j < m; j += WIDTH<double>) {
            Lanes<double> f, first, second;
            kernel.profile(load(dots + j), f, first, second);
            store(&s.values[j], f), store(&s.first[j], first);
            if (bent) store(&s.second[j], second);
        }
    }
};

} // namespace gpmlp

// features (m, d), tangents (n_tangents, d). Of each column the centre, and the tangent or -1 of a value. parts: of the
// kernel, as in gpmlp_inducing_centres.
GPMLP_API int64_t gpmlp_inducing_columns(int64_t m, int64_t d, int64_t n_tangents, int64_t n_columns, int64_t n_parts,
                                         const double *features, const double *tangents, const int64_t *centre, const int64_t *tangent,
                                         const double *parts) {
    return gpmlp::guarded([&] {
        return gpmlp::address_of(new gpmlp::InducingColumns(int(m), int(d), int(n_tangents), int(n_columns), features, tangents, centre,
                                                            tangent, gpmlp::Kernel(n_parts, parts)));
    });
}
