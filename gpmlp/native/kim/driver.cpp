// A KIM model driver: portable models of gpmlp, each with the model's file (model_file.hpp) as its one parameter file.
//
// Energies, forces, virials, and energies and virials of each particle, of particles that contribute; no uncertainties,
// for which KIM has no place. Units of length and energy are those that the simulator asks for.

#define GPMLP_API inline // nothing of the core is visible outside

#include "KIM_ModelDriverHeaders.hpp"

#include "model_file.hpp"

#include <cstdlib>
#include <sstream>

#define SAY(WHERE, SENTENCE) (WHERE)->LogEntry(KIM::LOG_VERBOSITY::error, std::string("gpmlp: ") + (SENTENCE), __LINE__, __FILE__)

namespace {

constexpr double ON_TOP = 1e-3; // A; particles that are as close are one on top of the other
constexpr int FAILED = true, DONE = false;

// What KIM hands to each routine of a model.
struct Buffer {
    std::unique_ptr<gpmlp::Model> model;
    double cutoff;              // in the simulator's unit of length
    double length, energy;      // its units in A and eV
    int without_ghosts_own = 1; // neighbours of particles that do not contribute are never asked for
    int64_t threads;
};

// Pairs of all particles that contribute, within the cutoff.
struct Environments {
    std::vector<int> particles, neighbors;
    std::vector<int64_t> species, centers, neighbor_species;
    std::vector<double> vectors, gradients, energies;
};

// What the simulator gives, and wants; null where it does not.
struct Arguments {
    const int *n, *species, *contributing;
    const double *coordinates;
    double *energy, *forces, *particle_energy, *virial, *particle_virial;

    bool get(const KIM::ModelComputeArguments *from) {
        namespace N = KIM::COMPUTE_ARGUMENT_NAME;
        return !(
            from->GetArgumentPointer(N::numberOfParticles, &n) || from->GetArgumentPointer(N::particleSpeciesCodes, &species) ||
            from->GetArgumentPointer(N::particleContributing, &contributing) || from->GetArgumentPointer(N::coordinates, &coordinates) ||
            from->GetArgumentPointer(N::partialEnergy, &energy) || from->GetArgumentPointer(N::partialForces, &forces) ||
            from->GetArgumentPointer(N::partialParticleEnergy, &particle_energy) || from->GetArgumentPointer(N::partialVirial, &virial) ||
            from->GetArgumentPointer(N::partialParticleVirial, &particle_virial));
    }
};

// False where it has said why not.
bool gather(const KIM::ModelCompute *model, const KIM::ModelComputeArguments *from, const Buffer &buffer, const Arguments &given,
            Environments &out) {
    const double cutoff = buffer.model->cutoff();
    for (int i = 0; i < *given.n; i++) {
        if (!given.contributing[i]) continue;
        int count;
        const int *neighbors;
        if (from->GetNeighborList(0, i, &count, &neighbors)) return SAY(model, "there is no list of neighbours"), false;
        const int64_t center = out.particles.size();
        out.particles.push_back(i), out.species.push_back(given.species[i]);
        for (int k = 0; k < count; k++) {
            const int j = neighbors[k];
            double r[3], square = 0;
            for (int c = 0; c < 3; c++) {
                r[c] = buffer.length * (given.coordinates[3 * j + c] - given.coordinates[3 * i + c]);
                square += r[c] * r[c];
            }
            if (!(square < cutoff * cutoff)) continue;
            if (square < ON_TOP * ON_TOP)
                return SAY(model, "particles " + std::to_string(i) + " and " + std::to_string(j) + " are on top of each other"), false;
            out.neighbors.push_back(j), out.centers.push_back(center), out.neighbor_species.push_back(given.species[j]);
            out.vectors.insert(out.vectors.end(), r, r + 3);
        }
    }
    return true;
}

// Sums over particles and pairs, in the simulator's units.
void add_up(const Buffer &buffer, const Environments &from, const Arguments &to) {
    static constexpr int ROW[6] = {0, 1, 2, 1, 0, 0}, COLUMN[6] = {0, 1, 2, 2, 2, 1}; // xx yy zz yz xz xy
    const std::size_t n = *to.n;
    if (to.energy) *to.energy = 0;
    if (to.forces) std::fill_n(to.forces, 3 * n, 0.0);
    if (to.particle_energy) std::fill_n(to.particle_energy, n, 0.0);
    if (to.virial) std::fill_n(to.virial, 6, 0.0);
    if (to.particle_virial) std::fill_n(to.particle_virial, 6 * n, 0.0);
    for (std::size_t k = 0; k < from.particles.size(); k++) {
        const double energy = from.energies[k] / buffer.energy;
        if (to.energy) *to.energy += energy;
        if (to.particle_energy) to.particle_energy[from.particles[k]] = energy;
    }
    for (std::size_t p = 0; p < from.neighbors.size(); p++) {
        const int i = from.particles[from.centers[p]], j = from.neighbors[p];
        const double *r = &from.vectors[3 * p], *g = &from.gradients[3 * p];
        for (int c = 0; to.forces && c < 3; c++) {
            const double force = g[c] * buffer.length / buffer.energy;
            to.forces[3 * i + c] += force, to.forces[3 * j + c] -= force;
        }
        for (int k = 0; (to.virial || to.particle_virial) && k < 6; k++) {
            const double v = 0.5 * (r[ROW[k]] * g[COLUMN[k]] + r[COLUMN[k]] * g[ROW[k]]) / buffer.energy;
            if (to.virial) to.virial[k] += v;
            if (to.particle_virial) to.particle_virial[6 * i + k] += 0.5 * v, to.particle_virial[6 * j + k] += 0.5 * v;
        }
    }
}

int compute(const KIM::ModelCompute *const model, const KIM::ModelComputeArguments *const arguments) {
    Buffer *buffer;
    model->GetModelBufferPointer(reinterpret_cast<void **>(&buffer));
    Arguments given;
    if (!given.get(arguments)) return SAY(model, "an argument cannot be had"), FAILED;
    try {
        Environments here;
        if (!gather(model, arguments, *buffer, given, here)) return FAILED;
        here.energies.resize(here.particles.size()), here.gradients.resize(here.vectors.size());
        const gpmlp::Surroundings<double> pairs{int64_t(here.particles.size()),
                                                int64_t(here.neighbors.size()),
                                                here.species.data(),
                                                here.centers.data(),
                                                here.neighbor_species.data(),
                                                here.vectors.data()};
        if (!buffer->model->evaluate(pairs, {here.energies.data(), here.gradients.data()}, buffer->threads))
            return SAY(model, "the model was not made for one of these species"), FAILED;
        add_up(*buffer, here, given);
    } catch (const std::exception &) {
        return SAY(model, "there is not enough memory"), FAILED;
    }
    return DONE;
}

int destroy(KIM::ModelDestroy *const model) {
    Buffer *buffer;
    model->GetModelBufferPointer(reinterpret_cast<void **>(&buffer));
    delete buffer;
    return DONE;
}

int create_arguments(const KIM::ModelCompute *const, KIM::ModelComputeArgumentsCreate *const arguments) {
    using namespace KIM::COMPUTE_ARGUMENT_NAME;
    for (const auto &name : {partialEnergy, partialForces, partialParticleEnergy, partialVirial, partialParticleVirial})
        if (arguments->SetArgumentSupportStatus(name, KIM::SUPPORT_STATUS::optional)) return FAILED;
    return DONE;
}

int destroy_arguments(const KIM::ModelCompute *const, KIM::ModelComputeArgumentsDestroy *const) { return DONE; }

// How many of `to` are one A (or eV) to these powers; throws where KIM does not know.
double units_per(const KIM::LengthUnit &length, const KIM::EnergyUnit &energy, double of_length, double of_energy) {
    namespace C = KIM::CHARGE_UNIT;
    namespace K = KIM::TEMPERATURE_UNIT;
    namespace T = KIM::TIME_UNIT;
    double factor = 1;
    if (KIM::ModelDriverCreate::ConvertUnit(KIM::LENGTH_UNIT::A, KIM::ENERGY_UNIT::eV, C::e, K::K, T::ps, length, energy, C::e, K::K, T::ps,
                                            of_length, of_energy, 0, 0, 0, &factor))
        gpmlp::refuse("knows no conversion from eV and A to " + energy.ToString() + " and " + length.ToString());
    return factor;
}

template <class F> KIM::Function *routine(F *function) { return reinterpret_cast<KIM::Function *>(function); }

// The model that its parameter file holds; throws a sentence that begins with what it does.
void create(KIM::ModelDriverCreate *const driver, KIM::LengthUnit length, KIM::EnergyUnit energy) {
    namespace R = KIM::MODEL_ROUTINE_NAME;
    const std::string *folder, *name;
    int files = 0;
    driver->GetNumberOfParameterFiles(&files);
    driver->GetParameterFileDirectoryName(&folder);
    if (files != 1 || driver->GetParameterFileBasename(0, &name)) gpmlp::refuse("must have one parameter file");
    if (length == KIM::LENGTH_UNIT::unused) length = KIM::LENGTH_UNIT::A;
    if (energy == KIM::ENERGY_UNIT::unused) energy = KIM::ENERGY_UNIT::eV;
    auto buffer = std::make_unique<Buffer>();
    buffer->length = 1 / units_per(length, energy, 1, 0), buffer->energy = 1 / units_per(length, energy, 0, 1);
    const gpmlp::Words words = gpmlp::read_words(*folder + "/" + *name);
    buffer->model = gpmlp::model_of(words);
    if (buffer->model->tail) gpmlp::refuse("has a dispersion tail, which this driver does not compute: use LAMMPS with pair_style gpmlp");
    buffer->cutoff = buffer->model->cutoff() / buffer->length;
    const std::string writer = gpmlp::head_entry(words, "gpmlp"), built = GPMLP_VERSION;
    const std::string told = "gpmlp: " + *name + " was exported by gpmlp " + writer + " from the model file with sha256 " +
                             gpmlp::head_entry(words, "sha256");
    driver->LogEntry(KIM::LOG_VERBOSITY::information, told, __LINE__, __FILE__);
    if (writer != built)
        driver->LogEntry(KIM::LOG_VERBOSITY::warning, told + "; the driver is of gpmlp " + built + ": export and install both again",
                         __LINE__, __FILE__);
    const char *threads = std::getenv("OMP_NUM_THREADS");
    buffer->threads = threads && std::atoi(threads) > 0 ? std::atoi(threads) : 1;
    std::istringstream symbols(gpmlp::head_entry(words, "species"));
    std::string symbol;
    for (int64_t z : buffer->model->species)
        if (!std::getline(symbols, symbol, ',') || driver->SetSpeciesCode(KIM::SpeciesName(symbol), int(z)))
            gpmlp::refuse("has the species " + symbol + ", which KIM does not know");
    const auto cpp = KIM::LANGUAGE_NAME::cpp;
    if (driver->SetUnits(length, energy, KIM::CHARGE_UNIT::unused, KIM::TEMPERATURE_UNIT::unused, KIM::TIME_UNIT::unused) ||
        driver->SetModelNumbering(KIM::NUMBERING::zeroBased) ||
        driver->SetRoutinePointer(R::ComputeArgumentsCreate, cpp, true, routine(create_arguments)) ||
        driver->SetRoutinePointer(R::Compute, cpp, true, routine(compute)) ||
        driver->SetRoutinePointer(R::ComputeArgumentsDestroy, cpp, true, routine(destroy_arguments)) ||
        driver->SetRoutinePointer(R::Destroy, cpp, true, routine(destroy)))
        gpmlp::refuse("is refused by this version of the KIM API");
    driver->SetInfluenceDistancePointer(&buffer->cutoff);
    driver->SetNeighborListPointers(1, &buffer->cutoff, &buffer->without_ghosts_own);
    driver->SetModelBufferPointer(buffer.release());
}

} // namespace

extern "C" int model_driver_create(KIM::ModelDriverCreate *const driver, KIM::LengthUnit const length, KIM::EnergyUnit const energy,
                                   KIM::ChargeUnit const, KIM::TemperatureUnit const, KIM::TimeUnit const) {
    try {
        create(driver, length, energy);
    } catch (const std::bad_alloc &) {
        return SAY(driver, "there is not enough memory for the model"), FAILED;
    } catch (const std::exception &problem) {
        return SAY(driver, std::string("the model ") + problem.what()), FAILED;
    }
    return DONE;
}
