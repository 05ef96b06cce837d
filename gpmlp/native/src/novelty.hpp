// Mahalanobis distance of environments of one central species from the training data, over its threshold: the equations
// of uncertainty/mahalanobis.py.
#pragma once

#include <limits>

#include "abi.hpp"
#include "matrix.hpp"

namespace gpmlp {

class Clusters : public Object {
    int d, rank, n_clusters;
    double threshold;
    Array<double> centre, offset, across;   // of the reduced space; -W m of all clusters; s of each
    PanelMatrix<double> components, whiten; // V; W of all clusters side by side

  public:
    struct Scratch {
        Array<double> centred, y, z;
    };

    Clusters(int d, int rank, int n_clusters, double threshold, const double *centre, const double *components, const double *whiten,
             const double *offset, const double *across)
        : d(d), rank(rank), n_clusters(n_clusters), threshold(threshold), centre(centre, centre + d),
          offset(offset, offset + rank * n_clusters), across(across, across + n_clusters), components(d, rank, components, rank, 1),
          whiten(rank, rank * n_clusters, whiten, rank * n_clusters, 1) {}

    // out(i, novelty) for n rows of features; infinite where they are no numbers.
    template <class Out> void operator()(int n, const double *x, int row, Scratch &s, Out out) const {
        const int wide = PanelMatrix<double>::row_length(rank), every = PanelMatrix<double>::row_length(rank * n_clusters);
        s.centred.resize(std::size_t(n) * d), s.y.resize(std::size_t(n) * wide), s.z.resize(std::size_t(n) * every);
        for (int i = 0; i < n; i++)
            for (int k = 0; k < d; k++) s.centred[std::size_t(i) * d + k] = x[std::size_t(i) * row + k] - centre[k];
        components.multiply(n, s.centred.data(), d, s.y.data(), wide);
        whiten.multiply(n, s.y.data(), wide, s.z.data(), every);
        for (int i = 0; i < n; i++) {
            const double *from = &s.centred[std::size_t(i) * d], *y = &s.y[std::size_t(i) * wide];
            double *z = &s.z[std::size_t(i) * every];
            for (int k = 0; k < rank * n_clusters; k++) z[k] += offset[k];
            // |r|² by Pythagoras: what rounding leaves of it is far below s
            const double residual = std::max(0.0, dot(from, from, d) - dot(y, y, rank));
            double least = std::numeric_limits<double>::infinity();
            for (int k = 0; k < n_clusters; k++) least = std::min(least, dot(z + k * rank, z + k * rank, rank) + residual / across[k]);
            out(i, std::sqrt(least) / threshold);
        }
    }
};

} // namespace gpmlp

// Of one central species: centre (d), components (d, rank), whiten (rank, clusters rank), offset (clusters rank), across
// (clusters).
GPMLP_API int64_t gpmlp_clusters(int64_t d, int64_t rank, int64_t n_clusters, double threshold, const double *centre,
                                 const double *components, const double *whiten, const double *offset, const double *across) {
    return gpmlp::guarded([&] {
        return gpmlp::address_of(
            new gpmlp::Clusters(int(d), int(rank), int(n_clusters), threshold, centre, components, whiten, offset, across));
    });
}
