// Posterior variances of local energies of one central species, mostly in single precision: the equations of
// gp/local_variance.py.
#pragma once

#include "inducing.hpp"

namespace gpmlp {

class LocalVariance : public Object {
    struct Block {
        const InducingColumns *columns; // null where the descriptor has none of the species
        std::vector<int> places;        // of its columns in a row: leading ones of all blocks, then the others
    };
    std::vector<Block> blocks; // by descriptor
    double prior;              // k_xx, eV²
    bool together;             // whether what data leave is |a|² itself: of fewer columns, the rest of the variance included
    int leading, others, first_other, width;
    PanelMatrix<double> whiten_leading, posterior_leading, project; // D₁ L₁₁⁻¹, S and L₂₁ D₁⁻¹, transposed
    PanelMatrix<float> whiten_rest, posterior_cross;                // Vᵀ D₂ L₂₂⁻¹ and C, transposed
    Array<float> posterior_rest;                                    // √p

  public:
    struct Scratch {
        InducingColumns::Scratch of_columns;
        Array<double> rows, a, more;
        Array<float> narrow, narrow_a, y, z;
    };

    // places: of all columns, block after block, leading ones first. posterior_leading: null where there are no others, and none is needed.
    LocalVariance(double prior, std::vector<const InducingColumns *> columns, const int64_t *places, int leading, int others,
                  const double *whiten_leading, const double *posterior_leading, const double *project, const float *whiten_rest,
                  const float *posterior_cross, const float *posterior_rest)
        : prior(prior), together(!posterior_leading), leading(leading), others(others), first_other(PanelMatrix<double>::row_length(leading)),
          width(first_other + PanelMatrix<double>::row_length(others)), whiten_leading(leading, leading, whiten_leading, 1, leading),
          posterior_leading(leading, together ? 0 : leading, posterior_leading, 1, leading), project(leading, others, project, 1, leading),
          whiten_rest(others, others, whiten_rest, 1, others), posterior_cross(leading, others, posterior_cross, 1, leading),
          posterior_rest(posterior_rest, posterior_rest + others) {
        for (const InducingColumns *block : columns) {
            blocks.push_back({block, {}});
            for (int k = 0; block && k < block->columns(); k++, places++)
                blocks.back().places.push_back(int(*places < leading ? *places : first_other + *places - leading));
        }
    }

    // How many centres of the mean of descriptor k it would have the kernel with; 0 if none.
    int shared_centres(std::size_t k) const { return blocks[k].columns ? blocks[k].columns->centres() : 0; }

    // Covariances of n rows of features of descriptor k, kept in scratch until all are there.
    void take(std::size_t k, int n, const double *x, int row, const KernelRows &known, Scratch &s) const {
        s.rows.resize(std::size_t(n) * width);
        const Block &block = blocks[k];
        if (block.columns) block.columns->covariances(n, x, row, known, block.places.data(), s.rows.data(), width, s.of_columns);
    }

    // What the inducing set cannot represent, w = 1, and what data leave, (2) eV² of each of the n rows taken.
    template <class Out> void finish(int n, Scratch &s, Out out) const {
        const int deep = first_other, wide = PanelMatrix<double>::row_length(others), narrow = PanelMatrix<float>::row_length(others);
        s.a.resize(std::size_t(n) * deep), s.more.resize(std::size_t(n) * std::max(deep, wide));
        for (auto *part : {&s.narrow, &s.y, &s.z}) part->resize(std::size_t(n) * narrow);
        s.narrow_a.resize(std::size_t(n) * deep);
        whiten_leading.multiply_triangle(n, s.rows.data(), width, s.a.data(), deep);
        posterior_leading.multiply(n, s.a.data(), deep, s.more.data(), deep);
        std::vector<double> explained(n), left(n);
        for (int i = 0; i < n; i++) {
            const double *a = &s.a[std::size_t(i) * deep], *b = &s.more[std::size_t(i) * deep];
            explained[i] = dot(a, a, leading), left[i] = together ? explained[i] : dot(b, b, leading);
        }
        if (others) {
            project.multiply(n, s.a.data(), deep, s.more.data(), wide);
            for (int i = 0; i < n; i++) {
                const double *k = &s.rows[std::size_t(i) * width + first_other], *seen = &s.more[std::size_t(i) * wide];
                for (int j = 0; j < others; j++) s.narrow[std::size_t(i) * narrow + j] = float(k[j] - seen[j]);
                for (int j = 0; j < leading; j++) s.narrow_a[std::size_t(i) * deep + j] = float(s.a[std::size_t(i) * deep + j]);
            }
            whiten_rest.multiply(n, s.narrow.data(), narrow, s.y.data(), narrow);
            posterior_cross.multiply(n, s.narrow_a.data(), deep, s.z.data(), narrow);
            for (int i = 0; i < n; i++) {
                const float *y = &s.y[std::size_t(i) * narrow];
                float *z = &s.z[std::size_t(i) * narrow];
                for (int j = 0; j < others; j++) z[j] += y[j] * posterior_rest[j];
                explained[i] += squares(y, others), left[i] += squares(z, others);
            }
        }
        for (int i = 0; i < n; i++) out(i, std::max(0.0, prior - explained[i]), left[i]);
    }

  private:
    // Σ x², a few numbers at a time in single precision.
    static double squares(const float *x, int n) {
        constexpr int FEW = 64;
        double total = 0;
        for (int k = 0; k < n; k += FEW) total += dot(x + k, x + k, std::min(FEW, n - k));
        return total;
    }
};

} // namespace gpmlp

// Of one central species: columns by descriptor (addresses, 0 where there are none), the place of each of their columns
// in the order of the factors, leading ones first; factors as gp/local_variance.py has them.
GPMLP_API int64_t gpmlp_local_variance(double prior, int64_t n_blocks, const int64_t *columns, const int64_t *places, int64_t leading,
                                       int64_t others, const double *whiten_leading, const double *posterior_leading, const double *project,
                                       const float *whiten_rest, const float *posterior_cross, const float *posterior_rest) {
    return gpmlp::guarded([&] {
        return gpmlp::address_of(new gpmlp::LocalVariance(prior, gpmlp::objects<gpmlp::InducingColumns>(n_blocks, columns), places,
                                                          int(leading), int(others), whiten_leading, posterior_leading, project,
                                                          whiten_rest, posterior_cross, posterior_rest));
    });
}
