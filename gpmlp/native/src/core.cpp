// The C ABI of the compiled core: what gpmlp/native/library.py and other programs call.
//
// Plain pointers to contiguous numbers and int64_t sizes; results are a value or a status, 0 or more, and -1 where
// memory ran out. Nothing is thrown through it. A macro makes the two functions NAME_f32 and NAME_f64 of one template.

#include "abi.hpp"
#include "covariance_rows.hpp"
#include "expansion.hpp"
#include "force_variance.hpp"
#include "model.hpp"
#include "model_file.hpp"
#include "pairs.hpp"

GPMLP_API int64_t gpmlp_abi_version() { return gpmlp::ABI; }

GPMLP_API int64_t gpmlp_free(int64_t address) {
    delete reinterpret_cast<gpmlp::Object *>(address);
    return 0;
}

// Whether this processor runs code compiled for x86-64-v3.
GPMLP_API int64_t gpmlp_supports_v3() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
#else
    return 0;
#endif
}
