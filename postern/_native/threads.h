// A small persistent thread pool. It is our own so that the library needs no OpenMP run-time beside torch's.
#pragma once

#include <cstddef>

namespace postern {

// Calls function(context, index) once for each index in [0, count), on up to `threads` threads, the caller's among
// them; returns when all calls are done. Indices go to whichever thread is free. While another caller has the pool,
// or in a call made from inside, the caller does all the work. An exception ends the loop
// and is thrown to the caller. Workers take over the caller's handling of denormals.
void parallel_for(std::size_t count, int threads, void (*function)(void*, std::size_t), void* context);

template <class Body>
inline void parallel_for(std::size_t count, int threads, Body&& body) {
    parallel_for(
        count, threads, [](void* context, std::size_t index) { (*static_cast<Body*>(context))(index); }, &body);
}

}  // namespace postern
