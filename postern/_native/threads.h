// Loops in parallel: on the threads of the OpenMP runtime that torch has loaded, else on a small pool of our own.
//
// A second set of threads beside torch's would compete with it: after each operator of torch its idle threads keep
// their processors busy for some milliseconds, waiting for the next. The library does not link OpenMP, which would
// bring a second runtime; it is told at run time where torch's entry point is.
#pragma once

#include <cstddef>

namespace postern {

// Calls function(context, index) once for each index in [0, count), on up to `threads` threads, the caller's among
// them; returns when all calls are done. Indices go to whichever thread is free. A call made from inside another, and
// with our own pool one made while another caller has it, is served by the caller alone. An exception ends the loop and
// is thrown to the caller. All threads handle denormals as the caller does.
void parallel_for(std::size_t count, int threads, void (*function)(void*, std::size_t), void* context);

template <class Body>
inline void parallel_for(std::size_t count, int threads, Body&& body) {
    parallel_for(
        count, threads, [](void* context, std::size_t index) { (*static_cast<Body*>(context))(index); }, &body);
}

}  // namespace postern
