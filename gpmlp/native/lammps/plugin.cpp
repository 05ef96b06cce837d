// What LAMMPS calls when it loads the plugin: it refuses any LAMMPS but the one that it was compiled for, whose classes
// alone are laid out in memory as it reads them. Until that is known only LAMMPS's C library is called. All of LAMMPS is
// referred to weakly, so that another version, which lacks some of it, loads the plugin and learns why it is refused. This
// file is compiled for any processor of its kind, as it has to tell those that the pair style is not for.

#include "lammps.h"
#include "pair_gpmlp.h"
#include "utils.h"

#include <mpi.h>

#include <cstdio>
#include <cstring>
#include <string>

// Of the LAMMPS that it is compiled for, by gpmlp lammps build.
#if !defined(GPMLP_LAMMPS_VERSION) || !defined(GPMLP_LAMMPS_COMMIT)
#error "compile this by: gpmlp lammps build"
#endif

#if defined(OPEN_MPI)
#define GPMLP_MPI "Open MPI"
#elif defined(MPICH_VERSION) || defined(I_MPI_VERSION) // one ABI
#define GPMLP_MPI "MPICH"
#else
#define GPMLP_MPI "LAMMPS MPI STUBS"
#endif
#if defined(LAMMPS_BIGBIG)
#define GPMLP_SIZES "bigbig"
#else
#define GPMLP_SIZES "smallbig"
#endif

extern "C" {
// library.h of LAMMPS; absent where the program was linked without it
__attribute__((weak)) void *lammps_extract_global(void *, const char *);
__attribute__((weak)) int lammps_extract_setting(void *, const char *);
__attribute__((weak)) void lammps_error(void *, int, const char *);

// lammpsplugin.h of LAMMPS, which is not installed with it
struct lammpsplugin_t {
    const char *version, *style, *name, *info, *author;
    void *(*creator)(void *);
    void *handle;
};

// whom it is made for, as the file says; not constants, which would be compiled away
__attribute__((visibility("default"))) char gpmlp_plugin_version[] = GPMLP_LAMMPS_VERSION, gpmlp_plugin_commit[] = GPMLP_LAMMPS_COMMIT,
                                            gpmlp_plugin_abi[] = GPMLP_MPI ", " GPMLP_SIZES;
}

// with std::string among its arguments: the name is another where that is another type
namespace LAMMPS_NS::utils {
__attribute__((weak)) std::string get_potential_file_path(const std::string &);
}

// Which MPI the process runs with.
static std::string running_mpi() {
    char name[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length = 0;
    MPI_Get_library_version(name, &length);
    for (const char *known : {"Open MPI", "LAMMPS MPI STUBS"})
        if (std::strstr(name, known)) return known;
    return "MPICH";
}

// Instructions that pair_gpmlp.cpp was compiled with and this processor has not. GPMLP_NEEDS names them: GPMLP_CHECK("avx2") ...
static std::string lacking_instructions() {
    std::string out;
#if defined(__x86_64__)
    __builtin_cpu_init();
#define GPMLP_CHECK(NAME)                                                                                                                  \
    if (!__builtin_cpu_supports(NAME)) out += out.empty() ? NAME : ", " NAME;
    GPMLP_NEEDS
#undef GPMLP_CHECK
#endif
    return out;
}

// What this LAMMPS is that the plugin was not made for; empty if it is the one.
static std::string mismatch(void *lmp) {
    if (!lammps_extract_global || !lammps_extract_setting)
        return "a LAMMPS without its C library (build LAMMPS with -D BUILD_SHARED_LIBS=on)";
    const auto *version = static_cast<const char *>(lammps_extract_global(lmp, "lammps_version"));
    if (!version || std::strcmp(version, gpmlp_plugin_version)) return std::string("LAMMPS ") + (version ? version : "of unknown version");
    const std::string commit = gpmlp_plugin_commit, running = LAMMPS_NS::LAMMPS::git_descriptor();
    if (!commit.empty() && running != commit) return std::string("LAMMPS ") + version + " (" + running + ")";
    if (!LAMMPS_NS::utils::get_potential_file_path) return "a LAMMPS that was compiled with another std::string";
    for (const auto &type : {std::make_pair("tagint", sizeof(LAMMPS_NS::tagint)),
                             {"bigint", sizeof(LAMMPS_NS::bigint)},
                             {"imageint", sizeof(LAMMPS_NS::imageint)}}) {
        const int size = lammps_extract_setting(lmp, type.first);
        if (size != int(type.second)) return std::string("a LAMMPS whose ") + type.first + " has " + std::to_string(size) + " bytes";
    }
    if (running_mpi() != GPMLP_MPI) return "a LAMMPS that runs with " + running_mpi();
    const std::string lacking = lacking_instructions();
    return lacking.empty() ? "" : "this processor, which lacks " + lacking;
}

static void *make_pair(void *lmp) { return new LAMMPS_NS::PairGPMLP(static_cast<LAMMPS_NS::LAMMPS *>(lmp)); }

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void *lmp, void *handle, void *registration) {
    const std::string other = mismatch(lmp);
    if (!other.empty()) {
        const std::string sentence = std::string("this plugin of gpmlp is for LAMMPS ") + gpmlp_plugin_version + " (" +
                                     gpmlp_plugin_commit + "; " + gpmlp_plugin_abi + ") and cannot be loaded by " + other +
                                     ": build one for this LAMMPS by: gpmlp lammps build --lammps PATH";
        if (lammps_error)
            lammps_error(lmp, 2, sentence.c_str()); // of all processes
        else
            std::fprintf(stderr, "ERROR: %s\n", sentence.c_str());
        return;
    }
    lammpsplugin_t plugin{gpmlp_plugin_version, "pair", "gpmlp", "potentials of gpmlp with uncertainties", "gpmlp", make_pair, handle};
    reinterpret_cast<void (*)(lammpsplugin_t *, void *)>(registration)(&plugin, lmp);
}
