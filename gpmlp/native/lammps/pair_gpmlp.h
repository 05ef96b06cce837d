// pair_style gpmlp: a potential of gpmlp in LAMMPS, with its uncertainties.
//
// pair_style gpmlp [threads N] [force_atoms N] [sigma_above X] [novelty_above X]
// pair_coeff * * MODEL element|NULL ...   (MODEL written by: gpmlp export MODEL.gpmlp --to lammps -o MODEL)
// fix ID all pair N gpmlp sigma 1 novelty 1   (by atom, every N steps: standard deviation of the local energy, eV; novelty)
// fix ID all pair N gpmlp force_sigma 1       (standard deviations of force components, eV/A, of the atoms that are flagged)
#pragma once

#include "pair.h"

#include <cmath>
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

    // What is known of errors, on steps when fix pair asks for it.
    struct Asked {
        const char *name;
        int asked = 0;
        bigint step = -1; // when it was last computed
    };
    // Of each atom's local energy.
    struct Errors : Asked {
        std::vector<double> of_centers, of_atoms;
    };
    Errors sigma{{"sigma"}, {}, {}}, novelty{{"novelty"}, {}, {}};
    bigint evaluated = -1; // the last step of this run

    std::string load(const std::string &path);
    void introduce(const std::string &given, const std::vector<int64_t> &words);
    void gather();
    Errors *errors(const std::string &name);
    void spread(Errors &);

    // Of force components of the atoms that are flagged; zero for all others.
    struct ForceErrors : Asked {
        int atoms = -1;                                                // so many of all processes with the largest sigma; if not given, FEW
        double sigma_above = INFINITY, novelty_above = INFINITY;       // and those beyond these
        std::vector<double> values;
        std::vector<double *> rows; // (atoms, 3), as LAMMPS wants them
        void resize(std::size_t n);
    };
    ForceErrors force_sigma{{"force_sigma"}};

    void check_read(const Asked &) const;
    double sigma_of_flagged() const;
    std::vector<int> flagged() const;
    void find_force_errors();
    void check_force_sigma();
    void reach_to(double distance, const std::string &what);
    void check_ghosts(double distance, const std::string &what) const;
    void add_tail();
    void tally_pair(int i, int j, const double *r, const double *g);
};

} // namespace LAMMPS_NS
