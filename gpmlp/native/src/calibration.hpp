// What makes posterior variances agree with held-out errors: the equations of uncertainty/calibration.py.
#pragma once

#include <algorithm>
#include <cmath>

namespace gpmlp {

// A factor on standard deviations that depends on the prediction: uncertainty/local_scale.py.
struct LocalScale {
    double force = 0;                                  // rms of predicted forces, eV/A; 0 where there is no such factor
    double slope[3], middle[3], lowest[3], highest[3]; // of each predictor

    // parts: of the variance, weighted: due to the inducing set, to the data, and constant.
    double operator()(const double *parts, double squared_force) const {
        if (!(force > 0)) return 1;
        constexpr double LEAST_PART = 1e-4, LEAST_FORCE = 0.1;
        const double total = parts[0] + parts[1] + parts[2], least = LEAST_PART * total, floor = LEAST_FORCE * force;
        const double sizes[3] = {total, squared_force + floor * floor, (parts[0] + least) / (parts[1] + least)};
        double log = 0;
        for (int k = 0; k < 3; k++) {
            const double x = 0.5 * std::log(std::max(sizes[k], 1e-300));
            log += slope[k] * (std::max(lowest[k], std::min(highest[k], x)) - middle[k]);
        }
        return std::exp(log);
    }
};

// Of forces, and of local energies, which are calibrated as their slopes are.
struct Calibration {
    double share = 1;                                        // of what the inducing set cannot represent
    double weights[3] = {1, 1, 1}, scale = 1, forbidden = 0; // of the parts; factor on all; eV/A
    double typical_novelty = 0;                              // beyond which variances grow; 0: they do not
    double misspecification = 0, label_noise = 0;            // variances of forces that are the same everywhere, (eV/A)²
    LocalScale local;

    double widening(double novelty) const {
        if (!(typical_novelty > 0)) return 1;
        const double beyond = std::min(std::max(novelty / typical_novelty, 1.0), 1e4);
        return beyond * beyond;
    }

    // Standard deviation of a local energy from the two parts of its variance, eV².
    double local_sigma(double inducing, double data, double novelty) const {
        const double squared = scale * scale * widening(novelty);
        return std::sqrt(squared * (weights[0] * share * inducing + weights[1] * data) + forbidden * forbidden);
    }
};

} // namespace gpmlp
