// pair_style gpmlp: a potential of gpmlp in LAMMPS, with its uncertainties.
//
// pair_style gpmlp [threads N] [force_atoms N]
// pair_coeff * * MODEL element|NULL ...   (MODEL written by: gpmlp export MODEL.gpmlp --to lammps -o MODEL)
// fix ID all pair N gpmlp force_sigma 1       (standard deviations of force components, eV/A, of the atoms with the largest sigma)
// fix ID all pair N gpmlp sigma 1 novelty 1   (by atom, every N steps: standard deviation of the local energy, eV; novelty)
#pragma once

#include "pair.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace gpmlp {
class Model;
}

namespace LAMMPS_NS {

class PairGPMLP : public Pair {
  public:
    explicit PairGPMLP(LAMMPS *);
    ~PairGPMLP() override;
    void settings(int, char **) override;
    void coeff(int, char **) override;
    void init_style() override;
    double init_one(int, int) override;
    void compute(int, int) override;
    void *extract(const char *, int &) override;
    void *extract_peratom(const char *, int &) override;
    double memory_usage() override;

  private:
    // The environments of this process: pairs by centre, each with its neighbour.
    struct Environments {
        std::vector<int> atoms, neighbors; // which atom each centre and each neighbour is
        std::vector<int64_t> species, centers, neighbor_species;
        std::vector<double> vectors, gradients, energies; // A, eV/A, eV
        int64_t pairs = 0;                                // so many of the entries of pairs are in use
    };

    std::unique_ptr<gpmlp::Model> model;
    double cutoff = 0;
    int threads = 1;
    std::vector<int64_t> species_of_type; // atomic numbers; 0 of types that are none of ours
    Environments here;

    // What is known of the error of each atom's local energy, on steps when fix pair asks for it.
    struct Errors {
        int asked = 0;
        std::vector<double> of_centers, of_atoms;
    };
    Errors sigma, novelty;

    std::string load(const std::string &path);
    void gather();
    Errors *errors(const std::string &name);
    void spread(Errors &);

    // Of force components of the atoms whose local energies are least certain; zero for all others.
    struct ForceErrors {
        int asked = 0;
        int atoms = 8; // so many of all processes
        std::vector<double> values;
        std::vector<double *> rows; // (atoms, 3), as LAMMPS wants them
        void resize(std::size_t n);
    };
    ForceErrors force_sigma;

    std::vector<int> least_certain() const;
    void find_force_errors();
    void reach_twice_as_far();
    void tally_pair(int i, int j, const double *r, const double *g);
};

} // namespace LAMMPS_NS
