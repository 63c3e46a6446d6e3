#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "export.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define POSTERN_FORKS 1
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define POSTERN_MXCSR 1
#endif

namespace postern {
namespace {

// A worker that has just finished looks for the next job this long before it sleeps: the two passes over a row follow
// each other within microseconds, and waking a sleeping thread takes tens of them.
constexpr std::chrono::microseconds spinning_time{30};

inline void pause() {
#ifdef POSTERN_MXCSR
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

inline unsigned floating_point_mode() {
#ifdef POSTERN_MXCSR
    return _mm_getcsr() & ~0x3Fu;  // without the sticky exception flags
#else
    return 0;
#endif
}

inline void set_floating_point_mode([[maybe_unused]] unsigned mode) {
#ifdef POSTERN_MXCSR
    _mm_setcsr(mode);
#endif
}

struct Job {
    void (*function)(void*, std::size_t);
    void* context;
    std::size_t count;
    unsigned mode;
    std::atomic<std::size_t> next{0};
    std::atomic<bool> has_failed{false};
    std::exception_ptr failure{};

    // On a thread that is not ours to change.
    void visit() noexcept {
        const unsigned own_mode = floating_point_mode();
        set_floating_point_mode(mode);
        work();
        set_floating_point_mode(own_mode);
    }

    void work() noexcept {
        try {
            for (std::size_t index = next++; index < count; index = next++) function(context, index);
        } catch (...) {
            if (!has_failed.exchange(true)) failure = std::current_exception();
            next = count;
        }
    }
};

class Pool {
public:
    void run(Job& job, int threads) {
        std::unique_lock<std::mutex> turn(busy_, std::try_to_lock);
        if (!turn.owns_lock()) return job.work();
        publish(&job, threads - 1);
        job.work();
        withdraw();
    }

private:
    void publish(Job* job, int helpers) {
        std::lock_guard<std::mutex> lock(mutex_);
        while (workers_ < helpers) {
            try {
                std::thread(&Pool::serve, this).detach();
            } catch (const std::system_error&) {
                break;  // the machine gives no more threads: those that are there do the work
            }
            ++workers_;
        }
        job_ = job;
        vacancies_ = helpers;
        generation_.fetch_add(1, std::memory_order_release);
        if (sleeping_ > 0) wake_.notify_all();
    }

    // A worker that has not yet joined is too late; those that have are waited for.
    void withdraw() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = nullptr;
        }
        while (working_.load(std::memory_order_acquire) > 0) pause();
    }

    void serve() {
        unsigned long seen = 0;
        for (;;) {
            await(seen);
            Job* job = nullptr;
            {
                std::lock_guard<std::mutex> lock(mutex_);
                seen = generation_.load(std::memory_order_relaxed);
                if (job_ != nullptr && vacancies_ > 0) {
                    --vacancies_;
                    job = job_;
                    working_.fetch_add(1, std::memory_order_relaxed);
                }
            }
            if (job == nullptr) continue;
            job->visit();
            working_.fetch_sub(1, std::memory_order_release);
        }
    }

    void await(unsigned long seen) {
        const auto deadline = std::chrono::steady_clock::now() + spinning_time;
        do {
            for (int k = 0; k < 32; ++k) {
                if (generation_.load(std::memory_order_acquire) != seen) return;
                pause();
            }
        } while (std::chrono::steady_clock::now() < deadline);
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        --sleeping_;
    }

    std::mutex busy_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned long> generation_{0};
    std::atomic<int> working_{0};
    Job* job_ = nullptr;
    int vacancies_ = 0;
    int workers_ = 0;
    int sleeping_ = 0;
};

// Never destroyed: detached workers may outlive every static object.
std::atomic<Pool*> current_pool{nullptr};

// The entry point of an OpenMP runtime, which both GCC's and LLVM's have: calls function(data) on each thread of a team.
using OpenMPParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
std::atomic<OpenMPParallel> openmp_parallel{nullptr};

// A forked child has none of the threads and may have inherited locked mutexes: it starts with a pool of its own.
[[maybe_unused]] void forget_threads() {
    current_pool.store(nullptr);
    openmp_parallel.store(nullptr);
}

void start_afresh_in_forks() {
#ifdef POSTERN_FORKS
    static const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
    (void)registered;
#endif
}

Pool& pool() {
    start_afresh_in_forks();
    Pool* existing = current_pool.load(std::memory_order_acquire);
    if (existing == nullptr) {
        auto fresh = std::make_unique<Pool>();
        if (current_pool.compare_exchange_strong(existing, fresh.get())) existing = fresh.release();
    }
    return *existing;
}

}  // namespace

void parallel_for(std::size_t count, int threads, void (*function)(void*, std::size_t), void* context) {
    if (count <= 1 || threads <= 1) {
        for (std::size_t index = 0; index < count; ++index) function(context, index);
        return;
    }
    Job job{function, context, count, floating_point_mode()};
    if (const OpenMPParallel parallel = openmp_parallel.load(std::memory_order_relaxed)) {
        // The whole team even for fewer indices: a runtime may end the threads that a smaller team leaves out.
        parallel([](void* data) { static_cast<Job*>(data)->visit(); }, &job, static_cast<unsigned>(threads), 0);
    } else {
        pool().run(job, count < static_cast<std::size_t>(threads) ? static_cast<int>(count) : threads);
    }
    if (job.has_failed) std::rethrow_exception(job.failure);
}

}  // namespace postern

// From now on loops run on the threads of the OpenMP runtime whose GOMP_parallel this is, or on our own if it is null.
POSTERN_EXPORT void postern_share_threads(void* parallel) {
    postern::start_afresh_in_forks();
    postern::openmp_parallel.store(reinterpret_cast<postern::OpenMPParallel>(parallel));
}
