// Energies that are added, not learned: isolated atoms and the short-range nuclear repulsion of potential/baselines.py
// (ZBL).
#pragma once

#include <cmath>
#include <vector>

namespace gpmlp {

// By place of a species in the model, or of two of them.
struct Baselines {
    std::vector<double> isolated, charges; // eV; atomic numbers
    std::vector<double> inner, outer;      // A; no repulsion where outer is 0
    double coulomb = 0, farthest = 0;      // eV A; largest outer

    // Half of the repulsion of centre i with neighbour j at distance r < outer, and its derivative. Ziegler, Biersack,
    // Littmark, The Stopping and Range of Ions in Matter (1985); switched off by a quintic smoothstep.
    double repulsion(int i, int j, double r, double &slope) const {
        static constexpr double AMPLITUDES[4] = {0.18175, 0.50986, 0.28022, 0.02817};
        static constexpr double EXPONENTS[4] = {3.19980, 0.94229, 0.40290, 0.20162};
        const double from = inner[i * isolated.size() + j], to = outer[i * isolated.size() + j];
        const double length = 0.46850 / (std::pow(charges[i], 0.23) + std::pow(charges[j], 0.23));
        double phi = 0, d_phi = 0;
        for (int k = 0; k < 4; k++) {
            const double term = AMPLITUDES[k] * std::exp(-EXPONENTS[k] * r / length);
            phi += term, d_phi -= term * EXPONENTS[k] / length;
        }
        const double bare = coulomb * charges[i] * charges[j] / r, energy = bare * phi;
        const double d_energy = bare * (d_phi - phi / r);
        const double width = std::max(to - from, 1e-6), x = std::min(1.0, std::max(0.0, (r - from) / width));
        const double off = 1 - x * x * x * (10 - 15 * x + 6 * x * x), d_off = -30 * x * x * (1 - x) * (1 - x) / width;
        slope = 0.5 * (d_energy * off + energy * d_off);
        return 0.5 * energy * off;
    }
};

} // namespace gpmlp
