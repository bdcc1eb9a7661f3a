// Streams of the simulated GPU, the graphs that they record, and what events know of them.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace simulated {

using Work = std::function<void()>;
using Clock = std::chrono::steady_clock;

// Microseconds by which work is late at most; and one of how many works that may be late is.
inline int most_delay() {
  static int const delay = std::getenv("SIMULATED_GPU_DELAY") ? std::atoi(std::getenv("SIMULATED_GPU_DELAY")) : 0;
  return delay;
}
constexpr unsigned kLate = 4;

// Work that was recorded, in the order in which it was put on any of the streams. Each launch asks all nodes for their work.
struct Graph {
  std::vector<std::function<Work()>> nodes;
  unsigned long long id;
  bool is_valid = true;
};

// What an event knows of its last record.
struct Mark {
  Graph* graph = nullptr;  // Recorded into it: nothing outside of it may wait.
  std::mutex mutex;
  std::condition_variable happened;
  bool done = false;
  Clock::time_point at;

  void happen() {
    std::lock_guard<std::mutex> lock(mutex);
    done = true;
    at = Clock::now();
    happened.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    happened.wait(lock, [&] { return done; });
  }
  bool is_done() {
    std::lock_guard<std::mutex> lock(mutex);
    return done;
  }
};

// Runs work in order, on a thread of its own.
class Stream {
 public:
  bool transfers = false;           // Its copies and kernels may be late.
  Graph* recording = nullptr;  // Takes what is put here.

  Stream() : random_(std::random_device{}()) { std::thread([this] { serve(); }).detach(); }

  void put(Work work, bool may_be_late = false) {
    if (recording) {
      recording->nodes.push_back([work] { return work; });
      return;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (most_delay() && may_be_late && random_() % kLate == 0) {
      std::chrono::microseconds const delay(random_() % most_delay());
      works_.push_back([delay] { std::this_thread::sleep_for(delay); });
    }
    works_.push_back(std::move(work));
    more_.notify_one();
  }
  std::shared_ptr<Mark> mark() {
    auto mark = std::make_shared<Mark>();
    mark->graph = recording;
    if (!recording) put([mark] { mark->happen(); });
    return mark;
  }
  void launch(Graph const& graph) {
    for (auto const& node : graph.nodes) put(node(), transfers);
  }
  void synchronize() { mark()->wait(); }
  bool is_idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return works_.empty();
  }

 private:
  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      more_.wait(lock, [&] { return !works_.empty(); });
      Work work = works_.front();
      lock.unlock();
      work();
      lock.lock();
      works_.pop_front();
    }
  }

  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<Work> works_;
  std::minstd_rand random_;
};

struct Event {
  std::shared_ptr<Mark> mark;
};

}  // namespace simulated
