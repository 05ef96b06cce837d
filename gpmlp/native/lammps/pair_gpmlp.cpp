// pair_style gpmlp: environments from LAMMPS's neighbour list, local energies and their gradients from the core, sums to
// forces, energies and virials.

#include "pair_gpmlp.h"

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "update.h"
#include "utils.h"

#include "force_variance.hpp"
#include "model_file.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <sstream>

using namespace LAMMPS_NS;

static constexpr double ON_TOP = 1e-3; // A; atoms that are as close are one on top of the other
static constexpr int FEW = 8;          // atoms whose force_sigma is found where no others are flagged

PairGPMLP::PairGPMLP(LAMMPS *lmp) : Pair(lmp) {
    restartinfo = 0; // as others that read a file: give pair_style and pair_coeff again
    one_coeff = 1;
    manybody_flag = 1;
    single_enable = 0;
    centroidstressflag = CENTROID_AVAIL;
}

PairGPMLP::~PairGPMLP() {
    if (!allocated) return;
    memory->destroy(setflag);
    memory->destroy(cutsq);
}

void PairGPMLP::settings(int n, char **words) {
    if (n % 2)
        error->all(FLERR, "pair_style gpmlp: an option lacks its value (pair_style gpmlp [threads N] [force_atoms N] [sigma_above X] "
                          "[novelty_above X])");
    threads = 1; // of an earlier pair_style nothing stays
    force_sigma.atoms = -1;
    force_sigma.sigma_above = force_sigma.novelty_above = INFINITY;
    for (int k = 0; k < n; k += 2) {
        const std::string name = words[k];
        if (name == "sigma_above" || name == "novelty_above") {
            const double value = utils::numeric(FLERR, words[k + 1], false, lmp);
            if (!(value >= 0)) error->all(FLERR, "pair_style gpmlp: " + name + " must be 0 or more");
            (name == "sigma_above" ? force_sigma.sigma_above : force_sigma.novelty_above) = value;
            continue;
        }
        if (name != "threads" && name != "force_atoms") error->all(FLERR, "pair_style gpmlp has no option " + name);
        const int value = utils::inumeric(FLERR, words[k + 1], false, lmp);
        if (value < 1) error->all(FLERR, "pair_style gpmlp: " + name + " must be 1 or more");
        (name == "threads" ? threads : force_sigma.atoms) = value;
    }
    const bool thresholds = std::isfinite(force_sigma.sigma_above) || std::isfinite(force_sigma.novelty_above);
    if (force_sigma.atoms < 0) force_sigma.atoms = thresholds ? 0 : FEW;
}

void PairGPMLP::coeff(int n, char **words) {
    const int types = atom->ntypes;
    if (n != 3 + types || std::strcmp(words[0], "*") || std::strcmp(words[1], "*"))
        error->all(FLERR, "pair_style gpmlp needs: pair_coeff * * MODEL and then one element (or NULL) for each of the " +
                              std::to_string(types) + " atom types");
    const std::string known = load(words[2]);
    std::vector<std::string> symbols;
    std::istringstream list(known);
    for (std::string symbol; std::getline(list, symbol, ',');) symbols.push_back(symbol);
    species_of_type.assign(types + 1, 0);
    for (int type = 1; type <= types; type++) {
        const char *word = words[2 + type];
        if (!std::strcmp(word, "NULL")) continue;
        const auto found = std::find(symbols.begin(), symbols.end(), word);
        if (found == symbols.end())
            error->all(FLERR, std::string("pair_coeff: the model ") + words[2] + " was not trained on " + word + ", given for atom type " +
                                  std::to_string(type) + "; it knows " + known);
        species_of_type[type] = model->species[found - symbols.begin()];
    }
    if (!allocated) {
        allocated = 1;
        memory->create(setflag, types + 1, types + 1, "pair:setflag");
        memory->create(cutsq, types + 1, types + 1, "pair:cutsq");
    }
    for (int i = 1; i <= types; i++)
        for (int j = 1; j <= types; j++) setflag[i][j] = species_of_type[i] && species_of_type[j];
}

// Read by one process, replayed by all. Returns the symbols of the model's species.
std::string PairGPMLP::load(const std::string &given) {
    const std::string path = utils::get_potential_file_path(given);
    gpmlp::Words words;
    std::string problem;
    if (comm->me == 0) {
        try {
            words = gpmlp::read_words(path.empty() ? given : path);
        } catch (const std::exception &said) {
            problem = said.what();
        }
    }
    bigint n = words.size();
    MPI_Bcast(&n, 1, MPI_LMP_BIGINT, 0, world);
    words.resize(n);
    for (bigint from = 0; from < n; from += MAXSMALLINT)
        MPI_Bcast(words.data() + from, int(std::min<bigint>(n - from, MAXSMALLINT)), MPI_LMP_BIGINT, 0, world);
    try {
        if (problem.empty()) model = gpmlp::model_of(words);
    } catch (const std::bad_alloc &) {
        error->one(FLERR, "there is not enough memory for the model " + given);
    } catch (const std::exception &said) {
        problem = said.what();
    }
    int length = int(problem.size());
    MPI_Bcast(&length, 1, MPI_INT, 0, world); // all read the same, but only one knows why there is nothing to read
    if (length) error->all(FLERR, given + ": " + problem);
    cutoff = model->cutoff();
    if (comm->me == 0) introduce(given, words);
    return gpmlp::head_entry(words, "species");
}

// What was loaded, so that an export that is older than its model is noticed.
void PairGPMLP::introduce(const std::string &given, const std::vector<int64_t> &words) {
    const std::string hash = gpmlp::head_entry(words, "sha256"), writer = gpmlp::head_entry(words, "gpmlp"), built = GPMLP_VERSION;
    utils::logmesg(lmp, "gpmlp: " + given + " was exported by gpmlp " + writer + " from " +
                            (hash == "unknown" ? "a model that was in no file" : "the model file with sha256 " + hash) + "\n");
    if (writer != built)
        error->warning(FLERR, "pair_style gpmlp: " + given + " was exported by gpmlp " + writer + ", and the plugin was built by gpmlp " +
                                  built + "; they can be used together, but export the model again (gpmlp export) or build the plugin "
                                          "again (gpmlp lammps build) if results are to be those of one version");
}

void PairGPMLP::init_style() {
    evaluated = -1;
    if (!force->newton_pair) error->all(FLERR, "pair_style gpmlp needs the forces of ghost atoms to be summed: newton on");
    if (std::strcmp(update->unit_style, "metal"))
        error->all(FLERR,
                   std::string("pair_style gpmlp has energies in eV and lengths in A: it needs units metal, not ") + update->unit_style);
    const double *lj = force->special_lj;
    if (atom->molecular != Atom::ATOMIC && !(lj[1] == 1 && lj[2] == 1 && lj[3] == 1))
        error->all(FLERR, "pair_style gpmlp sees bonded neighbours as others: it needs special_bonds lj/coul 1.0 1.0 1.0");
    if ((neighbor->nex_type || neighbor->nex_group || neighbor->nex_mol) && comm->me == 0)
        error->warning(FLERR, "pair_style gpmlp does not see the pairs that neigh_modify exclude leaves out: energies and forces of "
                              "atoms near them are not those of the model");
    neighbor->add_request(this, NeighConst::REQ_FULL);
    if (!model->tail) return;
    reach_to(model->tail->reach(), "the dispersion tail");
    no_virial_fdotr_compute = force->pair->no_virial_fdotr_compute = 1; // forces of the tail on ghost atoms are left to their owners
}

double PairGPMLP::init_one(int i, int j) {
    if (!species_of_type[i] || !species_of_type[j]) return 0; // by hybrid styles only
    return cutoff;
}

// Centres that are ours, and their neighbours within the cutoff.
void PairGPMLP::gather() {
    const double *const *x = atom->x;
    const int *type = atom->type;
    std::size_t most = 0, n = 0;
    for (int k = 0; k < list->inum; k++) most += list->numneigh[list->ilist[k]];
    if (here.neighbors.size() < most) {
        here.neighbors.resize(most), here.centers.resize(most), here.neighbor_species.resize(most);
        here.vectors.resize(3 * most), here.gradients.resize(3 * most);
    }
    here.atoms.clear(), here.species.clear();
    double closest = cutoff * cutoff;
    for (int k = 0; k < list->inum; k++) {
        const int i = list->ilist[k], *neighbors = list->firstneigh[i];
        if (!species_of_type[type[i]]) continue;
        const int64_t center = here.atoms.size();
        here.atoms.push_back(i), here.species.push_back(species_of_type[type[i]]);
        for (int m = 0; m < list->numneigh[i]; m++) { // what is too far is written over by the next
            const int j = neighbors[m] & NEIGHMASK;
            double *r = &here.vectors[3 * n], square = 0;
            for (int c = 0; c < 3; c++) r[c] = x[j][c] - x[i][c], square += r[c] * r[c];
            here.neighbors[n] = j, here.centers[n] = center, here.neighbor_species[n] = species_of_type[type[j]];
            const bool near = square < cutoff * cutoff && here.neighbor_species[n];
            closest = near && square < closest ? square : closest;
            n += near;
        }
    }
    here.pairs = n;
    here.energies.resize(here.atoms.size());
    if (closest < ON_TOP * ON_TOP) error->one(FLERR, "pair_style gpmlp: two atoms are on top of each other");
}

void PairGPMLP::compute(int eflag, int vflag) {
    ev_init(eflag, vflag);
    gather();
    const int64_t n = here.atoms.size();
    const gpmlp::Surroundings<double> given{
        n, here.pairs, here.species.data(), here.centers.data(), here.neighbor_species.data(), here.vectors.data()};
    if (force_sigma.asked) sigma.asked = 1;
    if (force_sigma.asked && std::isfinite(force_sigma.novelty_above)) novelty.asked = 1;
    for (Errors *wanted : {&sigma, &novelty})
        if (wanted->asked) wanted->of_centers.resize(n);
    const gpmlp::Wanted to{here.energies.data(), here.gradients.data(), nullptr, sigma.asked ? sigma.of_centers.data() : nullptr,
                           novelty.asked ? novelty.of_centers.data() : nullptr};
    try {
        if (!model->evaluate(given, to, threads))
            error->one(FLERR, "pair_style gpmlp: a descriptor of the model was not made for one of its species");
    } catch (const std::bad_alloc &) {
        error->one(FLERR, "pair_style gpmlp: there is not enough memory");
    }
    for (int64_t k = 0; k < n; k++) {
        if (eflag_global) eng_vdwl += here.energies[k];
        if (eflag_atom) eatom[here.atoms[k]] += here.energies[k];
    }
    double **f = atom->f;
    const bool tally = vflag_atom || cvflag_atom || (vflag_global && !vflag_fdotr);
    for (int64_t p = 0; p < here.pairs; p++) {
        const int i = here.atoms[here.centers[p]], j = here.neighbors[p];
        const double *r = &here.vectors[3 * p], *g = &here.gradients[3 * p];
        for (int c = 0; c < 3; c++) f[i][c] += g[c], f[j][c] -= g[c];
        if (tally) tally_pair(i, j, r, g);
    }
    if (model->tail) add_tail();
    if (vflag_fdotr) virial_fdotr_compute();
    if (sigma.asked) spread(sigma);
    if (novelty.asked) spread(novelty);
    if (force_sigma.asked) find_force_errors();
    evaluated = update->ntimestep;
    for (Asked *found : {static_cast<Asked *>(&sigma), static_cast<Asked *>(&novelty), static_cast<Asked *>(&force_sigma)}) {
        if (found->asked) found->step = evaluated;
        found->asked = 0;
    }
}

// Of our atoms, half of each of their pairs; the other half is that of the other atom, or of whom its image is.
void PairGPMLP::add_tail() {
    check_ghosts(model->tail->reach(), "the dispersion tail");
    const double *const *x = atom->x;
    std::vector<int> atoms;
    std::vector<int64_t> places;
    std::vector<double> points;
    int64_t ours = 0;
    for (int i = 0; i < atom->nlocal + atom->nghost; i++) {
        if (const int64_t z = species_of_type[atom->type[i]])
            atoms.push_back(i), places.push_back(model->place_of(z)), points.insert(points.end(), x[i], x[i] + 3);
        if (i + 1 == atom->nlocal) ours = atoms.size();
    }
    const auto sums = (*model->tail)(ours, atoms.size(), points.data(), places.data(), threads);
    for (std::size_t k = 0; k < sums.size(); k++) {
        const auto &of = sums[k];
        const int i = atoms[k];
        if (eflag_global) eng_vdwl += of[0];
        if (eflag_atom) eatom[i] += of[0];
        for (int c = 0; c < 3; c++) atom->f[i][c] += of[1 + c];
        for (int v = 0; v < 6; v++) { // in LAMMPS's order
            if (vflag_global) virial[v] -= of[4 + v];
            if (vflag_atom) vatom[i][v] -= of[4 + v];
            if (cvflag_atom) cvatom[i][v] -= of[4 + v];
            if (cvflag_atom && v > 2) cvatom[i][v + 3] -= of[4 + v];
        }
    }
}

// To the places of atoms; zero for those that are none of ours.
void PairGPMLP::spread(Errors &found) {
    found.of_atoms.assign(atom->nmax, 0);
    for (std::size_t k = 0; k < here.atoms.size(); k++) found.of_atoms[here.atoms[k]] = found.of_centers[k];
}

PairGPMLP::Errors *PairGPMLP::errors(const std::string &name) {
    if (name != "sigma" && name != "novelty") return nullptr;
    if (!model) error->all(FLERR, "pair_style gpmlp: give pair_coeff before fix pair");
    const bool known = name == "sigma" ? model->variances.size() : model->clusters.size();
    if (!known)
        error->all(FLERR, "pair_style gpmlp: the model knows no " + name + " (it was fitted with " +
                              (name == "sigma" ? "variance" : "novelty") + ": false); fit and export it again");
    return name == "sigma" ? &sigma : &novelty;
}

// Fix pair sets it to 1 where it wants the property on this step.
void *PairGPMLP::extract(const char *name, int &dimension) {
    dimension = 0;
    const std::string whole = name, ending = "_flag";
    if (whole == "force_sigma_flag") return &force_sigma.asked;
    if (whole.size() <= ending.size() || whole.substr(whole.size() - ending.size()) != ending) return nullptr;
    Errors *found = errors(whole.substr(0, whole.size() - ending.size()));
    return found ? &found->asked : nullptr;
}

// Fix pair reads, after the forces of a step, what nobody asked for on it: its own 0 behind the name.
void PairGPMLP::check_read(const Asked &found) const {
    if (update->whichflag && evaluated == update->ntimestep && found.step != evaluated)
        error->all(FLERR, std::string("pair_style gpmlp: fix pair reads ") + found.name +
                              ", which is computed on steps that ask for it only: write " + found.name + " 1 in fix pair, not 0");
}

void *PairGPMLP::extract_peratom(const char *name, int &columns) {
    columns = 0;
    if (!std::strcmp(name, "force_sigma")) {
        columns = 3;
        check_read(force_sigma);
        check_force_sigma();
        if (force_sigma.rows.size() < std::size_t(atom->nmax)) force_sigma.resize(atom->nmax);
        return force_sigma.rows.data();
    }
    Errors *found = errors(name);
    if (!found) return nullptr;
    check_read(*found);
    if (found->of_atoms.size() < std::size_t(atom->nmax)) found->of_atoms.resize(atom->nmax, 0);
    return found->of_atoms.data();
}

// Shares of the virial -r g of the pair: half of it for each atom, but all for the neighbour where it is to be multiplied by
// velocities (centroid stress), as there it is what the motion of the neighbour does to the energy of the centre.
void PairGPMLP::tally_pair(int i, int j, const double *r, const double *g) {
    static constexpr int ROW[9] = {0, 1, 2, 0, 0, 1, 1, 2, 2}, COLUMN[9] = {0, 1, 2, 1, 2, 2, 0, 0, 1}; // LAMMPS's order
    for (int k = 0; k < 6; k++) {
        const double v = -0.5 * (r[ROW[k]] * g[COLUMN[k]] + r[COLUMN[k]] * g[ROW[k]]);
        if (vflag_global && !vflag_fdotr) virial[k] += v;
        if (vflag_atom) vatom[i][k] += 0.5 * v, vatom[j][k] += 0.5 * v;
    }
    if (cvflag_atom)
        for (int k = 0; k < 9; k++) cvatom[j][k] -= r[ROW[k]] * g[COLUMN[k]];
}

double PairGPMLP::memory_usage() { return Pair::memory_usage() + double(here.neighbors.size()) * (sizeof(int) + 8 * sizeof(double)); }

void PairGPMLP::ForceErrors::resize(std::size_t n) {
    values.assign(3 * n, 0), rows.resize(n);
    for (std::size_t k = 0; k < n; k++) rows[k] = &values[3 * k];
}

// Let ghost atoms be there to this distance.
void PairGPMLP::reach_to(double distance, const std::string &what) {
    if (comm->mode != Comm::SINGLE) error->all(FLERR, "pair_style gpmlp: " + what + " needs comm_modify mode single");
    comm->cutghostuser = std::max(comm->cutghostuser, distance + neighbor->skin);
}

void PairGPMLP::check_ghosts(double distance, const std::string &what) const {
    const std::string cutoff = std::to_string(distance + neighbor->skin);
    if (comm->get_comm_cutoff() < distance + neighbor->skin)
        error->all(FLERR, "pair_style gpmlp: ghost atoms do not reach as far as " + what + " needs: give fix pair behind neighbor and "
                          "comm_modify, or comm_modify cutoff " + cutoff);
}

// Environments that contain an atom reach twice as far as the model, and ghost atoms have to.
void PairGPMLP::check_force_sigma() {
    if (!model || !model->posterior)
        error->all(FLERR, "pair_style gpmlp: the model knows no force_sigma (give pair_coeff before fix pair; it may have been fitted with "
                          "variance: false, or exported by another version)");
    if (std::isfinite(force_sigma.novelty_above)) errors("novelty");
    reach_to(2 * cutoff, "force_sigma");
}

// The least sigma of the `force_atoms` atoms of all processes that have the largest.
double PairGPMLP::sigma_of_flagged() const {
    const std::size_t most = force_sigma.atoms;
    if (!most) return INFINITY;
    std::vector<double> mine = sigma.of_centers;
    mine.resize(std::max(mine.size(), most), -1);
    std::partial_sort(mine.begin(), mine.begin() + most, mine.end(), std::greater<>());
    std::vector<double> all(most * comm->nprocs);
    MPI_Allgather(mine.data(), int(most), MPI_DOUBLE, all.data(), int(most), MPI_DOUBLE, world);
    std::nth_element(all.begin(), all.begin() + (most - 1), all.end(), std::greater<>());
    return all[most - 1];
}

// Places in `here` of the atoms whose force_sigma is wanted: the least certain ones, and those beyond a threshold.
std::vector<int> PairGPMLP::flagged() const {
    const double least = sigma_of_flagged();
    std::vector<int> out;
    for (std::size_t k = 0; k < here.atoms.size(); k++)
        if (sigma.of_centers[k] >= least || sigma.of_centers[k] > force_sigma.sigma_above ||
            (novelty.asked && novelty.of_centers[k] > force_sigma.novelty_above))
            out.push_back(int(k));
    return out;
}

// Of each of these atoms the environments around it, those of ghosts among them: the image of an atom counts as an atom, whose
// environment is the same.
void PairGPMLP::find_force_errors() {
    check_ghosts(2 * cutoff, "force_sigma");
    force_sigma.resize(atom->nmax);
    const double *const *x = atom->x;
    const int *type = atom->type, all = atom->nlocal + atom->nghost;
    const auto vector = [&](int i, int j, double *r) {
        for (int c = 0; c < 3; c++) r[c] = x[j][c] - x[i][c];
        return r[0] * r[0] + r[1] * r[1] + r[2] * r[2] < cutoff * cutoff;
    };
    std::vector<int> atoms; // of environments
    std::vector<int64_t> chosen, place(all, -1);
    double r[3];
    const auto add = [&](int i) {
        if (place[i] < 0) place[i] = int64_t(atoms.size()), atoms.push_back(i);
    };
    for (const int k : flagged()) {
        const int i = here.atoms[k];
        add(i), chosen.push_back(place[i]);
        for (int m = 0; m < list->numneigh[i]; m++)
            if (const int j = list->firstneigh[i][m] & NEIGHMASK; species_of_type[type[j]] && vector(i, j, r)) add(j);
    }
    const int64_t n = atoms.size(); // others are named by one more environment, which has no neighbours
    std::vector<int64_t> species, centers, neighbors, neighbor_species;
    std::vector<double> vectors, found(3 * chosen.size());
    for (int64_t e = 0; e < n; e++) {
        species.push_back(species_of_type[type[atoms[e]]]);
        for (int j = 0; j < all; j++) {
            if (j == atoms[e] || !species_of_type[type[j]] || !vector(atoms[e], j, r)) continue;
            centers.push_back(e), neighbors.push_back(place[j] < 0 ? n : place[j]), neighbor_species.push_back(species_of_type[type[j]]);
            vectors.insert(vectors.end(), r, r + 3);
        }
    }
    species.push_back(model->species[0]);
    const int64_t status =
        gpmlp_force_sigma(gpmlp::address_of(model.get()), n + 1, centers.size(), species.data(), centers.data(), neighbors.data(),
                          neighbor_species.data(), vectors.data(), chosen.size(), chosen.data(), found.data(), threads);
    if (status) error->one(FLERR, "pair_style gpmlp: there is not enough memory for force_sigma");
    for (std::size_t c = 0; c < chosen.size(); c++) std::copy_n(&found[3 * c], 3, force_sigma.rows[atoms[chosen[c]]]);
}
