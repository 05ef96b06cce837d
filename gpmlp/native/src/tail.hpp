// Dispersion beyond the cutoff: −C₆ S(r)/r⁶ of all pairs within some 25 A (potential/dispersion.py: R6Tail), so many that points are
// sorted into cells anew each time and no list of pairs is made.
#pragma once

#include <array>
#include <limits>

#include "lanes.hpp"
#include "threads.hpp"

namespace gpmlp {

// Points in the order of cells of a box around them; those of a row of cells along x follow each other.
class CellGrid {
    double low[3] = {}, edge[3];
    int64_t cells[3];
    std::vector<int64_t> first; // of each cell, and the number of points

    int64_t cell(int axis, double x) const {
        const double at = (x - low[axis]) / edge[axis];
        return at > 0 ? int64_t(std::min(at, double(cells[axis] - 1))) : 0;
    }

    // How far x is from the cell.
    double distance(int axis, int64_t cell, double x) const {
        const double from = low[axis] + double(cell) * edge[axis];
        return std::max({0.0, from - x, x - from - edge[axis]});
    }

  public:
    Array<double> x[3];
    std::vector<int64_t> order; // which point each is

    CellGrid(const double *points, int64_t n, double reach) : order(n) {
        double extent[3] = {};
        for (int axis = 0; axis < 3 && n; axis++) {
            double high = low[axis] = points[axis];
            for (int64_t k = 0; k < n; k++) low[axis] = std::min(low[axis], points[3 * k + axis]), high = std::max(high, points[3 * k + axis]);
            extent[axis] = high - low[axis];
        }
        double scale = 1; // cells are larger where most would be empty
        do {
            for (int axis = 0; axis < 3; axis++) {
                edge[axis] = scale * reach / (axis ? 6 : 12);
                cells[axis] = 1 + int64_t(std::min(extent[axis] / edge[axis], 1e6));
            }
            scale *= 1.3;
        } while (double(cells[0]) * double(cells[1]) * double(cells[2]) > 4.0 * double(n) + 1000);
        first.assign(cells[0] * cells[1] * cells[2] + 1, 0);
        std::vector<int64_t> of_point(n);
        for (int64_t k = 0; k < n; k++) {
            const double *p = points + 3 * k;
            of_point[k] = (cell(2, p[2]) * cells[1] + cell(1, p[1])) * cells[0] + cell(0, p[0]);
            first[of_point[k] + 1]++;
        }
        for (std::size_t k = 1; k < first.size(); k++) first[k] += first[k - 1];
        std::vector<int64_t> next(first.begin(), first.end() - 1);
        for (auto &values : x) values.assign(n + WIDTH<double>, 0.0);
        for (int64_t k = 0; k < n; k++) {
            const int64_t to = next[of_point[k]]++;
            order[to] = k;
            for (int axis = 0; axis < 3; axis++) x[axis][to] = points[3 * k + axis];
        }
    }

    // run(begin, end) of points that are one after the other, all within `reach` of p among them.
    template <class Run> void around(const double *p, double reach, Run run) const {
        for (int64_t z = cell(2, p[2] - reach); z <= cell(2, p[2] + reach); z++)
            for (int64_t y = cell(1, p[1] - reach); y <= cell(1, p[1] + reach); y++) {
                const double dy = distance(1, y, p[1]), dz = distance(2, z, p[2]), rest = reach * reach - dy * dy - dz * dz;
                if (rest < 0) continue;
                const int64_t *row = &first[(z * cells[1] + y) * cells[0]];
                run(row[cell(0, p[0] - std::sqrt(rest))], row[cell(0, p[0] + std::sqrt(rest)) + 1]);
            }
    }
};

class Tail {
    using L = Lanes<double>;
    using Mask = LanesOf<double>::places;

    int64_t n_species;
    std::vector<double> c6;          // (species, species) eV A^6
    double begin, full, fall, outer; // A; it rises between the first two and falls between the last two

    // The quintic from 0 at low to 1 at high, and its derivative by r, over r.
    static GPMLP_INLINE L smoothstep(L square, L inverse, double low, double high, L &slope) {
        L r;
        for (int k = 0; k < WIDTH<double>; k++) r[k] = std::sqrt(square[k]);
        const double per = 1 / (high - low);
        const L zero{}, one = fill(1.0), given = (r - low) * per;
        const L x = choose<double>(given > one, one, choose<double>(given < zero, zero, given)), rest = 1 - x;
        slope = 30 * per * (x * x) * (rest * rest) * (r * inverse);
        return x * x * x * (10 - 15 * x + 6 * x * x);
    }

    // Energies of pairs and dE/dr / r, from r².
    GPMLP_INLINE void of_pairs(L square, L c6, L &energy, L &slope) const {
        const L inverse = 1 / square, sixth = inverse * inverse * inverse;
        energy = -c6 * sixth, slope = -6 * energy * inverse;
        L change;
        if (any(square < full * full)) {
            const L on = smoothstep(square, inverse, begin, full, change);
            slope = slope * on + energy * change, energy *= on;
        }
        if (any(square > fall * fall)) {
            const L on = 1 - smoothstep(square, inverse, fall, outer, change);
            slope = slope * on - energy * change, energy *= on;
        }
    }

    static bool any(Mask mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }

  public:
    // Of a point: half of the energy of its pairs, eV, the force on it, eV/A, and half of r (x) ∂E/∂r of its pairs, xx yy zz xy xz yz.
    using Sums = std::array<double, 10>;

    Tail(int64_t n_species, const double *c6, double begin, double full, double fall, double outer)
        : n_species(n_species), c6(c6, c6 + n_species * n_species), begin(begin), full(full), fall(fall), outer(outer) {}

    double reach() const { return outer; }

    // Of the first points (n_own of n, of which all images within `outer` have to be there), whose species are these places.
    std::vector<Sums> operator()(int64_t n_own, int64_t n, const double *points, const int64_t *places, int64_t threads) const {
        const CellGrid grid(points, n, outer);
        std::vector<Array<double>> of_species(n_species); // C₆ of each point with one of a species
        for (int64_t s = 0; s < n_species; s++) {
            of_species[s].assign(n + WIDTH<double>, 0.0);
            for (int64_t k = 0; k < n; k++) of_species[s][k] = c6[s * n_species + places[grid.order[k]]];
        }
        std::vector<Sums> out(n_own);
        constexpr int64_t TOGETHER = 32;
        Pool::share((n_own + TOGETHER - 1) / TOGETHER, threads, [&](int64_t block) {
            for (int64_t i = block * TOGETHER; i < std::min(n_own, (block + 1) * TOGETHER); i++)
                out[i] = of_point(grid, points + 3 * i, of_species[places[i]].data());
        });
        return out;
    }

  private:
    Sums of_point(const CellGrid &grid, const double *p, const double *c6) const {
        const double *x = grid.x[0].data(), *y = grid.x[1].data(), *z = grid.x[2].data();
        const L least = fill(begin * begin), most = fill(outer * outer), plain = fill(full * full), zero{};
        const L px = fill(p[0]), py = fill(p[1]), pz = fill(p[2]);
        L sums[10] = {};
        grid.around(p, outer, [&](int64_t from, int64_t to) {
            L e{}, fx{}, fy{}, fz{}, xx{}, yy{}, zz{}, xy{}, xz{}, yz{}; // kept in registers
            for (int64_t k = from; k < to; k += WIDTH<double>) {
                const L dx = load(x + k) - px, dy = load(y + k) - py, dz = load(z + k) - pz, square = dx * dx + dy * dy + dz * dz;
                const Mask near = (square > least) & (square < most) & (Mask{0, 1, 2, 3} < to - k); // not the point itself
                L energy, slope;
                of_pairs(choose<double>(near, square, plain), choose<double>(near, load(c6 + k), zero), energy, slope);
                const L gx = slope * dx, gy = slope * dy, gz = slope * dz;
                e += energy, fx += gx, fy += gy, fz += gz;
                xx += gx * dx, yy += gy * dy, zz += gz * dz, xy += gx * dy, xz += gx * dz, yz += gy * dz;
            }
            int at = 0;
            for (const L &sum : {e, fx, fy, fz, xx, yy, zz, xy, xz, yz}) sums[at++] += sum;
        });
        Sums out;
        for (int k = 0; k < 10; k++) out[k] = (k >= 1 && k <= 3 ? 1 : 0.5) * sum<double>(sums[k]);
        return out;
    }
};

} // namespace gpmlp
