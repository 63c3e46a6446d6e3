#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

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
    // Whether it ran the job: false while another caller has the pool.
    bool run(std::size_t count, int threads, void (*function)(void*, std::size_t), void* context) {
        std::unique_lock<std::mutex> turn(busy_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        Job job{function, context, count, floating_point_mode()};
        publish(&job, threads - 1);
        job.work();
        withdraw();
        if (job.has_failed) std::rethrow_exception(job.failure);
        return true;
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
            set_floating_point_mode(job->mode);
            job->work();
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

// A forked child has none of the threads and may have inherited locked mutexes, so it starts afresh.
[[maybe_unused]] void forget_pool() { current_pool.store(nullptr); }

Pool& pool() {
#ifdef POSTERN_FORKS
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
#endif
    Pool* existing = current_pool.load(std::memory_order_acquire);
    if (existing == nullptr) {
        auto fresh = std::make_unique<Pool>();
        if (current_pool.compare_exchange_strong(existing, fresh.get())) existing = fresh.release();
    }
    return *existing;
}

}  // namespace

void parallel_for(std::size_t count, int threads, void (*function)(void*, std::size_t), void* context) {
    if (count > 1 && threads > 1) {
        const int useful = count < static_cast<std::size_t>(threads) ? static_cast<int>(count) : threads;
        if (pool().run(count, useful, function, context)) return;
    }
    for (std::size_t index = 0; index < count; ++index) function(context, index);
}

}  // namespace postern
