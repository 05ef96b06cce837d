// What all C functions of the core share: they are visible, throw nothing, and answer -1 where memory ran out.
#pragma once

#include <cstdint>
#include <vector>

#ifndef GPMLP_API // programs that compile the core in need none of its functions to be visible
#define GPMLP_API extern "C" __attribute__((visibility("default")))
#endif

namespace gpmlp {

constexpr int64_t ABI = 7; // raised with every change of what functions or their arguments mean

// Whatever a function hands out by its address, to be freed by gpmlp_free.
struct Object {
    virtual ~Object() = default;
};

template <class T> const T &object(int64_t address) { return *static_cast<const T *>(reinterpret_cast<Object *>(address)); }

template <class T> T &changed(int64_t address) { return *static_cast<T *>(reinterpret_cast<Object *>(address)); }

// Of n addresses, null where one is 0.
template <class T> std::vector<const T *> objects(int64_t n, const int64_t *addresses) {
    std::vector<const T *> out;
    for (; n--; addresses++) out.push_back(*addresses ? &object<T>(*addresses) : nullptr);
    return out;
}

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
