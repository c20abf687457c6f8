// Threads that wait for one another after each step of a sequence: by spinning, since a step may take a microsecond.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

namespace rnn_ext::cpu {

class Team {
 public:
  explicit Team(int members) : flags_(members > 1 ? members : 0) {}

  // Returns when all members have called it as often. A member that has lost its core is waited for by giving ours up.
  void wait(int member);

 private:
  struct alignas(64) Flag {
    std::atomic<int64_t> arrivals{0};
  };
  std::vector<Flag> flags_;
};

}  // namespace rnn_ext::cpu
