// A pool of threads that share numbered blocks of work: each block is done by one thread, so that results do not depend
// on their number.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>

namespace gpmlp {

constexpr int SPIN = 50; // microseconds

class Pool {
  public:
    // work(block) for 0 <= block < blocks, by up to `threads` threads, the calling one among them. Where the pool is at
    // work for another caller, this one does everything itself. What a block throws is thrown here, after all others
    // are done.
    template <class Work> static void share(int64_t blocks, int64_t threads, Work &&work) {
        threads = std::min(threads, blocks);
        if (threads > 1) {
            Pool &pool = of_process();
            std::unique_lock<std::mutex> mine(pool.busy, std::try_to_lock);
            if (mine) return pool.run(blocks, threads, &call<Work>, &work);
        }
        for (int64_t block = 0; block < blocks; block++) work(block);
    }

  private:
    using Function = void (*)(void *, int64_t);

    template <class Work> static void call(void *work, int64_t block) { (*static_cast<std::remove_reference_t<Work> *>(work))(block); }

    // Threads do not survive a fork: each process has a pool of its own. That of the parent is left as it is.
    static Pool &of_process() {
        static std::mutex making;
        static Pool *pool = nullptr;
        static pid_t owner = 0;
        std::lock_guard<std::mutex> lock(making);
        if (!pool || owner != getpid()) pool = new Pool, owner = getpid();
        return *pool;
    }

    // Threads that wake up when no block is left are not waited for.
    void run(int64_t blocks, int64_t threads, Function function, void *work) {
        {
            std::lock_guard<std::mutex> lock(guard);
            while (static_cast<int64_t>(workers.size()) + 1 < threads) workers.emplace_back([this, id = workers.size()] { serve(id); });
            job = {function, work, blocks, threads - 1};
            next = 0, error = nullptr, open = true, round++;
        }
        wake.notify_all();
        take_blocks();
        {
            std::lock_guard<std::mutex> lock(guard);
            open = false;
        }
        spin([this] { return active == 0; });
        std::unique_lock<std::mutex> lock(guard);
        done.wait(lock, [this] { return active == 0; });
        if (error) std::rethrow_exception(error);
    }

    void serve(std::size_t id) {
        uint64_t last = 0;
        std::unique_lock<std::mutex> lock(guard);
        for (;;) {
            wake.wait(lock, [&] { return round != last; });
            last = round;
            if (!open || static_cast<int64_t>(id) >= job.helpers) continue;
            active++;
            lock.unlock();
            take_blocks();
            lock.lock();
            if (--active == 0) done.notify_one();
            lock.unlock();
            spin([&] { return round != last; }); // one call shares work several times
            lock.lock();
        }
    }

    // Wait for what comes soon: falling asleep and waking up take as long.
    template <class Ready> static void spin(Ready &&ready) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(SPIN);
        while (!ready() && std::chrono::steady_clock::now() < until) {}
    }

    void take_blocks() {
        for (int64_t block; (block = next++) < job.blocks;) {
            try {
                job.function(job.work, block);
            } catch (...) {
                std::lock_guard<std::mutex> lock(guard);
                error = std::current_exception();
            }
        }
    }

    struct Job {
        Function function;
        void *work;
        int64_t blocks, helpers;
    };

    std::mutex busy, guard;
    std::condition_variable wake, done;
    std::vector<std::thread> workers; // never joined: they wait until the process ends
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    bool open = false; // whether blocks may be left
    std::atomic<int64_t> active{0};
    std::atomic<uint64_t> round{0};
    Job job{};
};

} // namespace gpmlp
