// What all C functions of the core share: they are visible, throw nothing, and answer -1 where memory ran out.
#pragma once

#include <cstdint>

#define GPMLP_API extern "C" __attribute__((visibility("default")))

namespace gpmlp {

constexpr int64_t ABI = 1; // raised with every change of what functions or their arguments mean

// Whatever a function hands out by its address, to be freed by gpmlp_free.
struct Object {
    virtual ~Object() = default;
};

template <class T> const T &object(int64_t address) { return *static_cast<const T *>(reinterpret_cast<Object *>(address)); }

inline int64_t address_of(Object *object) { return reinterpret_cast<int64_t>(object); }

// The status that `work` returns.
template <class Work> int64_t guarded(Work work) noexcept {
    try {
        return work();
    } catch (...) { // only memory can be lacking
        return -1;
    }
}

} // namespace gpmlp
